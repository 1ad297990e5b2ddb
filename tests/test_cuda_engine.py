"""The decode engine beside the reference decode step: the same logits, whatever the model.

Kernels run on the CPU (tests/kernel_shim.py).  What is asserted of the captured graph is asserted
by the stand-in's stream, which refuses everything but a launch while it captures.
"""

import guard
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from guard import moved
from kernel_shim import checking, needs_gxx

import npllm
from npllm import ops
from npllm.kernels import cuda
from npllm.kernels.cuda import decode, decode_graph
from npllm.quantized.int8 import quantize

pytestmark = [needs_gxx, pytest.mark.usefixtures("on_the_stand_in_apart")]
slow = pytest.mark.slow
BF16 = ml_dtypes.bfloat16


def pair(dtype=BF16, **changes):
    """A model on the engine, and the same on the definitions, in NumPy."""
    base = tiny.model(dtype=dtype, ops=ops.reference, **{"hidden_size": 128} | changes)
    return npllm.Model(base.config, moved(base.params), ops=cuda.cuda_ops()), base


def fed(model, ids, n_prompt, valid=None):
    """Logits of each token behind a prompt, fed one by one."""
    cache, logits = model.new_cache(len(ids)), []
    valid = np.ones(ids.shape, bool) if valid is None else valid
    for start, stop in [(0, n_prompt), *((at, at + 1) for at in range(n_prompt, ids.shape[1]))]:
        y = model.last_logits(ids[:, start:stop], valid[:, :stop], cache)
        logits.append(npllm.arrays.to_numpy(y)[:, 0])
    return np.stack(logits, axis=1), cache


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
LONG = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    },
    "original_max_position_embeddings": 12,
}
KINDS = {
    "heads of 64": HEADS,
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "window": {"sliding_window": 5},
    "partial rotary": HEADS | {"partial_rotary_factor": 0.5},
    "tied": {"tie_word_embeddings": True},
    "longrope": LONG,
    "heads of 96": HEADS | {"hidden_size": 192},
    "heads of 128": {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    # heads of 64, half of each rotated: 16 factors, as many as LONG has
    "all at once": LONG
    | {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "sliding_window": 5,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize(
    "kind", [name if name == "window" else pytest.param(name, marks=slow) for name in KINDS]
)
@pytest.mark.parametrize(
    "dtype", [BF16, *(pytest.param(x, marks=slow) for x in (np.float16, np.float32))]
)
def test_the_engine_gives_the_logits_of_the_reference(kind, dtype):
    """Ten tokens behind a prompt of five: eager, captured, replayed; also over the crossing of
    longrope, where cached keys are computed anew.
    """
    model, base = pair(dtype, **KINDS[kind])
    ids = tiny.random_ids(2, 15)
    guard.OPERATIONS.clear()
    got, cache = fed(model, ids, 5)
    want, other = fed(base, ids, 5)
    close(got, want, times=20)
    assert guard.OPERATIONS["graph"] >= 5 and cache.n_ctx == other.n_ctx == 15


@slow
@pytest.mark.parametrize("n_batch", [1, 3, 4, 5, 6, 7, 8])
def test_batches_of_every_size(n_batch):
    """Grouped heads, part of each rotated, longrope over its crossing, a window, padding."""
    model, base = pair(**KINDS["all at once"])
    ids, valid = tiny.random_ids(n_batch, 15), np.ones((n_batch, 15), bool)
    valid[0, :2] = n_batch == 1
    close(fed(model, ids, 9, valid)[0], fed(base, ids, 9, valid)[0], times=20)


@slow
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_a_row_has_the_same_bits_in_any_company(dtype):
    """Alone, and as any row of a batch of up to 8.  Prompts of two tokens are 16 rows at most: more
    rows of float32 weights are a product of the matrix library, whose order of summation depends
    on their number.
    """
    model, _ = pair(dtype, **HEADS)
    ids = tiny.random_ids(8, 9)
    alone = [fed(model, ids[row : row + 1], 2)[0][0] for row in range(8)]
    for n in (2, 3, 5, 8):
        for row, logits in enumerate(fed(model, ids[:n], 2)[0]):
            assert logits.tobytes() == alone[row].tobytes(), (n, row)


@slow
def test_padding_on_the_left():
    model, base = pair(**HEADS | {"sliding_window": 7})
    ids, valid = tiny.random_ids(3, 14), np.ones((3, 14), bool)
    valid[0, :4], valid[1, :1] = False, False
    close(fed(model, ids, 6, valid)[0], fed(base, ids, 6, valid)[0], times=20)


@slow
def test_a_cache_gives_what_computing_again_gives():
    """The last logits of every length, beside those of a prefill of the whole."""
    model, _ = pair(**HEADS)
    ids = tiny.random_ids(1, 12)
    got, _ = fed(model, ids, 4)
    for n in range(4, 13):
        whole = model.last_logits(ids[:, :n], np.ones((1, n), bool)).get()[:, 0]
        close(got[:, n - 4], whole, times=20)


@slow
def test_keys_grow_beyond_their_arrays_and_beyond_one_split():
    """At 64 and at 128 slots arrays are reallocated, and graphs captured again."""
    model, base = pair(max_position_embeddings=256, original_max_position_embeddings=256, **HEADS)
    ids = tiny.random_ids(1, 140)
    close(fed(model, ids, 60)[0], fed(base, ids, 60)[0], times=20)


@pytest.mark.parametrize("changes", [HEADS, pytest.param(LONG, marks=slow)], ids=["", "longrope"])
def test_greedy_tokens_are_chosen_on_the_device(changes):
    """The same text as token by token; one wait for eight tokens; a stop leaves a usable cache."""
    model, base = pair(**changes)
    ids = tiny.random_ids(2, 5)
    n = 20 if changes is LONG else 10
    want = base.generate(ids, max_new_tokens=n)
    guard.Gets.n = 0
    assert (model.generate(ids, max_new_tokens=n) == want).all()
    one_by_one = (
        cuda.CUDA.n_queued - 1 if changes is LONG else 0
    )  # tokens before the frequencies change
    assert guard.Gets.n <= 6 + one_by_one
    cache = model.new_cache(2)
    first = next(iter(_tokens(model, ids, cache)))
    assert (first == want[:, 5]).all() and cache.n_ctx == 5
    assert (model.generate(want[:, :9], max_new_tokens=3, cache=cache) == want[:, :12]).all()


def _tokens(model, ids, cache):
    from npllm.decoding import loop, options, sequences

    run = sequences.Sequences(ids, np.ones(ids.shape, bool), model.config.vocab_size, 20)
    return loop.generate_tokens(model, run, options.Options(cache=cache))


@slow
def test_logits_that_are_no_distribution_raise_as_elsewhere():
    base = tiny.model(dtype=np.float32, hidden_size=128, **HEADS)
    norm = base.params.norm.copy()
    norm[3] = np.nan
    params = moved(base.params._replace(norm=norm))
    model = npllm.Model(base.config, params, ops=cuda.cuda_ops())
    cache = model.new_cache()
    model(tiny.random_ids(1, 4), cache=cache)
    one, valid = tiny.random_ids(1, 1), np.ones((1, 5), bool)
    assert model.greedy_ids(one, valid, cache, 3) is None and cache.n_ctx == 4
    with pytest.raises(npllm.NpllmError, match="NaN"):
        model.generate(tiny.random_ids(1, 4), max_new_tokens=3)


# ------------------------------------------------------------------------------------- the graph


def test_nothing_but_launches_is_captured(monkeypatch):
    """No allocation, copy or product of the library; every kernel of the step, once a token."""
    graphs, captured = [], decode_graph.captured
    monkeypatch.setattr(
        decode_graph, "captured", lambda launches: graphs.append(captured(launches)) or graphs[-1]
    )
    model, _ = pair(**HEADS)
    fed(model, tiny.random_ids(1, 8), 5)
    layer = ["linear", "rope_append", "attend_one", "linear", "linear", "linear"]
    assert [graph.names for graph in graphs] == [["embed", *layer * 2, "linear"]]


@pytest.mark.parametrize(
    "planted",
    [
        lambda plan: plan.xp.empty((3,), dtype=plan.xp.float32),
        *(
            pytest.param(call, marks=slow)
            for call in (
                lambda plan: plan.logits.get(),
                lambda plan: plan.state.set(np.zeros(plan.state.shape, np.int64)),
                lambda plan: plan.xp.astype(plan.logits, plan.xp.float32),
                lambda plan: plan.logits @ plan.xp.matrix_transpose(plan.logits),
                lambda plan: plan.xp.asarray(np.zeros(3)),
            )
        ),
    ],
)
def test_a_planted_allocation_copy_or_product_is_refused(planted, monkeypatch):
    """While the graph is captured; the first step, which is not captured, is left alone."""
    layer = decode_graph.Plan._layer

    def broken(self, number):
        if guard.CAPTURED:
            planted(self)
        layer(self, number)

    monkeypatch.setattr(decode_graph.Plan, "_layer", broken)
    model, _ = pair(**HEADS)
    with pytest.raises(guard.Refused, match="captured"):
        fed(model, tiny.random_ids(1, 7), 4)
    assert not guard.CAPTURED


def test_the_stream_of_the_stand_in_refuses_what_the_default_stream_cannot():
    with pytest.raises(guard.Refused, match="not the default one"):
        guard.Stream().begin_capture()


@slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_whole_step_is_clean_under_the_checker(seed):
    """No race, no access out of bounds, nothing read that nobody wrote; the bits stay the same."""
    model, _ = pair(num_attention_heads=4, num_key_value_heads=2)
    ids = tiny.random_ids(3, 7)
    want = fed(model, ids, 5)[0]
    with checking(seed):
        got = fed(model, ids, 5)[0]
    assert got.tobytes() == want.tobytes()


# --------------------------------------------------------------------------------- where it applies


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": np.float64},
        *(
            pytest.param(change, marks=slow)
            for change in (
                {"hidden_size": 96, "num_attention_heads": 4},
                {"n_batch": 9},
                {"mask": ops.mask.causal() | ops.mask.sliding_window(2)},
                {"padded": "right"},
                {"off": True},
                {"replaced": True},
            )
        ),
    ],
    ids=str,
)
def test_where_it_does_not_apply_the_layers_run_one_by_one(change, monkeypatch):
    ran = []
    monkeypatch.setattr(decode_graph.Plan, "_step", lambda self: ran.append(self))
    sizes = {key: change[key] for key in ("hidden_size", "num_attention_heads") if key in change}
    model, base = pair(change.get("dtype", np.float32), **HEADS | sizes)
    n_batch = change.get("n_batch", 1)
    if "mask" in change:
        model, base = (one.with_mask(change["mask"]) for one in (model, base))
    if "off" in change:
        model = model.on(model.ops.replace(decode_step=None))
    if "replaced" in change:
        model = model.with_ops(silu=ops.silu)
    ids, valid = tiny.random_ids(n_batch, 6), np.ones((n_batch, 6), bool)
    valid[0, 3] = "padded" not in change
    close(fed(model, ids, 5, valid)[0], fed(base, ids, 5, valid)[0], times=20)
    assert not ran


def test_replacing_an_operation_takes_the_whole_step_away():
    assert cuda.CUDA.decode_step is decode.decode_step
    assert cuda.CUDA.replace(rms_norm=ops.rms_norm).decode_step is None
    off = cuda.CUDA.replace(decode_step=None)
    assert (off.decode_step, off.name, off.linear) == (None, "cuda", cuda.linear)


@slow
@pytest.mark.parametrize(
    "changes",
    [
        HEADS,
        {"tie_word_embeddings": True},
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
    ],
    ids=["", "tied", "no whole groups"],
)
def test_int8_weights(changes):
    """Weights and embedding table in int8, vectors in bfloat16, beside the definitions on both."""
    _, base = pair(intermediate_size=48, **changes)  # rows of whole packs of 16
    layers = tuple(
        layer._replace(**{name: quantize(getattr(layer, name)) for name, *_ in decode.PRODUCTS})
        for layer in base.params.layers
    )
    table = quantize(base.params.embed_tokens)
    tied = base.params.lm_head is base.params.embed_tokens
    head = table if tied else quantize(base.params.lm_head)
    params = base.params._replace(embed_tokens=table, layers=layers, lm_head=head)
    there = params._replace(
        embed_tokens=table.to(guard.xp),
        lm_head=head.to(guard.xp),
        norm=moved(params.norm),
        layers=tuple(
            layer._make(
                x.to(guard.xp) if hasattr(x, "to") else moved(x) if x is not None else None
                for x in layer
            )
            for layer in layers
        ),
    )
    model = npllm.Model(base.config, there, ops=cuda.cuda_ops())
    reference = npllm.Model(base.config, params, ops=ops.reference)
    ids = tiny.random_ids(2, 9)
    guard.OPERATIONS.clear()
    close(fed(model, ids, 5)[0], fed(reference, ids, 5)[0], times=20)
    assert guard.OPERATIONS["graph"] >= 1
