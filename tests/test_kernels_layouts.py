"""No op takes memory order for logical order: every op of every set, its arguments laid out in
memory in every way.
"""

import importlib

import ml_dtypes
import numpy as np
import pytest
from close import close
from composed import Composed, definitions
from layouts import BAND, LAYOUTS, Allocator, contiguous, memory_of, strided

from npllm import kernels, ops
from npllm.cache import kv_cache as kv
from npllm.models.params import LayerParams
from npllm.ops import mask
from npllm.quantized.int8 import Int8Weight, quantize

SETS = {
    "reference": definitions,
    "blockwise": Composed(ops.blockwise),
    "tiled": Composed(kernels.tiled_ops()),
    "compiled": kernels.compiled_ops() and Composed(kernels.compiled_ops()),
}
ROWS = (1, 2, 12, 13, 40, 300)
EPS, D_MODEL, D_FF, D_HEAD, D_ROPE, N_HEAD, N_KV = (
    1e-5,
    50,
    38,
    18,
    16,
    4,
    2,
)  # none is a multiple of a vector
D_QKV, N_PAST, PLACE = (N_HEAD + 2 * N_KV) * D_HEAD, 3, 1
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


@pytest.fixture(params=SETS)
def tested(request):
    """A set."""
    if SETS[request.param] is None:
        pytest.skip(kernels.why_not_compiled())
    return SETS[request.param]


class Draw:
    """Arguments of each op: [n_batch, n_seq] rows, and weights of some dtype."""

    def __init__(self, n_batch, n_seq, dtype, seed=0):
        self.rng, self.shape, self.dtype = np.random.default_rng(seed), (n_batch, n_seq), dtype

    def x(self, *axes):
        return self.rng.standard_normal(axes, dtype=np.float32)

    def weight(self, *axes):
        return (self.x(*axes) / np.float32(4 if len(axes) > 1 else 1)).astype(self.dtype)

    def tables(self):
        positions = np.arange(N_PAST, N_PAST + self.shape[1])
        return dict(
            zip(
                ("cos", "sin"),
                ops.rope_tables(positions, ops.rope_frequencies(D_ROPE)),
                strict=True,
            )
        )

    def attended(self):
        """What the last arguments of fusions with attention are."""
        return {
            "n_head": N_HEAD,
            "n_kv_head": N_KV,
            "mask": mask.causal(),
            "cache": self.past(),
            "layer": PLACE,
        }

    def past(self):
        keys, values = (self.x(self.shape[0], N_KV, N_PAST, D_HEAD) for _ in range(2))

        def cache():
            new = kv.KVCache(self.shape[0], 3, 512)
            for layer in range(3):
                new.append(layer, keys, values)
            new.advance(
                *np.zeros((2, self.shape[0], N_PAST), int),
                np.ones((self.shape[0], N_PAST), bool),
                None,
            )
            return new

        return cache

    def layer(self):
        return LayerParams(
            self.weight(D_MODEL),
            self.weight(D_QKV, D_MODEL),
            self.weight(D_MODEL, N_HEAD * D_HEAD),
            self.weight(D_MODEL),
            self.weight(2 * D_FF, D_MODEL),
            self.weight(D_MODEL, D_FF),
        )


def _rows(d):
    return {"x": d.x(*d.shape, D_MODEL)}


def _normed(d, d_out):
    return {
        **_rows(d),
        "norm_weight": d.weight(D_MODEL),
        "eps": EPS,
        "weight": d.weight(d_out, D_MODEL),
        "bias": d.weight(d_out),
    }


def _layers(d, masks):
    return {
        **_rows(d),
        "layers": (d.layer(), d.layer()),
        "eps": EPS,
        **d.tables(),
        "n_head": N_HEAD,
        "n_kv_head": N_KV,
        "masks": masks,
        "cache": d.past(),
        "layer": PLACE,
    }


ARGUMENTS = {
    "embed": lambda d: {"ids": d.rng.integers(0, 9, d.shape), "weight": d.weight(9, D_MODEL)},
    "linear": lambda d: {**_rows(d), "weight": d.weight(D_FF, D_MODEL), "bias": d.weight(D_FF)},
    "rms_norm": lambda d: {**_rows(d), "weight": d.weight(D_MODEL), "eps": EPS},
    "layer_norm": lambda d: {
        **_rows(d),
        "weight": d.weight(D_MODEL),
        "bias": d.weight(D_MODEL),
        "eps": EPS,
    },
    "rope_tables": lambda d: {"positions": d.rng.integers(0, 99, d.shape), "inv_freq": d.x(8)},
    "apply_rope": lambda d: {"x": d.x(d.shape[0], 3, d.shape[1], D_HEAD), **d.tables()},
    "attention": lambda d: {
        "q": d.x(d.shape[0], N_HEAD, d.shape[1], D_HEAD),
        "k": d.x(d.shape[0], N_KV, d.shape[1] + 3, D_HEAD),
        "v": d.x(d.shape[0], N_KV, d.shape[1] + 3, 21),
        "mask": mask.causal(),
    },
    "swiglu": lambda d: {"gate": d.x(*d.shape, D_FF), "up": d.x(*d.shape, D_FF)},
    "add": lambda d: {"x": d.x(*d.shape, D_MODEL), "y": d.x(*d.shape, D_MODEL)},
    "add_positions": lambda d: {
        **_rows(d),
        "positions": d.rng.integers(0, 9, d.shape[1]),
        "weight": d.weight(9, D_MODEL),
    },
    "relu": _rows,
    "gelu": _rows,
    "silu": _rows,
    "norm_linear": lambda d: _normed(d, D_FF),
    "norm_swiglu": lambda d: _normed(d, 2 * D_FF),
    "linear_add": lambda d: {
        "x": d.x(*d.shape, D_FF),
        "weight": d.weight(D_MODEL, D_FF),
        "residual": d.x(*d.shape, D_MODEL),
        "bias": d.weight(D_MODEL),
    },
    "rope_attention": lambda d: {"qkv": d.x(*d.shape, D_QKV), **d.tables(), **d.attended()},
    "attention_block": lambda d: {
        **_rows(d),
        "norm_weight": d.weight(D_MODEL),
        "eps": EPS,
        "qkv_weight": d.weight(D_QKV, D_MODEL),
        "o_weight": d.weight(D_MODEL, N_HEAD * D_HEAD),
        **d.tables(),
        "qkv_bias": d.weight(D_QKV),
        "o_bias": d.weight(D_MODEL),
        **d.attended(),
    },
    "mlp_block": lambda d: {
        **_rows(d),
        "norm_weight": d.weight(D_MODEL),
        "eps": EPS,
        "gate_up_weight": d.weight(2 * D_FF, D_MODEL),
        "down_weight": d.weight(D_MODEL, D_FF),
        "gate_up_bias": d.weight(2 * D_FF),
        "down_bias": d.weight(D_MODEL),
    },
    "decoder_layers": lambda d: _layers(d, [mask.causal()] * 2),
}


ATTENDING = {"attention", "rope_attention", "attention_block", "decoder_layers"}
WEIGHTLESS = {
    "rope_tables",
    "apply_rope",
    "attention",
    "swiglu",
    "add",
    "relu",
    "gelu",
    "silu",
    "rope_attention",
}


def laid_out(value, layout):
    """An argument in another layout: an array, the layers that hold arrays, or what it was."""
    if isinstance(value, Int8Weight):
        return Int8Weight(layout(value.values), layout(value.scales))
    if isinstance(value, tuple):
        return (
            type(value)(*(laid_out(x, layout) for x in value))
            if hasattr(value, "_fields")
            else tuple(laid_out(x, layout) for x in value)
        )
    return layout(value) if isinstance(value, np.ndarray) else value


def arrays_in(value):
    """Every array of an argument."""
    if isinstance(value, Int8Weight):
        return [value.values, value.scales]
    if isinstance(value, tuple):
        return [x for part in value for x in arrays_in(part)]
    return [value] if isinstance(value, np.ndarray) else []


def result(op, arguments):
    """What an op returns, and the keys and values that it leaves."""
    arguments = {name: x() if name == "cache" else x for name, x in arguments.items()}
    y = op(**arguments)
    y = list(y) if isinstance(y, tuple) else [y]
    cache = arguments.get("cache")
    if cache is not None:
        n_new, n_layer = y[0].shape[1], len(arguments.get("layers", "1"))
        cache.advance(
            *np.zeros((2, cache.n_batch, n_new), np.int64),
            np.ones((cache.n_batch, N_PAST + n_new), bool),
            cache.rope_variant,
        )
        y += [x.copy() for n in range(n_layer) for x in cache.kept(PLACE + n)[:2]]
    return y


def agree(op, definition, arguments):
    """Compare an op with its definition on contiguous copies, and the arguments with what they
    were.
    """
    arrays = [x for value in arguments.values() for x in arrays_in(value)]
    before = [memory_of(x).tobytes() for x in arrays]
    want = result(
        definition,
        {name: laid_out(x, lambda a: np.array(a, order="C")) for name, x in arguments.items()},
    )
    for got, expected in zip(result(op, arguments), want, strict=True):
        close(got, expected, times=8)
    assert [memory_of(x).tobytes() for x in arrays] == before


TILED = ("layout", "tiled", "tiled_linear", "tiled_attention")
MODULES = {
    "tiled": TILED,
    "compiled": (*TILED, "operands", "parts", "rope_attention", "compiled", "gemm"),
}
SHAPES = [(1, n) for n in ROWS] + [(n, 1) for n in (2, 12, 13)] + [(3, 14)]
ONE_FEW_MANY = [(1, 1), (2, 1), (3, 14)]  # kernels of one row, of a few, and of panels


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * (dtype == FLOAT32))
        for name in ARGUMENTS
        for dtype in (BFLOAT16, FLOAT32)
        if dtype == BFLOAT16 or name not in WEIGHTLESS
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shapes", [ONE_FEW_MANY, pytest.param(SHAPES, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_an_op_reads_its_arguments_in_logical_order(tested, name, dtype, shapes):
    if tested is SETS["blockwise"] and name not in ATTENDING:
        return  # the op is that of the reference set
    if tested is not SETS["compiled"] and len(shapes) == 3:
        shapes = shapes[1:]  # only compiled kernels differ for one row
    for shape in shapes:
        arguments = ARGUMENTS[name](Draw(*shape, dtype))
        changed = [key for key, value in arguments.items() if arrays_in(value)]
        for layout in LAYOUTS.values():
            for only in [None, *(changed if shape in ((1, 13), (3, 14), (2, 1)) else [])]:
                here = {
                    key: laid_out(x, layout if only in (None, key) else contiguous)
                    for key, x in arguments.items()
                }
                try:
                    agree(getattr(tested, name), getattr(definitions, name), here)
                except Exception as error:
                    error.add_note(
                        f"[n_batch, n_seq] = {list(shape)}, {layout.__name__} {only or 'everything'}"
                    )
                    raise


@pytest.mark.parametrize(
    "name", ["linear", "norm_linear", "norm_swiglu", "linear_add", "mlp_block"]
)
def test_weights_in_8_bits_are_read_in_logical_order(tested, name, monkeypatch):
    for size in ("D_MODEL", "D_FF"):
        monkeypatch.setitem(globals(), size, 64)
    for n in (1, 13):
        for layout in LAYOUTS.values():
            arguments = ARGUMENTS[name](Draw(1, n, FLOAT32))
            arguments = {
                key: quantize(x) if key.endswith("weight") and x.ndim == 2 else x
                for key, x in arguments.items()
            }
            agree(
                getattr(tested, name),
                getattr(definitions, name),
                {key: laid_out(x, layout) for key, x in arguments.items()},
            )


@pytest.mark.parametrize("tested", MODULES, indirect=True)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", [*ops.SLOTS, "linear", "rms_norm", "swiglu", "gelu", "attention"])
def test_a_kernel_writes_into_its_output_and_its_buffers_only(tested, name, dtype, monkeypatch):
    modules = [
        importlib.import_module("npllm.kernels.cpu." + name) for name in MODULES[tested.name]
    ]
    calls = [
        {key: laid_out(x, layout) for key, x in ARGUMENTS[name](Draw(*shape, dtype)).items()}
        for shape in SHAPES
        for layout in (contiguous, strided)
    ]
    for arguments in calls:
        result(getattr(tested, name), arguments)  # compiles, with NumPy as it is
    memory = Allocator()
    for module in modules:
        monkeypatch.setattr(module, "np", memory, raising=False)
        monkeypatch.setattr(module, "scratch", memory.scratch, raising=False)
    monkeypatch.setattr(
        kv,
        "empty",
        lambda x, n, dtype: memory.empty((*x.shape[:2], n, x.shape[3]), dtype or x.dtype),
    )
    for arguments in calls:
        agree(getattr(tested, name), getattr(definitions, name), arguments)
    memory.check()
    assert memory.lent or getattr(tested.ops, name) in (None, getattr(ops, name, None))


@pytest.mark.parametrize("at", [-1, 6])
def test_a_write_beside_an_array_is_found(at):
    memory = Allocator()
    x = memory.zeros((2, 3), np.float32)
    memory.check()
    memory_of(x).view(np.float32)[BAND + at] = 0
    with pytest.raises(AssertionError):
        memory.check()


def test_every_op_is_tried():
    assert ARGUMENTS.keys() == set(ops.Ops.names())


@pytest.mark.skipif(SETS["compiled"] is None, reason="Numba is not installed")
def test_a_kernel_that_counts_entries_is_not_compiled_for_what_is_not_row_major():
    from numba.core.errors import TypingError

    from npllm.kernels.cpu import panels

    x = np.arange(64, dtype=np.float32)
    close(np.float32(panels.root_mean_square(x, np.float32(0))), np.sqrt(np.mean(x * x)))
    with pytest.raises(TypingError, match="row-major order"):
        panels.root_mean_square(x[::2], np.float32(0))
