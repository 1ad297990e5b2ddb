"""The folder of a trace: a round trip bit for bit, and folders that are not what they say."""

import json
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import npllm
from npllm.errors import NpllmError, NpllmKeyError, NpllmValueError
from npllm.tracing.graph import graph
from npllm.tracing.index import FORMAT, file_name, step_name, value_entry

NODES = graph(2)
FILE = "step-0.layer-01.safetensors"
NAME = "model.layers.1"


def made(dtype=np.float32):
    """A trace of three values in two files, one of them in another memory order."""
    draw = np.random.default_rng(3).standard_normal
    values = {
        "model.embed_tokens": draw((1, 3, 4)).astype(dtype),
        "model.layers.1.mlp.gate": draw((1, 4, 3)).astype(dtype).transpose(0, 2, 1),
        NAME: draw((1, 3, 8)).astype(dtype)[..., ::2],
    }
    entries = {
        name: value_entry(name, 0, x, NODES[name], is_partial=False) for name, x in values.items()
    }
    step = {"input_ids": [[1, 2, 3]], "position_ids": [[0, 1, 2]], "attention_mask": None}
    step |= {"n_past": 0, "cached": False}
    index = {"format": FORMAT, "model": "mine", "config": {}, "ops": "mine", "dtype": None}
    return npllm.Trace(index | {"steps": [step], "values": entries}, values)


DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_keeps_every_bit(tmp_path, dtype):
    trace = made(dtype)
    trace.save(tmp_path / "new" / "folder")
    loaded = npllm.Trace.load(tmp_path / "new" / "folder")
    assert loaded.index == trace.index
    assert list(loaded) == list(trace)
    for name in trace:
        assert loaded[name].dtype == np.dtype(dtype)
        assert loaded[name].tobytes() == trace[name].tobytes()
        assert not loaded[name].flags.writeable


def test_a_loaded_trace_is_saved_again(tmp_path):
    made().save(tmp_path / "a")
    npllm.Trace.load(tmp_path / "a").save(tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"index.json", "step-0.first.safetensors", FILE}
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in names
    )


def test_a_bool_table_is_kept(tmp_path):
    visible = np.tri(3, dtype=bool)
    node = "model.layers.0.self_attn.mask"
    entry = value_entry(node, 0, visible, NODES["model.norm"], is_partial=False)
    assert entry["axes"] == ["n_seq", "n_ctx"]
    trace = npllm.Trace({"format": FORMAT, "steps": [], "values": {node: entry}}, {node: visible})
    trace.save(tmp_path / "new")
    assert np.array_equal(npllm.Trace.load(tmp_path / "new")[node], visible)


def test_only_files_that_are_looked_at_are_open(tmp_path, monkeypatch):
    made().save(tmp_path / "new")
    mapped, memmap = [], np.memmap

    def watched(*args, **options):
        mapping = memmap(*args, **options)
        mapped.append(weakref.ref(mapping))
        return mapping

    def names():
        return [one().filename.name for one in mapped if one() is not None]

    monkeypatch.setattr(np, "memmap", watched)
    trace = npllm.Trace.load(tmp_path / "new")
    assert names() == []
    held = [trace[NAME], trace["model.layers.1.mlp.gate"]]
    assert names() == [FILE] and np.shares_memory(held[0], mapped[0]())
    del held
    assert names() == []


def test_where_no_file_can_be_mapped_values_are_copied(tmp_path, monkeypatch):
    made().save(tmp_path / "new")
    trace = npllm.Trace.load(tmp_path / "new")

    def refuse(*_, **__):
        raise OSError("too many open files")

    monkeypatch.setattr(np, "memmap", refuse)
    assert np.array_equal(trace[NAME], made()[NAME])


def test_a_name_that_is_not_there_is_named_with_those_that_are():
    trace = made()
    with pytest.raises(NpllmKeyError, match=r"'model.layer.1'; there are model.layers.1"):
        trace["model.layer.1"]
    assert isinstance(NpllmKeyError("x"), KeyError)
    assert "model.layer.1" not in trace and trace.get("model.layer.1") is None


def test_names_of_index_and_values_must_be_the_same():
    trace = made()
    with pytest.raises(NpllmValueError, match=r"3 names and there are 2 values.*model.layers.1'"):
        npllm.Trace(trace.index, {name: trace[name] for name in list(trace)[:2]})


def test_a_folder_with_files_is_not_written_into(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(NpllmValueError, match="new or empty folder"):
        made().save(tmp_path)
    with pytest.raises(NpllmError, match=r"mine.txt: cannot be written"):
        made().save(tmp_path / "mine.txt")


def test_no_index_before_all_values_are_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.numpy.save_file", refuse)
    with pytest.raises(NpllmError, match=r"step-0.first.safetensors: cannot be written.*full"):
        made().save(tmp_path / "new")
    assert not (tmp_path / "new" / "index.json").exists()


def entry_changed(**changes):
    def change(index):
        index["values"][NAME] |= changes

    return change


def index_changed(**changes):
    return lambda index: index.update(changes)


HOSTILE = {
    "another format": (index_changed(format="npllm trace 2"), 'must be "npllm trace 1"'),
    "no values": (index_changed(values=None), "values must be an object, got None"),
    "no steps": (index_changed(steps={}), "steps must be a list"),
    "ragged ids": (index_changed(steps=[{"input_ids": [[1], [1, 2]]}]), "step 0: input_ids"),
    "ids that are none": (index_changed(steps=[{"input_ids": [["a"]]}]), "step 0: input_ids"),
    "a huge position": (index_changed(steps=[{"position_ids": [[2**62]]}]), "32-bit integers"),
    "past that is none": (index_changed(steps=[{"n_past": -1}]), "n_past must be from 0"),
    "a cache that is none": (index_changed(steps=[{"cached": 1}]), "cached must be true or false"),
    "a step that is no object": (index_changed(steps=[3]), "step 0: must be an object, got 3"),
    "an entry that is none": (lambda index: index["values"].update({NAME: 1}), f"'{NAME}'"),
    "outside": (entry_changed(file="../secret.safetensors"), "files of its own folder.*secret"),
    "absolute": (entry_changed(file="/etc/passwd"), "files of its own folder.*passwd"),
    "a pickle": (entry_changed(file="values.pkl"), "pickles"),
    "no file": (entry_changed(file=None), "files of its own folder, got None"),
    "a missing file": (entry_changed(file="no.safetensors"), "no.safetensors: no such file"),
    "the wrong file": (
        entry_changed(file="step-0.first.safetensors"),
        f"first.safetensors: index.json says that it holds '{NAME}'",
    ),
    "another shape": (
        entry_changed(shape=[1, 4, 3]),
        rf"{FILE}: '{NAME}' must be 'float32' \[1, 4",
    ),
    "another dtype": (entry_changed(dtype="float64"), f"{FILE}: '{NAME}' must be 'float64'"),
    "a size that is none": (entry_changed(shape=[1, -3, 4]), "shape must be a list of sizes"),
    "too few axes": (
        entry_changed(axes=["n_seq"]),
        r"has axes \['n_seq'\], but its shape is \[1, 3, 4\]",
    ),
    "inputs that are none": (entry_changed(inputs="model.norm"), "inputs must be a list of texts"),
    "an op that is none": (entry_changed(op=7), "op must be a text, got 7"),
    "a status that is none": (entry_changed(status="good"), "whole or partial, got 'good'"),
    "a step that is none": (entry_changed(step=True), "step must be from 0"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_index_is_refused(tmp_path, what):
    change, said = HOSTILE[what]
    made().save(tmp_path / "new")
    path = tmp_path / "new" / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index)
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(NpllmError, match=said):
        npllm.Trace.load(tmp_path / "new")


@pytest.mark.parametrize("n_bytes", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, n_bytes):
    made().save(tmp_path / "new")
    path = tmp_path / "new" / FILE
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(NpllmError, match=f"{FILE}: is not a readable safetensors file"):
        npllm.Trace.load(tmp_path / "new")


def test_a_file_that_is_truncated_after_loading_is_refused(tmp_path):
    made().save(tmp_path / "new")
    trace = npllm.Trace.load(tmp_path / "new")
    path = tmp_path / "new" / FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(NpllmError, match=f"{FILE}.*ends within a tensor"):
        [trace[name] for name in trace]


def test_a_dtype_that_no_array_has_is_refused(tmp_path):
    made().save(tmp_path / "new")
    path = tmp_path / "new" / FILE
    raw = path.read_bytes().replace(b'"F32"', b'"I32"')
    path.write_bytes(raw)
    with pytest.raises(NpllmError, match=f"{FILE}: .* must be 'float32' .*got I32"):
        npllm.Trace.load(tmp_path / "new")


def test_a_link_to_a_folder_is_no_file_of_values(tmp_path):
    made().save(tmp_path / "new")
    (tmp_path / "new" / FILE).unlink()
    (tmp_path / "new" / FILE).mkdir()
    with pytest.raises(NpllmError, match="must be a regular file"):
        npllm.Trace.load(tmp_path / "new")


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(NpllmError, match=r"index.json: cannot be read"):
        npllm.Trace.load(tmp_path)
    save_file({"x": np.zeros(1)}, tmp_path / "index.json")
    with pytest.raises(NpllmError, match=r"index.json: is not"):
        npllm.Trace.load(tmp_path)


def test_a_folder_that_is_no_path_is_refused():
    for call in (npllm.Trace.load, made().save):
        with pytest.raises(NpllmError, match="folder must be a path, got int"):
            call(3)


def test_files_of_foreign_names():
    """Of other programs, whatever they call their values."""
    names = {"blk.12.attn_q": "layer-12", "x.².y": "first", "a.9999999": "first", "7": "layer-07"}
    for name, wanted in names.items():
        assert file_name(2, name) == f"step-2.{wanted}.safetensors"


def test_names_of_steps():
    assert step_name("model.norm", 0) == "model.norm"
    assert step_name("model.norm", 3) == "model.norm@3"
