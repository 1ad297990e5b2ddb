"""Each number of the page, read back from its elements in a Chromium, against the trace.

One check for each section.  A number is compared at the digits that it is shown with.
"""

import math
import re
from typing import Any, NamedTuple

import browsing
import numpy as np
import pytest

import npllm
from npllm import ops
from npllm.page.data.packed import TEXTS
from npllm.page.sections import SECTIONS

browser = browsing.browser
N_NEW = 3
IN_DATA = 5e-5  # the data of the page hold five digits of most numbers, four of vectors


class Gold(NamedTuple):
    """The model, its prompt, and the trace that the page must show."""

    model: Any
    prompt: str
    ids: list
    trace: Any
    data: dict  # for choices (which layer, which edit), and for measured times
    layer: int

    def value(self, name, layer=None):
        layer = self.layer if layer is None else layer
        return np.asarray(self.trace[f"model.layers.{layer}.{name}"][0], np.float64)

    def stream(self, layer):
        """The residual stream in front of a layer."""
        name = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
        return np.asarray(self.trace[name][0], np.float64)

    def text(self, token):
        text = self.model.tokenizer.token_text(int(token))
        return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")

    def log_p(self, ids, **options):
        logits = np.asarray(self.model(np.array([ids]), **options)[0], np.float64)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.fixture(
    scope="module",
    params=[
        "tiny",
        pytest.param("default", marks=[pytest.mark.weights, pytest.mark.slow]),
    ],
)
def gold(request, tmp_path_factory):
    if request.param == "tiny":
        model = browsing.tiny_model(tmp_path_factory.mktemp("tiny"))
        prompt = browsing.PROMPT
    else:
        model, prompt = request.getfixturevalue("default_model"), "The capital of France is"
    ids = model.tokenizer.encode(prompt)
    names = ["*.self_attn.weights", "*"]
    traced = npllm.trace(model, np.array([ids]), names=names, max_new_tokens=N_NEW)
    page = npllm.explain(model, prompt, max_new_tokens=N_NEW)
    file = tmp_path_factory.mktemp("page") / "page.html"
    page.save(file)
    return Gold(model, prompt, ids, traced, page.data, page.data["attention"]["layer"]), file


@pytest.fixture(scope="module")
def view(browser, gold):
    seen = browsing.View(browser, f"file://{gold[1]}")
    yield seen
    seen.check()
    seen.page.close()


def number(text):
    """The first number of a text: commas as in 1,024, "1.2e-4", "−" for nothing."""
    return float(re.search(r"-?[\d,]*\.?\d+(?:e[-+]?\d+)?", text)[0].replace(",", ""))


def near(text, desired, places, factor=1.0):
    """A number with so many decimal places equals the desired one times a factor."""
    room = 0.501 * 10.0**-places + IN_DATA * abs(desired) * factor
    assert abs(number(text) - desired * factor) <= room, (text, desired)


def same(text, desired, digits=4):
    """A number with so many significant digits equals the desired one."""
    room = 0.56 * 10.0 ** (1 - digits) * abs(desired) + 1e-6
    assert abs(number(text) - desired) <= room, (text, desired)


def lengths(vectors):
    return np.sqrt((np.asarray(vectors, np.float64) ** 2).sum(axis=-1))


def texts(view, selector):
    return view.page.locator(selector).all_text_contents()


def facts(view, selector):
    """The entries of a list of terms: term -> text."""
    return dict(zip(texts(view, f"{selector} dt"), texts(view, f"{selector} dd"), strict=True))


def strips(view, selector, nth=0):
    """Names and notes of a block of coloured strips."""
    cells = view.page.locator(f"{selector} .strips").nth(nth).locator("> span")
    all_texts = cells.all_text_contents()
    return dict(zip(all_texts[::2], all_texts[1::2], strict=True))


def region(section, label):
    return f"#{section} [aria-label='{label}'] table"


# ------------------------------------------------------------------------------ the checks


def check_pipeline(view, gold):
    parts = texts(view, "#pipeline .flow li")
    config = gold.model.config
    assert number(parts[1]) == len(gold.ids)
    layers, width = re.findall(r"(\d+) (?:blocks|numbers)", parts[2])
    assert (int(layers), int(width)) == (config.num_hidden_layers, config.hidden_size)
    assert number(parts[3]) == config.vocab_size
    new = gold.model.generate(np.array([gold.ids]), max_new_tokens=N_NEW)[0, len(gold.ids) :]
    assert texts(view, "#pipeline [data-value=answer]") == [gold.model.tokenizer.decode(new)]
    told = texts(view, "#pipeline > p")[0]
    assert int(re.search(r"greedily with (\d+)", told)[1]) == gold.data["pipeline"]["n_new"]


def check_autoregression(view, gold):
    ids = list(gold.ids)
    for _ in gold.data["autoregression"]["steps"]:
        p = gold.model.next_token_distribution(np.array([ids]))[0]
        rows = view.rows(region("autoregression", "Candidates of this step"))
        assert len(rows) == 5
        for (_, _, token, shown, _), best in zip(rows, np.argsort(-p, kind="stable"), strict=False):
            assert int(token) == best
            near(shown, p[best], 2, 100)
        ids.append(int(p.argmax()))
        view.page.locator("#autoregression").get_by_role("button", name="Step", exact=True).click()
        assert texts(view, "#autoregression .loop .token") == [gold.text(i) for i in ids]


def check_forward(view, gold):
    shapes = [
        re.findall(r"\d+", row[2]) for row in view.rows(region("forward", "Parts of the model"))
    ]
    names = ("model.embed_tokens", f"model.layers.{gold.model.config.num_hidden_layers - 1}")
    values = [gold.trace[name] for name in (*names, "model.norm", "lm_head")]
    assert shapes == [[str(n) for n in s] for s in [(1, len(gold.ids)), *(x.shape for x in values)]]
    counts = npllm.cost.parameter_counts(gold.model.config)
    *parts, all_of_them = view.rows(region("forward", "Parameters by part"))
    for (name, n, share, _), (part, count) in zip(parts, counts.items(), strict=True):
        assert (name, number(n)) == (part, count)
        near(share, count / sum(counts.values()), 1, 100)
    assert number(all_of_them[1]) == sum(counts.values())


def check_tokens(view, gold):
    vectors = gold.stream(0)
    buttons = view.page.locator("#tokens [role=group] button")
    for n, (token, vector) in enumerate(zip(gold.ids, vectors, strict=True)):
        buttons.nth(n).click()
        shown = facts(view, "#tokens")
        assert (int(shown["position"]), int(shown["id"])) == (n, token)
        assert shown["token"] == gold.text(token)
        text = gold.model.tokenizer.token_text(token)
        assert bytes.fromhex(shown["bytes (UTF-8)"]) == text.encode()
        same(shown["length of the vector"], lengths(vector))
        numbers = re.findall(r"-?[\d.]+(?:e-?\d+)?(?=,)", texts(view, "#tokens p.mono")[0])
        assert len(numbers) == 8
        for one, x in zip(numbers, vector, strict=False):
            same(one, x, 3)
    for shown, length in zip(
        texts(view, "#tokens .strips > span:nth-child(3n)"), lengths(vectors), strict=True
    ):
        same(shown, length, 3)


def check_tree(view, gold):
    assert texts(view, "#tree [data-value=tree]") == [str(gold.model)]
    params = gold.model.params
    tensors = [params.embed_tokens, *(x for x in params.layers[0] if x is not None), params.norm]
    counts = [1, *[len(params.layers)] * (len(tensors) - 2), 1]
    if params.lm_head is not params.embed_tokens:
        tensors, counts = [*tensors, params.lm_head], [*counts, 1]
    for kind, size in (("stored", None), ("float32", 4), ("4-bit blocks (4.5 bits)", 4.5 / 8)):
        names = {"stored": "as it is held in memory"}
        view.choose("tree", "Type of the weights", names.get(kind, kind))
        *rows, last = view.rows(region("tree", "Tensors"))
        of_each = [x.nbytes if size is None else x.size * size for x in tensors]
        for (_, shape, _, n, n_bytes, _), x, count, one in zip(
            rows, tensors, counts, of_each, strict=True
        ):
            assert [int(s) for s in re.findall(r"\d+", shape)] == list(x.shape)
            assert (int(n), number(n_bytes)) == (count, round(one))
        assert number(last[4]) == pytest.approx(np.dot(counts, of_each), abs=1)


def check_logits(view, gold):
    logits = np.asarray(gold.trace["lm_head"][0, -1], np.float64)
    p = gold.model.next_token_distribution(np.array([gold.ids]))[0]
    order = np.argsort(-logits, kind="stable")
    for n in (10, 20):
        view.set("logits", "Tokens shown", n)
        rows = view.rows(region("logits", "Most likely tokens"))
        assert len(rows) == n
        for k, (place, _, token, logit, share, _) in enumerate(rows):
            assert (int(place), int(token)) == (k + 1, order[k])
            near(logit, logits[order[k]], 3)
            near(share, p[order[k]], 3, 100)
        caption = texts(view, "#logits caption")[0]
        near(caption.rpartition("together ")[2], p[order[:n]].sum(), 2, 100)


def check_decoding(view, gold):
    """The distribution under every filter is checked in test_explain_browser.py."""
    options = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 4,
        "length_penalty": 0.0,
    }
    beams = gold.model.beam_search(np.array([gold.ids]), **options)
    rows = view.rows(region("decoding", "Answers"))
    for (text, score), ids, total in zip(
        rows, beams.sequences[0, :, len(gold.ids) :], beams.scores[0], strict=True
    ):
        near(score, total, 3)
        kept = [int(i) for i in ids]
        log_p = gold.log_p([*gold.ids, *kept])
        ends = [n for n, i in enumerate(kept) if i in gold.model.generation_config.eos_token_id]
        kept = kept[: ends[0] + 1] if ends else kept
        assert text == "".join(gold.text(i) for i in kept)
        sums = [log_p[len(gold.ids) + n - 1, i] for n, i in enumerate(kept)]
        assert abs(number(score) - math.fsum(sums)) < 2e-3
    scores = [number(t) for t in texts(view, "#decoding .beam svg text.faint")]
    assert scores == [round(node["score"], 3) for node in gold.data["decoding"]["nodes"]]


def check_streams(view, gold):
    edited = [*gold.ids[:-1], gold.data["streams"]["edited"]["id"]]
    other = npllm.trace(gold.model, np.array([edited]), max_new_tokens=1)
    n_layer = gold.model.config.num_hidden_layers
    for place in range(n_layer + 1):
        view.set("streams", "Compare the streams behind", place)
        name = f"model.layers.{place - 1}" if place else "model.embed_tokens"
        change = np.abs(gold.stream(place) - np.asarray(other[name][0], np.float64)).max(axis=-1)
        notes = texts(view, "#streams figure .token small")
        for note, x in zip(notes[:-1], change[:-1], strict=True):
            assert x == 0 if note == "the same: 0" else note.startswith("rounding") and x < 1e-3
        assert notes[-1].startswith("changed: ")
        same(notes[-1], change[-1], 3)
    rows = view.rows(region("streams", "Most likely next token of each stream"))
    runs = (gold.trace["lm_head"][0], other["lm_head"][0])
    for n, (_, before, after) in enumerate(rows):
        assert [before, after] == [gold.text(x[n].argmax()) for x in runs]
    told = " ".join(texts(view, "#streams > p"))
    assert (
        number(re.search(r"at most ([\d,]+) streams", told)[1]) == gold.model.config.context_length
    )


def check_cache(view, gold):
    n, one = len(gold.ids), npllm.cost.kv_cache_bytes(gold.model.config, 1)
    for at in range(4):
        shown = {name: number(x) for name, x in facts(view, "#cache dl:first-of-type").items()}
        held = n + at - 1 if at else 0
        assert shown["computed in this step"] == (1 if at else n)
        assert (shown["taken from the cache"], shown["without the cache"]) == (held, n + at)
        assert shown["bytes of the cache afterwards"] == (n + at) * one
        view.page.locator("#cache").get_by_role("button", name="Step", exact=True).click()
    for k in (3, 5):
        view.set("cache", "Length of the context", k)
        shown = dict(
            zip(("tokens", "bytes"), texts(view, "#cache dl >> nth=1 >> dd"), strict=False)
        )
        assert number(shown["tokens"]) == 2**k
        assert number(shown["bytes"]) == npllm.cost.kv_cache_bytes(gold.model.config, 2**k)
    told = texts(view, "#cache .figure > p")[0]
    times = [gold.data["cache"][name] for name in ("with", "without")]
    shown = re.findall(r"([\d.e-]+) s with", told)[0], re.findall(r"([\d.e-]+) s without", told)[0]
    for text, measured in zip(shown, times, strict=True):
        assert (np.diff(measured) > 0).all()
        same(text, measured[-1], 3)
    same(re.search(r"([\d.]+) times", told)[1], times[1][-1] / times[0][-1], 3)
    formula = texts(view, "#cache > .formula")[0]
    assert math.prod(int(x) for x in re.findall(r"\d+", formula.rpartition("=")[2])) == one


def check_block(view, gold):
    n_layer = gold.model.config.num_hidden_layers
    for position in (0, len(gold.ids) - 1):
        view.set("block", "Position", position)
        rows = view.rows(region("block", "Numbers of every layer"))
        for layer, (name, stream, attention, mlp, share, _) in enumerate(rows):
            added = [
                lengths(gold.value(name, layer)[position])
                for name in ("self_attn.o_proj", "mlp.down_proj")
            ]
            assert int(name) == layer
            same(stream, lengths(gold.stream(layer + 1)[position]))
            same(attention, added[0])
            same(mlp, added[1])
            near(share, added[0] / sum(added), 1, 100)
        assert len(rows) == n_layer
    final = gold.log_p(gold.ids)[-1]
    choice = int(final.argmax())
    rows = view.rows(region("block", "Logit lens"))
    assert len(rows) == n_layer + 1
    for layer, (_, rank, p, _, kl, best) in enumerate(rows):
        hidden = gold.stream(layer)[-1]
        gain = np.asarray(gold.model.params.norm, np.float64)
        eps = gold.model.config.rms_norm_eps
        hidden = gain * hidden / np.sqrt((hidden**2).mean() + eps)
        head = np.asarray(gold.model.params.lm_head, np.float64)
        logits = head @ hidden
        log_p = logits - np.logaddexp.reduce(logits)
        assert abs(number(rank) - 1 - (log_p > log_p[choice]).sum()) <= 1  # a near tie
        assert abs(number(p) - 100 * math.exp(log_p[choice])) <= 0.02
        assert abs(number(kl) - (np.exp(final) * (final - log_p)).sum()) <= 0.002
        assert best.startswith(gold.text(log_p.argmax()))


def check_feedforward(view, gold):
    active = gold.value("mlp.swiglu")[-1]
    order = np.argsort(-np.abs(active), kind="stable")
    rows = view.rows(region("feedforward", "Most active neurons"))
    down = np.asarray(gold.model.params.layers[gold.layer].down_proj, np.float64)
    head = np.asarray(gold.model.params.lm_head, np.float64)
    for (neuron, activation, _, likelier), n in zip(rows, order, strict=False):
        assert int(neuron) == n
        near(activation, active[n], 3)
        written = head @ down[:, n] * active[n]
        assert likelier.startswith(gold.text(written.argmax()))
    for share in (10, 60):
        view.set("feedforward", "Threshold, in % of the largest", share)
        told = texts(view, "#feedforward .status")[0]
        n = np.count_nonzero(np.abs(active) >= share / 100 * np.abs(active).max())
        assert abs(number(told) - n) <= 1  # activations hold three digits
        near(told.partition("(")[2], number(told) / len(active), 1, 100)
        assert number(told.partition("of ")[2]) == len(active)


def check_attention(view, gold):
    """Scores and weights too; steps 1 to 10 in order."""
    layer = gold.layer
    for head, position in ((0, 1), (3, len(gold.ids) - 1)):
        view.set("attention", f"Head of layer {layer}", head)
        view.set("attention", "Position of the query", position)
        steps = npllm.steps.attention_steps(
            gold.model, gold.prompt, layer=layer, head=head, position=position
        )
        keys = range(position + 1)
        blocks = [
            [lengths(steps.stream[position]), lengths(steps.x[position])],
            [lengths(steps.q)],
            *([lengths(x[j]) for j in keys] for x in (steps.k, steps.v)),
            [lengths(steps.rotated_q)],
            [lengths(steps.rotated_k[j]) for j in keys],
            [lengths(steps.weighted_values[j]) for j in keys],
            *([lengths(x)] for x in (steps.output, steps.merged, steps.o_proj)),
            [lengths(x) for x in (steps.stream[position], steps.o_proj, steps.stream_after)],
        ]
        for nth, desired in enumerate(blocks):
            notes = list(strips(view, "#attention", nth).values())
            assert len(notes) == len(desired), nth
            for note, x in zip(notes, desired, strict=True):
                same(note, x, 3)
        rows = view.rows(region("attention", "Weights"))
        for (place, token, score, weight, _), j in zip(rows, keys, strict=True):
            assert (int(place), token) == (j, gold.text(gold.ids[j]))
            near(score, steps.scores[j], 3)
            near(weight, steps.weights[j], 4)
        check_shares(view, gold, head, position)
    titles = texts(view, "#attention .steps h3")
    assert [int(number(title)) for title in titles] == list(range(1, 11))


def check_shares(view, gold, head, position):
    """What each head adds alone: W_o[:, its channels] times its output."""
    y, d = gold.value("self_attn.heads"), gold.model.config.head_dim
    weight = np.asarray(gold.model.params.layers[gold.layer].o_proj, np.float64)
    rows = view.rows(region("attention", "What each head adds"))
    for h, (name, length, _) in enumerate(rows):
        same(length, lengths(weight[:, h * d : (h + 1) * d] @ y[h, position]))
        assert name == f"head {h}" + (" (this one)" if h == head else "")


def check_heads(view, gold):
    last = len(gold.ids) - 1
    for layer, head, query in ((0, 0, last), (gold.model.config.num_hidden_layers - 1, 2, 1)):
        for label, x in (("Layer", layer), ("Head", head), ("Query", query)):
            view.set("heads", label, x)
        w = gold.value("self_attn.weights", layer)[head]
        entropy, first, distance = facts(view, "#heads .large").values()
        same(entropy, -(w * np.log(np.where(w > 0, w, 1))).sum(axis=-1).mean(), 3)
        near(first, w[:, 0].mean(), 3)
        n = np.arange(len(w))
        same(distance, (w * (n[:, None] - n)).sum(axis=-1).mean(), 3)
        rows = view.rows("#heads .large table")
        for (_, token, text, _), j in zip(rows, range(query + 1), strict=True):
            assert token == gold.text(gold.ids[j])
            assert abs(number(text) - w[query, j]) <= 0.000501
        told = texts(view, "#heads .large svg title")
        for title, x in zip(told, w.reshape(-1), strict=True):
            assert abs(number(title.rpartition(": ")[2]) - x) <= 0.000501


def check_masks(view, gold):
    """Pairs of other rules are checked in test_explain_browser.py."""
    side, n_layer = 6, gold.model.config.num_hidden_layers
    n = side**2
    view.choose("masks", "Rule", "strided")
    view.set("masks", "Current position", 20)
    for stride in (3, 7):
        view.set("masks", "stride", stride - 1)
        table = ops.mask.strided(stride).dense(n)
        pairs, causal = int(table.sum()), n * (n + 1) // 2
        shown = facts(view, "#masks .figure")
        assert shown["pairs visited"] == f"{pairs} of {n * n}"
        near(shown["share of full attention"], pairs / n**2, 1, 100)
        near(shown["share of causal attention"], pairs / causal, 1, 100)
        assert number(shown["keys that position 20 sees"]) == table[20].sum()
        rows = [number(row[1]) for row in view.rows(region("masks", "Layers"))]
        half = n_layer // 2
        assert rows == [n_layer * causal, (n_layer - half) * causal + half * pairs, n_layer * pairs]


def check_sharing(view, gold):
    config = gold.model.config
    for k in (0, 5):
        view.set("sharing", "Length of the context", k)
        rows = view.rows(region("sharing", "Bytes of the cache"))
        heads = (config.num_attention_heads, config.num_key_value_heads, 1)
        for (_, n_kv, n_bytes, short, _), n in zip(rows, heads, strict=True):
            desired = 2 * config.num_hidden_layers * n * config.head_dim * 4 * 2**k
            assert (int(n_kv), number(n_bytes)) == (n, desired)
            unit = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[short.split()[1]]
            same(short, desired / unit)


def check_flash(view, gold):
    config, n = gold.model.config, len(gold.ids)
    head = int(view.page.locator("#flash select").input_value())
    group = config.num_attention_heads // config.num_key_value_heads
    q, k = gold.value("self_attn.q")[head, -1], gold.value("self_attn.k")[head // group]
    s = k @ q / math.sqrt(config.head_dim)
    for block in (1, 3):
        view.set("flash", "Positions in a block", block)
        rows = view.rows("#flash .running table")
        for (keys, largest, m, _, total), start in zip(rows, range(0, n, block), strict=True):
            stop = min(n, start + block)
            assert keys == f"{start} to {stop - 1}"
            near(largest, s[start:stop].max(), 3)
            near(m, s[:stop].max(), 3)
            assert abs(number(total) - np.exp(s[:stop] - s[:stop].max()).sum()) < 3e-4
    for n_index, b_index in ((0, 0), (6, 3)):
        view.set("flash", "Positions", n_index)
        view.set("flash", "Block size", b_index)
        desired = ops.attention_io(128 * 2**n_index, config.head_dim, 16 * 2**b_index)
        rows = view.rows(region("flash", "Bytes moved"))
        for row, name in zip(rows, ("naive", "flash_1", "flash_2"), strict=True):
            assert number(row[1]) == desired[name]
            near(row[3], desired[name] / desired["naive"], 1, 100)


def check_norms(view, gold):
    x, eps = gold.stream(gold.layer)[-1], gold.model.config.rms_norm_eps
    gain = np.asarray(gold.model.params.layers[gold.layer].input_layernorm, np.float64)
    rms = x / np.sqrt((x**2).mean() + eps)
    vectors = [x, (x - x.mean()) / np.sqrt(x.var() + eps), rms, gain * rms]
    rows = view.rows(region("norms", "Mean and root mean square"))
    for (_, mean, root), v in zip(rows, vectors, strict=True):
        assert abs(number(mean) - v.mean()) <= 6e-4 * abs(v.mean()) + 1e-6
        same(root, np.sqrt((v**2).mean()))
    for note, v in zip(strips(view, "#norms").values(), vectors, strict=True):
        same(note, np.sqrt((v**2).mean()), 3)
    for k in (10, 50):
        view.set("norms", "x", k)
        at = -4 + k / 8
        gelu = at * 0.5 * math.erfc(-at / math.sqrt(2))
        desired = {"relu": max(at, 0), "gelu": gelu, "silu": at / (1 + math.exp(-at))}
        rows = view.page.locator("#norms table").last.locator("tbody tr").all_text_contents()
        for row, (name, y) in zip(rows, desired.items(), strict=True):
            assert row.startswith(name)
            same(row.removeprefix(name), y)


def check_rope(view, gold):
    config = gold.model.config
    d, half = config.head_dim, config.d_rope // 2
    inv_freq = config.rope_parameters.rope_theta ** (-np.arange(half) / half)
    for m in (1, 40):
        view.set("rope", "Position m", m)
        titles = texts(view, "#rope .cells svg title")
        for title, f in zip(titles, inv_freq, strict=True):
            same(title.partition(": ")[2], m * f)
        rows = [[number(x) for x in row] for row in view.rows("#rope .figure table")]
        desired = [[math.cos(m), -math.sin(m)], [math.sin(m), math.cos(m)]]
        assert np.abs(np.subtract(rows, desired)).max() <= 1.1e-4
    group = config.num_attention_heads // config.num_key_value_heads
    for head, distance in ((0, 8), (3, 1)):
        view.set("rope", "Head", head)
        view.set("rope", "Distance", distance)
        q = gold.value("self_attn.q_proj")[head, -1]
        k = gold.value("self_attn.k_proj")[head // group, -1]
        z = [a[:half] + 1j * a[half : 2 * half] for a in (q, k)]
        turned = (z[0] * np.exp(1j * distance * inv_freq) * z[1].conj()).real.sum()
        score = (turned + q[2 * half :] @ k[2 * half :]) / math.sqrt(d)
        for key, query, shown in view.rows(region("rope", "Scores")):
            assert int(query) - int(key) == distance
            assert abs(number(shown) - score) <= 2e-3
    formula = texts(view, "#rope > .formula")[0]
    assert float(re.search(r"base = ([\d.e+]+)", formula)[1]) == config.rope_parameters.rope_theta


def check_packing(view, gold):
    encode = gold.model.tokenizer.encode
    documents = [gold.ids, *(encode(text) for text in TEXTS)]
    documents = [ids for n, ids in enumerate(documents) if ids not in documents[:n]][:4]
    chosen = [documents[n] for n in gold.data["packing"]["together"]]
    alone = [gold.log_p(ids)[np.arange(len(ids) - 1), ids[1:]] for ids in chosen]
    packed = [i for ids in chosen for i in ids]
    positions = np.concatenate([np.arange(len(ids)) for ids in chosen])
    log_p, start, leaky = gold.log_p(packed, position_ids=positions[None]), 0, []
    for ids in chosen:
        leaky.append(log_p[start + np.arange(len(ids) - 1), ids[1:]])
        start += len(ids)
    for option, desired in (("causal only: documents leak", leaky), ("causal & documents", alone)):
        view.page.locator("#packing").get_by_label(option).check()
        rows = iter(view.rows(region("packing", "Log-probabilities")))
        for a, b in zip(alone, desired, strict=True):
            for x, y in zip(a, b, strict=True):
                _, _, one, other, change = next(rows)
                assert abs(number(one) - x) <= 2e-3 and abs(number(other) - y) <= 2e-3
                assert abs(number(change) - abs(x - y)) <= 2e-3
        leak = max(np.abs(a - b).max() for a, b in zip(alone, desired, strict=True))
        shown = number(list(facts(view, "#packing").values())[-1])
        assert abs(shown - leak) <= 2e-3 + 6e-3 * leak
    sizes = [len(ids) for ids in documents]
    filled = [sum(sizes[d] for d in row) for row in gold.data["packing"]["rows"]]
    used = list(facts(view, "#packing").values())
    near(used[0], sum(sizes) / (len(sizes) * max(sizes)), 1, 100)
    near(used[1], sum(sizes) / (len(filled) * max(filled)), 1, 100)


def check_other_heads(view, gold):
    config, n = gold.model.config, len(gold.ids)
    shapes = [
        re.findall(r"\[(.*?)\]", " ".join(row[1:]))
        for row in view.rows(region("other_heads", "Heads"))
    ]
    d, v = str(config.hidden_size), str(config.vocab_size)
    assert shapes == [
        [f"1, {n}, {d}", f"1, {n}, {v}"],
        [f"1, {d}", "1, n_label"],
        [f"1, {n}, {d}", f"1, {n}, n_label"],
        [f"1, {n}, {d}", f"1, {d}"],
    ]
    edited = [*gold.ids[:-1], gold.data["streams"]["edited"]["id"]]
    for option, rule in (
        ("causal: a decoder", ops.mask.causal()),
        ("bidirectional: an encoder", ops.mask.bidirectional()),
    ):
        view.page.locator("#other_heads").get_by_label(option).check()
        hidden = gold.model.with_mask(rule).model(np.array([gold.ids, edited]))
        change = np.abs(np.asarray(hidden[0]) - np.asarray(hidden[1])).max(axis=-1)
        for note, x in zip(texts(view, "#other_heads .token small"), change, strict=True):
            if note.startswith("changed"):
                same(note, x, 3)
            else:
                assert x < 1e-3
        changed = sum(x.startswith("changed") for x in texts(view, "#other_heads .token small"))
        assert changed == (1 if option.startswith("causal") else n)


CHECKS = {name[6:]: check for name, check in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("section", [section.name for section in SECTIONS])
def test_numbers_of_a_section_are_those_of_the_trace(view, gold, section):
    CHECKS[section](view, gold[0])


def test_the_prompt_is_told_at_the_top(view, gold):
    assert texts(view, "header q") == [gold[0].prompt]
