"""Tensors of a file that are, or seem, superfluous: tied matrices that differ, old RoPE buffers,
heads of another task.
"""

import os
import warnings

import family
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st
from test_llama import LLAMA

import npllm
from npllm import Config
from npllm.checkpoints import phi3_layout, unused
from npllm.checkpoints.phi3_layout import load_params
from npllm.models import rope

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
TIED = {
    "phi3": tiny.config_dict(tie_word_embeddings=True),
    "llama": LLAMA | {"tie_word_embeddings": True},
}
families = pytest.mark.parametrize("content", TIED.values(), ids=list(TIED))
DIFFER = r"tie_word_embeddings: true, but lm_head\.weight and model\.embed_tokens\.weight differ, so both are used"
IDS = np.array([[5, 6, 7, 8]])


def another(seed=9):
    return (0.3 * np.random.default_rng(seed).standard_normal((61, 32))).astype(np.float32)


def load(folder, content, tensors, **options):
    family.write(folder, content, tensors)
    return load_params(folder, Config.from_json(content), **options)


# ------------------------------------------------------------------------------------------------------------------ tied matrices


@families
def test_two_tied_matrices_that_differ_are_both_used(content):
    tensors = family.tensors(content) | {OUTPUT: another()}
    with pytest.warns(UserWarning, match=DIFFER):
        model = family.load(content, tensors)
    want = family.load(content | {"tie_word_embeddings": False}, tensors)
    close(model(IDS), want(IDS), times=0)
    close(np.array(model.params.lm_head), another(), times=0)


@families
@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_two_tied_matrices_that_are_equal_are_one(tmp_path, content, dtype):
    tensors = family.tensors(content)
    params = load(tmp_path, content, tensors | {OUTPUT: tensors[EMBEDDING].copy()}, dtype=dtype)
    assert params.lm_head is params.embed_tokens


@families
@pytest.mark.parametrize("dtype", [None, "float64", "int8"])
def test_of_two_tied_matrices_the_one_in_the_file_is_used_for_both(tmp_path, content, dtype):
    tensors = family.tensors(content)
    renamed = {OUTPUT if name == EMBEDDING else name: x for name, x in tensors.items()}
    params = load(tmp_path, content, renamed, dtype=dtype)
    assert params.lm_head is params.embed_tokens
    ids = tiny.random_ids(1, 5)
    close(
        npllm.load(tmp_path, dtype=dtype)(ids),
        family.load(content, tensors, dtype=dtype)(ids),
        times=0,
    )


@families
def test_a_single_entry_makes_the_difference(tmp_path, content):
    tensors = family.tensors(content)
    for place in ((0, 0), (60, 31)):
        other = tensors[EMBEDDING].copy()
        other[place] += 1e-3
        with pytest.warns(UserWarning, match=DIFFER):
            assert load(tmp_path, content, tensors | {OUTPUT: other}).lm_head[place] == other[place]


def test_without_either_of_two_tied_matrices_the_error_names_the_embedding(tmp_path):
    tensors = family.tensors(TIED["llama"])
    del tensors[EMBEDDING]
    with pytest.raises(npllm.NpllmError, match=r"missing: model\.embed_tokens\.weight$"):
        load(tmp_path, TIED["llama"], tensors)


def test_an_untied_model_does_not_make_do_with_one(tmp_path):
    tensors = family.tensors(LLAMA)
    del tensors[EMBEDDING]
    with pytest.raises(npllm.NpllmError, match=r"missing: model\.embed_tokens\.weight$"):
        load(tmp_path, LLAMA, tensors)


@pytest.mark.parametrize("lost", [None, EMBEDDING])
def test_a_tied_output_matrix_has_the_shape_of_the_embedding(tmp_path, lost):
    tensors = {name: x for name, x in family.tensors(TIED["llama"]).items() if name != lost}
    with pytest.raises(
        npllm.NpllmError, match=r"lm_head\.weight must be \[61, 32\], got \[60, 32\]"
    ):
        load(tmp_path, TIED["llama"], tensors | {OUTPUT: another()[:-1]})


def test_a_tied_output_matrix_of_integers_is_refused(tmp_path):
    with pytest.raises(npllm.NpllmError, match=r"dtype not one of .*lm_head\.weight is I64"):
        load(
            tmp_path,
            TIED["llama"],
            family.tensors(TIED["llama"]) | {OUTPUT: np.zeros((61, 32), np.int64)},
        )


FLOATS = st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16])


@given(st.integers(1, 9), st.integers(1, 9), FLOATS, FLOATS, st.booleans(), st.data())
def test_matrices_are_the_same_where_their_values_are(n, d, one, other, changed, data):
    x = np.random.default_rng(0).integers(-8, 8, (n, d)).astype(np.float64)
    y = x.copy()
    if changed:
        y[data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, d - 1))] += 0.5
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(unused, "BLOCK", data.draw(st.integers(1, 30)))
        assert unused.same_values(x.astype(one), y.astype(other)) is not changed


def test_the_comparison_stops_where_matrices_differ(monkeypatch):
    seen = []
    monkeypatch.setattr(unused, "BLOCK", 32)
    monkeypatch.setattr(
        unused.np, "array_equal", lambda a, b: (seen.append(a.shape), bool((a == b).all()))[1]
    )
    assert not unused.same_values(another(1), another(2))
    assert len(seen) == 1


# ------------------------------------------------------------------------------------------------------------------ RoPE buffers

ROPES = {
    "default": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 16,
        }
    },
}


@pytest.mark.parametrize("changes", ROPES.values(), ids=list(ROPES))
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_rope_buffers_that_follow_from_the_config_are_silent(tmp_path, changes, dtype):
    content = LLAMA | changes
    config = Config.from_json(content)
    for length in (1, config.context_length):
        stored = rope.frequencies(config, rope.frequency_choice(config, length)).astype(dtype)
        load(
            tmp_path,
            content,
            family.tensors(content) | {BUFFER: stored, "model.rotary_emb.inv_freq": stored},
        )


@pytest.mark.parametrize(
    "stored",
    [
        np.ones(4, np.float32),
        np.ones(3, np.float32),
        np.zeros(4, np.int64),
        np.float32([1, 0.1, 0.01, 0.0011]),
    ],
)
def test_rope_buffers_that_do_not_are_named(tmp_path, stored):
    tensors = family.tensors(LLAMA)
    with pytest.warns(
        UserWarning,
        match=r"not used: model\.layers\.0\.self_attn\.rotary_emb\.inv_freq; .* of config\.json, which are used",
    ):
        params = load(tmp_path, LLAMA, tensors | {BUFFER: stored})
    close(np.array(params.norm), tensors["model.norm.weight"], times=0)


def test_the_bar_counts_what_is_read(tmp_path, monkeypatch):
    import contextlib

    seen = []
    monkeypatch.setattr(
        phi3_layout,
        "progress_bar",
        lambda total, _, **__: contextlib.nullcontext(lambda n, _: seen.append((n, total))),
    )
    tensors = family.tensors(TIED["llama"])
    load(tmp_path, TIED["llama"], tensors | {OUTPUT: tensors[EMBEDDING].copy()}, progress=True)
    assert sum(n for n, _ in seen) == seen[0][1]


# ------------------------------------------------------------------------------------------------------------------ Transformers


@pytest.mark.live
@families
@pytest.mark.parametrize("case", ["differ", "equal", "only the output", "equal, wider", "rounded"])
def test_tied_matrices_are_those_of_transformers(tmp_path, content, case):
    if os.environ.get("NPLLM_REQUIRE_LIVE") != "1":
        pytest.importorskip(
            "torch", reason="compares with Transformers, and torch is not installed"
        )
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tensors = family.tensors(content)
    embedding = tensors[EMBEDDING]
    tensors[OUTPUT] = {
        "differ": another(),
        "equal, wider": embedding.astype(np.float64),
        "rounded": embedding.astype(ml_dtypes.bfloat16),
    }.get(case, embedding.copy())
    if case == "only the output":
        del tensors[EMBEDDING]
    folder = family.write(tmp_path, content, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = npllm.load(folder)
    with torch.no_grad():
        want = theirs(torch.as_tensor(IDS)).logits.numpy()
    close(ours(IDS), want, times=16)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (
        ours.params.lm_head is ours.params.embed_tokens
    )
    assert any("both are used" in str(warning.message) for warning in caught) == (
        case in ("differ", "rounded")
    )
