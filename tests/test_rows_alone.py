"""The compiled set: a row has the same bits alone and in company, of up to 16 rows.

This is what makes verifying proposed tokens, reusing a prefix and serving many callers exact.
"""

from functools import lru_cache

import ml_dtypes
import numpy as np
import oracles
import pytest
import tiny
from close import close
from hypothesis import example, given
from hypothesis import strategies as st

import npllm
from npllm import kernels
from npllm.arrays import widen
from npllm.decoding.prefill import n_reusable, pieces
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.int8 import quantize
from npllm.quantized.stacked import StackedWeight

MOST = 16  # rows
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CONFIGS = {
    "plain": {},
    "window": {"sliding_window": 7},
    "one key/value head, half rotated": {"num_key_value_heads": 1, "partial_rotary_factor": 0.5},
    "odd widths": {"hidden_size": 36, "intermediate_size": 46, "num_attention_heads": 2},
}
MIXES = {
    "Q4_0": (["Q4_0"], "Q4_0", "Q4_0", "Q4_0"),
    "Q4_1": (["Q4_1"], "Q4_1", "Q4_1", "Q4_1"),
    "Q4_K and Q6_K": (["Q4_K", "Q4_K", "Q6_K"], "Q4_K", "Q4_K", "Q6_K"),
    "Q5 and Q8_0": (["Q5_0"], "Q5_1", "Q5_K", "Q8_0"),
}
made = st.tuples(st.sampled_from(list(CONFIGS)), st.sampled_from(list(DTYPES)))


@pytest.fixture(autouse=True)
def compiled():
    if kernels.compiled_ops() is None:
        pytest.skip(kernels.why_not_compiled())


@lru_cache
def model(config, dtype):
    longest = {"max_position_embeddings": 512, "original_max_position_embeddings": 512}
    changes = longest | CONFIGS[config]
    return tiny.model(ops=kernels.compiled_ops(), dtype=DTYPES[dtype], **changes)


@lru_cache
def model_in_8_bits(hidden_size=64):
    plain = tiny.model(hidden_size=hidden_size, intermediate_size=128)
    names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    layers = tuple(
        layer._replace(**{name: quantize(getattr(layer, name)) for name in names})
        for layer in plain.params.layers
    )
    params = plain.params._replace(layers=layers, lm_head=quantize(plain.params.lm_head))
    return npllm.Model(plain.config, params, ops=kernels.compiled_ops())


@lru_cache
def model_in_blocks(mix):
    """A model whose matrices are in blocks of the formats of a mix, qkv_proj perhaps in several."""
    plain = tiny.model(hidden_size=256, intermediate_size=512)
    qkv, o, gate_up, down = MIXES[mix]

    def layer(old):
        rows = np.split(np.asarray(old.qkv_proj), [256, 384])
        parts = tuple(map(quantize_blocks, rows, qkv)) if len(qkv) > 1 else ()
        return old._replace(
            qkv_proj=StackedWeight(parts) if parts else quantize_blocks(old.qkv_proj, qkv[0]),
            o_proj=quantize_blocks(old.o_proj, o),
            gate_up_proj=quantize_blocks(old.gate_up_proj, gate_up),
            down_proj=quantize_blocks(old.down_proj, down),
        )

    head = quantize_blocks(plain.params.lm_head, down)
    params = plain.params._replace(layers=tuple(map(layer, plain.params.layers)), lm_head=head)
    return npllm.Model(plain.config, params, ops=kernels.compiled_ops())


def one_by_one(model, ids, n_past):
    """Logits of the tokens from n_past on, each sent alone."""
    cache = model.new_cache(1)
    if n_past:
        model(ids[:, :n_past], cache=cache)
    steps = [model(ids[:, t : t + 1], cache=cache)[:, 0] for t in range(n_past, ids.shape[1])]
    return np.stack(steps, axis=1)


@given(
    st.sampled_from([*DTYPES, "int8"]),
    st.one_of(st.integers(1, 130), st.sampled_from([32, 40, 63, 65, 96])),
    st.integers(2, MOST),
    st.integers(0, 9),
)
def test_a_row_of_a_product_of_any_width(dtype, d_in, n, seed):
    draw = np.random.default_rng(seed).standard_normal
    w = draw((19, d_in)).astype(np.float32)
    w = quantize(w) if dtype == "int8" else w.astype(DTYPES[dtype])
    x, linear = draw((n, d_in)).astype(np.float32), kernels.compiled_ops().linear
    close(linear(x, w), np.concatenate([linear(row[None], w) for row in x]), times=0)
    close(linear(x, w), oracles.linear(x, widen(w)).astype(np.float32), times=8)


@given(made, st.integers(0, 9), st.integers(0, 30), st.integers(1, MOST))
def test_tokens_sent_together_are_as_those_sent_one_by_one(which, seed, n_past, n_new):
    m = model(*which)
    ids = tiny.random_ids(1, n_past + n_new, seed)
    together = m.new_cache(1)
    if n_past:
        m(ids[:, :n_past], cache=together)
    close(m(ids[:, n_past:], cache=together), one_by_one(m, ids, n_past), times=0)


@given(st.sampled_from([64, 40]), st.integers(0, 9), st.integers(0, 30), st.integers(1, MOST))
def test_and_so_with_weights_in_8_bits(hidden_size, seed, n_past, n_new):
    m = model_in_8_bits(hidden_size)
    ids = tiny.random_ids(1, n_past + n_new, seed)
    together = m.new_cache(1)
    if n_past:
        m(ids[:, :n_past], cache=together)
    close(m(ids[:, n_past:], cache=together), one_by_one(m, ids, n_past), times=0)


@given(st.sampled_from(list(MIXES)), st.integers(0, 9), st.integers(0, 30), st.integers(1, MOST))
def test_and_so_with_weights_in_blocks(mix, seed, n_past, n_new):
    m = model_in_blocks(mix)
    ids = tiny.random_ids(1, n_past + n_new, seed)
    together = m.new_cache(1)
    if n_past:
        m(ids[:, :n_past], cache=together)
    close(m(ids[:, n_past:], cache=together), one_by_one(m, ids, n_past), times=0)


@given(made, st.integers(0, 9), st.integers(1, 5), st.integers(1, 20), st.integers(1, 3))
def test_a_sequence_has_no_part_in_what_its_neighbours_are(which, seed, n_batch, n_past, n_new):
    """The cache was filled row by row, so that only the step itself has company."""
    m = model(*which)
    ids = tiny.random_ids(n_batch, n_past + n_new, seed)
    past, new = ids[:, :n_past], ids[:, n_past:]
    caches = [m.new_cache(1) for _ in ids]
    for row, cache in zip(past, caches, strict=True):
        m(row[None], cache=cache)
    shared = m.new_cache(1)
    m(past[:1], cache=shared)
    shared.reorder([0] * n_batch)
    shared.transact(lambda draft: [draft.replace_rows([b], c) for b, c in enumerate(caches)])
    together = m(new, cache=shared)
    for row, cache, logits in zip(new, caches, together, strict=True):
        close(logits[None], m(row[None], cache=cache), times=0)


@given(made, st.integers(0, 9), st.integers(1, 6), st.integers(1, 12), st.integers(1, 10))
def test_padding_on_the_left_does_not_matter(which, seed, n_pad, n_past, n_new):
    m = model(*which)
    ids = tiny.random_ids(1, n_pad + n_past + n_new, seed)
    valid, padded = np.arange(ids.shape[1])[None] >= n_pad, m.new_cache(1)
    n = n_pad + n_past
    for t in range(n):
        m(ids[:, t : t + 1], attention_mask=valid[:, : t + 1], cache=padded)
    together = m(ids[:, n:], attention_mask=valid, cache=padded)
    close(together, one_by_one(m, ids[:, n_pad:], 0)[:, n_past:], times=0)


@given(made, st.integers(0, 9), st.integers(2, MOST), st.integers(1, 3))
def test_rows_with_caches_of_their_own_have_the_bits_of_each_alone(which, seed, n_rows, n_new):
    """Of unequal lengths, without padding: what a server does."""
    m = model(*which)
    lengths = np.random.default_rng(seed).integers(1, 40, n_rows)
    ids = tiny.random_ids(n_rows, 40 + n_new, seed)
    caches = [m.new_cache(1) for _ in ids]
    for row, n, cache in zip(ids, lengths, caches, strict=True):
        m(row[None, :n], cache=cache)
    alone = [cache.copy() for cache in caches]
    for t in range(n_new):
        together = m.logits_of_rows(ids[:, 40 + t], caches)
        for row, logits, cache in zip(ids, together, alone, strict=True):
            close(logits, m(row[None, 40 + t, None], cache=cache)[0, 0], times=0)


@given(made, st.integers(0, 9), st.integers(18, 260), st.integers(0, 243))
@example(("window", "float32"), 0, 250, 150)
def test_a_prompt_read_in_pieces_has_the_bits_of_one_reading(which, seed, n, n_past):
    m = model(*which)
    ids, whole, parts = tiny.random_ids(1, n, seed), m.new_cache(1), m.new_cache(1)
    logits = m(ids, cache=whole, logits_to_keep=1)
    n_past = n_reusable(n_past, n)
    for start, stop in ([(0, n_past)] if n_past > MOST else []) or [(0, 0)]:
        if stop:
            m(ids[:, start:stop], cache=parts)
    for start, stop in pieces(parts.n_ctx, n):
        last = m(ids[:, start:stop], cache=parts, logits_to_keep=1)
    close(last, logits, times=0)
    close(parts.kept(1)[0], whole.kept(1)[0], times=0)


def test_the_attention_of_such_rows_is_one_kernel(monkeypatch):
    from npllm.kernels.cpu import rope_attention

    m, names = model("plain", "float32"), []
    launch = rope_attention.launch
    monkeypatch.setattr(
        rope_attention, "launch", lambda k, *args: names.append(k.__name__) or launch(k, *args)
    )
    caches = [m.new_cache(1) for _ in range(3)]
    m.logits_of_rows(np.array([5, 6, 7]), caches)
    assert names == ["attend_rows"] * m.config.num_hidden_layers


@lru_cache
def many_rows_and_weight(dtype):
    rng = np.random.default_rng(3)
    x, w = (rng.standard_normal((n, 128)).astype(np.float32) for n in (200, 130))
    if dtype == "int8":
        return x, quantize(w)
    return x, quantize_blocks(w, dtype) if dtype == "Q4_0" else w.astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "Q4_0"])
@given(n=st.integers(17, 199), garbage=st.sampled_from([np.nan, 1e30]))
def test_a_row_has_the_same_bits_in_every_company_of_more_than_16(dtype, n, garbage):
    """Whatever an earlier product has left in the columns of the last panel that have no row."""
    x, weight = many_rows_and_weight(dtype)
    fast, gain = kernels.compiled_ops(), np.ones(128, np.float32)
    want = {"linear": fast.linear(x, weight), "norm": fast.norm_swiglu(x, gain, 0.0, weight)}
    fast.norm_swiglu(np.full((256, 128), garbage, np.float32), gain, 0.0, weight)
    np.testing.assert_array_equal(fast.linear(x[:n], weight), want["linear"][:n])
    np.testing.assert_array_equal(fast.norm_swiglu(x[:n], gain, 0.0, weight), want["norm"][:n])
