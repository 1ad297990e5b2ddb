"""Laws of a whole decoder: wrong ones break the law that they should, our own breaks none."""

import numpy as np
import pytest
import tiny

import npllm
from npllm import ops, testing
from npllm.errors import NpllmValueError


class Spoilt:
    """A tiny model with something wrong around it."""

    def __init__(self, call):
        self.model, self.call = tiny.model(ops=ops.reference), call
        self.new_cache, self.config = self.model.new_cache, self.model.config

    def __call__(self, ids, *, attention_mask=None, cache=None):
        return self.call(self.model, ids, attention_mask, cache)


def stale_positions(model, ids, attention_mask, cache):
    positions = np.arange(ids.shape[1]) if cache is not None else None
    return model(ids, attention_mask=attention_mask, cache=cache, position_ids=positions)


def no_padding(model, ids, attention_mask, cache):
    return model(ids, attention_mask=None if cache is None else attention_mask, cache=cache)


def leaks_rows(model, ids, attention_mask, cache):
    y = model(ids, attention_mask=attention_mask, cache=cache)
    return y + np.float32(1e-7) * y[-1:]


def leaks_future(model, ids, attention_mask, cache):
    y = model(ids, attention_mask=attention_mask, cache=cache)
    return y + np.float32(1e-6) * y[:, -1:]


def counts_calls(model, ids, attention_mask, cache):
    model.n = getattr(model, "n", 0) + 1
    return model(ids, attention_mask=attention_mask, cache=cache) + np.float32(model.n > 9)


def not_finite(model, ids, attention_mask, cache):
    y = model(ids, attention_mask=attention_mask, cache=cache).copy()
    y[..., 0] = np.inf
    return y


@pytest.mark.parametrize(
    ("call", "law"),
    [
        (stale_positions, "with a cache"),
        (no_padding, "Padding, on the left or the right"),
        (leaks_rows, "other rows of a batch change no bit"),
        (leaks_future, "Later tokens change no bit"),
        (counts_calls, "12 calls in a row"),
        (not_finite, "Logits are a finite float array"),
    ],
)
def test_a_wrong_decoder_breaks_a_law(call, law):
    with pytest.raises(testing.LawBroken, match=law):
        testing.check_decoder(Spoilt(call), max_examples=10, most=8, shrink=False)


def test_our_decoder_breaks_none_and_packing_is_checked():
    model = tiny.model(ops=ops.reference)
    report = testing.check_decoder(model, max_examples=4, most=12)
    assert report.features == ("cache", "packing", "padding")
    unmasked = lambda documents: model  # noqa: ARG005, E731 - documents see each other
    with pytest.raises(testing.LawBroken, match="Documents packed in one row"):
        testing.check_decoder(model, {"packing"}, max_examples=10, most=12, packed=unmasked)


def test_a_decoder_failure_replays():
    fn = Spoilt(leaks_future)
    with pytest.raises(testing.LawBroken) as caught:
        testing.check_decoder(fn, max_examples=10, most=8, seed=1)
    assert caught.value.case["n_seq"] <= 3
    with pytest.raises(testing.LawBroken, match="Later tokens"):
        eval(caught.value.replay.replace("(fn,", "(mine,"), {"npllm": npllm, "mine": fn})


def test_a_feature_without_a_way_to_it_raises():
    def logits(ids):
        return np.zeros((*ids.shape, 7), np.float32)

    with pytest.raises(NpllmValueError, match="n_vocab must be given"):
        testing.check_decoder(logits)
    with pytest.raises(NpllmValueError, match="the cache needs new_cache"):
        testing.check_decoder(logits, {"cache"}, n_vocab=7)
    report = testing.check_decoder(logits, n_vocab=7, max_examples=3)
    assert set(report.left_out) == {"cache", "packing", "padding"}
