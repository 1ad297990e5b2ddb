"""Classifiers: `score` on top of the hidden state, of the last token that is no padding or of every
token.
"""

import family
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm.analysis.inspect import checkpoint_facts
from npllm.models import heads

PAD = 60


def _content(head, **changes):
    return tiny.config_dict(
        **{"architectures": [f"Phi3For{head}"], "num_labels": 5, "pad_token_id": PAD} | changes
    )


def _model(head="SequenceClassification", **changes):
    return family.model(_content(head, **changes))


rows = st.lists(st.lists(st.integers(3, 59), min_size=1, max_size=9), min_size=1, max_size=4)


def _right(rows):
    n = max(map(len, rows))
    return np.array([list(row) + [PAD] * (n - len(row)) for row in rows]), np.array(
        [[1] * len(row) + [0] * (n - len(row)) for row in rows]
    )


def _by_hand(model, row):
    """Scores of a sequence alone: its last hidden state times `score`."""
    return model.model(np.array([row]))[0, -1] @ np.asarray(model.params.score, np.float64).T


@given(rows, st.sampled_from(["left", "right"]), st.booleans())
def test_a_sequence_is_scored_by_its_last_token_on_either_side_of_the_padding(rows, side, masked):
    """spec 8.37: by the mask where one is given; by the pad id alone, padding on the right only is
    invisible to the tokens.
    """
    model = _model()
    ids, mask = family.padded(rows, PAD) if side == "left" else _right(rows)
    expected = np.stack([_by_hand(model, row) for row in rows])
    if masked:
        close(model(ids, attention_mask=mask), expected)
    elif side == "right":
        close(model(ids), expected)


@given(rows)
def test_tokens_are_scored_one_by_one_with_a_bias(rows):
    """spec 8.37."""
    model = _model("TokenClassification")
    ids, mask = family.padded(rows, PAD)
    logits = model(ids, attention_mask=mask)
    score, bias = (np.asarray(x, np.float64) for x in (model.params.score, model.params.score_bias))
    assert logits.shape == (*ids.shape, 5)
    for row, ours in zip(rows, logits, strict=True):
        close(ours[-len(row) :], model.model(np.array([row]))[0] @ score.T + bias)


def test_a_pad_id_inside_the_sequence_is_not_the_end():
    model = _model()
    row = [5, PAD, 7, PAD, 9]
    close(model(np.array([[*row, PAD]]))[0], _by_hand(model, row))
    close(model(np.array([row]), attention_mask=np.ones((1, 5), int))[0], _by_hand(model, row))


def test_a_mask_goes_before_the_pad_id():
    model = _model()
    row = [5, 6, PAD]
    close(model(np.array([row]), attention_mask=np.array([[1, 1, 1]]))[0], _by_hand(model, row))
    close(
        model(np.array([[5, 6, 7, 8]]), attention_mask=np.array([[1, 1, 0, 0]]))[0],
        _by_hand(model, [5, 6]),
    )


def test_without_pad_id_and_mask_the_last_token_is_scored():
    model = _model(pad_token_id=None)
    for row in ([5, 6], [5, PAD]):
        close(model(np.array([row]))[0], _by_hand(model, row))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_a_classifier_has_no_output_matrix_and_does_not_generate(head):
    """spec 8.37."""
    model = _model(head)
    assert model.params.lm_head is None
    with pytest.raises(npllm.NpllmError, match=f"Phi3For{head} has no lm_head.*5 classes"):
        model.lm_head(np.zeros((1, 32)))
    with pytest.raises(npllm.NpllmError, match=f"Phi3For{head} .*cannot generate"):
        model.generate(np.array([[5]]))
    with pytest.raises(npllm.NpllmError, match="cannot generate"):
        model.stream([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("head", "lost"),
    [
        ("SequenceClassification", "score.weight"),
        ("TokenClassification", "score.weight"),
        ("TokenClassification", "score.bias"),
    ],
)
def test_a_missing_score_is_an_error_that_names_it(head, lost):
    weights = family.tensors(_content(head))
    del weights[lost]
    with pytest.raises(npllm.NpllmError, match=f"missing: {lost}"):
        family.load(_content(head), weights)


def test_a_score_of_another_number_of_labels_is_an_error_with_both_shapes():
    with pytest.raises(npllm.NpllmError, match=r"score\.weight must be \[4, 32\], got \[5, 32\]"):
        family.load(
            _content("SequenceClassification", num_labels=4),
            family.tensors(_content("SequenceClassification")),
        )


def test_an_output_matrix_left_in_the_file_is_not_read_and_named():
    content = _content("SequenceClassification")
    weights, ids = family.tensors(content), np.array([[5, 6]])
    with pytest.warns(
        UserWarning,
        match=r"not used: lm_head\.weight; Phi3ForSequenceClassification scores classes",
    ):
        model = family.load(content, weights | {"lm_head.weight": np.ones((61, 32), np.float32)})
    close(model(ids), family.load(content, weights)(ids), times=0)


@pytest.mark.parametrize(
    ("changes", "n"),
    [
        ({"num_labels": ...}, 2),
        ({"num_labels": ..., "id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
        ({"num_labels": 4}, 4),
    ],
)
def test_the_number_of_labels_is_as_said_else_as_many_as_have_names_else_two(changes, n):
    content = tiny.config_dict(**{**_content("SequenceClassification"), **changes})
    assert family.load(content)(np.array([[5]])).shape == (1, n)


def test_a_cached_classifier_scores_the_last_token_so_far():
    model = _model(sliding_window=4)
    cache, ids = model.new_cache(), family.ids_of(model.config, (1, 9))
    for part, n in ((ids[:, :5], 5), (ids[:, 5:6], 6), (ids[:, 6:], 9)):
        close(model(part, cache=cache)[0], _by_hand(model, ids[0, :n]))


def test_a_language_model_is_not_called_a_classifier(tmp_path):
    facts = checkpoint_facts(family.write(tmp_path, _content("SequenceClassification")))
    assert facts["parameters"] == sum(
        x.size for x in family.tensors(_content("SequenceClassification")).values()
    )
    assert "(score): Linear(in_features=32, out_features=5" in facts["tree"]


def test_last_token_picks_one_position_of_each_row():
    hidden = np.arange(24.0).reshape(2, 3, 4)
    close(
        heads.last_token(hidden, np.array([2, 0])), np.stack([hidden[0, 2], hidden[1, 0]]), times=0
    )
