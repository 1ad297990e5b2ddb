"""What the tests draw: arrays, mask rules beside what they should say, attention calls, and calls
that docstrings describe.
"""

import inspect
import os
import re
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from npllm import ops
from npllm.models.params import LayerParams
from npllm.ops import mask

FLOATS = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("float16"),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}
dtypes = st.sampled_from(list(FLOATS.values()))
compute_dtypes = st.sampled_from([np.dtype("float32"), np.dtype("float64")])
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 5)
batches = st.lists(st.integers(0, 3), max_size=2).map(tuple)


def examples(n):
    """Settings of a test that runs on a GPU: n examples, or as many as NPLLM_EXAMPLES allows."""
    return settings(max_examples=min(n, int(os.environ.get("NPLLM_EXAMPLES", n))))


def fewer(times):
    """Settings of a test whose examples differ little: a part of the examples of others."""
    return settings(max_examples=settings.default.max_examples // times)


def normal(shape, dtype=np.float32, scale=1.0):
    """Draw an array of normally distributed values: Hypothesis draws the seed, which is enough for
    a law that holds for any.
    """
    return seeds.map(
        lambda seed: (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
    )


def coins(shape):
    return seeds.map(lambda seed: np.random.default_rng(seed).random(shape) < 0.6)


# ---------------------------------------------------------------- mask rules: pairs (rule, what it should say of two integers)

_causal = st.just((mask.causal(), lambda i, j: j <= i))
_windows = st.integers(1, 9).map(lambda w: (mask.sliding_window(w), lambda i, j: i - w < j <= i))
_unbounded = st.integers(2, 3).map(
    lambda n: (mask.Rule(lambda i, j: (i + j) % n == 0), lambda i, j: (i + j) % n == 0)
)


def _both(pair):
    (a, says_a), (b, says_b) = pair
    return a & b, lambda i, j: says_a(i, j) and says_b(i, j)


def _either(pair):
    (a, says_a), (b, says_b) = pair
    return a | b, lambda i, j: says_a(i, j) or says_b(i, j)


def _inverse(one):
    return ~one[0], lambda i, j: not one[1](i, j)


def _combined(rules):
    pairs = st.tuples(rules, rules)
    return pairs.map(_both) | pairs.map(_either) | rules.map(_inverse)


rules = st.recursive(_causal | _windows | _unbounded, _combined, max_leaves=4)

# ------------------------------------------------------------------------------------------------------------ attention calls


@dataclass
class Call:
    """Arguments of an attention op, beside the full table of what is visible."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    visible: np.ndarray
    options: dict = field(default_factory=dict)

    @property
    def scores(self):
        return {name: x for name, x in self.options.items() if name in ("bias", "scale", "softcap")}


@st.composite
def attention_calls(
    draw, dtype=None, kinds=("none", "rule", "function", "array", "padding"), max_seq=6, min_batch=0
):
    kind = draw(st.sampled_from(kinds))
    side = st.integers(min_batch, 3)
    batch = draw(
        side.map(lambda n: (n,)) if kind == "padding" else st.lists(side, max_size=2).map(tuple)
    )
    n_kv_head, group, n_seq, n_ctx = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, max_seq)),
        draw(st.integers(1, 9)),
    )
    d_head, d_value, n_head = draw(sizes), draw(sizes), n_kv_head * group
    q_dtype, kv_dtype = (draw(dtypes), draw(dtypes)) if dtype is None else (dtype, dtype)
    q = draw(normal((*batch, n_head, n_seq, d_head), q_dtype))
    k = draw(normal((*batch, n_kv_head, n_ctx, d_head), kv_dtype))
    v = draw(normal((*batch, n_kv_head, n_ctx, d_value), kv_dtype))
    options = {}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.1, 1.0, 3.0]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 2.0, 30.0]))
    full = (*batch, n_head, n_seq, n_ctx)
    if draw(st.booleans()):
        bias = draw(normal(draw(broadcast_shapes(full)), q_dtype))
        options["bias"] = np.where(draw(coins(bias.shape)), bias, np.asarray(-np.inf, bias.dtype))
    i, j = [*range(n_ctx - n_seq, n_ctx)], [*range(n_ctx)]
    if kind in ("rule", "function"):
        i = draw(_given_slots(options, "q_slots", i))
        j = draw(_given_slots(options, "k_slots", j))
    options["mask"], visible = draw(_masks(kind, full, i, j))
    if options["mask"] is None:
        del options["mask"]
    return Call(q, k, v, np.broadcast_to(visible, full), options)


@st.composite
def broadcast_shapes(draw, full):
    """Shapes that broadcast to `full`: leading axes left out, others of size 1."""
    shape = [1 if draw(st.booleans()) else n for n in full]
    return tuple(shape[draw(st.integers(0, len(full))) :])


@st.composite
def _given_slots(draw, options, name, default):
    n, form = len(default), draw(st.sampled_from(["default", "array", "range", "backward"]))
    if form == "default":
        return default
    start, step = (
        draw(st.integers(-3, 9)),
        draw(st.integers(1, 2)) * (-1 if form == "backward" else 1),
    )
    slots = range(start, start + n * step, step)
    if form == "array":
        slots = np.random.default_rng(draw(seeds)).permutation(
            np.asarray(slots, dtype=draw(st.sampled_from([np.int32, np.int64])))
        )
    options[name] = slots
    return [int(slot) for slot in slots]


@st.composite
def _masks(draw, kind, full, i, j):
    """Draw a mask of one kind, and the table of what it shows."""
    if kind == "none":
        return None, np.ones(full, bool)
    if kind == "array":
        table = draw(coins(draw(broadcast_shapes(full))))
        return table, table
    rule, says = draw(rules)
    table = np.array([says(a, b) for a in i for b in j], bool).reshape(len(i), len(j))
    if kind == "function":
        return (lambda i, j: rule(i, j)), table
    if kind == "padding":
        valid = draw(coins((full[0], full[-1])))
        return mask.padding(valid) & rule, valid[:, None, None, :] & table
    return rule, table


# ---------------------------------------------------------------------------------------------- calls that docstrings describe


@dataclass
class Documented:
    """One line `names : type` of a Parameters or Returns section, with its description."""

    name: str
    type: str
    text: str

    @property
    def axes(self):
        """Axis names of an array ("n_seq", "d_rope/2", "..."), the largest ones where it
        broadcasts; None for what is no array.
        """
        match = re.match(r"(?:integer |bool )?array \[(.*?)\]", self.type)
        match = match or (
            "array" in self.type and re.search(r"broadcasts\s+to\s+\[(.*?)\]", self.text)
        )
        return re.findall(r"[^\s,]+", match[1]) if match else None

    @property
    def kind(self):
        """Kind of the entries: "integer", "bool" or "float"."""
        return next((kind for kind in ("integer", "bool") if f"{kind} array" in self.type), "float")

    @property
    def optional(self):
        return self.type.endswith("optional")


def documented(op, section):
    """Read a section of a numpydoc docstring: a Documented for each name; "As in `other`" is looked
    up there.
    """
    doc = inspect.getdoc(op)
    match = re.search(
        rf"^{section}\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", doc, re.MULTILINE | re.DOTALL
    )
    entries = []
    for head, text in re.findall(
        r"^(\S.*)\n((?:[ \t]+.*\n?|\n)*)", match[1] + "\n" if match else "", re.MULTILINE
    ):
        names, _, kind = head.partition(" : ")
        elsewhere = re.search(r"As in `(\w+)`", text) if not kind else None
        known = (
            {entry.name: entry for entry in documented(getattr(ops, elsewhere[1]), section)}
            if elsewhere
            else {}
        )
        entries += [
            known.get(name) or Documented(name, kind, text)
            for name in re.split(r", ", names.lstrip("*"))
        ]
    return entries


OPS = {
    name: op
    for module in (ops, mask)
    for name, op in vars(module).items()
    if name in module.__all__ and inspect.isfunction(op)
}
# Those that follow the library of an array that they need; the others make arrays, or take them as
# an option.
ARRAY_OPS = {
    name: op
    for name, op in OPS.items()
    if any(entry.axes and not entry.optional for entry in documented(op, "Parameters"))
}

SCALARS = {
    "eps": 1e-5,
    "scale": 0.5,
    "softcap": 5.0,
    "axis": -1,
    "t": 0.7,
    "k": 2,
    "tokens": [0],
    "eos": [0],
    "words": [[0]],
    "n_new": 0,
    "least": 1,
    "n_left": 1,
    "size": 1,
    "p": 0.6,
    "penalty": 1.2,
    "base": 10000.0,
    "w": 2,
    "interleaved": True,
    "return_lse": True,
    "block_q": 2,
    "block_k": 3,
    "factor": 4.0,
    "n_original": 64,
    "dtype": "bfloat16",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "truncate": False,
    "outer": "keys",
    "before": 1,
    "after": 2,
    "dilation": 2,
    "stride": 3,
    "c": 2,
    "block": 2,
    "n_blocks": 3,
    "n_random": 1,
    "seed": 0,
    "n": 8,
    "d": 4,
    "sram": 256,
    "itemsize": 4,
    "n_prefix": 2,
    "slots": [0, 2],
    "rule": mask.causal(),
}


@st.composite
def axis_sizes(draw):
    """Draw a size for every axis name of the glossary, with what must hold between them."""
    small = st.integers(2, 5)
    names = [
        "n_seq",
        "n_ctx",
        "n_kv_head",
        "d_model",
        "d_in",
        "d_out",
        "d_value",
        "d_ff",
        "d_rank",
        "n_vocab",
        "n_batch",
        "n_pos",
        "n_split",
    ]
    axis = {name: draw(small) for name in names}
    axis["n_head"] = axis["n_kv_head"] * draw(st.integers(1, 3))
    axis["n_group"] = draw(
        st.sampled_from([n for n in range(1, axis["n_kv_head"] + 1) if axis["n_kv_head"] % n == 0])
    )
    axis["d_model"] = 2 * draw(st.integers(1, 3))
    axis["d_rope"] = 2 * draw(st.integers(2, 4))
    axis["d_head"] = axis["d_rope"] + draw(st.integers(0, 3))
    axis["..."] = draw(st.lists(small, max_size=2).map(tuple))
    return axis


def shape_of(axes, axis):
    """Turn axis names into a shape: products and quotients are computed, `...` stands for any
    number of axes.
    """
    shape = []
    for name in axes:
        shape += axis["..."] if name == "..." else [eval(name.replace("/", "//"), {}, axis)]
    return tuple(shape)


@st.composite
def documented_calls(draw, op, dtype=None):
    """Draw keyword arguments for an op as its docstring describes them, and the axis sizes they
    were made from.
    """
    axis, arguments = draw(axis_sizes()), {}
    dtype = draw(compute_dtypes) if dtype is None else dtype
    for entry in documented(op, "Parameters"):
        if "LayerParams" in entry.type:
            arguments[entry.name] = tuple(draw(layer_params(axis, dtype)) for _ in range(2))
        elif entry.axes is None:
            if entry.name in axis:
                arguments[entry.name] = axis[entry.name]
            elif entry.name in SCALARS and draw(
                st.booleans() if _has_default(op, entry.name) else st.just(True)
            ):
                arguments[entry.name] = SCALARS[entry.name]
        elif not entry.optional or draw(st.booleans()):
            rng, shape = np.random.default_rng(draw(seeds)), shape_of(entry.axes, axis)
            arguments[entry.name] = (
                rng.integers(0, 2, shape)
                if entry.kind == "integer"
                else rng.random(shape) < 0.5
                if entry.kind == "bool"
                else rng.random(shape).astype(dtype)
            )
    return arguments, axis


@st.composite
def layer_params(draw, axis, dtype):
    """Draw the weights of a layer in the shapes that stand beside its fields; biases or not."""
    shapes = re.findall(
        r"^    (\w+): Array( \| None = None)?  # \[(.*?)\]",
        inspect.getsource(LayerParams),
        re.MULTILINE,
    )
    assert [name for name, *_ in shapes] == list(LayerParams._fields)
    rng, biased = np.random.default_rng(draw(seeds)), draw(st.booleans())
    return LayerParams(
        **{
            name: rng.random(shape_of(axes.split(", "), axis)).astype(dtype)
            for name, optional, axes in shapes
            if biased or not optional
        }
    )


def _has_default(op, name):
    return inspect.signature(op).parameters[name].default is not inspect.Parameter.empty
