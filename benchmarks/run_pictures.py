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
_NOT_SHOWN = ("Script ", "real\t", "user\t", "sys\t")  # what `script` and `time` say
# What moves on a terminal, and what neither moves nor colours.
_MOVE = re.compile(r"\x1b\[(?P<count>\d*)(?P<kind>[AK])|(?P<newline>\n)|(?P<start>\r)")
_OTHER = re.compile(r"\x1b\[[0-9;?]*[B-HJSTfhlnsu]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b\x0c\x0e-\x1a]")


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
        log = (
            Path(sys.argv[2]).read_bytes().decode(errors="replace")
        )  # as bytes: a text file's lines end where a cursor only goes back
        for place in (
            run.parents[1],
            Path(sys.base_prefix) / "bin",
        ):  # where this machine keeps them is nobody's business
            log = log.replace(f"{place}/", "")
        (folder / "demo.svg").write_text(terminal_picture(log))


def terminal_picture(log: str) -> str:
    """Return an SVG of what stood on a terminal at the end: of lines that were drawn again and again, the last state."""
    console = Console(record=True, width=_COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    for line in _last_state(_OTHER.sub("", log)):
        if line.strip() and not line.startswith(_NOT_SHOWN):
            console.print(Text.from_ansi(line), soft_wrap=True)
    return console.export_svg(title="make demo")


def _last_state(log: str) -> list[str]:
    """Return the lines that are left when the cursor's moves up and the erasing of lines are followed."""
    lines, row, place = [""], 0, 0
    for move in _MOVE.finditer(log):
        lines[row] += log[place : move.start()]
        place = move.end()
        if move["newline"]:
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif move["start"]:
            if log[place : place + 1] not in ("\n", "\r"):
                lines[row] = ""
        elif move["kind"] == "A":
            row = max(0, row - int(move["count"] or 1))
        else:
            lines[row] = ""
    return lines


def _take(browser: Browser, page_path: Path, picture: Path, scheme: str) -> None:
    page = browser.new_page(
        viewport={"width": _WIDTH_PX, "height": _HEIGHT_PX}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page.goto(page_path.as_uri())
    page.screenshot(path=picture)
    page.close()


if __name__ == "__main__":
    main()
