"""A page in a headless Chromium: the browser, a page of a tiny model, and reading it back.

Runs where playwright and a Chromium are installed (`pip install playwright`, then the system's
chromium or `playwright install chromium`).
"""

import shutil

import optional
import pytest
from page_reading import tiny_model

import npllm

playwright = optional.import_or_skip(
    "playwright.sync_api", reason="the page is looked at where playwright is installed"
)
PROMPT = "hello wé, how low"

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) => violations.push(e.violatedDirective));
"""


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: playwright's own, or the system's."""
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with playwright.sync_playwright() as driver:
        try:
            one = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield one
        one.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    npllm.explain(model, PROMPT, path, max_new_tokens=3)
    return path


class View:
    """A page in a window: what it said and asked for."""

    def __init__(self, browser, address, width=1280, **options):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        self.said, self.requests = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.add_init_script(WATCH)
        self.page.goto(address)
        self.address = address

    def check(self):
        """Raise for a message, a request, a violation, or a page wider than its window."""
        assert self.said == []
        assert self.requests == [self.address], "the page itself and nothing else"
        assert self.page.evaluate("violations") == []
        assert self.page.evaluate("document.documentElement.dataset.ready") == "yes"
        assert self.page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )

    def set(self, section, label, value):
        """Move the slider, or choose the option, that has this label."""
        control = self.page.locator(f"#{section}").get_by_label(label, exact=True)
        if control.evaluate("e => e.tagName") == "SELECT":
            control.select_option(str(value))
        else:
            control.evaluate(
                "(e, x) => { e.value = x; e.dispatchEvent(new Event('input')); }", value
            )

    def choose(self, section, label, text):
        """Choose the option of a list that has this text."""
        self.page.locator(f"#{section}").get_by_label(label, exact=True).select_option(label=text)

    def rows(self, selector):
        """The cells of a table, as texts."""
        return self.page.locator(selector).first.evaluate(
            "t => [...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent))"
        )


@pytest.fixture
def view(browser, file):
    seen = View(browser, f"file://{file}")
    yield seen
    seen.check()
    seen.page.close()
