"""The compiled set's kernel for a whole decode step: the bits, and the cache, of the same step in
several kernels.
"""

import ml_dtypes
import numpy as np
import pytest
from blocks import FORMAT_NAMES, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import draws
from tiny import model, random_ids

import npllm
from npllm import kernels
from npllm.errors import NpllmValueError
from npllm.quantized.int8 import quantize
from npllm.quantized.packed import PackedMatrix

compiled = pytest.importorskip("npllm.kernels.cpu.compiled", exc_type=ImportError)

FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32)
LONG = {
    "original_max_position_embeddings": 12,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
}


def packed(m, pack):
    """The model with every matrix packed; an embedding that is tied stays so."""
    layers = tuple(
        layer._replace(**{name: pack(x) for name, x in layer._asdict().items() if np.ndim(x) == 2})
        for layer in m.params.layers
    )
    table = pack(m.params.embed_tokens)
    tied = m.params.lm_head is m.params.embed_tokens
    params = m.params._replace(
        embed_tokens=table, layers=layers, lm_head=table if tied else pack(m.params.lm_head)
    )
    return npllm.Model(m.config, params, ops=m.ops)


def of_kind(kind, **changes):
    """A small model whose weights are of a float type, int8, or in blocks."""
    if kind in FORMAT_NAMES:
        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
        m = model(ops=kernels.compiled_ops(), **sizes | changes)
        return packed(m, lambda x: random_weight(kind, *x.shape, seed=int(abs(x[0, 0]) * 1e6)))
    if kind == "int8":
        sizes = {"hidden_size": 64, "intermediate_size": 128}
        return packed(model(ops=kernels.compiled_ops(), **sizes | changes), quantize)
    return model(ops=kernels.compiled_ops(), dtype=kind, **changes)


def apart(m):
    """The model without the kernel of a whole step."""
    return m.on(m.ops.replace(decode_step=None))


@pytest.fixture
def whole_steps(monkeypatch):
    """Numbers of rows of the steps that one kernel takes."""
    calls, kernel = [], compiled.logits_step
    monkeypatch.setattr(
        compiled, "logits_step", lambda ids, *rest: (calls.append(len(ids)), kernel(ids, *rest))[1]
    )
    return calls


def state_of(cache):
    """Everything a cache holds, as bytes."""
    state = cache.copy().state
    held = [x for layer in state.layers for x in layer[:2]]
    known = state.ids, state.positions, state.valid, state.rope_variant
    used = [np.ascontiguousarray(x[:, :, : state.n_ctx]) for x in held]
    return [x.tobytes() for x in (*known, *used)]


def same_steps(m, ids, n_prompt, mask=None, **new_cache):
    """Assert that both ways give the same bits and caches, token by token."""
    runs = []
    for way in (m, apart(m)):
        cache, logits = way.new_cache(len(ids), **new_cache), []
        for stop in range(n_prompt, ids.shape[1] + 1):
            new = ids[:, 0 if stop == n_prompt else stop - 1 : stop]
            seen = None if mask is None else mask[:, :stop]
            logits.append(way(new, cache=cache, attention_mask=seen, logits_to_keep=1))
        runs.append((logits, state_of(cache)))
    (got, left), (want, other) = runs
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape == (len(ids), 1, m.config.vocab_size)
        assert a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()
    assert left == other
    return got


@pytest.mark.parametrize("kind", [*FLOATS, "int8", *FORMAT_NAMES])
@given(
    n_batch=st.sampled_from([1, 2, 3, 8, 16]),
    n_kv_head=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 3]),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=draws(4, 40))
def test_a_step_has_the_bits_of_its_parts(kind, n_batch, n_kv_head, window, tied, seed):
    changes = {"sliding_window": window, "num_key_value_heads": n_kv_head}
    m = of_kind(kind, tie_word_embeddings=tied, seed=seed, **changes)
    same_steps(m, random_ids(n_batch, 9, seed), 4)


def test_it_is_taken_wherever_it_applies(whole_steps):
    for kind in (*FLOATS, "int8", "Q4_K"):
        for n_batch in (1, 16):
            whole_steps.clear()
            same_steps(of_kind(kind), random_ids(n_batch, 7), 4)
            n_prefill = int(4 * n_batch <= kernels.FEW_ROWS)
            assert whole_steps == [n_batch] * (n_prefill + 3), kind


def test_frequencies_that_change_on_the_way(whole_steps):
    m = of_kind(np.float32, **LONG)
    same_steps(m, random_ids(2, 20), 4)
    assert whole_steps == [2] * 17


def test_where_it_does_not_apply_the_parts_run(whole_steps):
    m, ids = of_kind(np.float32), random_ids(2, 9)
    padded = np.ones((2, 9), int)
    padded[1, :2] = 0
    same_steps(m, ids, 4, mask=padded)
    same_steps(m, random_ids(17, 6), 4)
    same_steps(m, ids, 4, dtype="bfloat16")
    biased = m.params.layers[1]._replace(o_bias=np.ones(32, np.float32))
    layers = m.params.layers[0], biased
    same_steps(npllm.Model(m.config, m.params._replace(layers=layers), ops=m.ops), ids, 4)
    head = np.asfortranarray(m.params.lm_head)
    same_steps(npllm.Model(m.config, m.params._replace(lm_head=head), ops=m.ops), ids, 4)
    rules = [npllm.ops.mask.causal(), npllm.ops.mask.sliding_window(2)]
    same_steps(m.with_mask(rules), ids, 4)
    assert whole_steps == []
    wide = model(ops=m.ops, dtype=np.float64)
    cache = wide.new_cache(2)
    wide(ids[:, :4], cache=cache)
    assert wide(ids[:, 4:5], cache=cache).dtype == np.float64 and whole_steps == []


def test_weights_that_change_are_seen(whole_steps):
    m, other, ids = of_kind(np.float32), of_kind(np.float32, seed=1), random_ids(1, 8)
    cache, plain = m.new_cache(), m.new_cache()
    for way, c in ((m, cache), (apart(m), plain)):
        way(ids[:, :4], cache=c)
    for part in (m.params, m.params._replace(norm=other.params.norm), other.params):
        changed = npllm.Model(m.config, part, ops=m.ops)
        for way, c in ((changed, cache), (apart(changed), plain)):
            c._state = replace_owner(c._state, way)
        got, want = changed(ids[:, 4:5], cache=cache), apart(changed)(ids[:, 4:5], cache=plain)
        assert got.tobytes() == want.tobytes()
    assert whole_steps == [1] * 4


@pytest.mark.parametrize("kind", [np.float32, "int8", "Q4_K"])
def test_an_id_beyond_the_embedding_raises(kind):
    m = of_kind(kind)
    table = m.params.embed_tokens
    few = table.rows(slice(40)) if isinstance(table, PackedMatrix) else table[:40]
    short = npllm.Model(m.config, m.params._replace(embed_tokens=few), ops=m.ops)
    cache = short.new_cache()
    short(random_ids(1, 4, n_vocab=40), cache=cache)
    for way in (short, apart(short)):
        with pytest.raises(NpllmValueError, match="n_vocab - 1 = 39, got 40"):
            way(np.array([[40]]), cache=cache)
        with pytest.raises(NpllmValueError, match="n_vocab - 1 = 39, got -1"):
            way.last_logits(np.array([[-1]]), np.ones((1, 5), bool), cache)
    assert cache.n_ctx == 4


def replace_owner(state, m):
    """The state of a cache, handed to another model."""
    return state._replace(owner=m._cache_owner())


def test_the_rows_of_a_batch_do_not_depend_on_their_company():
    m, ids = of_kind(ml_dtypes.bfloat16), random_ids(16, 9)
    together = same_steps(m, ids, 1)
    for row in (0, 7, 15):
        alone = same_steps(m, ids[row : row + 1], 1)
        for a, b in zip(alone, together, strict=True):
            assert a.tobytes() == b[row : row + 1].tobytes()


def test_several_tokens_at_once_give_the_bits_of_one_by_one():
    m, ids = of_kind(ml_dtypes.bfloat16), random_ids(1, 13)
    one_by_one = same_steps(m, ids, 4)
    cache = m.new_cache()
    m(ids[:, :4], cache=cache)
    at_once = m(ids[:, 4:], cache=cache)
    for at, logits in enumerate(one_by_one[1:]):
        assert at_once[:, at : at + 1].tobytes() == logits.tobytes()


@pytest.mark.parametrize("n_keep", [0, 1, 3, 5, 99])
def test_the_last_positions_that_are_asked_for(whole_steps, n_keep):
    m, ids = of_kind("int8"), random_ids(3, 10)
    found = []
    for way in (m, apart(m)):
        cache = way.new_cache(3)
        parts = [
            way(ids[:, s], cache=cache, logits_to_keep=n_keep) for s in (slice(5), slice(5, 10))
        ]
        found.append(b"".join(part.tobytes() for part in parts))
        assert parts[1].shape == (3, min(n_keep or 5, 5), m.config.vocab_size)
    assert found[0] == found[1] and whole_steps == [3, 3]


@pytest.mark.parametrize("dtype", FLOATS)
@given(n=st.integers(1, 20), d=st.integers(1, 70), seed=st.integers(0, 99))
def test_the_norm_of_few_rows_has_the_bits_of_the_fused_one(dtype, n, d, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 2 * d)).astype(np.float32)
    gain, weight = (rng.standard_normal(s).astype(dtype) for s in ((2 * d,), (3, 2 * d)))
    set_ = kernels.compiled_ops()
    apart_ = set_.linear(set_.rms_norm(x, gain, 1e-5), weight)
    fused = set_.norm_linear(x, gain, 1e-5, weight)
    if n <= kernels.FEW_ROWS:
        assert apart_.tobytes() == fused.tobytes()
    np.testing.assert_allclose(apart_, fused, rtol=1e-4, atol=1e-4)


def test_a_set_with_a_replaced_operation_has_no_such_step():
    set_ = kernels.compiled_ops()
    assert set_.decode_step is compiled.decode_step
    assert set_.replace(rms_norm=npllm.ops.rms_norm).decode_step is None
    assert set_.n_queued == 0
