"""The machine's own Chromium under Playwright; nothing is downloaded."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

__all__ = ["faults_of", "open_chromium"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = ("--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update")


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """Start a headless Chromium, or skip where there is none; CHROME names one that is not on the path."""
    path = os.environ.get("CHROME") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"there is no Chromium here: install one of {', '.join(_NAMES)}, or set CHROME to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


def faults_of(page: Page) -> list[str]:
    """Return a list that grows by what its console shows: warnings, errors (of files not found, too), exceptions."""
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("warning", "error") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    return faults
