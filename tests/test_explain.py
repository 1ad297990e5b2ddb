"""The offline page without a browser: its numbers, escaping, size, table of contents, and errors."""

import json
import re
from pathlib import Path

import numpy as np
import optional
import pytest
import tiny
from notions import IN_PAGE
from page_reading import Elements, data_of, tiny_model

import npllm
from npllm import ops
from npllm.analysis.cost import kv_cache_bytes, kv_table
from npllm.errors import NpllmError, NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.page.data.masks import N_SLOTS
from npllm.page.render import POLICY
from npllm.page.run import MOST_BYTES, most_tokens
from npllm.page.sections import SECTIONS

pytest.importorskip("jinja2", reason="the page is made with Jinja2")
ROOT = Path(__file__).resolve().parents[1] / "npllm" / "page"
PROMPT = "hello wé, how low"
HOSTILE = "</script><img src=x onerror=alert(1)><!--\u2028{{ 7 * 7 }}\"'&"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def page(model):
    return npllm.explain(model, PROMPT, max_new_tokens=3)


@pytest.fixture(scope="module")
def data(page):
    return data_of(page.html)


@pytest.fixture(scope="module")
def traced(model):
    ids = np.array([model.tokenizer.encode(PROMPT)])
    names = ["*.self_attn.weights", "*"]
    return npllm.trace(model, ids, names=names, max_new_tokens=2)


def near(actual, desired, digits=4):
    """Numbers of the page equal those of a run, up to the digits that the page keeps."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    assert (np.abs(actual - desired) <= 0.51 * 10.0 ** (1 - digits) * np.abs(desired) + 1e-6).all()


# ------------------------------------------------------------------------------ the numbers


def test_the_data_of_the_file_are_those_of_the_object(page, data):
    assert data == json.loads(json.dumps(page.data))
    assert list(data) == [section.name for section in SECTIONS]


def test_tokens_are_those_of_the_tokenizer(model, data):
    ids = model.tokenizer.encode(PROMPT)
    rows = data["tokens"]["tokens"]
    assert [row["id"] for row in rows] == ids
    assert [row["text"] for row in rows] == [model.tokenizer.token_text(i) for i in ids]
    vectors = np.asarray(model.params.embed_tokens)[ids]
    near([row["vector"] for row in rows], vectors)
    near([row["norm"] for row in rows], np.linalg.norm(vectors, axis=1))


def test_the_loop_is_that_of_generate(model, data):
    ids = np.array([model.tokenizer.encode(PROMPT)])
    steps = data["autoregression"]["steps"]
    new = model.generate(ids, max_new_tokens=3)[0, ids.shape[1] :]
    assert [step[0]["id"] for step in steps] == new.tolist()[: len(steps)]
    for n, step in enumerate(steps):
        text = np.concatenate([ids, new[None, :n]], axis=1)
        p = model.next_token_distribution(text)[0]
        near([t["p"] for t in step], np.sort(p)[::-1][:5])


def test_attention_weights_of_every_head_are_those_of_the_trace(traced, data):
    for layer, heads in enumerate(data["heads"]["weights"]):
        for head, rows in enumerate(heads):
            gold = traced[f"model.layers.{layer}.self_attn.weights"][0, head]
            full = np.array([row + [0] * (len(gold) - len(row)) for row in rows])
            assert np.abs(full / 1000 - gold).max() <= 0.000501


def test_the_steps_of_attention_are_those_of_the_trace(model, traced, data):
    shown, layer = data["attention"], data["attention"]["layer"]
    prefix = f"model.layers.{layer}."
    for key, name in {
        "x": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "q": "self_attn.q",
        "k": "self_attn.k",
        "v": "self_attn.v",
        "output": "self_attn.heads",
        "added": "self_attn.o_proj",
        "weights": "self_attn.weights",
    }.items():
        near(shown[key], traced[prefix + name][0])
    for head in range(4):
        for position in (0, len(shown["tokens"]) - 1):
            steps = npllm.steps.attention_steps(
                model, PROMPT, layer=layer, head=head, position=position
            )
            row = shown["scores"][head][position]
            assert [s is None for s in row] == [j > position for j in range(len(row))]
            near(row[: position + 1], steps.scores[: position + 1])


def test_what_each_head_adds_sums_to_what_attention_adds(model, traced, data):
    """Alone each head adds W_o[:, its channels] @ its output."""
    layer = data["attention"]["layer"]
    y = np.asarray(traced[f"model.layers.{layer}.self_attn.heads"][0], np.float64)
    weight = np.asarray(model.params.layers[layer].o_proj, np.float64)
    d = y.shape[-1]
    alone = [y[h] @ weight[:, h * d : (h + 1) * d].T for h in range(len(y))]
    near(data["attention"]["shares"], np.linalg.norm(alone, axis=-1))


def test_lengths_of_the_stream_are_those_of_the_trace(model, traced, data):
    for layer in range(2):
        for key, name in (("attention", ".self_attn.o_proj"), ("mlp", ".mlp.down_proj")):
            gold = np.linalg.norm(traced[f"model.layers.{layer}{name}"][0], axis=-1)
            near(data["block"][key][layer], gold)
        near(
            data["block"]["stream"][layer + 1],
            np.linalg.norm(traced[f"model.layers.{layer}"][0], axis=-1),
        )
    rows = npllm.tracing.lens.lens(model, traced)
    assert [row["rank"] for row in data["block"]["lens"]] == [row.rank for row in rows]
    near([row["probability"] for row in data["block"]["lens"]], [row.probability for row in rows])


def test_logits_are_all_there_and_give_the_exact_distribution(model, data):
    shown = data["logits"]
    x = np.array([*(t["logit"] for t in shown["named"]), *shown["others"]])
    assert (np.diff(x) <= 0).all()
    p = model.next_token_distribution(PROMPT)[0]
    assert np.abs(np.sort(p)[::-1] - ops.softmax(x)).max() < 1e-5
    assert [t["id"] for t in shown["named"]] == np.argsort(-p, kind="stable")[:200].tolist()


def test_an_edit_of_the_last_token_changes_the_last_stream_only(model, data):
    change, rounding = np.array(data["streams"]["change"]), np.array(data["streams"]["rounding"])
    assert (change[:, :-1] <= rounding[:, None]).all()
    assert (change[:, -1] > 10 * rounding).all()
    assert data["streams"]["edited"]["id"] != model.tokenizer.encode(PROMPT)[-1]
    heads = data["other_heads"]["change"]
    assert np.count_nonzero(np.array(heads["causal"]) > data["other_heads"]["rounding"]) == 1
    assert (np.array(heads["bidirectional"]) > data["other_heads"]["rounding"]).all()


def test_bytes_are_those_of_the_cost_formulas(model, data):
    assert data["cache"]["bytes_per_token"] == kv_cache_bytes(model.config, 1)
    for kind, row in kv_table(model.config, 1).items():
        assert data["sharing"]["kinds"][kind]["bytes_per_token"] == row["full"]
        assert kv_table(model.config, 50)[kind]["full"] == 50 * row["full"], "linear, as the page"
    assert all(np.diff(data["cache"][name]).min() > 0 for name in ("with", "without"))
    tensors = data["tree"]["tensors"]
    assert data["tree"]["text"] == str(model)
    assert sum(t["bytes"] * t["count"] for t in tensors) == data["tree"]["bytes"]
    assert data["tree"]["bytes"] == 4 * sum(npllm.cost.parameter_counts(model.config).values())


def unpacked(rows):
    """The table of a mask from its hexadecimal rows."""
    return np.array([[c == "1" for c in f"{int(row, 16):0{N_SLOTS}b}"] for row in rows])


MASKS = {
    "causal": lambda: ops.mask.causal(),
    "bidirectional": lambda: ops.mask.bidirectional(),
    "sliding_window": ops.mask.sliding_window,
    "lookback": ops.mask.lookback,
    "longformer_window": ops.mask.longformer_window,
    "prefix_lm": ops.mask.prefix_lm,
    "band": ops.mask.band,
    "dilated_window": ops.mask.dilated_window,
    "strided": ops.mask.strided,
    "fixed": ops.mask.fixed,
    "block_local": ops.mask.block_local,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_of_the_rules(data, name):
    (rule,) = [rule for rule in data["masks"]["rules"] if rule["name"] == name]
    for variant in rule["variants"]:
        gold = ops.mask.to_bool(MASKS[name](**variant["parameters"]), N_SLOTS, N_SLOTS)
        assert np.array_equal(unpacked(variant["rows"]), gold), variant["parameters"]


def test_every_rule_of_npllm_is_among_the_masks(data):
    shown = " ".join(rule["name"] for rule in data["masks"]["rules"])
    rules = set(ops.mask.__all__) - {"ALL", "NONE", "SOME", "Rule", "to_bool", "padding"}
    assert {name for name in rules if name not in shown} == set()


def test_the_two_dimensional_band_is_row_and_column(data):
    i, j = np.arange(N_SLOTS)[:, None], np.arange(N_SLOTS)
    (rule,) = [r for r in data["masks"]["rules"] if r["name"] == "two-dimensional band"]
    for variant in rule["variants"]:
        w = variant["parameters"]["width"]
        gold = (j <= i) & ((i // w == j // w) | (i % w == j % w))
        assert np.array_equal(unpacked(variant["rows"]), gold)


def test_bytes_moved_are_those_of_attention_io(model, data):
    shown = data["flash"]
    for n, lines in zip(
        shown["lengths"], zip(shown["naive"], shown["flash_2"], strict=True), strict=True
    ):
        for block, naive, flash in zip(shown["blocks"], *lines, strict=True):
            gold = ops.attention_io(n, model.config.head_dim, block)
            assert (naive, flash) == (gold["naive"], gold["flash_2"])


def test_rope_depends_on_the_distance_only(traced, data):
    shown = data["rope"]
    near(shown["inv_freq"], ops.rope_frequencies(8), digits=6)
    assert np.abs(np.array(shown["scores"][0]) - shown["scores"][1]).max() < 1e-3
    layer, m = shown["layer"], 5
    q = np.asarray(traced[f"model.layers.{layer}.self_attn.q_proj"][0, 3, -1], np.float64)
    k = np.asarray(traced[f"model.layers.{layer}.self_attn.k_proj"][0, 1, -1], np.float64)
    matrix = ops.rotation_matrix(np.array([m]), np.asarray(shown["inv_freq"]))[0]
    assert abs((matrix @ q) @ k * 8**-0.5 - shown["scores"][0][3][m]) < 1e-3
    near(shown["matrix"][m], [[np.cos(m), -np.sin(m)], [np.sin(m), np.cos(m)]])


def test_documents_leak_without_the_mask_only(data):
    shown = data["packing"]
    assert shown["leak_masked"] < 1e-3 < shown["leak"]
    for alone, masked in zip(shown["alone"], shown["masked"], strict=True):
        assert np.abs(np.subtract(alone, masked)).max(initial=0) < 1e-3
    assert np.abs(np.subtract(shown["alone"][0], shown["leaky"][0])).max() < 1e-3, "the first"


def test_the_tree_of_the_beam_search_ends_in_its_answers(model, data):
    shown, n_prompt = data["decoding"], len(model.tokenizer.encode(PROMPT))
    beams = model.beam_search(
        np.array([model.tokenizer.encode(PROMPT)]),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=4,
        length_penalty=0.0,
    )
    near([answer["score"] for answer in shown["answers"]], beams.scores[0])
    nodes = shown["nodes"]
    for tokens in beams.sequences[0, :, n_prompt:].tolist():
        parent = -1
        for depth, token in enumerate(tokens, 1):
            (parent,) = [
                n
                for n, node in enumerate(nodes)
                if (node["parent"], node["id"], node["depth"]) == (parent, token, depth)
            ]
            if token == 2:
                break
    assert all(
        node["score"] <= nodes[node["parent"]]["score"] for node in nodes if node["parent"] >= 0
    )


# ------------------------------------------------------------------------------ the document


def test_every_notion_of_the_chapter_is_in_the_table_of_contents(page):
    elements = Elements(page.html)
    links = [x for x in elements.named("a") if x["attributes"].get("href", "").startswith("#")]
    titles = {x["attributes"]["href"][1:]: x["text"] for x in links}
    for notion, words in IN_PAGE.items():
        assert any(words in title for title in titles.values()), notion
    assert len(titles) == len(IN_PAGE) + 2  # and the links past the contents and back to them
    assert set(titles) - {"main", "contents"} == {
        x["attributes"]["id"] for x in elements.named("section")
    }


def test_every_section_has_text_a_formula_functions_and_a_link(page):
    import pydoc

    parts = page.html.split("<section ")[1:]
    assert len(parts) == len(SECTIONS)
    for part, section in zip(parts, SECTIONS, strict=True):
        assert '<code class="formula">' in part, section.name
        assert f'href="docs/{section.docs}"' in part
        for name in section.functions:
            assert f"<code>{name}</code>" in part
            assert pydoc.locate(name) is not None, name


def test_the_docs_that_sections_link_to_exist():
    docs = ROOT.parents[1] / "docs"
    for section in SECTIONS:
        file, heading = section.docs.split("#")
        headings = re.findall(r"^###? (.*)", (docs / file).read_text(encoding="utf-8"), re.M)
        slugs = [re.sub("[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert heading in slugs, section.docs


def test_every_section_has_a_picture_in_the_docs():
    docs = ROOT.parents[1] / "docs"
    pictures = {f.stem: f.read_bytes() for f in (docs / "pictures" / "explain").iterdir()}
    assert set(pictures) == {section.name for section in SECTIONS} | {"top", "dark", "phone"}
    assert all(x[:4] == b"RIFF" and x[8:12] == b"WEBP" for x in pictures.values())
    assert sum(map(len, pictures.values())) < 1_500_000
    text = (docs / "explain.md").read_text(encoding="utf-8")
    shown = re.findall(r"^### \d+\. (.*)\n\n!\[.*\]\(pictures/explain/(\w+)\.webp\)", text, re.M)
    assert shown == [(section.title, section.name) for section in SECTIONS]
    assert "](docs/pictures/explain/" in (docs.parent / "README.md").read_text("utf-8")[:1500]


def test_the_policy_forbids_every_request(page):
    (meta,) = Elements(page.html).named("meta", **{"http-equiv": "Content-Security-Policy"})
    assert meta["attributes"]["content"] == POLICY
    assert page.html.index("Content-Security-Policy") < page.html.index("<style>")


def is_inert(html):
    """Raise for an element or attribute that could run code or ask for a file."""
    for x in Elements(html).found:
        assert x["tag"] not in ("img", "iframe", "object", "embed", "base", "form", "video"), x
        assert not [name for name in x["attributes"] if name.startswith("on")], x
        assert "src" not in x["attributes"], x
        if x["tag"] == "link":
            assert x["attributes"]["href"] == "data:,"
        assert not x["attributes"].get("href", "").startswith("javascript:")


def test_no_element_can_run_code_or_ask_for_a_file(page):
    is_inert(page.html)
    assert [x["attributes"] for x in Elements(page.html).named("script")] == [
        {"type": "application/json", "id": "data"},
        {},
    ]


def test_scripts_make_elements_of_text_only():
    for file in (ROOT / "scripts").glob("*.js"):
        text = file.read_text(encoding="utf-8")
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "fetch(",
        ):
            assert word not in text, f"{file.name}: {word}"
        assert re.findall(r"https?:[^\"]*", text) in ([], ["http://www.w3.org/2000/svg"]), file.name
    assert "url(" not in (ROOT / "style.css").read_text(encoding="utf-8")


def test_a_hostile_prompt_stays_text(model, page):
    found = npllm.explain(model, HOSTILE, max_new_tokens=1)
    is_inert(found.html)
    shape = [x["tag"] for x in Elements(page.html).found]
    assert [x["tag"] for x in Elements(found.html).found] == shape, "no element comes from the text"
    assert data_of(found.html)["pipeline"]["prompt"] == HOSTILE
    assert [x["text"] for x in Elements(found.html).named("q")] == [HOSTILE]
    assert "49" not in Elements(found.html).named("q")[0]["text"], "a template is not rendered"


def test_a_hostile_address_of_the_docs_stays_an_attribute(model):
    found = npllm.explain(model, "hello", max_new_tokens=1, docs='x"><img src=y>')
    is_inert(found.html)


def test_jupyter_gets_a_frame_with_the_whole_page(page):
    (frame,) = Elements(page._repr_html_()).named("iframe")
    assert frame["attributes"]["srcdoc"] == page.html
    assert frame["attributes"]["sandbox"] == "allow-scripts"
    assert "20 sections" in repr(page)


def test_every_control_can_be_named(page):
    """What scripts make has labels by construction; the template's regions have them too."""
    for x in Elements(page.html).found:
        if x["attributes"].get("class") == "scroll":
            assert x["attributes"]["aria-label"] and x["attributes"]["role"] == "group"
            assert x["attributes"]["tabindex"] == "0", "without scripts"


# ------------------------------------------------------------------------------ limits and errors


@pytest.mark.parametrize("n_layer", [2, 12, 32, 80])
@pytest.mark.parametrize("n_head", [4, 32, 64])
def test_the_longest_prompt_shrinks_with_the_heads(n_layer, n_head):
    config = npllm.Config.from_json(
        tiny.config_dict(
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            hidden_size=96 * n_head,
            vocab_size=32064,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
        )
    )
    n = most_tokens(config)
    assert 1 <= n <= 64
    assert n_layer * n_head * n * n * 1.5 <= MOST_BYTES


def test_a_prompt_that_is_too_long_says_the_limit():
    long = tiny.model(max_position_embeddings=512, original_max_position_embeddings=512)
    n = most_tokens(long.config)
    assert n == 64
    with pytest.raises(NpllmValueError, match=f"at most {n} tokens.*got {n + 1}: shorten"):
        npllm.explain(long, np.full((1, n + 1), 10))


def test_the_longest_prompt_fits_the_context():
    small = tiny.model(max_position_embeddings=6, original_max_position_embeddings=6)
    assert most_tokens(small.config) == 5
    page = npllm.explain(small, np.array([[3, 4, 5, 6, 7]]))
    assert len(page.data["autoregression"]["steps"]) <= 1


def test_ids_of_a_model_without_tokenizer():
    page = npllm.explain(tiny.model(), np.array([[3, 4, 5]]), max_new_tokens=2)
    assert [t["text"] for t in page.data["tokens"]["tokens"]] == ["3", "4", "5"]
    assert npllm.explain(tiny.model(), np.array([[3]]), max_new_tokens=1).data


@pytest.mark.parametrize(
    "change", [{"sliding_window": 2}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}]
)
def test_pages_of_other_models(change):
    page = npllm.explain(tiny.model(**change), np.array([[3, 4, 5, 6]]), max_new_tokens=2)
    assert len(data_of(page.html)) == 20


def test_bad_arguments(model):
    with pytest.raises(NpllmTypeError, match="takes a Model"):
        npllm.explain("weights", "hello")
    with pytest.raises(NpllmValueError, match="one prompt, got 2"):
        npllm.explain(model, ["hello", "hell"])
    with pytest.raises(NpllmValueError, match="layer must"):
        npllm.explain(model, "hello", layer=2)
    with pytest.raises(NpllmValueError, match="max_new_tokens"):
        npllm.explain(model, "hello", max_new_tokens=0)
    with pytest.raises(NpllmError):
        npllm.explain(model, "")


@pytest.mark.parametrize("place", ["no/such/folder/page.html", "."])
def test_a_path_that_cannot_be_written(page, tmp_path, place):
    with pytest.raises(NpllmOSError, match=r"cannot be written .*; give a file"):
        page.save(tmp_path / place)


def test_a_path_with_a_null_character(page):
    with pytest.raises(NpllmValueError, match="NUL"):
        page.save("a\0b")


def test_a_path_is_looked_at_before_the_model_runs(tmp_path):
    """Also before it is looked at."""
    with pytest.raises(NpllmOSError, match="there is no folder"):
        npllm.explain("no model", "hello", tmp_path / "no" / "page.html")
    with pytest.raises(NpllmOSError, match="it is a folder"):
        npllm.explain("no model", "hello", tmp_path)


def test_the_file_is_the_page(model, tmp_path):
    page = npllm.explain(model, "hello", tmp_path / "page.html", max_new_tokens=1)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html


# ------------------------------------------------------------------------------ the command


def test_the_command_writes_a_page(model, tmp_path):
    file = tmp_path / "page.html"
    arguments = ["explain", "-m", str(model.folder), "-p", "hello", "-o", str(file), "-n", "1"]
    result = optional.invoke([*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["bytes"] == file.stat().st_size
    assert facts["sections"] == 20
    assert f"{file}: 20 sections" in optional.invoke(arguments).stdout


def test_the_command_reports_errors(model, tmp_path):
    arguments = ["explain", "-m", str(model.folder), "-p", "hello", "-n", "1", "-o"]
    result = optional.invoke([*arguments, str(tmp_path / "no" / "page.html")])
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


# ------------------------------------------------------------------------------ real checkpoints


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt", ["The capital of France is", "The dog chased the squirrel because it"]
)
def test_the_page_of_the_default_model(default_model, prompt):
    page = npllm.explain(default_model, prompt)
    assert len(page.html.encode()) < MOST_BYTES
    assert len(data_of(page.html)) == 20
    is_inert(page.html)
