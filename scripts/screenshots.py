"""Take the pictures of the explain page that the documentation shows.

    python scripts/screenshots.py

Makes the page of the default model, opens it in a headless Chromium, and writes one picture for
each section into docs/pictures/explain, and the beginning of the page, light, dark and as wide as
a phone.  Needs playwright, a Chromium, and Pillow (`pip install playwright -e ".[plot]"`).
"""

import argparse
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import npllm
from npllm.page.sections import SECTIONS

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "explain"
PROMPT = "The dog chased the squirrel because it"
WIDTH, PHONE = 1180, 390
STEPS = {"autoregression": 3, "cache": 3}  # section -> how often "Step" is clicked
CHOICES = {"packing": "causal only: documents leak", "other_heads": "bidirectional: an encoder"}
OVERVIEWS = {  # file -> width, height, scheme, section at the top
    "top": (WIDTH, 780, "light", None),
    "dark": (WIDTH, 900, "dark", "heads"),
    "phone": (PHONE, 800, "light", "logits"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-p", "--prompt", default=PROMPT)
    parser.add_argument("-o", "--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        npllm.explain(npllm.load(), arguments.prompt, page)
        total = sum(take_all(f"file://{page}", arguments.output))
    print(f"{arguments.output}: {len(SECTIONS) + len(OVERVIEWS)} pictures, {total / 1000:.0f} kB")


def take_all(address: str, folder: Path) -> list[int]:
    """Take every picture; the sizes of the files in bytes."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        sizes = take_sections(browser, address, folder)
        for name, place in OVERVIEWS.items():
            sizes.append(save(take_overview(browser, address, *place), folder / f"{name}.webp"))
        browser.close()
    return sizes


def take_sections(browser: Any, address: str, folder: Path) -> list[int]:
    page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
    page.set_default_timeout(300_000)
    page.goto(address)
    sizes = []
    for section in SECTIONS:
        part = page.locator(f"#{section.name}")
        for _ in range(STEPS.get(section.name, 0)):
            part.get_by_role("button", name="Step", exact=True).click()
        if section.name in CHOICES:
            part.get_by_label(CHOICES[section.name]).check()
        sizes.append(save(part.screenshot(), folder / f"{section.name}.webp"))
    return sizes


def take_overview(
    browser: Any, address: str, width: int, height: int, scheme: str, section: str | None
) -> bytes:
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(300_000)
    page.goto(address)
    if section is not None:
        page.locator(f"#{section}").evaluate("e => e.scrollIntoView({behavior: 'instant'})")
    return page.screenshot()


def save(picture: bytes, path: Path) -> int:
    """Write a picture without a loss, as WebP, which is a third as large as PNG; its bytes."""
    from PIL import Image

    Image.open(io.BytesIO(picture)).convert("RGB").save(path, lossless=True, quality=100, method=4)
    return path.stat().st_size


if __name__ == "__main__":
    main()
