"""Golden bundles: what they hold is what the definitions compute today, in under 2 MB."""

import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest

import npllm
from npllm import ops, testing
from npllm.errors import NpllmValueError
from npllm.testing.golden_bundles import BUNDLES, FOLDER

DECODERS = [name for name in BUNDLES if name != "bert"]


def test_bundles_are_small_and_complete():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    assert {path.parent.name for path in files} == set(BUNDLES)
    names = {"config.json", "model.safetensors", "values.safetensors", "index.json"}
    assert {(path.parent.name, path.name) for path in files} == {
        (bundle, name) for bundle in BUNDLES for name in names
    }


@pytest.mark.parametrize("name", BUNDLES)
def test_the_index_describes_every_value(name):
    bundle = testing.golden(name)
    assert set(bundle.index["values"]) == set(bundle.values) - {"input_ids"}
    for key, about in bundle.index["values"].items():
        assert list(bundle.values[key].shape) == about["shape"]
        assert about["axes"].startswith("[")
        assert about["formula"]
    floats = {x.dtype for key, x in bundle.values.items() if not key.endswith(("ids", "mask"))}
    assert floats == {np.dtype(np.float64)}
    compared = bundle.index["compared with"]
    limit = 2e-15 if name == "bert" else 1e-6  # Transformers rounds cos and sin to float32
    assert compared["largest difference"] < limit * compared["largest value"]
    assert bundle.index["made with"]["numpy"]


@pytest.mark.parametrize("name", DECODERS)
def test_values_are_those_of_the_definitions(name):
    """To the last bits, which BLAS may sum in another order."""
    bundle, seen = testing.golden(name), {}

    def tap(key, x):
        seen[key] = np.array(x)
        return x

    tap.pairs = True
    model = npllm.load(bundle.folder, dtype="float64", ops=ops.reference)
    seen["logits"] = model(bundle.values["input_ids"], tap=tap)
    assert set(seen) == set(bundle.values) - {"input_ids"}
    for key, x in seen.items():
        np.testing.assert_allclose(x, bundle.values[key], rtol=1e-10, atol=1e-12, err_msg=key)


def test_hidden_states_of_the_encoder():
    bundle = testing.golden("bert")
    encoder = npllm.load(bundle.folder, dtype="float64", ops=ops.reference)
    values = bundle.values
    hidden = encoder(values["input_ids"], attention_mask=values["attention_mask"])
    np.testing.assert_allclose(hidden, values["hidden"], rtol=1e-10, atol=1e-12)


def test_bundles_show_what_they_are_named_after():
    config = {name: json.loads((FOLDER / name / "config.json").read_text()) for name in BUNDLES}
    for name, n_kv_head in (("mha", 4), ("gqa", 2), ("mqa", 1)):
        assert config[name]["num_key_value_heads"] == n_kv_head
    lengths = {name: testing.golden(name).values["input_ids"].shape[1] for name in BUNDLES}
    assert config["window"]["sliding_window"] < lengths["window"]
    original = config["longrope_long"]["original_max_position_embeddings"]
    assert lengths["longrope_short"] <= original < lengths["longrope_long"]
    partial = testing.golden("partial_rotary").values
    d_head = partial["model.layers.0.self_attn.q"].shape[-1]
    assert partial["model.rotary_emb.cos"].shape[-1] == d_head // 2
    assert config["tied"]["tie_word_embeddings"] is True
    assert config["llama3_rope"]["rope_scaling"]["rope_type"] == "llama3"


def test_a_port_reads_them_without_npllm():
    code = (
        "import sys, json, pathlib\n"
        "from safetensors.numpy import load_file\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "values = load_file(folder / 'values.safetensors')\n"
        "index = json.loads((folder / 'index.json').read_text())\n"
        "assert 'npllm' not in sys.modules\n"
        "print(values['logits'].shape == tuple(index['values']['logits']['shape']))\n"
    )
    folder = str(testing.golden("gqa").folder)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_the_package_carries_them():
    setup = ConfigParser()
    setup.read(Path(npllm.__file__).parents[1] / "setup.cfg")
    patterns = setup["options.package_data"]["npllm.testing"].replace(",", " ").split()
    folder = Path(npllm.__file__).parent / "testing"
    carried = {path for pattern in patterns for path in folder.glob(pattern)}
    assert carried == {path for path in FOLDER.rglob("*") if path.is_file()}


def test_another_name_raises():
    with pytest.raises(NpllmValueError, match="golden bundles are mha, gqa, mqa"):
        testing.golden("alibi")
