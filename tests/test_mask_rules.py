"""Every mask rule beside the formula of its paper, what the bounds promise, and rules inside a
model.
"""

from functools import lru_cache

import numpy as np
import optional
import pytest
import tiny
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import draws
from strategies import seeds

import npllm
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops import mask
from npllm.ops.mask import ALL, NONE, SOME, Rule, causal, sliding_window

strict = optional.module("array_api_strict")
N = 24  # slots 0 ... N - 1
N_BATCH = 2

# ---------------------------------------- a strategy for every rule: pairs (rule, says), says(row of the batch, i, j) as in the paper


@st.composite
def _random_blocks(draw):
    """What is drawn is read off the corners of the blocks; that the draw is right is another test."""
    size = draw(st.integers(1, 8))
    n_blocks = -(-N // size)
    rule = mask.random_blocks(size, n_blocks, draw(st.integers(0, n_blocks)), draw(seeds))
    corners = table(rule, np.arange(0, N, size), np.arange(0, N, size))[0]
    return rule, lambda _b, i, j: corners[i // size, j // size]


@st.composite
def _labels(draw, largest):
    """Runs of labels, in order or not, for each row of the batch."""
    x = np.random.default_rng(draw(seeds)).integers(0, largest + 1, (N_BATCH, N))
    return (
        np.sort(x, axis=1)
        if draw(st.booleans())
        else np.repeat(x, draw(st.integers(1, 6)), axis=1)[:, :N]
    )


def _strided(n):
    """Child et al. 2019: A1 = {t ... i} with t = max(0, i - l); A2 = {j : (i - j) mod l = 0}."""
    return mask.strided(
        n
    ), lambda _, i, j: j in range(max(0, i - n), i + 1) or j in range(i, -1, -n)


def _fixed(n, c):
    """Child et al. 2019: A1 = {j : floor(j / l) = floor(i / l)}; A2 = {j : j mod l in l - c ... l -
    1}; of j <= i.
    """
    return mask.fixed(
        n, c
    ), lambda _, i, j: j <= i and (j // n == i // n or j % n in range(n - c, n))


def _dilated(w, d):
    """Beltagy et al. 2020: w / 2 on each side, d - 1 left out between two."""
    return mask.dilated_window(
        w, d
    ), lambda _, i, j: j in [i + m * d for m in range(-(w // 2), w // 2 + 1)]


def _block_local(size):
    blocks = [range(start, start + size) for start in range(0, N, size)]
    return mask.block_local(size), lambda _, i, j: any(
        i in block and j in block for block in blocks
    )


sides = st.integers(0, 12)
CASES = {
    "bidirectional": st.just((mask.bidirectional(), lambda *_: True)),
    "causal": st.just((causal(), lambda _, i, j: j <= i)),
    "sliding_window": st.integers(1, 30).map(
        lambda w: (sliding_window(w), lambda _, i, j: j in range(i - w + 1, i + 1))
    ),
    "lookback": st.integers(0, 30).map(
        lambda w: (mask.lookback(w), lambda _, i, j: j in range(i - w, i + 1))
    ),
    "prefix_lm": st.integers(0, 30).map(
        lambda n: (mask.prefix_lm(n), lambda _, i, j: j in range(n) or j in range(i + 1))
    ),
    "band": st.tuples(sides, sides).map(
        lambda n: (mask.band(*n), lambda _, i, j: j in range(i - n[0], i + n[1] + 1))
    ),
    "longformer_window": st.integers(0, 30).map(
        lambda w: (mask.longformer_window(w), lambda _, i, j: abs(i - j) <= w // 2)
    ),
    "dilated_window": st.builds(_dilated, st.integers(0, 16), st.integers(1, 5)),
    "strided": st.integers(1, 12).map(_strided),
    "fixed": st.integers(1, 12).flatmap(lambda n: st.builds(_fixed, st.just(n), st.integers(1, n))),
    "block_local": st.integers(1, 12).map(_block_local),
    "global_tokens": st.lists(st.integers(0, N - 1), max_size=8).map(
        lambda slots: (mask.global_tokens(slots), lambda _, i, j: i in slots or j in slots)
    ),
    "random_blocks": _random_blocks(),
    "documents": _labels(3).map(lambda x: (mask.documents(x), lambda b, i, j: x[b, i] == x[b, j])),
    "left_padding": st.lists(st.integers(0, N), min_size=N_BATCH, max_size=N_BATCH).map(
        lambda start: (mask.left_padding(np.array(start)), lambda b, _, j: j >= start[b])
    ),
    "padding": _labels(1).map(lambda x: (mask.padding(x > 0), lambda b, _, j: x[b, j] > 0)),
}


@st.composite
def combined(draw, parts):
    (one, says_one), (other, says_other) = draw(parts), draw(parts)
    return draw(
        st.sampled_from(
            [
                (one & other, lambda b, i, j: says_one(b, i, j) and says_other(b, i, j)),
                (one | other, lambda b, i, j: says_one(b, i, j) or says_other(b, i, j)),
                (~one, lambda b, i, j: not says_one(b, i, j)),
            ]
        )
    )


any_rule = st.recursive(st.sampled_from(sorted(CASES)).flatmap(CASES.get), combined, max_leaves=4)


def table(rule, i, j):
    """What a rule shows [N_BATCH, len(i), len(j)], whatever axes it returns."""
    shown = np.asarray(rule(i[:, None], j[None, :]))
    return np.broadcast_to(shown, (N_BATCH, 1, len(i), len(j)))[:, 0]


def said(says, i, j):
    """The same from the formula, one pair at a time."""
    return np.array(
        [[[says(b, x, y) for y in j] for x in i] for b in range(N_BATCH)], dtype=bool
    ).reshape(N_BATCH, len(i), len(j))


every_rule = pytest.mark.parametrize("name", CASES)


def test_every_rule_is_tested():
    assert set(CASES) == {
        name
        for name in mask.__all__
        if callable(getattr(mask, name)) and name not in ("Rule", "to_bool")
    }


# ------------------------------------------------------------------------------------------------------------------ what they show


banded = st.sampled_from(
    ["bidirectional", "causal", "sliding_window", "lookback", "left_padding"]
).flatmap(CASES.get)


@given(st.lists(banded, min_size=1, max_size=4))
def test_the_band_of_a_rule_says_all_that_the_rule_shows(pairs):
    """What a kernel evaluates in the rule's place: a band of distances, from a first slot on where
    rows are padded.
    """
    rule = pairs[0][0]
    for other, _ in pairs[1:]:
        rule = rule & other
    low, high, start = rule.left_band
    first = np.zeros(N_BATCH, int) if start is None else start
    distance = np.arange(N)[:, None] - np.arange(N)[None, :]
    inside = (low <= distance) & (distance < high)
    close(table(rule, np.arange(N), np.arange(N)), inside & (np.arange(N) >= first[:, None, None]))
    assert (rule.band is None) == (start is not None)


@pytest.mark.parametrize(
    "rule", [~causal(), causal() | causal(), causal() & mask.padding(np.ones((2, N), bool))]
)
def test_a_rule_that_is_no_band_has_none(rule):
    assert rule.band is None and rule.left_band is None


@every_rule
@given(st.data())
@settings(max_examples=25)
def test_a_rule_shows_what_the_formula_of_its_paper_says(name, data):
    rule, says = data.draw(CASES[name])
    i, j = np.arange(N), np.array(data.draw(st.permutations(range(N))))
    assert isinstance(rule, Rule)
    assert rule(i[:, None], j[None, :]).dtype == np.bool
    close(table(rule, i, j), said(says, i.tolist(), j.tolist()))


@given(any_rule)
def test_combinations_follow_their_truth_tables_to_any_depth(pair):
    rule, says = pair
    close(table(rule, np.arange(N), np.arange(N)), said(says, range(N), range(N)))


@given(any_rule, any_rule)
@settings(max_examples=20)
def test_de_morgan_and_double_negation_hold(one, other):
    (a, _), (b, _), slots = one, other, np.arange(N)
    close(table(~(a & b), slots, slots), table(~a | ~b, slots, slots))
    close(table(~~a, slots, slots), table(a, slots, slots))


@pytest.mark.parametrize("w", [1, 2, 7])
def test_a_window_of_w_is_w_keys_and_a_lookback_of_w_is_one_more(w):
    """Convention C10, its three meanings."""
    row, slots = np.array([50]), np.arange(100)
    seen = {
        rule: np.flatnonzero(table(getattr(mask, rule)(w), row, slots)[0, 0]).tolist()
        for rule in ("sliding_window", "lookback", "longformer_window")
    }
    assert seen == {
        "sliding_window": [*range(51 - w, 51)],
        "lookback": [*range(50 - w, 51)],
        "longformer_window": [*range(50 - w // 2, 51 + w // 2)],
    }


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 6), seeds)
def test_random_blocks_gives_every_block_of_queries_n_random_blocks_of_keys(
    size, n_blocks, n_random, seed
):
    n_random = min(n_random, n_blocks)
    slots = np.arange(size * n_blocks)
    seen = table(mask.random_blocks(size, n_blocks, n_random, seed), slots, slots)[0].reshape(
        n_blocks, size, n_blocks, size
    )
    close(seen, np.broadcast_to(seen[:, :1, :, :1], seen.shape))
    assert (seen[:, 0, :, 0].sum(axis=1) == n_random).all()
    close(
        table(mask.random_blocks(size, n_blocks, n_random, seed), slots, slots),
        np.broadcast_to(seen.reshape(1, len(slots), -1), (N_BATCH, len(slots), len(slots))),
    )


def test_random_blocks_draws_every_block_equally_often_and_the_same_on_every_machine():
    slots = np.arange(8)
    drawn = np.mean(
        [table(mask.random_blocks(1, 8, 2, seed), slots, slots)[0] for seed in range(1000)], axis=0
    )
    assert np.abs(drawn - 2 / 8).max() < 5 * np.sqrt(0.25 * 0.75 / 1000), "five standard deviations"
    assert [
        np.flatnonzero(row).tolist()
        for row in table(mask.random_blocks(1, 4, 2, 7), slots[:4], slots[:4])[0]
    ] == [[0, 3], [0, 3], [0, 2], [0, 3]], "drawn once, kept here"


@every_rule
@given(st.data())
@settings(max_examples=5)
def test_a_rule_speaks_the_strict_array_api(name, data):
    rule, says = data.draw(CASES[name])
    if name in ("documents", "padding"):
        x = np.random.default_rng(0).integers(0, 2, (N_BATCH, N))
        x = x > 0 if name == "padding" else x
        rule, says = (
            getattr(mask, name)(strict.asarray(x)),
            lambda b, i, j: x[b, j] if name == "padding" else x[b, i] == x[b, j],
        )
    if name == "left_padding":
        rule, says = mask.left_padding(strict.asarray([3, 0])), lambda b, _, j: j >= (3, 0)[b]
    slots = strict.arange(N)
    shown = np.asarray(rule(slots[:, None], slots[None, :]))
    close(np.broadcast_to(shown, (N_BATCH, 1, N, N))[:, 0], said(says, range(N), range(N)))


@pytest.mark.parametrize(
    "name",
    [
        "bidirectional",
        "causal",
        "sliding_window",
        "lookback",
        "band",
        "longformer_window",
        "dilated_window",
    ],
)
@given(st.data(), st.integers(-50, 50))
@settings(max_examples=10)
def test_rules_of_the_distance_alone_hold_at_any_place(name, data, shift):
    rule, _ = data.draw(CASES[name])
    slots = np.arange(N)
    close(table(rule, slots + shift, slots + shift), table(rule, slots, slots))


# ------------------------------------------------------------------------------------------------------------- what bounds promise

spans = st.tuples(st.integers(0, N - 1), st.integers(1, 9)).map(
    lambda pair: (pair[0], min(sum(pair), N) - 1)
)
EXACT = {
    "bidirectional",
    "causal",
    "sliding_window",
    "lookback",
    "prefix_lm",
    "band",
    "longformer_window",
    "block_local",
    "global_tokens",
    "random_blocks",
    "documents",
    "padding",
}


def truth(says, i, j):
    seen = said(says, range(i[0], i[1] + 1), range(j[0], j[1] + 1))
    return ALL if seen.all() else SOME if seen.any() else NONE


@given(any_rule, st.lists(st.tuples(spans, spans), min_size=8, max_size=8))
def test_none_and_all_are_never_wrong(pair, blocks):
    rule, says = pair
    for i, j in blocks:
        bound = rule.bound(*i, *j)
        assert bound in (NONE, SOME, ALL)
        assert bound in (SOME, truth(says, i, j))


@pytest.mark.parametrize("name", sorted(EXACT))
@given(st.data(), st.lists(st.tuples(spans, spans), min_size=12, max_size=12))
@settings(max_examples=draws(12, 40))
def test_a_bound_says_some_only_where_a_block_is_mixed(name, data, blocks):
    rule, says = data.draw(CASES[name])
    for i, j in blocks:
        assert (rule.bound(*i, *j), i, j) == (truth(says, i, j), i, j)


def test_bounds_of_the_other_sparse_rules_skip_what_they_can():
    strided, fixed, dilated = mask.strided(16), mask.fixed(16, 2), mask.dilated_window(4, 3)
    assert [strided.bound(32, 39, *j) for j in ((40, 47), (20, 23), (30, 32), (0, 7))] == [
        NONE,
        SOME,
        ALL,
        SOME,
    ]
    assert strided.bound(39, 46, 32, 39) == ALL
    assert [
        fixed.bound(32, 39, *j) for j in ((16, 29), (30, 31), (14, 15), (0, 13), (40, 47), (28, 31))
    ] == [NONE, ALL, ALL, NONE, NONE, SOME]
    assert fixed.bound(40, 47, 32, 39) == ALL, "earlier in the own block"
    assert [dilated.bound(32, 39, *j) for j in ((0, 25), (46, 60), (26, 28))] == [NONE, NONE, SOME]
    assert mask.dilated_window(16, 1).bound(10, 14, 8, 16) == ALL


@given(spans, spans)
def test_bounds_of_combinations_are_those_of_three_valued_logic(i, j):
    full, nothing = mask.bidirectional(), ~mask.bidirectional()
    for rule, _ in ((causal(), 0), (sliding_window(5), 0), (mask.block_local(4), 0)):
        bound = rule.bound(*i, *j)
        assert [
            (rule & full).bound(*i, *j),
            (rule | nothing).bound(*i, *j),
            (~~rule).bound(*i, *j),
        ] == [bound] * 3
        assert ((rule & nothing).bound(*i, *j), (rule | full).bound(*i, *j)) == (NONE, ALL)
        assert (~rule).bound(*i, *j) == {ALL: NONE, SOME: SOME, NONE: ALL}[bound]


# ------------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "arguments", "wrong"),
    [
        ("sliding_window", (0,), "w"),
        ("sliding_window", (2.0,), "w"),
        ("sliding_window", (True,), "w"),
        ("sliding_window", ("4",), "w"),
        ("lookback", (-1,), "w"),
        ("lookback", (None,), "w"),
        ("prefix_lm", (-1,), "n_prefix"),
        ("band", (-1, 0), "before"),
        ("band", (0, -1), "after"),
        ("band", (0, 0.5), "after"),
        ("longformer_window", (-2,), "w"),
        ("dilated_window", (-1, 2), "w"),
        ("dilated_window", (4, 0), "dilation"),
        ("strided", (0,), "stride"),
        ("fixed", (0, 1), "stride"),
        ("fixed", (4, 0), "c"),
        ("fixed", (4, 5), "c must be at most stride = 4, got 5"),
        ("block_local", (0,), "block"),
        ("random_blocks", (0, 4, 1, 0), "block"),
        ("random_blocks", (2, 0, 0, 0), "n_blocks"),
        ("random_blocks", (2, 4, -1, 0), "n_random"),
        ("random_blocks", (2, 4, 5, 0), "n_random must be at most n_blocks = 4, got 5"),
        ("random_blocks", (2, 4, 1, -1), "seed"),
        ("global_tokens", ([0.5],), "slots"),
        ("documents", (np.zeros(3, int),), "labels"),
        ("padding", (np.ones((1, 2, 3), bool),), "valid"),
    ],
)
def test_parameters_that_make_no_rule_raise_by_name(name, arguments, wrong):
    with pytest.raises((NpllmValueError, NpllmTypeError), match=f"^{wrong} must|^{wrong}$"):
        getattr(mask, name)(*arguments)


@pytest.mark.parametrize("labels", [np.zeros((1, 3)), np.ones((1, 3), bool)])
def test_documents_have_integer_labels(labels):
    with pytest.raises(NpllmTypeError, match="labels must be integers"):
        mask.documents(labels)


@pytest.mark.parametrize(
    "rule",
    [
        mask.documents(np.zeros((1, 6), int)),
        mask.padding(np.ones((1, 6), bool)),
        mask.random_blocks(2, 3, 1, 0),
    ],
    ids=["documents", "padding", "random_blocks"],
)
@pytest.mark.parametrize("slots", [np.arange(7), np.arange(-1, 4), np.arange(6, 8)])
def test_slots_that_a_rule_knows_nothing_of_raise(rule, slots):
    """They would be read from the other end, or from another row."""
    with pytest.raises(NpllmValueError, match=r"slots must lie in 0 \.\.\. 5"):
        rule(slots[:, None], slots[None, :])
    x = np.ones((1, 1, len(slots), 2))
    with pytest.raises(NpllmValueError, match=r"slots must lie in 0 \.\.\. 5"):
        npllm.ops.blockwise_attention(x, x, x, mask=rule, q_slots=slots, k_slots=slots)


@pytest.mark.parametrize(
    "rule",
    [mask.documents(np.zeros((2, 4), int)), mask.padding(np.ones((1, 4), bool))],
    ids=["two rows", "one row"],
)
@pytest.mark.parametrize("op", [npllm.ops.attention, npllm.ops.blockwise_attention])
def test_a_rule_by_row_needs_arrays_by_row(op, rule):
    x = np.ones((2, 4, 3))  # 2 heads, no batch
    with pytest.raises(
        NpllmValueError, match=r"mask must broadcast to \[..., n_head, n_seq, n_ctx\] = \[2, 4, 4\]"
    ):
        op(x, x, x, mask=rule & ~mask.block_local(2))


# ------------------------------------------------------------------------------------------------------------------ rules in a model

CAUSAL_CASES = (
    st.sampled_from(sorted(set(CASES) - {"documents", "padding"}))
    .flatmap(CASES.get)
    .map(lambda pair: causal() & pair[0])
)


@pytest.fixture(scope="module")
def model():
    return tiny.model(dtype=np.float64)


@given(
    st.lists(CAUSAL_CASES, min_size=2, max_size=2), st.integers(1, N - 1), st.integers(1, 5), seeds
)
@settings(max_examples=30)
def test_cached_decoding_equals_the_recomputation_under_any_causal_rule(
    model, rules, n_prompt, step, seed
):
    model, ids = model.with_mask(rules), tiny.random_ids(2, N, seed)
    cache = model.new_cache(2)
    parts = [model(ids[:, :n_prompt], cache=cache)]
    parts += [model(ids[:, a : min(a + step, N)], cache=cache) for a in range(n_prompt, N, step)]
    close(np.concatenate(parts, axis=1), model(ids))


@given(st.lists(any_rule, min_size=2, max_size=2), seeds)
@settings(max_examples=20)
def test_a_model_runs_each_layer_under_its_own_rule(model, pairs, seed):
    """The definition with the table of each layer, one after the other, is handed exactly these
    masks.
    """
    ids, seen = tiny.random_ids(N_BATCH, N, seed), []

    def attention(q, k, v, *, mask, **slots):
        seen.append(table(mask, np.arange(N), np.arange(N)))
        return npllm.ops.attention(q, k, v, mask=seen[-1][:, None], **slots)

    rules = [rule for rule, _ in pairs]
    by_table = npllm.Model(
        model.config, model.params, ops=model.ops.replace(attention=attention), mask=rules
    )
    close(model.with_mask(rules)(ids), by_table(ids))
    for (_, says), got in zip(pairs, seen, strict=True):
        close(got, said(says, range(N), range(N)))


def test_a_rule_for_all_layers_is_that_rule_for_each(model):
    ids = tiny.random_ids(2, 12)
    rule = causal() & mask.strided(3)
    close(model.with_mask(rule)(ids), model.with_mask([rule, rule])(ids), times=0)
    close(model.with_mask(None)(ids), model(ids), times=0)
    close(model.with_mask(causal())(ids), model(ids), times=0)
    assert np.abs(model.with_mask(rule)(ids) - model(ids)).max() > 1e-3
    assert (
        np.abs(
            model.with_mask([causal(), rule])(ids) - model.with_mask([rule, causal()])(ids)
        ).max()
        > 1e-3
    )


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_list_must_have_one_rule_for_each_layer(model, n):
    with pytest.raises(
        NpllmValueError, match=f"mask must hold one rule for each of 2 layers, got {n}"
    ):
        model.with_mask([causal()] * n)


def test_the_cache_keeps_every_slot_under_a_rule_of_ones_own():
    """The checkpoint's window would drop keys that another rule still sees."""
    model = tiny.model(dtype=np.float64, sliding_window=4)
    ids = tiny.random_ids(1, 20)
    assert (model.new_cache().window, model.with_mask(causal()).new_cache().window) == (4, None)
    full = model.with_mask(causal())
    cache = full.new_cache()
    parts = [full(ids[:, a : a + 5], cache=cache) for a in range(0, 20, 5)]
    close(np.concatenate(parts, axis=1), tiny.model(dtype=np.float64)(ids))


def test_padding_is_hidden_under_a_rule_of_ones_own(model):
    model, ids = (
        model.with_mask([mask.bidirectional(), causal() & mask.longformer_window(4)]),
        tiny.random_ids(1, 6),
    )
    padded = np.concatenate([np.zeros((1, 3), int), ids], axis=1)
    close(model(padded, attention_mask=np.array([[0] * 3 + [1] * 6]))[:, 3:], model(ids))


@lru_cache
def in_float32(folder):
    """The default checkpoint with its weights widened once: the same numbers as stored in 16 bits,
    ten times as fast on a CPU.
    """
    return npllm.load(folder, dtype="float32")


PROMPT = "The history of the city of Paris begins"


@pytest.mark.slow
@pytest.mark.weights
def test_an_alternating_stack_gives_the_same_text_while_the_window_covers_everything(
    default_folder,
):
    """And goes on fluently beyond it: GPT-3's dense and locally banded layers in turns."""
    full = in_float32(default_folder)
    stacks = [
        full.with_mask(
            [
                sliding_window(w) if layer % 2 else causal()
                for layer in range(full.config.num_hidden_layers)
            ]
        )
        for w in (64, 8)
    ]
    texts = [
        model.generate(PROMPT, max_new_tokens=30, do_sample=False) for model in (full, *stacks)
    ]
    assert texts[0] == texts[1]
    assert len(texts[2]) > 60 and texts[2] != texts[0]


@pytest.mark.weights
def test_a_windowed_run_is_the_full_one_inside_the_window_and_finite_beyond(default_folder):
    model = in_float32(default_folder)
    ids = np.array([model.tokenizer.encode(PROMPT + ", says the old book, " * 12)])[:, :60]
    full, windowed = model(ids), model.with_mask(sliding_window(16))(ids)
    close(windowed[:, :16], full[:, :16], times=20)
    assert np.isfinite(windowed).all()
    assert np.abs(windowed[:, 30:] - full[:, 30:]).max() > 0.1


@pytest.mark.parametrize("mask", [lambda i, j: j <= i, np.ones((4, 4), bool), [None, None]])
def test_a_model_takes_rules_only(model, mask):
    with pytest.raises(NpllmTypeError, match="must be a Rule"):
        model.with_mask(mask)
