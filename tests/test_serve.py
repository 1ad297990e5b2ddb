"""The server as its clients meet it: OpenAI's own client, raw HTTP, and every refusal."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import optional
import pytest
import served
import tiny

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
run = pytest.importorskip("npllm.serve.run")

from npllm.errors import NpllmValueError  # noqa: E402
from npllm.serve.security import is_loopback, require_key  # noqa: E402

NAME = "tiny"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.load(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(model):
    return run.make_server(model, names=(NAME,), max_body_bytes=100_000, max_queue=64)


@pytest.fixture(scope="module")
def url(server):
    with run.serving(server) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


def post(url, path, body, **options):
    options = {"json": body} if not options else options
    return httpx.post(f"{url}/{path}", timeout=300, **options)


# ------------------------------------------------------------------------------ answers


def test_a_chat_is_answered_as_generate_answers_it(client, model):
    answer = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == model.generate(HELLO, max_new_tokens=12)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    n_prompt = len(model.tokenizer.encode_chat(HELLO))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 12)
    assert answer.usage.total_tokens == n_prompt + 12
    assert (answer.object, answer.model) == ("chat.completion", NAME)


def test_a_stream_joins_to_the_whole(client, model):
    options = {"model": NAME, "messages": HELLO, "max_tokens": 20, "seed": 4, "temperature": 1.3}
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, n=2, **options
    )
    chunks = list(stream)
    texts, roles, reasons = ["", ""], [], []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.delta.role] * (choice.delta.role is not None)
        reasons += [choice.finish_reason] * (choice.finish_reason is not None)
    whole = client.chat.completions.create(n=2, **options)
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] == model.generate(HELLO, max_new_tokens=20, seed=4, temperature=1.3)
    assert (roles, reasons) == (["assistant"] * 2, ["length"] * 2)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40


@pytest.mark.parametrize(
    "prompt", ["hello", [12, 40, 99], ["hello", "hell"], [[12, 40], [99]]], ids=repr
)
def test_prompts_of_every_form(client, model, prompt):
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=6)
    texts = [choice.text for choice in answer.choices]
    if isinstance(prompt[0], int | list):
        rows = [prompt] if isinstance(prompt[0], int) else prompt
        wanted = [
            model.tokenizer.decode(served.alone(model, ids, max_new_tokens=6)) for ids in rows
        ]
    else:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        wanted = [model.generate(one, max_new_tokens=6) for one in prompts]
    assert texts == wanted
    assert [choice.index for choice in answer.choices] == list(range(len(wanted)))


def test_every_option_of_decoding_does_what_it_does_in_generate(client, model):
    options = {
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 11,
        "stop": ["h", "zz"],
    }
    extra = {
        "top_k": 30,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "min_new_tokens": 2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[40, 41]],
        "suppress_tokens": [50],
        "begin_suppress_tokens": [60],
        "forced_eos_token_id": 70,
    }
    answer = client.completions.create(
        model=NAME, prompt="hello", max_tokens=30, extra_body=extra, **options
    )
    assert answer.choices[0].text == model.generate("hello", max_new_tokens=30, **options, **extra)


def test_a_stop_string_ends_an_answer(client, model):
    text = model.generate("hello", max_new_tokens=20)
    at = next(i for i in range(1, len(text)) if text[i].isascii() and text[i] not in text[:i])
    answer = client.completions.create(model=NAME, prompt="hello", max_tokens=20, stop=text[at])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[:at], "stop")


def test_log_probabilities_of_a_chat(client, model):
    answer = client.chat.completions.create(
        model=NAME, messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3
    )
    out = model.generate(
        HELLO, max_new_tokens=4, top_logprobs=3, return_dict_in_generate=True
    ).answers[0]
    content = answer.choices[0].logprobs.content
    np.testing.assert_allclose([one.logprob for one in content], out.logprobs, atol=1e-6)
    assert [len(one.top_logprobs) for one in content] == [3] * 4
    assert content[0].top_logprobs[0].logprob == content[0].logprob  # greedy


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_prompt_as_lm_eval_asks(client, model, max_tokens):
    """Token ids as prompts; the log-probability of the first token is null."""
    prompts = [tiny.random_ids(1, n, n, 272)[0].tolist() for n in (2, 19, 70)]
    answer = client.completions.create(
        model=NAME,
        prompt=prompts,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=1,
        echo=True,
        seed=1234,
    )
    for ids, choice in zip(prompts, answer.choices, strict=True):
        logits = np.asarray(model(np.array([ids])), np.float64)[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = choice.logprobs
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        wanted = log_probs[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(found.token_logprobs[1 : len(ids)], wanted, atol=1e-4)
        best = [max(top.values()) for top in found.top_logprobs[1 : len(ids)]]
        np.testing.assert_allclose(best, log_probs[:-1].max(-1), atol=1e-4)
        assert len(found.tokens) == len(found.text_offset) == len(ids) + max_tokens
        is_greedy = [
            max(top, key=top.get) == token
            for top, token in zip(found.top_logprobs[1:], found.tokens[1:], strict=True)
        ]
        assert is_greedy[len(ids) - 1 :] == [True] * max_tokens
    assert answer.usage.completion_tokens == max_tokens * len(prompts)


def test_a_streamed_echo_joins_to_the_whole(client):
    options = {"model": NAME, "prompt": "hello", "max_tokens": 5, "echo": True, "logprobs": 2}
    whole = client.completions.create(**options).choices[0]
    parts = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [x for part in parts for x in getattr(part.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)
    plain = client.completions.create(**options | {"logprobs": None}).choices[0]
    assert (plain.text, plain.logprobs) == (whole.text, None)


@pytest.mark.parametrize(("frequency", "presence"), [(0, 0), (2, 0), (0, 2), (-1.5, 1)])
def test_penalties_and_bias_change_the_logits(client, model, frequency, presence):
    a, b = model.tokenizer.encode("ab")
    n_prompt = len(model.tokenizer.encode("hello"))

    def process(ids, logits):
        logits[:, [a, b]] += np.float32([100, 99])
        answer = ids[0, n_prompt:].tolist()
        for token in set(answer):
            logits[0, token] -= np.float32(frequency * answer.count(token))
            logits[0, token] -= np.float32(presence)
        return logits

    answer = client.completions.create(
        model=NAME,
        prompt="hello",
        max_tokens=30,
        logit_bias={str(a): 100, str(b): 99},
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    text = answer.choices[0].text
    assert text == model.generate("hello", max_new_tokens=30, logits_processors=process)
    assert set(text) <= {"a", "b"}
    assert frequency <= 0 or len(set(text)) == 2


def test_parts_of_text_are_one_message(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "user", "content": parts}]
    answers = [
        client.chat.completions.create(model=NAME, messages=one, max_tokens=5, user="somebody")
        for one in (messages, HELLO)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_models_health_and_metrics(client, url):
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "npllm"
    root = url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    client.completions.create(model=NAME, prompt=[5, 6], max_tokens=3)
    text = httpx.get(f"{root}/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert values["npllm_running"] == 0
    assert values["npllm_generated_tokens_total"] >= 3
    assert values['npllm_requests_total{path="/v1/completions",status="200"}'] >= 1


# ------------------------------------------------------------------------------ refusals

COMPLETION = {"model": NAME, "prompt": "hello", "max_tokens": 1}
CHAT = {"model": NAME, "messages": HELLO, "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("completions", COMPLETION | {"model": "gpt-9"}, 404, "model", "model_not_found"),
        ("completions", {"model": NAME}, 400, "prompt", "missing_required_parameter"),
        ("completions", COMPLETION | {"prompt": ""}, 400, "prompt", "invalid_value"),
        ("completions", COMPLETION | {"prompt": []}, 400, "prompt", "invalid_value"),
        ("completions", COMPLETION | {"prompt": [[]]}, 400, "prompt", "invalid_value"),
        ("completions", COMPLETION | {"prompt": [5, "a"]}, 400, "prompt", "invalid_value"),
        ("completions", COMPLETION | {"prompt": [True]}, 400, "prompt", "invalid_value"),
        ("completions", COMPLETION | {"prompt": [272]}, 400, "prompt", "invalid_value"),
        ("completions", COMPLETION | {"prompt": [-1]}, 400, "prompt", "invalid_value"),
        ("completions", COMPLETION | {"prompt": {"a": 1}}, 400, "prompt", "invalid_value"),
        ("completions", COMPLETION | {"prompt": "\ud800"}, 400, None, None),
        (
            "completions",
            COMPLETION | {"prompt": [5] * 257},
            400,
            "prompt",
            "context_length_exceeded",
        ),
        ("completions", COMPLETION | {"max_tokens": 256}, 400, "prompt", "context_length_exceeded"),
        ("completions", COMPLETION | {"max_tokens": -1}, 400, "max_tokens", "invalid_value"),
        ("completions", COMPLETION | {"max_tokens": 1.5}, 400, "max_tokens", "invalid_value"),
        ("completions", COMPLETION | {"max_tokens": True}, 400, "max_tokens", "invalid_value"),
        ("completions", COMPLETION | {"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ("completions", COMPLETION | {"temperature": -1}, 400, "temperature", "invalid_value"),
        ("completions", COMPLETION | {"top_p": 2}, 400, "top_p", "invalid_value"),
        ("completions", COMPLETION | {"seed": -1}, 400, "seed", "invalid_value"),
        ("completions", COMPLETION | {"stop": ["", "a"]}, 400, "stop", "invalid_value"),
        ("completions", COMPLETION | {"stop": ["a"] * 17}, 400, "stop", "invalid_value"),
        ("completions", COMPLETION | {"n": 0}, 400, "n", "invalid_value"),
        ("completions", COMPLETION | {"n": 100}, 400, "n", "too_many_sequences"),
        ("completions", COMPLETION | {"logprobs": 21}, 400, "logprobs", "invalid_value"),
        ("completions", COMPLETION | {"logprobs": True}, 400, "logprobs", "invalid_value"),
        ("completions", COMPLETION | {"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_value"),
        (
            "completions",
            COMPLETION | {"logit_bias": {"272": 1}},
            400,
            "logit_bias",
            "invalid_value",
        ),
        ("completions", COMPLETION | {"best_of": 2}, 400, "best_of", "unsupported_parameter"),
        ("completions", COMPLETION | {"suffix": "x"}, 400, "suffix", "unsupported_parameter"),
        ("completions", COMPLETION | {"tempereture": 1}, 400, "tempereture", None),
        ("completions", COMPLETION | {"num_beams": 2}, 400, "num_beams", "unsupported_parameter"),
        ("completions", COMPLETION | {"stream_options": {}}, 400, "stream_options", None),
        (
            "completions",
            COMPLETION | {"stream": True, "stream_options": {"x": 1}},
            400,
            "stream_options",
            "invalid_value",
        ),
        ("completions", COMPLETION | {"forced_eos_token_id": 999}, 400, None, None),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages", "invalid_value"),
        ("chat/completions", CHAT | {"messages": "hi"}, 400, "messages", "invalid_value"),
        ("chat/completions", CHAT | {"messages": [5]}, 400, "messages", "invalid_value"),
        ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "messages", None),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages",
            "invalid_value",
        ),
        ("chat/completions", CHAT | {"max_completion_tokens": 2}, 400, "max_tokens", None),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        ("chat/completions", CHAT | {"logprobs": 2}, 400, "logprobs", "invalid_value"),
        (
            "chat/completions",
            CHAT | {"tools": [{"type": "function"}]},
            400,
            "tools",
            "unsupported_parameter",
        ),
        (
            "chat/completions",
            CHAT | {"response_format": {"type": "json_object"}},
            400,
            "response_format",
            "unsupported_parameter",
        ),
        ("chat/completions", CHAT | {"prompt": "x"}, 400, "prompt", "unsupported_parameter"),
        ("embeddings", {"model": NAME, "input": "a"}, 400, "model", "wrong_kind_of_model"),
    ],
    ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else None,
)
def test_a_refusal_names_what_is_wrong(url, path, body, status, param, code):
    answer = post(url, path, None, content=json.dumps(body), headers=JSON)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] == (param or error["param"])
    assert error["code"] == (code or error["code"])


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", JSON, 400),
        (b"{", JSON, 400),
        (b"[1]", JSON, 400),
        (b"null", JSON, 400),
        (b"\xff\xfe", JSON, 400),
        (b'{"model": "a", "model": "b"}', JSON, 400),
        (b"[" * 90_000, JSON, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", JSON, 400),
        (b'{"temperature": NaN, "model": "tiny", "prompt": "a"}', JSON, 400),
        (b" " * 200_000, JSON, 413),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {}, 415),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_a_malformed_body_is_refused(url, content, headers, status):
    answer = post(url, "completions", None, content=content, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_parameters_that_change_nothing_are_taken(url):
    body = COMPLETION | {
        "user": "me",
        "metadata": {"a": "b"},
        "best_of": 1,
        "suffix": None,
        "store": False,
        "frequency_penalty": 0,
        "logit_bias": {},
    }
    assert post(url, "completions", body).status_code == 200


def test_unknown_paths_and_methods_are_refused_in_the_same_form(url):
    for answer, status in (
        (httpx.get(f"{url}/nothing"), 404),
        (httpx.get(f"{url}/completions"), 405),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="top_p must be"):
        client.completions.create(model=NAME, prompt="a", top_p=3)


def test_a_page_of_another_site_cannot_ask(url):
    answer = post(url, "completions", None, json=COMPLETION, headers={"host": "evil.example:80"})
    assert answer.status_code == 403


# ------------------------------------------------------------------------------ limits


def test_an_api_key_is_asked_for(model):
    server = run.make_server(model, names=(NAME,), api_key="secret")
    with run.serving(server) as url:
        for key, status in (("secret", 200), ("secre", 401), ("x", 401), ("sécret", 401)):
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = httpx.get(f"{url}/models", headers=headers)
            assert answer.status_code == status
        assert answer.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{url}/models").status_code == 401
        root = url.removesuffix("/v1")
        assert httpx.get(f"{root}/metrics").status_code == 401
        assert httpx.get(f"{root}/health").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_another_address_needs_a_key(host):
    with pytest.raises(NpllmValueError, match="--api-key"):
        require_key(host, None)
    require_key(host, "secret")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "127.1.2.3"])
def test_loopback_needs_none(host):
    assert is_loopback(host)
    require_key(host, None)


def test_a_full_queue_is_429_and_the_client_tries_again(model):
    server = run.make_server(served.slowed(model, 0.005), names=(NAME,), max_batch=1, max_queue=0)
    with run.serving(server) as url, openai.OpenAI(base_url=url, api_key="x") as client:
        options = {"model": NAME, "prompt": [5], "max_tokens": 150}
        stream = client.completions.create(stream=True, **options)
        next(iter(stream))
        answer = post(url, "completions", options)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert client.completions.create(**options | {"max_tokens": 2}).choices[0].text


def test_a_client_that_goes_away_frees_its_row(model):
    server = run.make_server(served.slowed(model, 0.005), names=(NAME,), max_batch=1)
    options = {"model": NAME, "prompt": [5], "max_tokens": 200}
    with run.serving(server) as url:
        with openai.OpenAI(base_url=url, api_key="x") as client:
            with client.completions.create(stream=True, **options) as stream:
                next(iter(stream))
            assert client.completions.create(**options | {"max_tokens": 2}).choices[0].text
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/completions", json=options, timeout=0.2)
        served.wait_until(lambda: server.worker.gauges()["npllm_running"] == 0)
        counts = httpx.get(f"{url.removesuffix('/v1')}/metrics").text
    (n,) = [line for line in counts.splitlines() if line.startswith("npllm_generated")]
    assert float(n.split()[1]) < 300


def test_a_reader_that_stops_reading_stops_nobody(client, url):
    with httpx.stream("POST", f"{url}/completions", json=COMPLETION | {"stream": True}) as slow:
        assert client.completions.create(model=NAME, prompt="a", max_tokens=2).choices[0].text
        assert slow.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_fault_of_the_server_is_an_error_as_well(model, streamed):
    other = served.slowed(model, 0)
    other.logits_of_rows = lambda *_: 1 / 0
    server = run.make_server(other, names=(NAME,))
    body = {"model": NAME, "prompt": [5], "max_tokens": 3, "stream": streamed}
    with run.serving(server) as url:
        answer = post(url, "completions", body)
        last = answer.text.strip().rpartition("data: ")[2] if streamed else answer.text
        assert json.loads(last)["error"]["type"] == "server_error"
        assert answer.status_code == (200 if streamed else 500)
        body = {"model": NAME, "prompt": [5], "max_tokens": 1}
        assert post(url, "completions", body).status_code == 200


def test_an_answer_that_takes_too_long_is_an_error(model):
    server = run.make_server(served.slowed(model, 0.01), names=(NAME,), timeout=0.1)
    options = {"model": NAME, "prompt": [5], "max_tokens": 200}
    with run.serving(server) as url:
        answer = post(url, "completions", options)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        text = post(url, "completions", options | {"stream": True}).text
    last = json.loads(text.strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "timeout"


# ------------------------------------------------------------------------------ embeddings


def test_embeddings_are_those_of_embed():
    encoder_tests = pytest.importorskip("test_encoder")
    encoder, _ = encoder_tests.make(dtype=np.float32)
    server = run.make_server(encoder, names=("enc",))
    with run.serving(server) as url, openai.OpenAI(base_url=url, api_key="x") as client:
        texts = ["hello", "hell o"]
        wanted = encoder.embed(texts)
        found = client.embeddings.create(model="enc", input=texts).data
        np.testing.assert_array_equal([one.embedding for one in found], wanted)
        body = {"model": "enc", "input": texts[0], "encoding_format": "float"}
        plain = post(url, "embeddings", body).json()["data"][0]["embedding"]
        np.testing.assert_allclose(plain, wanted[0], atol=1e-7)
        coded = post(url, "embeddings", body | {"encoding_format": "base64"}).json()
        raw = base64.b64decode(coded["data"][0]["embedding"])
        np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), wanted[0])
        ids = encoder.encode(texts[1])
        by_ids = client.embeddings.create(model="enc", input=[ids]).data[0].embedding
        np.testing.assert_array_equal(by_ids, encoder.embed(texts[1:])[0])
        with pytest.raises(openai.BadRequestError, match="is an encoder"):
            client.completions.create(model="enc", prompt="a")
        for wrong in ({"dimensions": 7}, {"input": "a " * 600}, {"input": [10**6]}, {"input": []}):
            answer = post(url, "embeddings", body | wrong)
            assert answer.status_code == 400, wrong


# ------------------------------------------------------------------------------ the command


def test_the_command_makes_the_server_that_was_asked_for(model, monkeypatch):
    made = []
    monkeypatch.setattr(run, "run_server", lambda *args, **options: made.append((args, options)))
    words = ["serve", "-m", str(model.folder), "--max-batch", "3", "--max-queue", "5", "--port"]
    result = optional.invoke([*words, "8123", "--grace", "2", "--cache-bytes", "0"])
    assert result.exit_code == 0, result.output
    ((server, host, port), options) = made[0]
    assert options.pop("listener").fileno() == -1  # closed again
    assert (host, port, options) == ("127.0.0.1", 8123, {"grace": 2})
    assert (server.worker.max_batch, server.worker.max_queue) == (3, 5)
    assert server.names == (model.folder.name, str(model.folder))
    assert f"serving {model.folder.name} at http://127.0.0.1:8123/v1" in result.stderr
    refused = optional.invoke([*words, "8123", "--host", "0.0.0.0"])
    assert (refused.exit_code, len(made)) == (1, 1) and "--api-key" in refused.stderr


def test_a_port_in_use_is_said_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("npllm.cli.options.load", lambda *_, **__: 1 / 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = optional.invoke(["serve", "--port", str(port)])
    assert result.exit_code == 1
    assert f"cannot listen at 127.0.0.1:{port} (Address already in use)" in result.stderr
    assert "serving" not in result.stderr


def test_the_body_of_an_answer_does_not_wait_for_an_acknowledgement():
    """Connections that asyncio accepts on the listening socket send at once."""

    async def accepted():
        sockets = asyncio.Queue()
        with run.listen("127.0.0.1", 0) as listener:
            server = await asyncio.start_server(
                lambda _, writer: sockets.put_nowait(writer), sock=listener
            )
            async with server:
                _, writer = await asyncio.open_connection(*listener.getsockname())
                other = await sockets.get()
                there = other.get_extra_info("socket")
                found = there.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                other.close()
        return found

    assert asyncio.run(accepted())


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 17}, {"max_batch": 0}, {"max_queue": -1}, {"max_prompt_tokens": 257}]
)
def test_a_server_beyond_its_limits_is_refused(model, wrong):
    with pytest.raises(NpllmValueError, match=next(iter(wrong))):
        run.make_server(model, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_is_at_work_is_finished_before_the_end(model, how):
    """A process of its own, ended in the middle of a stream."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    words = ["-m", "npllm", "serve", "-m", str(model.folder), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *words], cwd=root, stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        served.wait_until(lambda: is_up(url))
        with openai.OpenAI(base_url=url, api_key="x") as client:
            name = client.models.list().data[0].id
            options = {"model": name, "prompt": [5], "max_tokens": 250, "stream": True}
            stream = iter(client.completions.create(**options))
            pieces = [next(stream)]
            process.send_signal(how)
            pieces += stream
        assert pieces[-1].choices[0].finish_reason == "length"
        assert process.wait(60) == (0 if how == signal.SIGINT else -how)
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def is_up(url):
    try:
        return httpx.get(f"{url}/models").status_code == 200
    except httpx.TransportError:
        return False


# ------------------------------------------------------------------------------ many clients


@pytest.mark.slow
def test_200_clients_at_once_lose_nothing(model):
    """Half of them stream, one in ten goes away, one in ten reads slowly; twice, memory flat."""
    prompts = [tiny.random_ids(1, 2 + i % 60, i, 272)[0].tolist() for i in range(200)]
    options = {"max_tokens": 24, "temperature": 0.9}
    wanted = [
        model.tokenizer.decode(served.alone(model, ids, max_new_tokens=24, temperature=0.9, seed=i))
        for i, ids in enumerate(prompts)
    ]
    server = run.make_server(model, names=(NAME,), max_queue=300, cache_bytes=2**20)
    with run.serving(server) as url:
        sizes = []
        for _ in range(3):
            found = asyncio.run(ask_all(url, prompts, options))
            gone = [text is None for text in found]
            assert gone == [i % 10 == 9 for i in range(200)]
            assert [t for t in found if t is not None] == [
                text for text, left in zip(wanted, gone, strict=True) if not left
            ]
            served.wait_until(lambda: is_idle(server))
            sizes.append(resident_bytes())
    assert server.worker.gauges()["npllm_kept_cache_bytes"] <= 2**20
    assert sizes[-1] - sizes[-2] < 8e6, sizes


async def ask_all(url, prompts, options):
    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(limits=limits, timeout=600) as http:
        client = openai.AsyncOpenAI(base_url=url, api_key="x", http_client=http, timeout=600)
        return await asyncio.gather(
            *(ask_one(client, i, ids, options) for i, ids in enumerate(prompts))
        )


async def ask_one(client, i, ids, options):
    """The text of an answer; None where this client went away."""
    options = {"model": NAME, "prompt": ids, "seed": i} | options
    if i % 2 == 0:
        answer = await client.completions.create(**options)
        return answer.choices[0].text
    text = ""
    stream = await client.completions.create(stream=True, **options)
    async for chunk in stream:
        text += chunk.choices[0].text
        if i % 10 == 9:
            await stream.close()
            return None
        if i % 10 == 7:
            await asyncio.sleep(0.05)
    return text


def is_idle(server):
    gauges = server.worker.gauges()
    return gauges["npllm_running"] + gauges["npllm_waiting"] == 0


def resident_bytes():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
