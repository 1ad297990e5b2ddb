"""What a plan of the decode engine keeps from token to token, and what makes it capture anew.

Kernels run on the CPU (tests/kernel_shim.py).
"""

from types import SimpleNamespace

import guard
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from guard import moved
from kernel_shim import needs_gxx
from test_cuda_blocks import on_device
from test_cuda_engine import HEADS, LONG, fed, pair

import npllm
from npllm import ops
from npllm.kernels import cuda
from npllm.kernels.cuda import decode, decode_graph
from npllm.kernels.cuda.attention import count_splits, parts_shape
from npllm.ops.mask import causal, sliding_window
from npllm.quantized.int8 import quantize
from npllm.quantized.stacked import StackedWeight

slow = pytest.mark.slow
pytestmark = [needs_gxx, pytest.mark.usefixtures("on_the_stand_in_apart")]
MASKS = [causal(), causal()]
ROOM = {"max_position_embeddings": 256, "original_max_position_embeddings": 256}


def asked(model, cache, *, params=None, positions=None, **of_step):
    """Logits of a token of each row, by the engine on other weights, and another `Step`, than the
    model's own; they come from the layers one by one where the engine refuses.
    """

    def step_of(tokens, variants, its_params, step, tables, *numbers):
        step = step._replace(**{"masks": MASKS} | of_step)
        return decode.decode_step(tokens, variants, params or its_params, step, tables, *numbers)

    ids = tiny.random_ids(cache.n_batch, 1, seed=cache.n_ctx)
    one = model.on(model.ops.replace(decode_step=step_of))
    return one(ids, position_ids=positions, cache=cache).get()


def warm(model, n_batch=2):
    """A cache with a plan whose graph is captured."""
    cache = model.new_cache(n_batch)
    model(tiny.random_ids(n_batch, 4), cache=cache)
    guard.OPERATIONS.clear()
    for _ in range(2):
        asked(model, cache)
    assert guard.OPERATIONS["graph"] == 1
    return cache


def other_weights(params):
    """The same with another head: what changes are the logits of the next token."""
    return params._replace(lm_head=moved(-params.lm_head.get()))


# what changes between two tokens -> (of the cache, of the step)
CHANGES = {
    "weights": (None, lambda model: {"params": other_weights(model.params)}),
    "a mask": (None, lambda _: {"masks": [MASKS[0], sliding_window(2)]}),
    "eps": (None, lambda _: {"eps": 0.5}),
    "rows, which change places": (lambda cache: cache.reorder([1, 0]), lambda _: {}),
    "the number of rows": (lambda cache: cache.reorder([1]), lambda _: {}),
    "positions, behind the tables": (None, lambda _: {"positions": np.array([66])}),
}
RARE = ("eps", "the number of rows")


@pytest.mark.parametrize("what", [pytest.param(x, marks=slow) if x in RARE else x for x in CHANGES])
def test_a_step_that_changed_is_captured_anew(what):
    """After it the plan gives what a new plan gives, to the bit: that of a copy of the cache."""
    model, _ = pair(**HEADS, **ROOM)
    cache, (of_cache, of_step) = warm(model), CHANGES[what]
    unchanged = asked(model, cache.copy())
    if of_cache is not None:
        of_cache(cache)
    copy, changes = cache.copy(), of_step(model)
    for _ in range(2):  # eager, captured
        guard.OPERATIONS.clear()
        got, want = (asked(model, one, **changes) for one in (cache, copy))
        assert not np.array_equal(got, unchanged)
        close(got, want, times=0)
    assert guard.OPERATIONS["graph"] == 2


def test_what_did_not_change_is_captured_once(monkeypatch):
    graphs, captured = [], decode_graph.captured
    monkeypatch.setattr(decode_graph, "captured", lambda run: graphs.append(1) or captured(run))
    model, _ = pair(**HEADS)
    cache = warm(model)
    for _ in range(2):
        asked(model, cache)
    assert graphs == [1]


def test_logits_are_no_view_of_what_the_next_step_writes():
    """Eager, captured and replayed."""
    model, _ = pair(num_hidden_layers=1, **HEADS)
    cache, ids = model.new_cache(1), tiny.random_ids(1, 6)
    model(ids[:, :3], cache=cache)
    found = [model(ids[:, n : n + 1], cache=cache) for n in range(3, 6)]
    again, _ = fed(model, ids, 3)
    close(np.concatenate([x.get() for x in found], axis=1), again[:, 1:], times=0)


def test_rows_of_one_batch_with_different_frequencies():
    """One row is three tokens shorter, and crosses later: both tables are read meanwhile."""
    model, base = pair(num_hidden_layers=1, **LONG)
    ids, valid = tiny.random_ids(2, 18), np.ones((2, 18), bool)
    valid[0, :3] = False
    guard.OPERATIONS.clear()
    (got, cache), (want, _) = (fed(one, ids, 11, valid) for one in (model, base))
    close(got, want, times=20)
    assert guard.OPERATIONS["graph"] >= 3 and cache.rope_variant.tolist() == [1, 1]


def test_the_first_column_of_a_window_is_not_slot_0():
    """At slot 64 the arrays are full, and what the window sees moves to their begin.  Two tokens
    behind it, so that a wrong column lies in the gap behind the arrays.
    """
    model, base = pair(sliding_window=5, num_hidden_layers=1, **ROOM)
    ids = tiny.random_ids(2, 66)
    guard.OPERATIONS.clear()
    (got, cache), (want, _) = (fed(one, ids, 62) for one in (model, base))
    close(got, want, times=20)
    assert guard.OPERATIONS["graph"] >= 2
    assert [(layer[2], layer[0].shape[-2]) for layer in cache.state.layers] == [(60, 64)]


@pytest.mark.parametrize("windows", [(5, 150), pytest.param((150, 5), marks=slow)])
def test_every_layer_has_room_for_its_splits(windows, monkeypatch):
    """One layer sees five keys, the other more than one split of 128."""
    launch, n_splits = decode_graph.launch_attend, []

    def checked(q, k, v, y, parts, place, *, n_split, **options):
        seen = min(k.shape[-2], place.high - place.low)
        assert n_split == count_splits(seen)
        room = 0 if parts is None else parts.size
        assert n_split == 1 or room >= parts_shape(q, n_split)[0]
        n_splits.append(n_split)
        launch(q, k, v, y, parts, place, n_split=n_split, **options)

    monkeypatch.setattr(decode_graph, "launch_attend", checked)
    masks = [sliding_window(n) for n in windows]
    model, base = (one.with_mask(masks) for one in pair(**HEADS, **ROOM))
    ids = tiny.random_ids(1, 133)
    close(fed(model, ids, 130)[0], fed(base, ids, 130)[0], times=20)
    assert n_splits[-2:] == [count_splits(min(n, 256)) for n in windows]


# --------------------------------------------------------------------------------- where it applies


def step_of(model, **changes):
    """What the engine is told of a model besides weights and tokens."""
    config = model.config
    n_head, n_kv_head = config.num_attention_heads, config.num_key_value_heads
    step = ops.Step(None, None, n_head, n_kv_head, config.rms_norm_eps, MASKS)
    return step._replace(**changes)


def of_layers(params, **changes):
    """Weights with some of every layer replaced: name -> function of the array in NumPy."""
    layers = [
        layer._replace(**{name: change(getattr(layer, name)) for name, change in changes.items()})
        for layer in params.layers
    ]
    return params._replace(layers=tuple(layers))


def halves(weight):
    n = weight.shape[0] // 2
    return StackedWeight((weight[:n], weight[n:]))


def wide(x):
    return x.astype(np.float32)


def bias(_):
    return np.full(256, 0.25, np.float32)


# name -> dtype of the weights, change of params that no kernel takes
REFUSED = {
    "gate and up in two parts": (np.float32, lambda p: of_layers(p, gate_up_proj=halves)),
    "gains in another type": (ml_dtypes.bfloat16, lambda p: of_layers(p, input_layernorm=wide)),
    "the gain of the mlp in another type": (
        ml_dtypes.bfloat16,
        lambda p: of_layers(p, post_attention_layernorm=wide),
    ),
    "the last gain in another type": (
        ml_dtypes.bfloat16,
        lambda p: p._replace(norm=wide(p.norm)),
    ),
    "a bias in another type": (ml_dtypes.bfloat16, lambda p: of_layers(p, qkv_bias=bias)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_weights_that_no_kernel_takes(what, monkeypatch):
    """A kernel reads gains and biases in the type of the weight, and gates one matrix."""
    dtype, change = REFUSED[what]
    _, base = pair(dtype, num_attention_heads=4, num_key_value_heads=2)
    assert decode.applies(on_device(base.params), step_of(base))
    params = change(base.params)
    assert not decode.applies(on_device(params), step_of(base))
    monkeypatch.setattr(decode_graph.Plan, "_step", lambda _: pytest.fail("the engine ran"))
    mine = npllm.Model(base.config, on_device(params), ops=cuda.cuda_ops())
    theirs, ids = npllm.Model(base.config, params, ops=ops.reference), tiny.random_ids(1, 6)
    close(fed(mine, ids, 5)[0], fed(theirs, ids, 5)[0], times=20)


@pytest.mark.parametrize(
    ("dtype", "is_taken"), [(np.float32, True), (ml_dtypes.bfloat16, True), (np.float64, False)]
)
def test_vectors_beside_a_packed_weight(dtype, is_taken):
    """They are widened to float32, which float64 would not be."""
    _, base = pair(**HEADS)
    changes = {"qkv_proj": quantize, "input_layernorm": lambda x: x.astype(dtype)}
    params = on_device(of_layers(base.params, **changes))
    assert decode.applies(params, step_of(base)) == is_taken


def test_an_id_beyond_the_embedding_is_not_taken(monkeypatch):
    """The kernel would read beyond the array."""
    model, base = pair(**HEADS)
    head = np.concatenate([base.params.lm_head] * 2)
    longer = on_device(base.params._replace(lm_head=head))
    assert not decode.applies(longer, step_of(model))
    cache = model.new_cache()
    model(tiny.random_ids(1, 4), cache=cache)
    monkeypatch.setattr(decode_graph.Plan, "_step", lambda _: pytest.fail("the engine ran"))
    for token in (model.params.embed_tokens.shape[0], -1):
        tokens = SimpleNamespace(
            ids=np.array([[token]]), valid=np.ones((1, 5), bool), positions=np.array([4])
        )
        step = step_of(model, cache=cache)
        assert decode.decode_step(tokens, None, model.params, step, None) is NotImplemented


def test_a_step_without_masks_is_not_taken():
    """Every key is visible then, those of columns that hold no token yet among them."""
    model, _ = pair(**HEADS)
    assert decode.applies(model.params, step_of(model))
    assert not decode.applies(model.params, step_of(model, masks=None))


def test_a_refused_model_is_looked_at_once_for_a_cache(monkeypatch):
    """Again for other weights, other masks and another cache; then it may be taken."""
    looked, applies = [], decode.applies
    monkeypatch.setattr(decode, "applies", lambda *x: looked.append(x[0]) or applies(*x))
    model, _ = pair(**HEADS)
    refused = model.params._replace(norm=moved(wide(model.params.norm.get())))
    no_band = [causal() | sliding_window(2)] * 2

    def looks(cache, **changes):
        looked.clear()
        guard.OPERATIONS.clear()
        for _ in range(2):
            asked(model, cache, **changes)
        return len(looked), guard.OPERATIONS["graph"]

    cache = model.new_cache(1)
    model(tiny.random_ids(1, 4), cache=cache)
    assert looks(cache, params=refused) == (1, 0)
    assert looks(cache.copy(), params=refused) == (1, 0)
    assert looks(cache, params=refused) == (0, 0)
    assert looks(cache) == (1, 1)
    other = cache.copy()
    assert looks(other, masks=no_band) == (1, 0)
    assert looks(other, params=refused, masks=no_band) == (1, 0)
    assert looks(other, masks=no_band) == (1, 0)
    assert looks(other) == (1, 1)


@pytest.mark.parametrize("of_keys", [np.float64, np.float32])
def test_keys_of_a_type_that_no_kernel_writes(of_keys, monkeypatch):
    """Values in float64, keys as well or not: the layers run one by one."""
    model, base = pair(**HEADS)
    monkeypatch.setattr(decode_graph.Plan, "_step", lambda _: pytest.fail("the engine ran"))
    ids, found = tiny.random_ids(1, 7), []
    for one in (model, base):
        cache = one.new_cache(1)
        one(ids[:, :5], cache=cache)
        xp = npllm.arrays.array_namespace(one.params.norm)
        with np.errstate(invalid="ignore"):  # of columns that hold nothing
            layers = [
                (xp.astype(k, of_keys), xp.astype(v, np.float64), first)
                for k, v, first in cache.state.layers
            ]
        cache.load_state(cache.state._replace(layers=layers))
        found.append([npllm.arrays.to_numpy(one(ids[:, n : n + 1], cache=cache)) for n in (5, 6)])
    close(np.stack(found[0]), np.stack(found[1]), times=20)


def test_more_tokens_than_there_is_room_for_are_not_queued(monkeypatch):
    assert decode.MOST_QUEUED is decode_graph.MOST_QUEUED
    for module in (decode, decode_graph):
        monkeypatch.setattr(module, "MOST_QUEUED", 3)
    model, base = pair(num_hidden_layers=1, **HEADS)
    ids = tiny.random_ids(1, 6)
    cache, valid = model.new_cache(1), np.ones((1, 6), bool)
    model(ids[:, :5], cache=cache)
    assert model.greedy_ids(ids[:, 5:], valid, cache, 4) is None and cache.n_ctx == 5
    want = base.generate(ids, max_new_tokens=3)[:, 6:]
    assert (model.greedy_ids(ids[:, 5:], valid, cache, 3) == want).all() and cache.n_ctx == 8
