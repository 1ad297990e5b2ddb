"""npllm.model and npllm.models.phi3: laws of the whole forward pass, on tiny random models."""

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
from close import close
from composed import Composed
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIG, Counted, model, random_ids, write_folder

import npllm
from npllm import ops
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError
from npllm.kernels import fastest_ops
from npllm.models import phi3, taps

N_VOCAB = CONFIG["vocab_size"]
LONGROPE = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
    "original_max_position_embeddings": 12,
}
VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 5},
    "wide head": {"head_dim": 14},
    "partial rope": {"partial_rotary_factor": 0.5},
    "one layer": {"num_hidden_layers": 1},
    "longrope": LONGROPE,
    "longrope, window": LONGROPE | {"sliding_window": 5},
}
SIZES = {
    "n_batch": 3,
    "n_seq": 5,
    "n_kept": 5,
    "n_ctx": 5,
    "d_model": 32,
    "d_qkv": 64,
    "n_head": 4,
    "n_kv_head": 2,
    "d_head": 8,
    "n_head*d_head": 32,
    "2*d_ff": 80,
    "d_ff": 40,
    "d_rope": 8,
    "n_vocab": N_VOCAB,
}


def named_values(cached):
    """Every name that a tap of the two-layer model sees, in order, with its axes as
    `npllm.models.taps` lists them.
    """
    rows = [
        (name, axes.strip("[]").split(", "))
        for name, (axes, _) in taps.NAMES.items()
        if cached or ".cached_" not in name
    ]
    layer = [row for row in rows if ".N" in row[0]]
    first, last = rows.index(layer[0]), rows.index(layer[-1]) + 1
    layers = [(name.replace(".N", f".{n}"), axes) for n in range(2) for name, axes in layer]
    return dict(rows[:first] + layers + rows[last:])


NAMES = list(named_values(False))

OF_OTHER_BLOCKS = {
    "layer_norm",
    "relu",
    "gelu",
    "silu",
    "add_positions",
}  # operations that no Phi-3 layer calls


@pytest.fixture(scope="module", params=VARIANTS)
def any_model(request):
    return model(**VARIANTS[request.param])


def in_chunks(m, ids, cuts, attention_mask=None):
    """Logits of a sequence that goes through a cache piece by piece."""
    cache, edges = m.new_cache(len(ids)), [0, *sorted(cuts), ids.shape[1]]
    parts = [
        m(
            ids[:, a:b],
            cache=cache,
            attention_mask=None if attention_mask is None else attention_mask[:, :b],
        )
        for a, b in pairwise(edges)
        if b > a
    ]
    return np.concatenate(parts, axis=1)


def padded(lengths, n_seq, side="left", seed=0):
    """Random rows of the given lengths, the mask, and where each row's tokens stand."""
    ids, mask = random_ids(len(lengths), n_seq, seed), np.zeros((len(lengths), n_seq), np.int64)
    places = [slice(n_seq - n, n_seq) if side == "left" else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        mask[row, place] = 1
    return ids, mask, places


# ------------------------------------------------------------------------------------------------------- cached and uncached agree


@given(st.data())
@settings(max_examples=12)
def test_any_split_into_chunks_gives_the_logits_of_the_whole(any_model, data):
    n_batch, n_seq = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    cuts = data.draw(st.lists(st.integers(0, n_seq), max_size=5))
    ids = random_ids(n_batch, n_seq, data.draw(st.integers(0, 99)))
    close(in_chunks(any_model, ids, cuts), any_model(ids), times=2)


@given(st.data())
@settings(max_examples=8)
@pytest.mark.parametrize("variant", ["gqa", "window", "longrope"])
def test_in_float64_any_split_agrees_to_float64(variant, data):
    m = model(dtype=np.float64, **VARIANTS[variant])
    n_seq = data.draw(st.integers(1, 12))
    ids = random_ids(2, n_seq, data.draw(st.integers(0, 99)))
    close(in_chunks(m, ids, data.draw(st.lists(st.integers(0, n_seq), max_size=5))), m(ids))


@given(st.data())
@settings(max_examples=8)
def test_any_split_agrees_under_left_padding(any_model, data):
    n_seq = data.draw(st.integers(2, 12))
    lengths = data.draw(st.lists(st.integers(1, n_seq), min_size=1, max_size=3))
    ids, mask, places = padded(lengths, n_seq, seed=data.draw(st.integers(0, 99)))
    got = in_chunks(any_model, ids, data.draw(st.lists(st.integers(0, n_seq), max_size=4)), mask)
    whole = any_model(ids, attention_mask=mask)
    for row, place in enumerate(places):
        close(got[row, place], whole[row, place], times=2)


def test_a_long_prompt_goes_through_in_chunks_of_its_own(monkeypatch):
    m = model(sliding_window=7)
    ids, whole = random_ids(2, 40), model(sliding_window=7)(random_ids(2, 40))
    monkeypatch.setattr(npllm.forward_pass, "PREFILL_CHUNK", 6)
    cache = m.new_cache(2)
    close(m(ids[:, :33], cache=cache), whole[:, :33], times=2)
    close(m(ids[:, 33:], cache=cache), whole[:, 33:], times=2)
    assert cache.n_ctx == 40


def test_a_cache_that_outgrows_its_first_arrays_keeps_what_it_holds():
    m = model(max_position_embeddings=150)
    ids = random_ids(2, 150)
    close(in_chunks(m, ids, range(40, 150, 13)), m(ids), times=2)


def test_longrope_switches_each_row_by_its_own_length():
    m = model(**LONGROPE)
    ids, mask, places = padded([10, 18, 13], 18)
    want = [m(ids[row : row + 1, place]) for row, place in enumerate(places)]
    got = in_chunks(m, ids, [11, 14], mask)
    for row, place in enumerate(places):
        close(m(ids, attention_mask=mask)[row, place], want[row][0], times=2)
        close(got[row, -1], want[row][0, -1], times=2)


@pytest.mark.parametrize("n_seq, used", [(12, "short_factor"), (13, "long_factor")])
def test_longrope_takes_the_long_factors_beyond_the_original_context(n_seq, used):
    factors, ids = LONGROPE["rope_scaling"], random_ids(1, n_seq)
    only = model(
        **LONGROPE
        | {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": factors[used],
                "long_factor": factors[used],
            }
        }
    )
    close(model(**LONGROPE)(ids), only(ids), times=0)


def test_two_caches_do_not_know_of_each_other():
    m = model()
    a, b, ids = m.new_cache(), m.new_cache(), random_ids(1, 12)
    m(ids[:, :5], cache=a)
    m(ids[:, 2:9], cache=b)
    close(m(ids[:, 5:], cache=a), m(ids)[:, 5:], times=2)


# ------------------------------------------------------------------------------------------------------------ batches and padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_equals_the_row_alone(any_model, side):
    ids, mask, places = padded([9, 4, 1, 6], 9, side)
    batch = any_model(ids, attention_mask=mask)
    for row, place in enumerate(places):
        close(batch[row, place], any_model(ids[row : row + 1, place])[0], times=2)


def test_each_row_of_a_full_batch_equals_the_row_alone(any_model):
    ids = random_ids(3, 8)
    for row, logits in enumerate(any_model(ids)):
        close(logits, any_model(ids[row : row + 1])[0], times=2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_change_by_a_bit_when_its_neighbour_does(any_model, side):
    ids, mask, places = padded([7, 5], 7, side)
    other = ids.copy()
    other[0] = random_ids(1, 7, seed=9)
    close(
        any_model(other, attention_mask=mask)[1, places[1]],
        any_model(ids, attention_mask=mask)[1, places[1]],
        times=0,
    )


def test_what_stands_under_the_padding_does_not_change_a_bit(any_model):
    ids, mask, places = padded([7, 5], 7)
    other = np.where(mask == 1, ids, (ids + 5) % N_VOCAB)
    close(
        any_model(other, attention_mask=mask)[1, places[1]],
        any_model(ids, attention_mask=mask)[1, places[1]],
        times=0,
    )


def test_padding_of_either_side_stays_finite():
    ids, mask, _ = padded([7, 5, 0], 7)
    assert np.isfinite(model()(ids, attention_mask=mask)).all()


def test_a_mask_of_ones_is_no_mask():
    m, ids = model(), random_ids(2, 6)
    for ones in (np.ones((2, 6), int), np.ones((2, 6), bool), np.ones((2, 6)), [[1] * 6] * 2):
        close(m(ids, attention_mask=ones), m(ids), times=0)


def test_padding_goes_with_a_rule_that_cannot_be_hashed():
    class Near:
        __hash__ = None

        def __call__(self, i, j):
            return (j <= i) & (i - j < 3)

    ids, mask, _ = padded([12, 7], 12)
    near, window = (
        model().with_mask(rule) for rule in (ops.mask.Rule(Near()), ops.mask.sliding_window(3))
    )
    close(near(ids, attention_mask=mask), window(ids, attention_mask=mask), times=2)


def test_padding_in_the_cache_stays_hidden_without_a_mask():
    m = model()
    ids, mask, _ = padded([4, 7], 7)
    new, cache = random_ids(2, 2, seed=5), m.new_cache(2)
    m(ids, cache=cache, attention_mask=mask)
    alone = m(np.concatenate([ids[:1, 3:], new[:1]], axis=1))
    close(m(new, cache=cache)[0], alone[0, -2:], times=2)


def test_left_padding_takes_slots_of_the_window_as_in_transformers():
    m = model(sliding_window=3)
    ids, mask, _ = padded([5], 9)
    close(m(ids, attention_mask=mask)[:, 4:], m(ids[:, 4:]), times=2)


def test_a_token_sees_exactly_the_window():
    m = model(sliding_window=4, num_hidden_layers=1)
    ids = random_ids(1, 10)
    for changed in range(10):
        other = ids.copy()
        other[0, changed] = (ids[0, changed] + 1) % N_VOCAB
        differs = (m(other) != m(ids)).any(axis=-1)[0]
        assert differs.nonzero()[0].tolist() == [*range(changed, min(changed + 4, 10))]


def test_a_token_sees_all_earlier_ones_and_no_later_one():
    m = model(num_hidden_layers=1)
    ids = random_ids(1, 10)
    for changed in range(10):
        other = ids.copy()
        other[0, changed] = (ids[0, changed] + 1) % N_VOCAB
        assert (m(other) != m(ids)).any(axis=-1)[0].nonzero()[0].tolist() == [*range(changed, 10)]


def test_a_window_as_wide_as_the_text_is_no_window():
    ids = random_ids(1, 9)
    close(model(sliding_window=9)(ids), model()(ids), times=0)
    with pytest.raises(AssertionError):
        close(model(sliding_window=8)(ids), model()(ids), times=20)


# ------------------------------------------------------------------------------------------------------- positions, logits_to_keep


def test_positions_may_be_given_by_sequence_or_for_all():
    m, ids = model(), random_ids(2, 6)
    for positions in (
        np.arange(6),
        np.arange(6)[None],
        np.tile(np.arange(6), (2, 1)),
        [*range(6)],
        np.arange(6, dtype=np.int32),
    ):
        close(m(ids, position_ids=positions), m(ids), times=0)


def test_rope_knows_distances_only():
    m, ids = model(), random_ids(2, 6)
    close(m(ids, position_ids=np.arange(6) + 17), m(ids), times=4)
    with pytest.raises(AssertionError):
        close(m(ids, position_ids=np.arange(6) * 2), m(ids), times=1000)


def test_each_row_has_its_own_positions():
    m, ids = model(), random_ids(2, 6)
    positions = np.array([np.arange(6), np.arange(6) * 3])
    got = m(ids, position_ids=positions)
    for row in range(2):
        close(got[row], m(ids[row : row + 1], position_ids=positions[row])[0], times=2)


def test_positions_default_to_what_the_mask_counts():
    m = model()
    ids, mask, places = padded([4, 6], 6)
    positions = np.array([[9, 9, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    got, want = m(ids, attention_mask=mask, position_ids=positions), m(ids, attention_mask=mask)
    for row, place in enumerate(places):
        close(got[row, place], want[row, place], times=0)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 100])
def test_logits_to_keep_keeps_the_last(n):
    m, ids = model(), random_ids(2, 6)
    close(m(ids, logits_to_keep=n), m(ids)[:, -n:], times=1)


def test_logits_to_keep_0_keeps_all():
    assert model()(random_ids(2, 6), logits_to_keep=0).shape == (2, 6, N_VOCAB)


def test_logits_are_computed_only_where_they_are_kept():
    rows = []
    m = model(
        ops=ops.blockwise.replace(
            linear=lambda x, w, bias=None: (
                rows.append((w.shape[0], x.shape[1])),
                ops.linear(x, w, bias),
            )[1]
        )
    )
    m(random_ids(1, 6), logits_to_keep=2)
    assert rows[-1] == (N_VOCAB, 2)


# ------------------------------------------------------------------------------------------------------------------- dtypes, inputs


@pytest.mark.parametrize(
    "stored, computed",
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_everything_is_computed_in_float32_or_float64(tmp_path, stored, computed):
    seen = {}
    m = npllm.load(write_folder(tmp_path), dtype=stored)
    cache = m.new_cache()
    m(random_ids(1, 4), cache=cache, tap=lambda name, x: seen.setdefault(name, x))
    assert {x.dtype.name for x in seen.values()} == {computed}
    assert {
        x.dtype.name for layer in range(m.config.num_hidden_layers) for x in cache.kept(layer)[:2]
    } == {computed}


def test_float32_stays_close_to_float64():
    ids = random_ids(2, 9)
    w32, w64 = model(), model(dtype=np.float64)
    exact = npllm.Model(w64.config, _astype(w32.params, np.float64))(ids)
    close(w32(ids), exact, dtype="float32", times=2)


def _astype(params, dtype):
    return params._replace(
        embed_tokens=params.embed_tokens.astype(dtype),
        norm=params.norm.astype(dtype),
        lm_head=params.lm_head.astype(dtype),
        layers=tuple(
            type(layer)(*(None if x is None else x.astype(dtype) for x in layer))
            for layer in params.layers
        ),
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_may_be_any_integers_also_in_a_list(dtype):
    m, ids = model(), random_ids(2, 5)
    close(m(ids.astype(dtype)), m(ids), times=0)
    close(m(ids.tolist()), m(ids), times=0)


def test_no_input_is_written_to():
    m, (ids, mask, _) = model(), padded([4, 6], 6)
    positions = np.arange(6)
    for x in (
        ids,
        mask,
        positions,
        *m.params[:1],
        *m.params.layers[0][:6],
        m.params.norm,
        m.params.lm_head,
    ):
        x.flags.writeable = False
    before = ids.copy()
    m(ids, attention_mask=mask, position_ids=positions, cache=m.new_cache(2))
    close(ids, before)


def test_the_same_call_gives_the_same_bits():
    m, ids = model(), random_ids(2, 9)
    close(m(ids), m(ids), times=0)


# ---------------------------------------------------------------------------------------------------------------------------- taps


def test_every_name_is_tapped_once_with_its_shape():
    seen = []
    model()(random_ids(3, 5), tap=lambda name, x: (seen.append((name, x.shape)), x)[1])
    assert [name for name, _ in seen] == NAMES
    for name, shape in seen:
        assert shape == tuple(SIZES[axis] for axis in named_values(False)[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_what_a_tap_returns_is_what_the_model_goes_on_with(name):
    m, ids = model(), random_ids(1, 5)
    plain = m(ids)
    changed = m(ids, tap=lambda at, x: np.flip(x, axis=-1) if at == name else x)
    if name == "lm_head":
        return close(changed, np.flip(plain, axis=-1), times=1)
    assert np.abs(changed - plain).max() > 1e-3


def test_a_tapped_run_equals_an_untapped_one(any_model):
    ids, mask, _ = padded([9, 5], 9)
    close(
        any_model(ids, attention_mask=mask, tap=lambda _, x: x),
        any_model(ids, attention_mask=mask),
        times=1,
    )


def test_a_tap_sees_a_cached_run_as_well():
    m, ids, seen = model(), random_ids(1, 8), {}
    cache = m.new_cache()
    m(ids[:, :6], cache=cache)
    close(
        m(ids[:, 6:], cache=cache, tap=lambda name, x: seen.setdefault(name, x)),
        m(ids)[:, 6:],
        times=2,
    )
    assert list(seen) == list(named_values(True)) and seen["model.layers.1.self_attn.k"].shape == (
        1,
        2,
        2,
        8,
    )


class Spy:
    """A tap that asks for the tables of n_seq x n_ctx as well."""

    pairs = True

    def __init__(self):
        self.seen = {}

    def __call__(self, name, x):
        return self.seen.setdefault(name, x)


@pytest.mark.parametrize("cached", [False, True])
def test_mask_and_weights_are_shown_on_request(cached):
    m, spy, ids = model(sliding_window=3), Spy(), random_ids(1, 6)
    cache = m.new_cache() if cached else None
    m(ids[:, :4], cache=cache)
    m(ids[:, 4:] if cached else ids, cache=cache, tap=spy)
    at = "model.layers.1.self_attn."
    weights, visible = spy.seen[at + "weights"], spy.seen[at + "mask"]
    assert not weights[..., ~np.broadcast_to(visible, weights.shape[-2:])].any()
    values = np.repeat(
        spy.seen[at + ("cached_v" if cached else "v")], 2, axis=1
    )  # 4 query heads, 2 of values
    close(weights @ values, spy.seen[at + "heads"], times=4)


def test_a_tap_cannot_change_a_value_in_place():
    with pytest.raises(ValueError, match="read-only"):
        model()(random_ids(1, 3), tap=lambda _, x: x.__setitem__(..., 0))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda _: None, "must return an array of numpy, got builtins.NoneType"),
        (
            lambda x: x.astype(np.float64),
            "must return an array of numpy, float32, got numpy, float64",
        ),
        (lambda x: x[..., :1], r"must return the shape \[1, 3, 32\], got \[1, 3, 1\]"),
    ],
)
def test_what_a_tap_returns_is_checked(returned, said):
    with pytest.raises(NpllmError, match="the tap of model.layers.1.residual " + said):
        model()(
            random_ids(1, 3),
            tap=lambda name, x: returned(x) if name == "model.layers.1.residual" else x,
        )


def test_model_and_lm_head_take_a_tap():
    m, seen = model(), {}
    hidden = m.model(random_ids(1, 3), tap=lambda name, x: seen.setdefault(name, x))
    assert list(seen) == NAMES[:-2]
    logits = m.lm_head(hidden, tap=lambda name, x: seen.setdefault(name, x))
    assert list(seen) == NAMES
    close(seen["lm_head"], logits, times=0)


@pytest.mark.parametrize("slot", ops.SLOTS)
@pytest.mark.parametrize("tap", [None, lambda _, x: x], ids=["plain", "tapped"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_slot_of_the_callers_runs_with_and_without_a_tap(slot, tap, cached):
    calls, definition = [], Composed(ops.reference)

    def mine(*args):
        calls.append(1)
        return NotImplemented if slot not in COMPUTED else COMPUTED[slot](definition, *args)

    m, ids = model(), random_ids(1, 4)
    got = npllm.Model(m.config, m.params, ops=ops.blockwise.replace(**{slot: mine}))
    close(got(ids, cache=got.new_cache() if cached else None, tap=tap), m(ids), times=4)
    assert calls


COMPUTED = {
    "norm_linear": Composed.norm_linear,
    "norm_swiglu": Composed.norm_swiglu,
    "linear_add": Composed.linear_add,
    "rope_attention": lambda o, qkv, step: phi3.rope_attention(qkv, step, o.ops),
    "attention_block": lambda o, x, layer, step: phi3.attention_block(x, layer, step, o.ops),
    "mlp_block": lambda o, x, layer, step: phi3.mlp_block(x, layer, step, o.ops),
    "decoder_layers": lambda o, x, layers, step: phi3.decoder_layers(x, layers, step, o.ops),
}


def test_taps_name_the_residual_stream_and_what_is_added_to_it():
    seen = {}
    model()(random_ids(1, 5), tap=lambda name, x: seen.setdefault(name, x))
    for n, before in enumerate(["model.embed_tokens", "model.layers.0"]):
        at = f"model.layers.{n}"
        close(
            seen[at],
            seen[before] + seen[f"{at}.self_attn.o_proj"] + seen[f"{at}.mlp.down_proj"],
            times=1,
        )


# ------------------------------------------------------------------------------------------------------------- ops are an argument


CALLS_A_LAYER = {
    "norm_linear": 2,
    "rope_attention": 1,
    "linear_add": 2,
    "norm_swiglu": 1,
    "attention": 1,
    "apply_rope": 2,
    "swiglu": 1,
    "add": 2,
    "rms_norm": 2,
    "linear": 4,
    "attention_block": 1,
    "mlp_block": 1,
}
CALLS_A_RUN = {
    "embed": 1,
    "rope_tables": 1,
    "rms_norm": 1,
    "linear": 1,
    "decoder_layers": 1,
}  # rms_norm: the final norm; linear: lm_head


@pytest.mark.parametrize("base", [ops.reference, ops.blockwise], ids=lambda base: base.name)
@pytest.mark.parametrize("name", sorted(CALLS_A_LAYER | CALLS_A_RUN))
def test_a_replaced_op_runs_in_prefill_and_in_decode(base, name):
    calls = []
    op = getattr(base, name) or (lambda *_: NotImplemented)  # an empty slot declines
    m = model(
        ops=base.replace(
            **{name: lambda *args, **kwargs: (calls.append(1), op(*args, **kwargs))[1]}
        )
    )
    cache = m.new_cache()
    for n_seq in (5, 1):
        calls.clear()
        m(random_ids(1, n_seq), cache=cache)
        assert len(calls) == 2 * CALLS_A_LAYER.get(name, 0) + CALLS_A_RUN.get(name, 0)


def test_the_counts_name_every_op_a_decoder_has():
    assert (CALLS_A_LAYER | CALLS_A_RUN).keys() == set(ops.Ops.names()) - OF_OTHER_BLOCKS


def test_under_a_tap_a_replaced_op_is_still_the_one_that_runs():
    counted = Counted()
    model(ops=counted.ops)(random_ids(1, 5), tap=lambda _, x: x)
    assert counted.calls.keys() == set(ops.Ops.names()) - OF_OTHER_BLOCKS
    assert (
        counted.calls | {"rms_norm": 5, "linear": 9, "apply_rope": 4, "attention": 2, "swiglu": 2}
        == counted.calls
    )


def test_replacing_a_part_of_a_slot_empties_the_slot():
    calls = []
    m = model(
        ops=ops.blockwise.replace(rms_norm=lambda *args: (calls.append(1), ops.rms_norm(*args))[1])
    )
    m(random_ids(1, 5))
    assert len(calls) == 5


def test_definition_and_blockwise_attention_give_the_same_model(any_model):
    ids, mask, _ = padded([12, 7], 12)
    definition = npllm.Model(any_model.config, any_model.params, ops=ops.reference)
    close(definition(ids, attention_mask=mask), any_model(ids, attention_mask=mask), times=1)


def test_attention_never_gets_a_table_of_n_times_n():
    shapes = []

    def attention(q, k, v, *, mask=None, **options):
        shapes.append(getattr(mask, "shape", None))
        return ops.blockwise_attention(q, k, v, mask=mask, **options)

    ids, mask, _ = padded([9, 5], 9)
    model(ops=ops.blockwise.replace(attention=attention))(ids, attention_mask=mask)
    assert shapes == [None, None]


def test_a_layer_scores_nothing_but_what_the_op_returns():
    zero = model(
        ops=ops.blockwise.replace(
            attention=lambda q, *_args, **_options: np.zeros_like(q),
            swiglu=lambda gate, up: np.zeros_like(gate * up),
        )
    )
    ids = random_ids(1, 4)
    close(
        zero.model(ids),
        ops.rms_norm(zero.params.embed_tokens[ids], zero.params.norm, 1e-5),
        times=0,
    )


# -------------------------------------------------------------------------------------------------------------------- the two halves


def test_hidden_state_then_scores_is_the_whole(any_model):
    ids, mask, _ = padded([9, 5], 9)
    hidden = any_model.model(ids, attention_mask=mask)
    assert hidden.shape == (2, 9, 32)
    close(any_model.lm_head(hidden), any_model(ids, attention_mask=mask), times=0)
    close(any_model.lm_head(hidden[0, -1]), any_model(ids, attention_mask=mask)[0, -1], times=1)


def test_a_model_prints_as_a_tree_and_knows_its_folder(tmp_path):
    m = npllm.load(write_folder(tmp_path / "tiny"))
    assert str(m).startswith(
        "Phi3ForCausalLM(\n  (model): Phi3Model(\n    (embed_tokens): Embedding(61, 32)\n"
    )
    assert "(0-1): 2 x Phi3DecoderLayer(" in str(
        m
    ) and "qkv_proj): Linear(in_features=32, out_features=64, bias=False)" in str(m)
    assert repr(m) == f"<npllm.Model tiny, {fastest_ops().name} ops, mask {m.mask_rule()!r}>"


def test_the_walk_through_of_the_book_ends_in_paris(default_model):
    ids = np.array([default_model.tokenizer.encode("The capital of France is")])
    assert ids.tolist() == [[504, 3575, 282, 4649, 314]]
    hidden = default_model.model(ids)
    scores = default_model.lm_head(hidden)
    assert hidden.shape == (1, 5, 576) and scores.shape == (1, 5, 49152)
    assert default_model.tokenizer.decode([scores[0, -1].argmax()]) == " Paris"


def test_the_default_checkpoint_is_mapped_not_copied(default_model):
    params = default_model.params
    assert params.lm_head is params.embed_tokens
    for x in (
        params.embed_tokens,
        params.norm,
        *(x for layer in params.layers for x in layer if x is not None),
    ):
        while x.base is not None and not isinstance(x, np.memmap):
            x = x.base
        assert isinstance(x, np.memmap) and not x.flags.writeable


def test_the_default_checkpoint_decodes_as_it_prefills(default_model):
    ids = np.array([[504, 3575, 282, 4649, 314, 7042, 30, 198]])
    close(in_chunks(default_model, ids, [3, 4, 7]), default_model(ids), times=2)


# ------------------------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize(
    "suffix, shape", [("ForSequenceClassification", (2, 3)), ("ForTokenClassification", (2, 6, 3))]
)
def test_classifiers_score_classes(tmp_path, suffix, shape):
    m = npllm.load(write_folder(tmp_path, architectures=["Phi3" + suffix], num_labels=3))
    ids, mask, places = padded([4, 6], 6)
    got = m(ids, attention_mask=mask)
    assert got.shape == shape
    close(got[0] if got.ndim == 2 else got[0, -1], _alone(m(ids[:1, places[0]])), times=2)
    with pytest.raises(NpllmValueError, match=f"Phi3{suffix} has no lm_head"):
        m.lm_head(m.model(ids))


def _alone(logits):
    return logits[0] if logits.ndim == 2 else logits[0, -1]


def test_a_sequence_is_classified_at_its_last_token_that_is_no_padding(tmp_path):
    m = npllm.load(
        write_folder(
            tmp_path, architectures=["Phi3ForSequenceClassification"], num_labels=3, pad_token_id=0
        )
    )
    ids = random_ids(1, 6)
    right = np.concatenate([ids, np.zeros((1, 3), int)], axis=1)
    close(m(right), m(ids), times=2)
    close(m(right, attention_mask=(right != 0) * 1), m(ids), times=2)


# ------------------------------------------------------------------------------------------------------- a pass that fails midway


@pytest.mark.parametrize("variant", ["gqa", "window", "longrope"])
@pytest.mark.parametrize("chunk", [3, 512])
def test_a_pass_that_fails_midway_leaves_the_cache_usable(monkeypatch, variant, chunk):
    m = model(max_position_embeddings=200, **{k: v for k, v in VARIANTS[variant].items()})
    monkeypatch.setattr(npllm.forward_pass, "PREFILL_CHUNK", chunk)
    ids, cache, calls = random_ids(2, 24), m.new_cache(2), []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 2 * (10 // chunk) + 2:
            raise KeyboardInterrupt
        return ops.blockwise_attention(*args, **options)

    m(ids[:, :9], cache=cache)
    broken = npllm.Model(m.config, m.params, ops=ops.blockwise.replace(attention=failing))
    with pytest.raises(KeyboardInterrupt):
        broken(random_ids(2, 11, seed=3), cache=cache)
    assert cache.n_ctx == 9
    whole = m(ids)
    close(m(ids[:, 9:20], cache=cache)[:, -1], m(ids[:, :20])[:, -1], times=2)
    close(m(ids[:, 20:], cache=cache)[:, -1], whole[:, -1], times=2)


def test_a_refused_call_leaves_the_cache_as_it_was():
    m, ids = model(max_position_embeddings=10), random_ids(1, 10)
    cache = m.new_cache()
    m(ids[:, :6], cache=cache)
    for bad in (
        lambda: m(ids[:, :5], cache=cache),
        lambda: m(np.array([[-1]]), cache=cache),
        lambda: m(ids[:, :2].repeat(2, 0), cache=cache),
        lambda: m(ids[:, :2], cache=cache, attention_mask=np.ones((1, 2))),
        lambda: m(ids[:, :2], cache=cache, position_ids=np.arange(3)),
        lambda: m(ids[:, :2], cache=cache, logits_to_keep=-1),
    ):
        with pytest.raises(NpllmError):
            bad()
    close(m(ids[:, 6:], cache=cache), m(ids)[:, 6:], times=2)


def test_models_do_not_keep_themselves_alive(tmp_path):
    m = npllm.load(write_folder(tmp_path))
    m(random_ids(1, 3))
    there = weakref.ref(m)
    del m
    gc.collect()
    assert there() is None


# -------------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "ids", [np.array([[1, -1]]), np.array([[1, N_VOCAB]]), np.array([[2**40]])]
)
def test_ids_outside_the_vocabulary_are_refused_with_the_range(ids):
    with pytest.raises(
        NpllmValueError,
        match=f"0 ... vocab_size - 1 = {N_VOCAB - 1}, got {ids.min()} ... {ids.max()}; is this the tok",
    ):
        model()(ids)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([[1.0, 2.0]]),
        np.array([1, 2]),
        np.array(1),
        np.ones((1, 2, 3), int),
        np.zeros((1, 0), int),
        np.zeros((0, 3), int),
        np.array([[True, False]]),
        [1, 2],
        [[1.5]],
        "text",
        None,
        [["a"]],
    ],
)
def test_what_is_no_table_of_integers_is_refused(ids):
    with pytest.raises(NpllmTypeError, match=r"input_ids must be integers \[n_batch, n_seq\]"):
        model()(ids)


def test_ragged_ids_are_refused():
    with pytest.raises(
        NpllmTypeError, match="input_ids must be an array, or lists of equal length"
    ):
        model()([[1, 2], [3]])
    with pytest.raises(NpllmTypeError, match="attention_mask must be"):
        model()([[1, 2]] * 2, attention_mask=[[1, 1], [1]])


def test_too_long_a_text_is_refused_by_both_numbers():
    counted = Counted()
    m = model(ops=counted.ops)
    with pytest.raises(
        NpllmValueError,
        match=r"65 tokens do not fit: the context length \(max_position_embeddings\) is 64",
    ):
        m(random_ids(1, 65))
    with pytest.raises(NpllmValueError, match=r"0 cached \+ 65 new tokens are 65.*is 64"):
        m(random_ids(1, 65), cache=m.new_cache())
    assert not counted.calls


def test_a_cache_of_another_batch_size_is_refused():
    m = model()
    with pytest.raises(NpllmValueError, match="n_batch = 2 sequences, got 1"):
        m(random_ids(1, 4), cache=m.new_cache(2))


@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (1, 6), (3, 6), (6,), (2, 1, 1, 6), (2, 6, 6)])
def test_a_mask_of_another_shape_is_refused_by_both_shapes(shape):
    with pytest.raises(
        NpllmValueError, match=r"attention_mask must be \[n_batch, n_ctx\] = \[2, 6\]"
    ) as caught:
        model()(random_ids(2, 6), attention_mask=np.ones(shape, int))
    assert str([*shape]) in str(caught.value)


def test_the_mask_covers_the_cache_too():
    m = model()
    cache = m.new_cache()
    m(random_ids(1, 4), cache=cache)
    with pytest.raises(NpllmValueError, match=r"\[1, 6\] \(cached keys included\), got \[1, 2\]"):
        m(random_ids(1, 2), cache=cache, attention_mask=np.ones((1, 2)))


def test_the_mask_of_cached_tokens_cannot_change():
    m = model()
    cache = m.new_cache()
    m(random_ids(1, 4), cache=cache)
    with pytest.raises(
        NpllmValueError, match="differs from the mask with which the cached tokens were computed"
    ):
        m(random_ids(1, 1), cache=cache, attention_mask=np.array([[0, 1, 1, 1, 1]]))


@pytest.mark.parametrize("value", [2, -1, 0.5, np.nan, -np.inf])
def test_a_mask_holds_0_and_1_only(value):
    with pytest.raises(NpllmValueError, match=r"1 \(token\) and 0 \(padding\) only"):
        model()(random_ids(1, 2), attention_mask=np.array([[1, value]]))


@pytest.mark.parametrize("n", [-1, 1.0, "1", None])
def test_logits_to_keep_is_a_count(n):
    with pytest.raises(
        NpllmValueError, match=f"logits_to_keep must be an integer in 0 .*, got {n!r}"
    ):
        model()(random_ids(1, 2), logits_to_keep=n)


@pytest.mark.parametrize(
    "positions",
    [
        np.arange(5),
        np.arange(7),
        np.ones((3, 6), int),
        np.arange(6) - 1,
        np.arange(6.0),
        np.ones((2, 1, 6), int),
        3,
        "text",
    ],
)
def test_positions_that_do_not_fit_are_refused(positions):
    with pytest.raises(
        NpllmValueError,
        match=r"position_ids must be integers from 0, \[n_seq\] = \[6\] or \[n_batch, n_seq\] = \[2, 6\]",
    ):
        model()(random_ids(2, 6), position_ids=positions)


def test_another_array_library_is_refused():
    strict = pytest.importorskip("array_api_strict")
    m = model()
    w = m.params.embed_tokens
    mixed = npllm.Model(
        m.config, m.params._replace(norm=strict.asarray(m.params.norm)), ops=ops.reference
    )
    with pytest.raises(
        NpllmTypeError, match="one library, got weight of array_api_strict and x of numpy"
    ):
        mixed(random_ids(1, 3))
    assert isinstance(w, np.ndarray)


@pytest.mark.parametrize("backend", ["jax", "", None])
def test_an_unknown_backend_is_refused(tmp_path, backend):
    with pytest.raises(NpllmValueError, match="backend must be one of numpy, cupy"):
        npllm.load(write_folder(tmp_path), backend=backend)


def test_models_of_arrays_need_no_folder():
    m = model()
    assert repr(m) == f"<npllm.Model phi3, {fastest_ops().name} ops, mask {m.mask_rule()!r}>"
    with pytest.raises(NpllmValueError, match="takes token ids only"):
        m.generate("text")
