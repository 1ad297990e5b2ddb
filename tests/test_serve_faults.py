"""What a client may send, by mistake or on purpose: nobody else waits, and every answer is one."""

import json
import time

import numpy as np
import pytest
import served

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
run = pytest.importorskip("npllm.serve.run")

from npllm.cache.owner import CacheOwner  # noqa: E402
from npllm.continuous_batching.prefix_cache import KeptCaches  # noqa: E402
from npllm.errors import NpllmValueError  # noqa: E402
from npllm.text.stream import TextStream  # noqa: E402

NAME = "tiny"
ASKED = {"model": NAME, "prompt": "hello", "max_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.load(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(model):
    return run.make_server(model, names=(NAME,))


@pytest.fixture(scope="module")
def url(server):
    with run.serving(server) as url:
        yield url


def post(url, path="completions", **body):
    content = json.dumps(body)  # as httpx writes it, but for surrogates
    headers = {"content-type": "application/json"}
    return httpx.post(f"{url}/{path}", content=content, headers=headers, timeout=300)


def test_a_long_stop_string_is_refused(url):
    answer = post(url, **ASKED, stop=["y" * 1001])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop")
    assert post(url, **ASKED, stop=["y" * 1000] * 16).status_code == 200


def test_the_time_for_stop_strings_grows_with_the_text_and_not_with_their_square(model):
    stream = TextStream(model.tokenizer, frozenset(), ("y" * 100_000,))
    start = time.process_time()
    for token in range(20, 40):
        stream.push(token)
    assert time.process_time() - start < 2  # more than 10 s before


@pytest.mark.parametrize("key", ["", " ", "schlüssel", "a\nb", " a"])
def test_a_key_that_no_client_can_send_is_refused(model, key):
    with pytest.raises(NpllmValueError, match="API key"):
        run.make_server(model, names=(NAME,), api_key=key)


@pytest.mark.parametrize("body", [{"\ud800": 1}, {"model": "\udfff"}, {"seed": "\ud800"}])
def test_lone_surrogates_are_refused_in_the_form_of_all_errors(url, body):
    answer = post(url, **ASKED | body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_equal_prompts_of_one_request_are_drawn_apart(url, model):
    body = ASKED | {"prompt": ["hello"] * 4, "temperature": 1.0, "max_tokens": 12}
    texts = [choice["text"] for choice in post(url, **body).json()["choices"]]
    assert len(set(texts)) == 4
    seeded = [choice["text"] for choice in post(url, **body, seed=3).json()["choices"]]
    alone = model.generate("hello", temperature=1.0, do_sample=True, seed=3, max_new_tokens=12)
    assert set(seeded) == {alone}


def test_null_counts_as_left_out_in_messages(url):
    message = {"role": "user", "content": None}
    answer = post(url, "chat/completions", model=NAME, messages=[message])
    assert answer.status_code == 400
    assert "content" in answer.json()["error"]["message"]
    message = {"role": "user", "content": "hi", "name": None}
    named = {"model": NAME, "max_tokens": 2, "temperature": 0}
    answers = [
        post(url, "chat/completions", messages=[sent], **named).json()["choices"]
        for sent in (message, {"role": "user", "content": "hi"})
    ]
    assert answers[0] == answers[1]


def test_the_only_model_need_not_be_named(url):
    answer = post(url, prompt="hello", max_tokens=1)
    assert (answer.status_code, answer.json()["model"]) == (200, NAME)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_token": 2}, "there is no parameter max_token; did you mean max_tokens?"),
        ({"tools": [{}]}, "tools = [{}] is not implemented"),
        ({"reasoning_effort": "low"}, "reasoning_effort = 'low' is not implemented"),
        ({"x": 1}, "there is no parameter x"),
    ],
)
def test_an_unknown_parameter_is_told_from_one_that_is_not_implemented(url, wrong, said):
    answer = post(url, **ASKED | wrong)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_an_unknown_role_is_refused(url):
    messages = [{"role": "user", "content": "hi"}, {"role": "usr", "content": "hi"}]
    answer = post(url, "chat/completions", model=NAME, messages=messages)
    assert answer.status_code == 400
    assert "messages[1].role must be one of system" in answer.json()["error"]["message"]


def test_an_unknown_key_of_a_message_is_refused(url):
    message = {"role": "user", "content": "hi", "weight": 0}
    answer = post(url, "chat/completions", model=NAME, messages=[message])
    assert answer.status_code == 400
    assert "weight" in answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["hello wide world", "héllo €uro 日本", "a\n\n b"])
@pytest.mark.parametrize("streamed", [False, True])
def test_each_token_begins_at_its_place_in_the_text(url, prompt, streamed):
    body = ASKED | {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = post(url, **body, stream=streamed)
    if streamed:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[6:7] == "{"]
        choices = [event["choices"][0] for event in events]
    else:
        choices = answer.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    places = [place for choice in choices for place in choice["logprobs"]["text_offset"]]
    assert text == prompt and places == sorted(places) and len(places) == len(tokens)
    for token, place in zip(tokens, places, strict=True):
        if token in text:  # else a part of a character, under its name
            assert text.startswith(token, place)


def test_another_adapter_takes_no_kept_keys(tmp_path):
    import lora

    model = served.load(tmp_path / "base")
    folder = lora.write_adapter(tmp_path / "ad", adapter_of(model), ("o_proj",))
    model.load_adapter(folder, name="ad")
    server = run.make_server(model, names=(NAME,))
    body = {"model": NAME, "prompt": "hello wide world " * 4, "max_tokens": 3}
    texts = {}
    with run.serving(server) as url:
        for name in ("ad", None, "ad", None):
            model.set_adapter(name)
            answer = post(url, **body)
            assert answer.status_code == 200, answer.text
            texts.setdefault(name, answer.json()["choices"][0]["text"])
            assert texts[name] == answer.json()["choices"][0]["text"]
    for name in ("ad", None):
        model.set_adapter(name)
        assert texts[name] == model.generate(body["prompt"], max_new_tokens=3)


def adapter_of(model):
    """Factors for o_proj of every layer, large enough to change the answer."""
    rng, config = np.random.default_rng(0), model.config
    d, d_in = config.hidden_size, config.num_attention_heads * config.head_dim
    tensors = {}
    for n in range(config.num_hidden_layers):
        name = f"base_model.model.model.layers.{n}.self_attn.o_proj"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((4, d_in)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((d, 4)).astype(np.float32)
    return tensors


def test_counting_kept_bytes_does_not_mind_changes_meanwhile():
    kept, others = KeptCaches(2**20), []

    class Cache:
        owner, first_crop, n_ctx = CacheOwner("weights", None), 0, 1

        def __init__(self, token):
            self.ids = np.array([[token]])

        def crop(self, n):
            assert n == 1

        @property
        def n_bytes(self):
            if others:
                kept.add(others.pop(), 1)  # as the engine's thread may do meanwhile
            return 1

    kept.add(Cache(1), 1)
    others.append(Cache(2))
    assert kept.n_bytes == 1
    assert kept.n_bytes == 2


# ------------------------------------------------------------------------------ embeddings


def slow_encoder(seconds):
    encoder_tests = pytest.importorskip("test_encoder")
    encoder, _ = encoder_tests.make(dtype=np.float32)
    embed_ids, calls = encoder.embed_ids, []

    def slowly(rows):
        calls.append(len(rows))
        time.sleep(seconds)
        return embed_ids(rows)

    encoder.embed_ids = slowly
    return encoder, calls


def test_embeddings_that_nobody_waits_for_are_not_computed():
    encoder, calls = slow_encoder(0.3)
    server = run.make_server(encoder, names=(NAME,), timeout=60)
    with run.serving(server) as url:
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{url}/embeddings", json={"model": NAME, "input": ["a"] * 640}, timeout=0.2
                )
        assert post(url, "embeddings", model=NAME, input="b").status_code == 200
        served.wait_until(lambda: server.worker.gauges()["npllm_waiting"] == 0)
        assert server.worker.gauges()["npllm_running"] == 0
    assert sum(calls) < 640


def test_a_late_embedding_is_counted_until_it_ends():
    encoder, _ = slow_encoder(1.0)
    server = run.make_server(encoder, names=(NAME,), timeout=0.2)
    with run.serving(server) as url:
        assert post(url, "embeddings", model=NAME, input="a").status_code == 504
        assert server.worker.gauges()["npllm_running"] == 1
        served.wait_until(lambda: server.worker.gauges()["npllm_running"] == 0)
