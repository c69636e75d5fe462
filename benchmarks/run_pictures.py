"""Pictures of a finished run for the docs: its report in light and dark, a contact sheet, and what its command printed.

The browser is the machine's Chromium, or the one that CHROME names. LOG is the command's output with its colours, as
`script -qc 'make demo' LOG` keeps it.

Run: python -m benchmarks.run_pictures runs/demo [LOG] [FOLDER]
"""

import os
import re
import shutil
import sys
from io import StringIO
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.text import Text

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WIDTH_PX, _HEIGHT_PX = 1080, 1400
_COLUMNS = 110
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-HJKSTfhlnsu]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b\x0c\x0e-\x1a]")


def main() -> None:
    """Take report.png, report_dark.png, contact_sheet.png and, of a log, demo.svg."""
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    run, folder = Path(sys.argv[1]).absolute(), Path(sys.argv[3] if len(sys.argv) > 3 else "docs/assets")
    path = os.environ.get("CHROME") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        sys.exit(f"there is no Chromium here: install one of {', '.join(_NAMES)}, or set CHROME to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        for scheme, name in (("light", "report.png"), ("dark", "report_dark.png")):
            _take(browser, run / "report.html", folder / name, scheme)
        _take(browser, run / "contact_sheet.html", folder / "contact_sheet.png", "light")
        browser.close()
    if len(sys.argv) > 2:
        (folder / "demo.svg").write_text(terminal_picture(Path(sys.argv[2]).read_text(errors="replace")))


def terminal_picture(log: str) -> str:
    """Return an SVG of what stood on a terminal at the end: of a line that was drawn again and again, the last state."""
    console = Console(record=True, width=_COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    for line in log.replace("\r\n", "\n").splitlines():
        shown = _CONTROL.sub("", line.rpartition("\r")[2])
        if shown.strip() and not shown.startswith("Script "):
            console.print(Text.from_ansi(shown), soft_wrap=True)
    return console.export_svg(title="make demo")


def _take(browser: Browser, page_path: Path, picture: Path, scheme: str) -> None:
    page = browser.new_page(
        viewport={"width": _WIDTH_PX, "height": _HEIGHT_PX}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page.goto(page_path.as_uri())
    page.screenshot(path=picture)
    page.close()


if __name__ == "__main__":
    main()
