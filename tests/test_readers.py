"""Readers of other programs' values, and the name maps they use."""

import json
from configparser import ConfigParser
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from safetensors.numpy import save_file

import npllm
from npllm.errors import NpllmError, NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.models.taps import NAMES
from npllm.tracing.readers import read_arrays, read_eval_callback, rename_arrays
from npllm.tracing.readers.name_maps import FOLDER, name_map

MAPS = sorted(path.stem for path in FOLDER.glob("*.json"))
CONFIG = tiny.config_dict()
IDS = tiny.random_ids(1, 9)


def tapped(**changes):
    """Every value of a tiny model with random weights."""
    seen = {}

    def tap(name, x):
        seen[name] = np.array(x)
        return x

    tiny.model(**changes)(IDS, tap=tap)
    return seen


@pytest.fixture(scope="module")
def values():
    return tapped()


# ------------------------------------------------------------------------------- name maps


def test_the_maps_are_these():
    assert MAPS == ["gguf", "mlx_lm", "transformer_lens", "transformers"]


@pytest.mark.parametrize("name", MAPS)
def test_a_map_names_values_of_ours_with_axes_that_can_be_ordered_as_ours(name):
    mapping = name_map(name)
    assert mapping.about and mapping.notes
    assert len(mapping.rows) == len(set(mapping.rows))
    for row in mapping.rows:
        ours = NAMES[row.ours][0].strip("[]").split(", ")
        cut = [part for axis in row.axes for part in ([axis] if axis in ours else axis.split("*"))]
        assert set(cut) | {"n_batch"} == set(ours) | {"n_batch"}, row


@pytest.mark.parametrize("name", MAPS)
def test_a_name_has_one_meaning(name):
    """With the operation and the other names where they decide."""
    mapping = name_map(name)
    for row in mapping.rows:
        theirs = row.theirs.replace("-N", "-11").replace(".N", ".11")
        ours = row.ours.replace(".N", ".11")
        beside = {row.beside.replace("-N", "-11")}
        for op in row.op or (None,):
            assert mapping.find(theirs, op=op, names=beside) == (ours, row.axes), row
    assert mapping.find("nothing-0") is None


def test_the_operation_and_the_other_names_decide():
    gguf = name_map("gguf")
    assert gguf.find("Qcur-3", op="ROPE")[0] == "model.layers.3.self_attn.q"
    assert gguf.find("Qcur-3", op="MUL_MAT") is None
    assert gguf.find("kqv_out-0", op="MUL_MAT")[0] == "model.layers.0.self_attn.o_proj"
    assert gguf.find("kqv_out-0", op="CONT")[0] == "model.layers.0.self_attn.attention"
    assert gguf.find("ffn_up-1", op="MUL_MAT")[0] == "model.layers.1.mlp.gate_up_proj"
    up = gguf.find("ffn_up-1", op="MUL_MAT", names={"ffn_gate-1"})
    assert up[0] == "model.layers.1.mlp.up"
    assert gguf.find("ffn_up-1", op="MUL_MAT", names={"ffn_gate-2"})[0].endswith("gate_up_proj")


def test_transformer_lens_says_that_it_folds_weights():
    assert "folds weights" in " ".join(name_map("transformer_lens").notes)


def test_the_package_carries_the_maps():
    setup = ConfigParser()
    setup.read(Path(npllm.__file__).parents[1] / "setup.cfg")
    patterns = setup["options.package_data"]["npllm.tracing.readers"].replace(",", " ").split()
    carried = {path for pattern in patterns for path in FOLDER.parent.glob(pattern)}
    assert carried == set(FOLDER.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "x"}, 'format must be "npllm names 1", got.*x'),
        ({"values": 3}, "values must be a list, got 3"),
        ({"values": [[]]}, "row 1: must be an object"),
        ({"values": [{"theirs": "a", "ours": "b"}]}, "row 1: ours must be a value of npllm"),
        ({"values": [{"theirs": "a", "ours": "lm_head", "axes": "n"}]}, "axes must be a list"),
        ({"values": [{"theirs": 1, "ours": "lm_head"}]}, "theirs must be a text, got 1"),
        ({"values": [{"theirs": "a", "our": "lm_head"}]}, "has unknown keys"),
        ({"values": [{"theirs": "a-N", "ours": "lm_head"}]}, "must both have the layer N"),
    ],
)
def test_a_bad_map_is_refused_with_the_row(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"format": "npllm names 1", "values": []} | content))
    with pytest.raises(NpllmValueError, match=message) as error:
        name_map(path)
    assert str(path) in str(error.value)


def test_a_map_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    row = {"theirs": "h.N.out", "ours": "model.layers.N", "axes": ["n_seq", "d_model"]}
    path.write_text(json.dumps({"format": "npllm names 1", "values": [row]}))
    assert name_map(path).find("h.12.out") == ("model.layers.12", ("n_seq", "d_model"))
    assert name_map(name_map(path)) == name_map(path)


def test_names_must_be_known():
    with pytest.raises(NpllmValueError, match=r"gguf, mlx_lm.*got 'flax'"):
        name_map("flax")
    with pytest.raises(NpllmTypeError, match="got int"):
        name_map(3)
    with pytest.raises(NpllmOSError, match=r"flax\.json"):
        name_map("flax.json")


# ------------------------------------------------------------------------ folders of arrays


@pytest.mark.parametrize("kind", ["npz", "npy", "safetensors", "one npz"])
def test_our_own_names_come_back(tmp_path, values, kind):
    if kind == "npy":
        for name, x in values.items():
            np.save(tmp_path / f"{name}.npy", x)
    elif kind == "safetensors":
        save_file(
            {name: np.ascontiguousarray(x) for name, x in values.items()},
            tmp_path / "a.safetensors",
        )
    else:
        np.savez(tmp_path / "a.npz", **values, input_ids=IDS)
    trace = read_arrays(tmp_path / "a.npz" if kind == "one npz" else tmp_path)
    assert list(trace) == list(values)
    for name, x in values.items():
        assert np.array_equal(trace[name], x)
        assert trace.index["values"][name]["status"] == "whole"
    assert trace.index["steps"] == (
        []
        if kind in ("npy", "safetensors")
        else [
            {
                "attention_mask": None,
                "position_ids": None,
                "input_ids": IDS.tolist(),
                "n_past": 0,
                "cached": False,
            }
        ]
    )
    trace.save(tmp_path / "out")
    again = npllm.Trace.load(tmp_path / "out")
    assert list(again) == list(trace)


def theirs(values, name):
    """The values as another program names and orders them, from the rows of its map."""
    made = {}
    for row in name_map(name).rows:
        for layer in range(2) if ".N" in row.ours else [0]:
            ours = NAMES[row.ours][0].strip("[]").split(", ")
            x = values[row.ours.replace(".N", f".{layer}")]
            axes = [
                part for axis in row.axes for part in ([axis] if axis in ours else axis.split("*"))
            ]
            if "n_batch" in axes and "n_batch" not in ours:
                x, ours = x[None], ["n_batch", *ours]
            elif "n_batch" not in axes:
                x, ours = x[0], ours[1:]
            x = x.transpose([ours.index(axis) for axis in axes])
            if len(axes) > len(row.axes):
                x = x.reshape(*x.shape[:-2], -1)
            made[row.theirs.replace(".N", f".{layer}")] = x
    return made


def test_other_names_and_axes_become_ours(tmp_path, values):
    """Heads side by side are cut, axes ordered, and the sequence is added where it is missing."""
    for name in ("transformers", "mlx_lm", "transformer_lens"):
        rows = {r.theirs: r.ours for r in name_map(name).rows}
        dump = theirs(values, name)
        if (
            name != "transformer_lens"
        ):  # two names of one value: what a module returns, and its last part
            dump = {k: x for k, x in dump.items() if not k.endswith(("self_attn", "mlp"))}
        if name == "mlx_lm":
            dump = {k: x for k, x in dump.items() if not k.endswith("v_proj")}
        np.savez(tmp_path / f"{name}.npz", **dump)
        trace = read_arrays(tmp_path / f"{name}.npz", names=name, config=CONFIG)
        same = rename_arrays(dump, names=name, config=CONFIG, input_ids=IDS)
        assert list(same) == list(trace)
        assert same.index["steps"][0]["input_ids"] == IDS.tolist()
        assert trace.index["ignored"] == []
        assert len(trace) == len(dump) >= 20, rows
        for key, x in trace.items():
            assert np.array_equal(x, values[key]), key
            assert len(trace.index["values"][key]["axes"]) == x.ndim


def test_a_missing_batch_axis_and_decode_steps(tmp_path, values):
    x = values["model.layers.0.mlp.gate_up_proj"]
    np.savez(tmp_path / "a.npz", **{"model.layers.0.mlp.gate_up_proj": x[0], "lm_head@2": x})
    trace = read_arrays(tmp_path)
    assert np.array_equal(trace["model.layers.0.mlp.gate_up_proj"], x)
    assert trace.index["values"]["lm_head@2"]["inputs"] == ["lm_head.input@2"]


def test_bfloat16_stays(tmp_path):
    x = np.ones((1, 2, 3), ml_dtypes.bfloat16)
    save_file({"model.norm": x}, tmp_path / "a.safetensors")
    trace = read_arrays(tmp_path)
    assert trace["model.norm"].dtype == x.dtype
    assert trace.index["values"]["model.norm"]["dtype"] == "bfloat16"


def test_unknown_names_are_listed(tmp_path):
    np.savez(tmp_path / "a.npz", **{"model.norm": np.ones((1, 2, 3)), "scores": np.ones(2)})
    with pytest.warns(UserWarning, match="no map knows: 'scores'"):
        trace = read_arrays(tmp_path)
    assert trace.index["ignored"] == ["scores"]


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"scores": np.ones(2)}, {}, r"none of its names is in the map .* 'scores'"),
        ({"model.norm": np.ones(2)}, {}, r"a\.npz.*n_batch, n_seq, d_model.*got the shape \[2\]"),
        ({"model.layers.0.self_attn.k_proj": np.ones((1, 2, 6))}, {}, "config.json as config="),
        (
            {"model.layers.0.self_attn.k_proj": np.ones((1, 2, 7))},
            {"config": CONFIG},
            "7 columns cannot be cut into n_kv_head = 2",
        ),
        (
            {
                "model.layers.0.mlp": np.ones((1, 2, 6)),
                "model.layers.0.mlp.down_proj": np.ones((1, 2, 6)),
            },
            {},
            "are both model.layers.0.mlp.down_proj; keep one",
        ),
        ({"model.norm": np.ones((1, 2, 3))}, {"input_ids": [0.5]}, "input_ids must be integers"),
        ({"model.norm": np.ones((1, 2, 3))}, {"config": {}}, "must have num_attention_heads"),
    ],
)
def test_bad_arrays_are_refused_with_the_file(tmp_path, arrays, options, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(NpllmValueError, match=message):
        read_arrays(tmp_path, **options)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(NpllmOSError, match=r"holds no \.npz"):
        read_arrays(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(NpllmOSError, match=r"a\.npz: cannot be read"):
        read_arrays(tmp_path)
    (tmp_path / "a.npz").unlink()
    np.save(tmp_path / "lm_head.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(NpllmOSError, match=r"lm_head\.npy: cannot be read"):
        read_arrays(tmp_path)
    (tmp_path / "lm_head.npy").unlink()
    (tmp_path / "b.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(NpllmError, match=r"b\.safetensors"):
        read_arrays(tmp_path)


# ------------------------------------------------------------------ llama-eval-callback


def printed(x, name, op, *, style="new", width="%12.4f", label="common_debug_cb_eval"):
    """A tensor as llama.cpp prints it: sizes from the fastest axis, three entries at each end."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    sizes = ", ".join(map(str, x.shape[::-1]))
    lines = [f"{label}: {name:>24} = (f32) {op:>10}(a{{{sizes}}}, b{{1, 1, 1, 1}}}}) = {{{sizes}}}"]
    tab = ["    " * n for n in range(4)] if style == "new" else [" " * (36 + n) for n in range(4)]

    def places(n):
        return range(n) if n <= 6 else [0, 1, 2, None, n - 3, n - 2, n - 1]

    for i3 in range(x.shape[0]):
        lines.append(tab[1] + "[")
        for i2 in places(x.shape[1]):
            if i2 is None:
                lines.append(tab[2] + "..., ")
                continue
            lines.append(tab[2] + "[")
            for i1 in places(x.shape[2]):
                row = [
                    "..." if i0 is None else width % x[i3, i2, i1 or 0, i0]
                    for i0 in places(x.shape[3])
                ]
                lines.append(tab[3] + ("..., " if i1 is None else f"[{', '.join(row)}],"))
            lines.append(tab[2] + "],")
        lines.append(tab[1] + "]" + ("" if style == "new" else ","))
        lines.append(tab[1] + f"sum = {x.sum():f}")
    return "\n".join(lines)


def dump(values, **options):
    """A run of a Llama checkpoint in llama.cpp, whose last layer computes the last row only."""
    text = [
        "main: number of input tokens = 9",
        *(f"main:   {i}" for i in IDS[0]),
        "",
        "system_info",
    ]

    def add(name, op, x):
        text.append(printed(x, name, op, **options))

    add("inp_embd", "GET_ROWS", values["model.embed_tokens"][0])
    for n in range(2):
        layer, rows = f"model.layers.{n}", slice(-1 if n else None, None)
        add(f"norm-{n}", "RMS_NORM", values[layer + ".input_layernorm"][0])
        add(f"attn_norm-{n}", "MUL", values[layer + ".input_layernorm"][0])
        q, q_before = (values[f"{layer}.self_attn.{x}"][0].swapaxes(0, 1) for x in ("q", "q_proj"))
        add(f"Qcur-{n}", "MUL_MAT", q_before.reshape(9, -1))
        add(f"Qcur-{n} (reshaped)", "RESHAPE", q_before)
        add(f"Qcur-{n}", "ROPE", q)
        add(f"kqv_out-{n}", "CONT", values[layer + ".self_attn.attention"][0])
        add(f"ffn_inp-{n}", "ADD", values[layer + ".residual"][0][rows])
        add(f"ffn_gate-{n}", "MUL_MAT", values[layer + ".mlp.gate"][0][rows])
        add(f"ffn_up-{n}", "MUL_MAT", values[layer + ".mlp.up"][0][rows])
        add(f"ffn_out-{n}", "MUL_MAT", values[layer + ".mlp.down_proj"][0][rows])
        add(f"l_out-{n}", "ADD", values[layer][0][rows])
    add("result_output", "MUL_MAT", values["lm_head"][0][-1:])
    return "\n".join([*text, "llama_perf_context_print: load time = 1.0 ms", ""])


STYLES = [
    {},
    {"style": "old", "label": "ggml_debug", "width": "%8.4f"},
    {"label": "0.00.412 I common_debug_cb_eval", "width": "%16.8f"},
]


@pytest.mark.parametrize("options", STYLES)
def test_what_llama_cpp_prints_is_read(tmp_path, values, options):
    path = tmp_path / "values.txt"
    path.write_text(dump(values, **options))
    trace = read_eval_callback(path, config=CONFIG)
    assert len(trace) == 2 + 2 * 9
    assert trace.index["steps"][0]["input_ids"] == IDS.tolist()
    for name, x in trace.items():
        entry, whole = trace.index["values"][name], values[name]
        unit = 1e-8 if "16.8" in options.get("width", "") else 1e-4
        assert (entry["status"], entry["rounded to"]) == ("partial", pytest.approx(unit))
        if name == "lm_head":
            whole = whole[:, -1:]
        assert entry["full shape"] == list(whole.shape), name
        assert np.abs(x - whole[np.ix_(*entry["kept"])]).max() <= 0.5001 * unit, name
        if "sum" in entry:
            assert entry["sum"] == pytest.approx(float(whole.sum()), abs=1e-4)
    q = trace.index["values"]["model.layers.1.self_attn.q"]
    assert q["kept"] == [[0], [0, 1, 2, 3], [0, 1, 2, 6, 7, 8], [0, 1, 2, 5, 6, 7]]
    last = trace.index["values"]["model.layers.1.mlp.up"]
    assert (last["kept"][1], last["full shape"][1], "sum" in last) == ([8], 9, False)
    assert "Qcur-0" in trace.index["ignored"] and "norm-0" in trace.index["ignored"]
    trace.save(tmp_path / "out")
    assert npllm.Trace.load(tmp_path / "out").index["values"] == trace.index["values"]


def test_the_first_release_printed_only_the_beginning_of_a_row(tmp_path):
    text = """ggml_debug:                 inp_embd = (f32)   GET_ROWS(t{7, 61, 1, 1}, i{1, 1, 1, 1}}) = {7, 1, 1, 1}
                                     [
                                      [
                                       [ -0.0181,   0.0272,   0.0272, ...],
                                      ],
                                     ]
"""
    (tmp_path / "a.txt").write_text(text)
    trace = read_eval_callback(tmp_path / "a.txt")
    close(trace["model.embed_tokens"], np.array([[[-0.0181, 0.0272, 0.0272]]]))
    assert trace.index["values"]["model.embed_tokens"]["kept"][2] == [0, 1, 2]
    assert trace.index["steps"] == []


def test_a_second_print_is_the_next_step(tmp_path, values):
    text = dump(values)
    (tmp_path / "a.txt").write_text(text + text)
    trace = read_eval_callback(tmp_path / "a.txt")
    assert len(trace) == 2 * (2 + 2 * 9)
    assert np.array_equal(trace["model.layers.1@1"], trace["model.layers.1"])


def test_numbers_that_are_none_are_read(tmp_path):
    x = np.array([[np.nan, np.inf, -np.inf]])
    (tmp_path / "a.txt").write_text(printed(x, "result_norm", "MUL").replace(" nan", "-nan"))
    assert np.array_equal(
        read_eval_callback(tmp_path / "a.txt")["model.norm"][0], x, equal_nan=True
    )


HEAD = "common_debug_cb_eval: l_out-0 = (f32) ADD(a{3, 1, 1, 1}, b{3, 1, 1, 1}}) = {3, 1, 1, 1}\n"


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("[\n[\n[ 1.0, 2.0 ],\n],\n]\n", 2, "must have 3 entries as its header says, got 2"),
        ("[\n[\n[ 1.0, x, 3.0 ],\n],\n]\n", 4, "must be a number, got 'x'"),
        ("[\n[\n[ 1.0, 2.0, 3.0 ],\n", 4, "2 brackets are open at the end"),
        ("[\n[\n[ 1.0, ..., 2.0, 3.0 ],\n],\n]\n", 2, "must have 3 entries"),
        ("[\n[\n[ [1.0], [2.0], [3.0] ],\n],\n]\n", 2, "more than four levels"),
        ("[\n[\n1.0, 2.0, 3.0\n],\n]\n", 2, "must have 1 entries as its header says, got 3"),
        ("[\n[ 1.0 ],\n]\n", 2, "has no brackets"),
        ("[\n[\n[ 1.0, 2.0, 3.0 ],\n],\n]\nsum = y\n", 7, "must be a number, got 'y'"),
    ],
)
def test_bad_text_is_refused_with_file_and_line(tmp_path, body, line, message):
    path = tmp_path / "a.txt"
    path.write_text(HEAD + body)
    with pytest.raises(NpllmValueError, match=message) as error:
        read_eval_callback(path)
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_text_without_values_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("llama_perf_context_print: load time = 1.0 ms\n")
    with pytest.raises(NpllmValueError, match=r"holds no tensor .* found 0 others"):
        read_eval_callback(path)
    path.write_text(HEAD.replace("{3, 1, 1, 1}\n", "{3, 1}\n"))
    with pytest.raises(NpllmValueError, match=r"a\.txt:1: must have four sizes"):
        read_eval_callback(path)
    with pytest.raises(NpllmOSError, match=r"b\.txt"):
        read_eval_callback(tmp_path / "b.txt")
