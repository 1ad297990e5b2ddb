"""The logit lens and the attention summary, against loops in float64; and their command."""

import json
import math

import numpy as np
import optional
import oracles
import pytest
import tiny
from close import close

import npllm
from npllm import ops
from npllm.errors import NpllmError, NpllmKeyError, NpllmValueError
from npllm.tracing.lens import lens, lens_facts, summarize_attention

IDS = tiny.random_ids(1, 7)
LAYERS = ["model.embed_tokens", "model.layers.0", "model.layers.1"]
MODELS = {
    "float32": tiny.model(),
    "float64": tiny.model(dtype=np.float64, sliding_window=3),
    "tied": tiny.model(ops=ops.reference, tie_word_embeddings=True),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def distribution(model, x):
    """Softmax of the scores of one position, in float64."""
    hidden = oracles.rms_norm(x, model.params.norm, model.config.rms_norm_eps)
    return np.array(oracles.softmax(oracles.linear(hidden, model.params.lm_head)))


@every_model
@pytest.mark.parametrize("position", [-1, 2])
def test_each_row_is_the_prediction_behind_a_layer(model, position):
    trace = npllm.trace(model, IDS)
    rows = lens(model, trace, position, 4)
    final = distribution(model, trace["model.layers.1"][0, position])
    own = int(final.argmax())
    assert [row.name for row in rows] == LAYERS
    for row in rows:
        p = distribution(model, trace[row.name][0, position])
        assert [token for token, _ in row.top] == list(np.argsort(-p)[:4])
        np.testing.assert_allclose([q for _, q in row.top], np.sort(p)[::-1][:4], rtol=1e-4)
        assert row.rank == 1 + sum(q > p[own] for q in p)
        assert row.probability == pytest.approx(p[own], rel=1e-4)
        kl = math.fsum(a * math.log(a / b) for a, b in zip(final, p, strict=True))
        assert row.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)


@every_model
def test_the_last_row_is_what_the_model_predicts(model):
    row = lens(model, npllm.trace(model, IDS))[-1]
    logits = model(IDS)[0, -1]
    assert (row.rank, row.top[0][0]) == (1, logits.argmax())
    assert row.kl == 0
    assert row.probability == pytest.approx(np.array(oracles.softmax(logits)).max(), rel=1e-4)


@every_model
def test_where_a_head_looks(model):
    trace = npllm.trace(model, IDS, names="*.weights")
    found = summarize_attention(trace)
    assert [(head.layer, head.head) for head in found] == [(n, h) for n in (0, 1) for h in range(4)]
    for head in found:
        w = trace[f"model.layers.{head.layer}.self_attn.weights"][0, head.head].tolist()
        entropy = [-math.fsum(p * math.log(p) for p in row if p > 0) for row in w]
        away = [math.fsum(p * (n - j) for j, p in enumerate(row)) for n, row in enumerate(w)]
        assert head.entropy == pytest.approx(math.fsum(entropy) / 7, abs=1e-6)
        assert head.first == pytest.approx(math.fsum(row[0] for row in w) / 7, abs=1e-6)
        assert head.distance == pytest.approx(math.fsum(away) / 7, abs=1e-6)


def test_equal_keys_give_the_entropy_of_their_number():
    params = MODELS["float64"].params
    layers = tuple(layer._replace(qkv_proj=layer.qkv_proj * 0) for layer in params.layers)
    model = npllm.Model(tiny.model().config, params._replace(layers=layers))
    (head, *_) = summarize_attention(npllm.trace(model, IDS, names="*.weights"))
    close(np.array(head.entropy), np.mean(np.log(np.arange(1.0, 8))))
    close(np.array([head.first, head.distance]), np.array([np.mean(1 / np.arange(1, 8)), 1.5]))


def test_what_the_lens_needs_is_asked_for():
    model = MODELS["float32"]
    with pytest.raises(NpllmKeyError, match=r"no value 'model.embed_tokens'"):
        lens(model, npllm.trace(model, IDS, names="model.layers.*"))
    for position in (7, -8):
        with pytest.raises(
            NpllmValueError, match=rf"position must be .*-7 \.\.\. 6, got {position}"
        ):
            lens(model, npllm.trace(model, IDS), position)
    said = r"one prompt with all positions, got model.embed_tokens \[2, 3, 32\], whole"
    with pytest.raises(NpllmValueError, match=said):
        lens_facts(model, tiny.random_ids(2, 3))
    with pytest.raises(NpllmValueError, match=r"model.embed_tokens \[1, 2, 32\], partial"):
        lens(model, npllm.trace(model, IDS, tokens=[0, 3]))
    with pytest.raises(NpllmValueError, match=r"weights \[1, 4, 2, 7\], partial"):
        summarize_attention(npllm.trace(model, IDS, tokens=[0, 3], names="*.weights"))


def test_logits_that_are_not_finite_are_refused():
    params = MODELS["float32"].params
    model = npllm.Model(MODELS["float32"].config, params._replace(norm=params.norm * np.nan))
    with pytest.raises(NpllmError, match="NaN"):
        lens(model, npllm.trace(model, IDS))


def folder(tmp_path):
    backend = tiny.byte_level()
    size = backend.get_vocab_size()
    return tiny.write_folder(
        tmp_path / "model", tokenizer=backend, settings=tiny.SETTINGS, vocab_size=size
    )


def test_the_lens_command(tmp_path):
    path = str(folder(tmp_path))
    prompt = ["-m", path, "-p", "hello world", "--ops", "reference"]
    result = optional.invoke(["lens", *prompt])
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "embed", "0", "1"]
    assert lines[-1].split()[1] == "1", "the model's own prediction"
    assert "comes" in result.stderr
    facts = json.loads(optional.invoke(["lens", *prompt, "--json", "-k", "2"]).stdout)
    model = npllm.load(path, ops="reference")
    assert facts == json.loads(json.dumps(lens_facts(model, "hello world", n_top=2)))
    assert [len(row["top"]) for row in facts["layers"]] == [2, 2, 2]
    heads = optional.invoke(["lens", *prompt, "--attention"]).stdout.splitlines()
    assert len(heads) == 1 + 8 and heads[0].split() == [
        "layer",
        "head",
        "entropy",
        "first",
        "distance",
    ]


def test_the_trace_command(tmp_path):
    path, out = str(folder(tmp_path)), tmp_path / "out"
    options = ["--layers", "1", "--tokens", "0,2:4,-1", "--names", "*.mlp.up", "--names", "lm_head"]
    command = ["trace", "-m", path, "-p", "hello world", "-o", str(out), *options]
    result = optional.invoke([*command, "-n", "1", "--dtype", "float64"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}: 2 values, ") and "reference ops" in result.stdout
    trace = npllm.Trace.load(out)
    assert list(trace) == ["model.layers.1.mlp.up", "lm_head"]
    wanted = npllm.trace(
        npllm.load(path),
        "hello world",
        layers=[1],
        tokens=[0, 2, 3, -1],
        names=["*.mlp.up", "lm_head"],
        dtype="float64",
        max_new_tokens=1,
    )
    for name, x in wanted.items():
        close(trace[name], x, times=0)
    again = optional.invoke(command)
    assert again.exit_code == 1 and "new or empty folder" in again.stderr
    bad = optional.invoke([*command[:-6], "--layers", "1:x"])
    assert bad.exit_code == 2 and "'1:x' is neither a number nor a range" in bad.stderr
    more = ["trace", "-m", path, "-p", "hello", "-o", str(tmp_path / "b"), "--json"]
    facts = json.loads(optional.invoke(more).stdout)
    assert facts["values"] == len(npllm.trace(npllm.load(path), "hello")) and facts["steps"] == 1
