"""npllm.trace: every value follows from its recorded inputs, whatever the model and the run."""

import gc
import tracemalloc

import guard
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st
from recomputed import recomputed

import npllm
from npllm import ops, testing
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError
from npllm.models.taps import NAMES, PAIRS
from npllm.testing.golden_bundles import BUNDLES
from npllm.tracing import recorder as recorder_module
from npllm.tracing.graph import graph

EVERY = ["*", "*.mask", "*.weights"]
KINDS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "window": {"sliding_window": 3},
    "partial": {"partial_rotary_factor": 0.5},
    "tied": {"tie_word_embeddings": True},
    "one layer": {"num_hidden_layers": 1},
}
IDS = tiny.random_ids(2, 5)


def tensors_of(changes, seed=0, dtype=np.float32):
    """The tensors of `tiny.model(**changes)`, by their names."""
    tensors = tiny.weights(tiny.config_dict(**changes), seed, dtype)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors


@st.composite
def runs(draw):
    """A tiny model and what `trace` takes: batch, prompt, padding, decode steps, dtype."""
    changes = draw(st.sampled_from(list(KINDS.values())))
    n_batch, n_seq = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    options = {"max_new_tokens": draw(st.integers(0, 3)), "names": EVERY}
    options["dtype"] = draw(st.sampled_from([None, "float32", "float64"]))
    padding = draw(st.integers(0, n_seq - 1))
    if padding:
        options["attention_mask"] = np.ones((n_batch, n_seq), int)
        options["attention_mask"][0, :padding] = 0
    if draw(st.booleans()):
        options["position_ids"] = np.arange(n_seq) + draw(st.integers(0, 9))
    set_ = draw(st.sampled_from([None, ops.reference, ops.blockwise]))
    stored = draw(st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16]))
    return changes, tiny.random_ids(n_batch, n_seq), options, set_, stored


@given(runs())
def test_every_value_follows_from_its_recorded_inputs(run):
    changes, ids, options, set_, stored = run
    trace = npllm.trace(tiny.model(ops=set_, dtype=stored, **changes), ids, **options)
    tensors = tensors_of(changes, dtype=stored)
    for name, x in trace.items():
        close(x, recomputed(trace, name, tensors), dtype=x.dtype, times=4)


@pytest.mark.parametrize("n_new", [0, 2])
def test_every_named_value_is_there_in_the_order_of_the_run(n_new):
    trace = npllm.trace(tiny.model(), IDS, max_new_tokens=n_new)
    one = list(graph(2, cached=n_new > 0))
    assert list(trace) == one + [f"{name}@{t}" for t in range(1, n_new + 1) for name in one]
    for name, entry in trace.index["values"].items():
        key = entry["node"].replace(".0", ".N").replace(".1", ".N")
        assert entry["axes"] == NAMES[key][0].strip("[]").split(", ")[-len(entry["axes"]) :]
        assert entry["formula"] == NAMES[key][1]
        assert (entry["shape"], entry["dtype"]) == (list(trace[name].shape), trace[name].dtype.name)
        assert set(entry["inputs"]) <= set(trace) and entry["status"] == "whole"


@pytest.mark.parametrize("name", [name for name in BUNDLES if name != "bert"])
def test_the_trace_in_float64_is_that_of_the_golden_bundle(name):
    """On weights in float32, which the bundle's maker widened whole."""
    bundle = testing.golden(name)
    ids = bundle.values["input_ids"]
    trace = npllm.trace(npllm.load(bundle.folder), ids, dtype="float64", names=EVERY)
    assert {*trace, "logits", "input_ids"} == set(bundle.values)
    for key, x in trace.items():
        close(x, bundle.values[key], times=0.01)
    assert trace.index["ops"] == "reference" and trace.index["dtype"] == "float64"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_narrow_weights_in_float64_are_those_of_a_widened_copy(tmp_path, dtype):
    """Block by block, or widened whole before: the same values."""
    from npllm.arrays import widen

    folder = tiny.write_folder(tmp_path / "model", hidden_size=64)
    narrow = npllm.load(folder, dtype=dtype)

    def wide(x):
        return tuple(map(wide, x)) if isinstance(x, tuple) else x if x is None else widen(x, float)

    top = [wide(x) for x in narrow.params]
    layers = tuple(type(narrow.params.layers[0])(*layer) for layer in top[1])
    params = type(narrow.params)(top[0], layers, *top[2:])
    found = npllm.trace(narrow, IDS, dtype="float64")
    wanted = npllm.trace(npllm.Model(narrow.config, params, ops=ops.reference), IDS)
    for name, x in found.items():
        close(x, wanted[name], dtype="float64")


def test_without_a_dtype_the_operations_of_the_model_run():
    counted = tiny.Counted(ops.blockwise)
    set_ = counted.ops.replace(name="mine", **{slot: None for slot in ops.SLOTS})
    trace = npllm.trace(tiny.model(ops=set_), IDS)
    assert trace.index["ops"] == "mine" and trace.index["dtype"] is None
    assert counted.calls["linear"] == 4 * 2 + 1 and counted.calls["attention"] == 2


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_logits_of_the_fast_set_are_those_of_a_plain_call(stored):
    """The kernels for whole stretches do not run under a trace; they differ in rounding."""
    model, ids = tiny.model(dtype=stored), tiny.random_ids(2, 9)
    close(np.array(npllm.trace(model, ids)["lm_head"]), model(ids), times=2)


def test_decoding_is_greedy_and_steps_are_those_of_generate():
    model, mask = tiny.model(ops=ops.blockwise), np.array([[0, 0, 1, 1, 1], [1] * 5])
    trace = npllm.trace(model, IDS, max_new_tokens=3, attention_mask=mask)
    answer = model.generate(IDS, max_new_tokens=3, do_sample=False, attention_mask=mask)
    steps = trace.index["steps"]
    assert np.array_equal(np.concatenate([s["input_ids"] for s in steps], axis=1), answer)
    assert [step["n_past"] for step in steps] == [0, 5, 6, 7]
    assert steps[0]["position_ids"] == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert steps[3]["position_ids"] == [[5], [7]]
    assert steps[3]["attention_mask"] == [[0, 0, *[1] * 6], [1] * 8]
    assert all(step["cached"] for step in steps)


def test_positions_of_the_prompt_go_on():
    trace = npllm.trace(tiny.model(), IDS, max_new_tokens=2, position_ids=np.arange(5) + 7)
    assert [s["position_ids"][0] for s in trace.index["steps"][1:]] == [[12], [13]]
    at = npllm.ops.rope_frequencies(8)
    close(np.array(trace["model.rotary_emb.sin@2"]), ops.rope_tables(np.array([13]), at)[1])


def test_cached_keys_that_are_computed_anew_name_no_past():
    """LongRoPE: the seventh token changes the frequencies of all."""
    longrope = {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        "original_max_position_embeddings": 6,
    }
    trace = npllm.trace(tiny.model(**longrope), IDS, max_new_tokens=3)
    node = "model.layers.1.self_attn.cached_k"
    inputs = [trace.index["values"][name]["inputs"] for name in trace if name.startswith(node)]
    assert [len(names) for names in inputs] == [1, 2, 1, 2]
    assert inputs[3] == ["model.layers.1.self_attn.k@3", f"{node}@2"]


# ------------------------------------------------------------------------------- what is kept


def test_names_layers_and_tables_on_request():
    model = tiny.model()
    assert list(npllm.trace(model, IDS, names="model.norm")) == ["model.norm"]
    found = npllm.trace(model, IDS, names=["*.mlp.?p", "lm_head"], layers=[1])
    assert list(found) == ["model.layers.1.mlp.up", "lm_head"]
    assert not [n for n in npllm.trace(model, IDS, layers=0) if n.startswith("model.layers.1")]
    assert "lm_head" in npllm.trace(model, IDS, layers=0)
    weights = npllm.trace(model, IDS, names="*.weights")
    assert list(weights) == [f"model.layers.{n}.self_attn.weights" for n in (0, 1)]
    one = npllm.trace(model, IDS, names=["*", "model.layers.0.self_attn.weights"])
    assert [n for n in one if n.endswith("weights")] == ["model.layers.0.self_attn.weights"]
    tables = set(npllm.trace(model, IDS, names="*"))
    assert not any(name.endswith((".mask", ".weights")) for name in tables)
    assert len(npllm.trace(model, IDS, names=EVERY)) == len(tables) + 2 * len(PAIRS)


def test_names_of_one_step():
    model, options = tiny.model(), {"max_new_tokens": 2}
    assert list(npllm.trace(model, IDS, names="model.norm@2", **options)) == ["model.norm@2"]
    assert list(npllm.trace(model, IDS, names="model.norm@0", **options)) == ["model.norm"]
    assert len(npllm.trace(model, IDS, names="model.norm", **options)) == 3


def test_tokens_cut_the_axes_of_positions():
    model, options = tiny.model(), {"max_new_tokens": 2, "names": EVERY}
    whole = npllm.trace(model, IDS, **options)
    trace = npllm.trace(model, IDS, tokens=[1, -1, 6], **options)
    for name, x in trace.items():
        entry = trace.index["values"][name]
        kept = {0: [1, 4], 1: [], 2: [0]}[entry["step"]]
        axis = [at for at, axis in enumerate(entry["axes"]) if axis in ("n_seq", "n_kept")]
        close(x, whole[name].take(kept, axis[0]) if axis else whole[name], times=0)
        is_cut = bool(axis) and entry["step"] == 0
        assert entry["status"] == ("partial" if is_cut else "whole")
    assert [step["tokens"] for step in trace.index["steps"]] == [[1, 4], [], [0]]
    assert [name for name in trace if name.endswith("@1")] == [
        f"model.layers.{n}.self_attn.cached_{x}@1" for n in (0, 1) for x in "kv"
    ]


def test_logits_that_are_not_kept_are_not_computed():
    counted = tiny.Counted()
    shapes = []

    def linear(x, weight, bias=None):
        shapes.append((x.shape[1], weight.shape[0]))
        return ops.linear(x, weight, bias)

    npllm.trace(tiny.model(ops=counted.ops.replace(linear=linear)), IDS, names="model.norm")
    assert shapes[-1] == (1, 61)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": "model.layer.1"}, r"'model.layer.1', which matches no value.*model.layers.1"),
        ({"names": "model.norm@1"}, r"'model.norm@1', which matches no value of 1 step"),
        ({"names": "*.cached_k"}, r"cached_k', which matches no value"),
        ({"names": 3}, "names must be names or patterns, got 3"),
        ({"layers": [0, 2]}, r"layers must be an integer in 0 \.\.\. 1, got 2"),
        ({"layers": -1}, r"layers must be an integer in 0 \.\.\. 1, got -1"),
        ({"tokens": 5}, r"tokens must be an integer in -5 \.\.\. 4, got 5"),
        ({"tokens": 7, "max_new_tokens": 2}, r"in -5 \.\.\. 6, got 7"),
        ({"dtype": "bfloat16"}, "dtype must be None, float32 or float64, got 'bfloat16'"),
        (
            {"max_new_tokens": 60},
            "max_new_tokens must be at most 59, .* 64 leaves .* 5 tokens, got 60",
        ),
        ({"folder": 3}, "folder must be a path, got int"),
        ({"max_new_tokens": -1}, r"max_new_tokens must be an integer in 0"),
        ({"attention_mask": np.ones((2, 4))}, r"attention_mask must be \[n_batch, n_ctx\]"),
        ({"position_ids": np.arange(4)}, r"position_ids must be integers from 0"),
    ],
)
def test_what_the_run_does_not_have_is_refused(options, said):
    with pytest.raises(NpllmError, match=said):
        npllm.trace(tiny.model(), IDS, **options)


def test_ids_that_do_not_fit_are_refused():
    with pytest.raises(NpllmValueError, match=r"vocab_size - 1 = 60, got 3 ... 61"):
        npllm.trace(tiny.model(), [[3, 61]])
    with pytest.raises(NpllmTypeError, match=r"a Model, as npllm.load gives one, got str"):
        npllm.trace("model", [[3]])
    with pytest.raises(NpllmError, match=r"has no tokenizer.json"):
        npllm.trace(tiny.model(), "hello")


# ------------------------------------------------------------------------------ where it lives


def test_a_temporary_folder_goes_with_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trace = npllm.trace(tiny.model(), IDS)
    held = trace["model.norm"]
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 1 + 2 + 2
    before = held.copy()
    del trace
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(held, before)


def test_a_given_folder_stays_and_is_what_save_writes(tmp_path):
    trace = npllm.trace(tiny.model(), IDS, max_new_tokens=1, folder=tmp_path / "a")
    trace.save(tmp_path / "b")
    del trace
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert len(files) == 1 + 2 * (2 + 2)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = npllm.Trace.load(tmp_path / "a")
    again = npllm.trace(tiny.model(), IDS, max_new_tokens=1)
    assert loaded.index == again.index
    for name, x in again.items():
        close(loaded[name], x, times=0)


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny.model(ops=ops.reference.replace(swiglu=fail))
    with pytest.raises(MemoryError):
        npllm.trace(model, IDS)
    with pytest.raises(MemoryError):
        npllm.trace(model, IDS, folder=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_the_config_of_the_index_is_the_models(tmp_path):
    folder = tiny.write_folder(tmp_path / "mine", sliding_window=9)
    model = npllm.load(folder)
    index = npllm.trace(model, IDS).index
    assert index["config"] == tiny.config_dict(sliding_window=9)
    assert index["model"] == "mine" and index["format"] == "npllm trace 1"
    assert index["made with"]["npllm"] == npllm.__version__
    changed = tiny.model(
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    )
    for one in (changed, tiny.model(partial_rotary_factor=0.5)):
        assert npllm.Config.from_json(npllm.trace(one, IDS).index["config"]) == one.config


def test_a_config_that_warns_warned_when_it_was_read(tmp_path):
    with pytest.warns(UserWarning, match="nobody_knows"):
        model = npllm.load(tiny.write_folder(tmp_path / "mine", nobody_knows=1))
    assert npllm.trace(model, IDS).index["config"]["nobody_knows"] == 1


def test_a_mask_of_the_callers_is_told():
    rule = ops.mask.causal() & ops.mask.sliding_window(2)
    assert npllm.trace(tiny.model(), IDS).index["mask"] is None
    found = npllm.trace(tiny.model().with_mask([rule, ops.mask.causal()]), IDS).index["mask"]
    assert found == ["causal() & sliding_window(2)", "causal()"]


def test_memory_holds_one_layer(monkeypatch):
    """Of ten layers: what a write holds, and the peak of all allocations."""
    written = []

    def write(folder, file, values):
        written.append(sum(x.nbytes for x in values.values()))
        return folder_write(folder, file, values)

    folder_write = recorder_module.write_values
    monkeypatch.setattr(recorder_module, "write_values", write)
    model, ids = tiny.model(num_hidden_layers=10), tiny.random_ids(1, 60)
    npllm.trace(model, ids)  # imports, compiled kernels
    written.clear()
    tracemalloc.start()
    npllm.trace(model, ids, dtype="float64")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    layer, whole = max(written), sum(written)
    assert len(written) == 12 and whole > 9 * layer
    assert peak < 4 * layer, (peak, layer)


def test_arrays_of_a_device_are_brought_to_the_host(monkeypatch):
    guard.installed(monkeypatch)
    ours = tiny.model(ops=ops.blockwise)
    model = npllm.Model(ours.config, guard.moved(ours.params), ops=ops.blockwise)
    for dtype in (None, "float64"):
        options = {"max_new_tokens": 2, "dtype": dtype, "names": EVERY}
        found, wanted = npllm.trace(model, IDS, **options), npllm.trace(ours, IDS, **options)
        assert found.index["steps"] == wanted.index["steps"]
        for name, x in found.items():
            assert isinstance(x, np.ndarray)
            close(x, wanted[name])
