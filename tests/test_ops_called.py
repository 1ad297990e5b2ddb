"""Every op that a model calls goes through its set: a replaced one fires, in every architecture
that has it.
"""

from collections import Counter

import numpy as np
import pytest
import test_encoder
import tiny

from npllm import kernels, ops
from npllm.models import bert, transformer
from npllm.ops import Ops

SETS = {
    "reference": ops.reference,
    "blockwise": ops.blockwise,
    "tiled": kernels.tiled_ops(),
    "compiled": kernels.compiled_ops(),
}
NAMES = Ops.names()
BLOCK = {"linear", "attention", "add", "layer_norm"}  # parts of the blocks of 2017
DECODER = set(NAMES) - {"layer_norm", "relu", "gelu", "silu", "add_positions"}
CALLED = {
    "phi3": DECODER,
    "phi3 traced": DECODER,
    "encoder": BLOCK | {"relu"},
    "decoder": BLOCK | {"relu"},
    "gelu encoder": BLOCK | {"gelu"},
    **{
        f"bert {name}": BLOCK | {"embed", "add_positions", name}
        for name in ("gelu", "relu", "silu")
    },
}


def drawn(*shape, seed=0):
    return 0.3 * np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def heads():
    return transformer.AttentionParams(
        *(drawn(8, 8, seed=n) for n in range(4)), *(drawn(8, seed=n) for n in range(4))
    )


def norm():
    return transformer.NormParams(1 + drawn(8), drawn(8))


def network():
    return transformer.FeedForwardParams(drawn(12, 8), drawn(12), drawn(8, 12), drawn(8))


ENCODER = transformer.EncoderLayerParams(heads(), norm(), network(), norm())
LAYER = transformer.DecoderLayerParams(heads(), norm(), heads(), norm(), network(), norm())
BOTH = transformer.TransformerParams((ENCODER,), (LAYER,), norm(), norm())


def phi3(o, tap=None):
    """Prefill, then decode: the two passes of a generation."""
    m = tiny.model(ops=o)
    cache = m.new_cache()
    for n_seq in (5, 1):
        yield lambda n_seq=n_seq: m(tiny.random_ids(1, n_seq), cache=cache, tap=tap)


def block(function, *inputs, **options):
    """A layer, post-norm and pre-norm."""

    def passes(o):
        for norm_first in (False, True):
            yield lambda norm_first=norm_first: function(
                *inputs,
                2,
                o,
                norm_first=norm_first,
                **{name: get(o) for name, get in options.items()},
            )

    return passes


def encoder(activation):
    """A BERT encoder with some activation function."""

    def passes(o):
        model, _ = test_encoder.make(dtype=np.float32, ops=o, hidden_act=activation)
        types = np.array([[0, 0, 1]])
        yield lambda: bert.forward(
            model.params, model.config, np.array([[2, 5, 3]]), types, None, model.ops
        )

    return passes


X, MEMORY = drawn(2, 4, 8, seed=1), drawn(2, 5, 8, seed=2)
PASSES = {
    "phi3": phi3,
    "phi3 traced": lambda o: phi3(o, lambda _, x: x),
    "encoder": block(transformer.encoder_layer, X, ENCODER),
    "gelu encoder": block(transformer.encoder_layer, X, ENCODER, activation=lambda o: o.gelu),
    "decoder": block(transformer.forward, MEMORY, X, BOTH),
    **{f"bert {name}": encoder(name) for name in ("gelu", "relu", "silu")},
}


@pytest.mark.parametrize("base", SETS)
@pytest.mark.parametrize("kind", CALLED)
def test_a_replaced_op_fires_in_every_pass_that_has_it(kind, base):
    if SETS[base] is None:
        pytest.skip(kernels.why_not_compiled())
    calls = Counter()

    def counted(name):
        op = getattr(SETS[base], name) or (lambda *_: NotImplemented)  # an empty slot declines
        return lambda *args, **options: (calls.update([name]), op(*args, **options))[1]

    for name in NAMES:
        for run in PASSES[kind](SETS[base].replace(**{name: counted(name)})):
            calls.clear()
            run()
            assert bool(calls[name]) == (name in CALLED[kind]), name


def skewed(op):
    """The op, each channel of its result scaled by another factor."""

    def changed(*args, **options):
        y = op(*args, **options)
        return y * np.linspace(0.5, 1, y.shape[-1], dtype=y.dtype)

    return changed


@pytest.mark.parametrize("kind", [kind for kind in CALLED if "phi3" not in kind])
def test_what_a_replaced_op_returns_is_what_the_model_goes_on_with(kind):
    plain = [run() for run in PASSES[kind](ops.reference)]
    for name in sorted(CALLED[kind]):
        mine = ops.reference.replace(**{name: skewed(getattr(ops, name))})
        for got, want in zip((run() for run in PASSES[kind](mine)), plain, strict=True):
            assert np.abs(got - want).max() > 1e-4, name


def test_every_op_is_called_by_some_model():
    assert set().union(*CALLED.values()) == set(NAMES)
