"""The recorder for Transformers: npllm's names and axes, the model as it was, no import of npllm."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import optional
import pytest
import tiny
from close import close

import npllm
from npllm.models.taps import NAMES
from npllm.tracing.graph import NODES, graph

torch = optional.module("torch")
transformers = optional.module("transformers")
pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]
IDS = tiny.random_ids(2, 7)
PADDED = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
WHERE = Path(npllm.__file__).parent / "tracing" / "recorders" / "torch_recorder.py"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LAYOUTS = {
    "phi3": {},
    "partial": {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "llama": LLAMA,
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
}


def recorder():
    from npllm.tracing.recorders import torch_recorder

    return torch_recorder


def pair(folder, attention="eager", dtype="float32", **changes):
    """The same random weights as our model and as Transformers'."""
    weights = tiny.weights(tiny.config_dict(**changes))
    path = tiny.write_folder(folder, tensors=weights, **changes)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(path, attn_implementation=attention, dtype=getattr(torch, dtype))
    return npllm.load(path, ops="reference"), theirs.eval()


def tapped(model, ids, **options):
    """What our own tap sees."""
    seen = {}

    def tap(name, x):
        seen[name] = np.array(x)
        return x

    model(ids, tap=tap, **options)
    return seen


def counted(mask):
    return torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))


def same(recorded, ours, suffix=""):
    """Every value, within float32's tolerance."""
    for name, x in ours.items():
        theirs = recorded[name + suffix].numpy()
        close(np.broadcast_to(x, theirs.shape), theirs, times=4)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("phi3"))


def test_its_table_is_that_of_the_graph():
    values = recorder().VALUES
    assert list(values) == list(NODES)
    for name, value in values.items():
        assert (value["op"], value["inputs"], value["weights"], value["conventions"]) == tuple(
            list(x) if isinstance(x, tuple) else x for x in NODES[name]
        )
        axes, formula = NAMES[name]
        assert (f"[{', '.join(value['axes'])}]", value["formula"]) == (axes, formula)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefill_has_every_value_of_the_tap_list(tmp_path, attention, layout):
    ours, theirs = pair(tmp_path, attention, **LAYOUTS[layout])
    recorded = recorder().record(theirs, torch.tensor(IDS))
    assert list(recorded) == list(graph(2))
    assert recorded.index["not recorded"] == []
    assert recorded["model.rotary_emb.cos"].ndim == 2
    same(recorded, tapped(ours, IDS))
    for name, node in graph(2).items():
        entry = recorded.index["values"][name]
        assert (tuple(entry["inputs"]), tuple(entry["weights"])) == (node.inputs, node.weights)


def test_left_padding_and_positions(phi3):
    ours, theirs = phi3
    recorded = recorder().record(
        theirs,
        torch.tensor(IDS),
        attention_mask=torch.tensor(PADDED),
        position_ids=counted(PADDED),
    )
    seen = tapped(ours, IDS, attention_mask=PADDED)
    visible = PADDED.astype(bool)
    for name, x in seen.items():
        theirs = recorded[name].numpy()
        x, theirs = (a.swapaxes(1, 2) if a.ndim == 4 else a for a in (x, theirs))
        close(x[visible], theirs[visible], times=4)
    step = recorded.index["steps"][0]
    assert step["attention_mask"] == PADDED.tolist()
    assert step["position_ids"] == counted(PADDED).tolist()


def test_documents_of_a_packed_row(phi3):
    """Transformers separates documents where positions start again; the index says which."""
    _, theirs = phi3
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    recorded = recorder().record(theirs, torch.tensor(IDS), position_ids=positions)
    step = recorded.index["steps"][0]
    assert step["documents"] == [[1, 1, 1, 2, 2, 2, 2]] * 2
    alone = recorder().record(theirs, torch.tensor(IDS[:, 3:]))
    assert "documents" not in alone.index["steps"][0]
    close(recorded["lm_head"][:, 3:].numpy(), alone["lm_head"].numpy(), times=4)


def test_decode_steps_and_what_the_cache_holds(phi3):
    ours, theirs = phi3
    recorded = recorder().record(theirs, torch.tensor(IDS), max_new_tokens=2)
    cache = ours.new_cache(2)
    for number, step in enumerate(recorded.index["steps"]):
        ids = np.array(step["input_ids"])
        suffix = f"@{number}" if number else ""
        assert (step["n_past"], step["cached"]) == (7 + number - 1 if number else 0, True)
        seen = tapped(ours, ids, cache=cache)
        assert [name + suffix for name in seen] == [
            name for name in recorded if recorded.index["values"][name]["step"] == number
        ]
        same(recorded, seen, suffix)
    entry = recorded.index["values"]["model.layers.1.self_attn.heads@2"]
    assert entry["inputs"][1] == "model.layers.1.self_attn.cached_k@2"
    assert entry["node"] == "model.layers.1.self_attn.heads"


def test_decoding_without_a_cache_runs_the_whole_again(phi3):
    ours, theirs = phi3
    recorded = recorder().record(theirs, torch.tensor(IDS), max_new_tokens=1, use_cache=False)
    step = recorded.index["steps"][1]
    assert (len(step["input_ids"][0]), step["n_past"], step["cached"]) == (8, 0, False)
    same(recorded, tapped(ours, np.array(step["input_ids"])), "@1")


def test_tokens_of_the_gold_are_fed(phi3):
    _, theirs = phi3
    new = torch.tensor([[5, 6], [7, 8]])
    recorded = recorder().record(theirs, torch.tensor(IDS), new_ids=new)
    steps = recorded.index["steps"]
    assert [step["input_ids"] for step in steps[1:]] == [[[5], [7]], [[6], [8]]]
    whole = theirs(torch.cat([torch.tensor(IDS), new], dim=1)).logits.detach()
    close(recorded["lm_head@2"][:, 0].numpy(), whole[:, -1].numpy(), times=4)


def test_bfloat16_stays_bfloat16_on_disk(tmp_path):
    _, theirs = pair(tmp_path / "model", dtype="bfloat16")
    recorded = recorder().record(theirs, torch.tensor(IDS), max_new_tokens=1)
    recorded.save(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index == json.loads(json.dumps(recorded.index))
    assert index["format"] == "npllm trace 1"
    from safetensors.torch import load_file

    files = {e["file"] for e in index["values"].values()}
    back = {k: v for file in files for k, v in load_file(tmp_path / "out" / file).items()}
    assert set(back) == set(recorded)
    for name, x in recorded.items():
        entry = index["values"][name]
        assert (entry["dtype"], entry["shape"]) == ("bfloat16", list(x.shape))
        assert torch.equal(back[name], x)
        assert len(entry["axes"]) == x.ndim


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(tmp_path, attention, fails):
    """Also after an exception: no hook, the same functions, the same answer."""
    _, theirs = pair(tmp_path, attention)
    file = sys.modules[type(theirs).__module__]
    registry = file.ALL_ATTENTION_FUNCTIONS
    before = (registry.get(attention), file.apply_rotary_pos_emb, file.eager_attention_forward)
    expected = theirs(torch.tensor(IDS)).logits
    cache = transformers.DynamicCache(config=theirs.config)
    if fails:
        theirs.lm_head.forward = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            recorder().record(theirs, torch.tensor(IDS), past_key_values=cache)
        del theirs.lm_head.forward
    else:
        recorded = recorder().record(theirs, torch.tensor(IDS), past_key_values=cache)
        assert torch.equal(recorded["lm_head"], expected)
    after = (registry.get(attention), file.apply_rotary_pos_emb, file.eager_attention_forward)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert theirs.config._attn_implementation == attention
    assert "update" not in vars(cache)
    for module in theirs.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(theirs(torch.tensor(IDS)).logits, expected)


def test_an_entry_of_the_users_own_comes_back(phi3):
    """A function that the user put under the same name is the one that runs, and stays."""
    _, theirs = phi3
    file = sys.modules[type(theirs).__module__]
    calls = []

    def mine(*args, **kwargs):
        calls.append(1)
        return file.eager_attention_forward(*args, **kwargs)

    file.ALL_ATTENTION_FUNCTIONS["eager"] = mine
    try:
        recorder().record(theirs, torch.tensor(IDS))
        assert file.ALL_ATTENTION_FUNCTIONS.get("eager") is mine
    finally:
        del file.ALL_ATTENTION_FUNCTIONS["eager"]
    assert len(calls) == 2


def test_values_are_copies(phi3):
    """What a module changes in place afterwards does not change what was recorded."""
    _, theirs = phi3
    hook = theirs.model.layers[0].mlp.register_forward_hook(lambda m, i, y: y.mul_(0))  # noqa: ARG005
    try:
        recorded = recorder().record(theirs, torch.tensor(IDS))
    finally:
        hook.remove()
    assert recorded["model.layers.0.mlp.down_proj"].abs().max() > 0
    assert torch.equal(recorded["model.layers.0"], recorded["model.layers.0.residual"])


def test_what_flows_is_recorded_not_what_should(phi3):
    """The half that the activation was given is the gate; layer 0's input is the embedding."""
    _, theirs = phi3
    mlp, embed = theirs.model.layers[0].mlp, theirs.model.embed_tokens
    right = recorder().record(theirs, torch.tensor(IDS))

    def up_first(x):
        up, gate = mlp.gate_up_proj(x).chunk(2, dim=-1)
        return mlp.down_proj(up * mlp.activation_fn(gate))

    hook = embed.register_forward_hook(lambda m, i, y: 3 * y)  # noqa: ARG005
    mlp.forward = up_first
    try:
        wrong = recorder().record(theirs, torch.tensor(IDS))
    finally:
        hook.remove()
        del mlp.forward
    assert torch.equal(wrong["model.embed_tokens"], 3 * right["model.embed_tokens"])
    d_ff = wrong["model.layers.0.mlp.gate"].shape[-1]
    gate_up = wrong["model.layers.0.mlp.gate_up_proj"]
    assert torch.equal(wrong["model.layers.0.mlp.gate"], gate_up[..., d_ff:])
    assert torch.equal(wrong["model.layers.0.mlp.up"], gate_up[..., :d_ff])


def test_q_is_what_the_rotation_gave(phi3):
    """A port that scales q before its attention function is right, and so is its q."""
    _, theirs = phi3
    file = sys.modules[type(theirs).__module__]
    right, eager = recorder().record(theirs, torch.tensor(IDS)), file.eager_attention_forward
    name = "model.layers.0.self_attn"
    attention = theirs.model.layers[0].self_attn
    function = file.ALL_ATTENTION_FUNCTIONS.get_interface

    def scaled(key, default):
        found = function(key, default)

        def call(module, q, k, v, mask, scaling, **kw):
            return found(module, q * scaling, k, v, mask, scaling=1.0, **kw)

        return call

    file.ALL_ATTENTION_FUNCTIONS.get_interface = scaled
    try:
        recorded = recorder().record(theirs, torch.tensor(IDS))
    finally:
        del file.ALL_ATTENTION_FUNCTIONS.get_interface
    assert file.eager_attention_forward is eager and attention.scaling != 1
    for leaf in ("q", "k", "v"):
        assert torch.equal(recorded[f"{name}.{leaf}"], right[f"{name}.{leaf}"])
    close(recorded[f"{name}.heads"].numpy(), right[f"{name}.heads"].numpy(), times=4)


def test_a_part_that_shows_nothing_is_listed(phi3):
    _, theirs = phi3
    attention = theirs.model.layers[1].self_attn

    def of_mine(hidden_states, **_):
        return attention.o_proj(hidden_states), None

    attention.forward = of_mine
    try:
        recorded = recorder().record(theirs, torch.tensor(IDS))
    finally:
        del attention.forward
    assert "model.layers.1.self_attn.q" in recorded.index["not recorded"]
    assert "model.layers.1.self_attn.q" not in recorded
    assert "model.layers.0.self_attn.q" in recorded


def test_models_that_cannot_be_recorded_are_named(phi3):
    _, theirs = phi3
    theirs.train()
    try:
        with pytest.raises(ValueError, match=r"training mode.*call model\.eval"):
            recorder().record(theirs, torch.tensor(IDS))
    finally:
        theirs.eval()
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is not built as Phi-3 or Llama"):
        recorder().record(transformers.GPT2LMHeadModel(config).eval(), torch.tensor(IDS))


def test_the_file_works_alone(tmp_path):
    """Copied to another folder, where npllm cannot be imported."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "my_recorder.py").write_text(WHERE.read_text())
    script = """
import sys
sys.modules["npllm"] = None
import torch, transformers, my_recorder
model = transformers.AutoModelForCausalLM.from_pretrained("model").eval()
recording = my_recorder.record(model, torch.tensor([[3, 4, 5]]))
recording.save("out")
print(len(recording))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) == len(graph(2))
    assert (tmp_path / "out" / "index.json").is_file()


def test_it_does_not_import_npllm():
    text = WHERE.read_text()
    assert "import npllm" not in text
    assert "from npllm" not in text


def test_one_sequence_and_one_token_are_saved(phi3, tmp_path):
    """Then a half of a fused projection is contiguous as it is: a view of the whole."""
    recording = recorder().record(phi3[1], torch.tensor(IDS[:1]), max_new_tokens=1)
    recording.save(tmp_path / "mine")
    saved = npllm.Trace.load(tmp_path / "mine")
    assert list(saved) == list(recording)
    name = "model.layers.0.mlp.up@1"
    assert np.array_equal(saved[name], recording[name].numpy())
