"""A headless Chromium driven over its DevTools protocol: just enough to use a page as a person does."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

__all__ = ["CHROMIUM", "Browser", "chromium"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--hide-scrollbars",
)  # fmt: skip
_TIMEOUT_S = 60


class Browser:
    """One page; every address that it asks for is kept in `requested`, every message of its console in `console`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count()
        self.requested: list[str] = []
        self.console: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=_TIMEOUT_S))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a condition of the page holds."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline_s, f"not in time: {expression}; console: {self.console}"
            time.sleep(0.1)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key such as Tab, Enter or ArrowRight; 2 is the modifier Ctrl."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowDown": 40, "a": 65}
        text = {"Enter": "\r", " ": " "}.get(key, "") if not modifiers else ""
        common = {"key": key, "code": key, "modifiers": modifiers, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def look(self, width_px: int, height_px: int, dark: bool = False) -> None:
        """Set the window's size and the colour scheme that its user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=height_px, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.console.append(params["exceptionDetails"]["text"])
        elif message.get("method") == "Log.entryAdded":
            self.console.append(params["entry"]["text"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a fresh profile folder and yield its one page."""
    assert CHROMIUM is not None
    # Its sandbox does not start for root, as in containers.
    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={profile}"]
    log = (profile.parent / "chromium.log").open("w")
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=log, stderr=log)
    try:
        with connect(_page_address(profile, process), max_size=None, proxy=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def _page_address(profile: Path, process: subprocess.Popen) -> str:
    """Return the page's DevTools address, whose port Chromium writes into its profile once it listens."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "Chromium did not start"
        file = profile / "DevToolsActivePort"
        if file.is_file() and (lines := file.read_text().split()):
            with opener.open(f"http://127.0.0.1:{lines[0]}/json/list", timeout=_TIMEOUT_S) as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise AssertionError("Chromium did not listen in time")
