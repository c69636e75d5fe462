"""What a recipe's hub models are told to be, asked of a local server that answers as the hub does."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CONFIG = json.dumps({"_class_name": "StableDiffusionPipeline"}).encode()
CODES = {
    "gated": (403, "GatedRepo"),
    "missing": (404, "RepoNotFound"),
    "revision": (404, "RevisionNotFound"),
    "other": (404, "EntryNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    """Knows owner/there; every other name is an answer of CODES."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        name = self.path.split("/")[2]
        status, code = CODES.get(name, (200, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        else:
            self.send_header("ETag", '"0123456789"')
            self.send_header("X-Repo-Commit", "0" * 40)
        body = b"" if code else CONFIG
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def asked(endpoint: str, home: Path, names: list[str], offline: bool = False) -> dict[str, str]:
    """Return what hub_file says of each model, in a process of its own: the hub's library reads its settings at import."""
    code = f"""
import json
from selma_ray.errors import ModelNotFoundError
from selma_ray.models.hub import hub_file
said = {{}}
for name in {names!r}:
    try:
        said[name] = str(hub_file("prompts.llm.name", name, "model_index.json", "v9" if "revision" in name else None))
    except ModelNotFoundError as error:
        said[name] = str(error)
print(json.dumps(said))
"""
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_that_cannot_be_had_says_why_and_what_to_do(hub: str, tmp_path: Path) -> None:
    said = asked(hub, tmp_path, ["owner/gated", "owner/missing", "owner/revision", "owner/other", "owner/there"])
    assert (
        "prompts.llm.name owner/gated is gated: accept its licence on its page at the hub and set HF_TOKEN"
        in said["owner/gated"]
    )
    assert "owner/missing is not on the hub, or is private; fix the name, set HF_TOKEN" in said["owner/missing"]
    assert "owner/revision has no revision 'v9'" in said["owner/revision"]
    assert "owner/other holds no model_index.json" in said["owner/other"]
    assert Path(said["owner/there"]).read_bytes() == CONFIG
    assert all("\n" not in line for line in said.values())


def test_without_a_network_what_was_fetched_is_found_and_the_rest_says_so(hub: str, tmp_path: Path) -> None:
    asked(hub, tmp_path, ["owner/there"])
    said = asked("http://127.0.0.1:9", tmp_path, ["owner/there", "owner/elsewhere"], offline=True)
    assert Path(said["owner/there"]).read_bytes() == CONFIG
    assert "owner/elsewhere is not in HF_HOME, and the hub cannot be reached" in said["owner/elsewhere"]
    assert "run `selma fetch RECIPE` where it can be" in said["owner/elsewhere"]
