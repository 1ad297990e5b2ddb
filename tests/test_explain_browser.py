"""The offline page in a headless Chromium: drawn, every control moved, numbers read back.

Runs where playwright and a Chromium are installed (`pip install playwright`, then the system's
chromium or `playwright install chromium`).
"""

import http.server
import re
import threading

import browsing
import numpy as np
import pytest
from browsing import PROMPT, View

import npllm
from npllm import ops
from npllm.page.data.masks import N_SLOTS
from npllm.page.render import POLICY

browser, model, file, view = browsing.browser, browsing.model, browsing.file, browsing.view
WIDTHS = (1280, 380)
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028'"

MOVE = """() => {
  const moved = [];
  for (const input of document.querySelectorAll("input, select, button")) {
    if (!input.isConnected) continue;
    if (input.type === "range") {
      for (const x of [input.min, input.max, (Number(input.min) + Number(input.max)) / 2]) {
        input.value = x;
        input.dispatchEvent(new Event("input"));
      }
    } else if (input.tagName === "SELECT") {
      for (const option of [...input.options]) {
        input.value = option.value;
        input.dispatchEvent(new Event("change"));
      }
    } else input.click();
    moved.push(input.type);
  }
  for (const details of document.querySelectorAll("details")) details.open = true;
  return moved;
}"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_control_moves_without_a_message(browser, file, width, scheme):
    view = View(browser, f"file://{file}", width, color_scheme=scheme)
    view.check()
    moved = view.page.evaluate(MOVE)
    assert moved.count("range") > 15 and moved.count("radio") > 8
    assert moved.count("select-one") > 5 and moved.count("button") > 15
    view.page.wait_for_timeout(1000)  # a player goes on
    view.check()
    view.page.close()


OVERLAPS = """() => {
  const wrong = [];
  for (const section of document.querySelectorAll("main > section")) {
    const boxes = [...section.querySelectorAll("svg text")].map((t) => [t, t.getBoundingClientRect()]);
    boxes.forEach(([t, a], k) => {
      const s = t.ownerSVGElement.getBoundingClientRect();
      if (a.left < s.left - 2 || a.right > s.right + 2 || a.top < s.top - 2 || a.bottom > s.bottom + 2)
        wrong.push(`${section.id}: ${t.textContent} is cut`);
      for (const [u, b] of boxes.slice(k + 1)) {
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (x > 1 && y > 4) wrong.push(`${section.id}: ${t.textContent} on ${u.textContent}`);
      }
    });
  }
  return wrong;
}"""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_of_a_figure_is_cut_or_lies_on_another(browser, file, width):
    view = View(browser, f"file://{file}", width)
    assert view.page.evaluate(OVERLAPS) == []
    view.page.close()


def test_every_control_and_figure_has_a_name(view):
    nameless = view.page.evaluate("""() => [
      ...[...document.querySelectorAll("input, select")].filter((e) => !e.labels.length),
      ...[...document.querySelectorAll("[role=img], [role=group], .thumbs button")].filter((e) => !e.getAttribute("aria-label")),
      ...[...document.querySelectorAll("button")].filter((e) => !(e.textContent || e.getAttribute("aria-label"))),
    ].map((e) => e.outerHTML.slice(0, 200))""")
    assert nameless == []


@pytest.mark.parametrize("width", WIDTHS)
def test_what_scrolls_is_a_stop_of_the_tab_key_and_what_fits_is_none(browser, file, width):
    view = View(browser, f"file://{file}", width)
    view.page.evaluate(MOVE)
    view.page.wait_for_timeout(300)
    wrong = view.page.evaluate("""() => [...document.querySelectorAll(".scroll")]
      .filter((e) => (e.tabIndex === 0) !== (e.scrollWidth > e.clientWidth + 1))
      .map((e) => e.getAttribute("aria-label"))""")
    assert wrong == []
    stops = view.page.locator(".scroll[tabindex='0']").count()
    assert stops > 5 if width < 500 else stops < 5
    view.page.close()


def test_the_keyboard_alone_moves_a_slider_and_chooses_a_head(view):
    page = view.page
    page.locator("#decoding").get_by_label("Top-k (0: off)").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#decoding .status").text_content() == "2 of 272 tokens can be drawn"
    page.locator("#heads .thumbs button[aria-pressed=true]").focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("layer 0")
    page.keyboard.press("Enter")
    assert page.locator("#heads .large h3").text_content().startswith("Layer 0")
    page.locator("#autoregression").get_by_role("button", name="Step", exact=True).focus()
    page.keyboard.press("Enter")
    assert page.locator("#autoregression .loop .new").count() == 1


# ------------------------------------------------------------------------------ numbers


def test_weights_of_a_head_in_the_page_are_those_of_the_trace(view, model):
    traced = npllm.trace(model, PROMPT, names="*.self_attn.weights")
    n = len(model.tokenizer.encode(PROMPT))
    for layer, head, query in ((0, 0, 0), (1, 3, n - 1), (0, 2, n // 2)):
        for label, x in (("Layer", layer), ("Head", head), ("Query", query)):
            view.set("heads", label, x)
        gold = traced[f"model.layers.{layer}.self_attn.weights"][0, head, query]
        rows = view.rows("#heads .large table")
        assert len(rows) == query + 1
        for (_, _, text, _), weight in zip(rows, gold, strict=False):
            assert abs(float(text) - weight) <= 0.000501


def test_scores_in_the_page_are_those_of_attention_steps(view, model):
    layer = npllm.explain(model, PROMPT, max_new_tokens=1).data["attention"]["layer"]
    for head, position in ((0, 2), (3, 5)):
        view.set("attention", f"Head of layer {layer}", head)
        view.set("attention", "Position of the query", position)
        steps = npllm.steps.attention_steps(
            model, PROMPT, layer=layer, head=head, position=position
        )
        gold = npllm.steps.attention_rows(steps)
        scores = view.rows("#attention [aria-label='Scores'] table")
        weights = view.rows("#attention [aria-label='Weights'] table")
        assert len(scores) == len(weights) == position + 1
        for (_, _, score), (_, _, same, weight, _), row in zip(scores, weights, gold, strict=False):
            assert abs(float(score) - row["score"]) <= 0.00051
            assert same == score and abs(float(weight) - row["weight"]) <= 0.000051


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 1.8, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0},
    ],
    ids=str,
)
def test_the_distribution_in_the_page_is_the_exact_one(view, model, filters):
    labels = {
        "temperature": "Temperature (0: greedy)",
        "top_k": "Top-k (0: off)",
        "top_p": "Top-p (1: off)",
        "min_p": "Min-p (0: off)",
    }
    for name, value in filters.items():
        view.set("decoding", labels[name], value)
    gold = model.next_token_distribution(PROMPT, **filters)[0]
    kept = int(re.match(r"[\d,]+", view.page.locator("#decoding .status").text_content())[0])
    assert kept == np.count_nonzero(gold)
    order = np.argsort(-model.next_token_distribution(PROMPT)[0], kind="stable")
    rows = view.rows("#decoding table")
    for (_, text, drawn, _), p in zip(rows[:12], gold[order[:12]], strict=True):
        assert abs(float(text.split()[0]) - 100 * p) <= 0.0051
        assert abs(int(drawn) - 1000 * p) <= 5 * (1000 * p * (1 - p)) ** 0.5 + 1e-9
    assert sum(int(row[2]) for row in rows) == 1000


def test_pairs_of_a_mask_in_the_page_are_those_of_the_rule(view):
    page = view.page
    for name, label, value, rule in (
        ("sliding_window", "w", 4, ops.mask.sliding_window(4)),
        ("strided", "stride", 6, ops.mask.strided(6)),
        ("block_local", "block", 5, ops.mask.block_local(5)),
    ):
        page.locator("#masks").get_by_label("Rule").select_option(label=name)
        view.set("masks", label, value - 1)
        gold = ops.mask.to_bool(rule, N_SLOTS, N_SLOTS)
        shown = page.locator("#masks .figure dd").first.text_content()
        assert shown == f"{gold.sum()} of {N_SLOTS**2}"
        light = page.locator("#masks .figure svg").first.locator("rect[fill='var(--allowed)']")
        assert light.count() == (gold & ~np.eye(N_SLOTS, dtype=bool)).sum()


def test_bytes_of_the_cache_in_the_page_are_those_of_the_formula(view, model):
    view.set("cache", "Length of the context", 5)
    shown = view.page.locator("#cache dl").nth(1).locator("dd").nth(1).text_content()
    assert int(shown.replace(",", "")) == npllm.cost.kv_cache_bytes(model.config, 32)


def test_the_lens_in_the_page_is_that_of_the_trace(view, model):
    rows = view.rows("#block .scroll[aria-label='Logit lens'] table")
    gold = npllm.tracing.lens.lens_facts(model, PROMPT)["layers"]
    assert len(rows) == len(gold)
    for (_, rank, p, _, kl, _), row in zip(rows, gold, strict=True):
        assert int(rank.replace(",", "")) == row["rank"]
        assert abs(float(p.split()[0]) - 100 * row["probability"]) <= 0.0051
        assert abs(float(kl) - row["kl"]) <= 0.00051


def test_the_running_sum_of_flash_attention_ends_in_the_whole_row(view):
    for block in (1, 2, 3):
        view.set("flash", "Positions in a block", block)
        last = view.rows("#flash .running table")[-1]
        told = view.page.locator("#flash .running p").text_content()
        assert told == f"The whole row at once: m = {last[2]}, l = {last[4]}."


# ------------------------------------------------------------------------------ no network


def test_a_hostile_prompt_makes_no_element(browser, model, tmp_path):
    npllm.explain(model, HOSTILE, tmp_path / "page.html", max_new_tokens=1)
    view = View(browser, f"file://{tmp_path / 'page.html'}")
    view.page.evaluate(MOVE)
    view.check()
    assert view.page.locator("img").count() == 0
    assert view.page.locator("header q").text_content() == HOSTILE
    view.page.close()


def test_a_server_that_forbids_every_request_is_asked_once(browser, file):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(file.read_bytes())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        view = View(browser, f"http://127.0.0.1:{server.server_port}/page.html")
        view.page.evaluate(MOVE)
        view.check()
        view.page.close()
        server.shutdown()
    assert asked == ["/page.html"]


def test_the_frame_of_jupyter_draws_the_page(browser, model, tmp_path):
    page = npllm.explain(model, PROMPT, max_new_tokens=1)
    (tmp_path / "notebook.html").write_text(f"<!DOCTYPE html>{page._repr_html_()}")
    view = View(browser, f"file://{tmp_path / 'notebook.html'}")
    frame = view.page.frame_locator("iframe")
    assert frame.locator("main > section").count() == 20
    assert frame.locator("html[data-ready=yes]").count() == 1
    assert view.said == []
    view.page.close()
