"""Pictures of the playground for the docs, taken of a running service in the machine's Chromium, or the one that CHROME names.

Run: selma serve RECIPE, then python -m benchmarks.playground_pictures http://127.0.0.1:8000 [FOLDER]
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WIDTH_PX, _HEIGHT_PX = 980, 1180
_DRAW_TIMEOUT_MS = 300_000
_PROMPT = "two blue bananas to the left of a red car"
_SEED = "7"

MIX = "mix of experts"


def main() -> None:
    """Take playground.png (light, base against merged) and playground_mix.png (dark, base against a mix)."""
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    url, folder = sys.argv[1].rstrip("/"), Path(sys.argv[2] if len(sys.argv) > 2 else "docs")
    path = os.environ.get("CHROME") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        sys.exit(f"there is no Chromium here: install one of {', '.join(_NAMES)}, or set CHROME to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        for picture in take_pictures(browser, url, folder):
            print(picture)
        browser.close()


def take_pictures(browser: Browser, url: str, folder: Path) -> list[Path]:
    """Draw with two pairs of models and write a picture of each; returns the files."""
    light, dark = folder / "playground.png", folder / "playground_mix.png"
    page = browser.new_page(viewport={"width": _WIDTH_PX, "height": _HEIGHT_PX}, color_scheme="light")
    page.set_default_timeout(_DRAW_TIMEOUT_MS)
    page.goto(f"{url}/")
    expect(page.locator("#status")).to_have_text("Ready", timeout=_DRAW_TIMEOUT_MS)
    page.locator("#prompt").fill(_PROMPT)
    page.locator("#seed").fill(_SEED)
    _draw(page)
    page.screenshot(path=light)
    page.emulate_media(color_scheme="dark")
    page.locator("#right select").select_option(MIX)
    _draw(page)
    page.screenshot(path=dark)
    page.close()
    return [light, dark]


def _draw(page: Page) -> None:
    page.locator("#generate").click()
    expect(page.locator("#status")).to_have_text("Done", timeout=_DRAW_TIMEOUT_MS)
    page.mouse.move(0, 0)


if __name__ == "__main__":
    main()
