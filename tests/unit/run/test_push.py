"""selma push: a card and files in a folder, or at a local server that answers as the hub does when files are pushed to it."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from selma_ray.cli.commands import main
from selma_ray.run.opening import open_run
from selma_ray.run.recipe import load_recipe
from selma_ray.storage import RunFolder

DEMO = Path(__file__).parents[3] / "jobs" / "recipes" / "demo.yaml"
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


class Hub(BaseHTTPRequestHandler):
    """Keeps what is pushed, by repository; owner/taken may not be written to."""

    pushed: ClassVar[dict[str, dict[str, bytes]]] = {}
    stored: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "siblings": [], "id": "owner/new"})

    def do_PUT(self) -> None:
        self.stored[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if "taken" in self.path or b"taken" in body:
            self._answer({"error": "forbidden"}, 403)
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{self._own_url()}/owner/new"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in files]
            told = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in zip(files, modes, strict=True)
            ]
            self._answer({"files": told})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                {**each, "actions": {"upload": {"href": f"{self._own_url()}/stored/{each['oid']}"}}} for each in objects
            ]
            self._answer({"transfer": "basic", "objects": actions})
        else:
            self._commit(body)

    def _commit(self, body: bytes) -> None:
        files = self.pushed.setdefault(self.path.removeprefix("/api/").partition("/commit")[0], {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        self._answer({"commitUrl": f"{self._own_url()}/owner/new/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _own_url(self) -> str:
        return f"http://{self.headers['Host']}"

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a run that has a merged adapter, a score and an image file."""
    place = tmp_path_factory.mktemp("run")
    run = open_run(load_recipe(DEMO, [f"run_dir={place}"]))
    for name, content in ADAPTER.items():
        run.folder.write_bytes(content, "merged", "merged", "adapter", name)
    run.folder.write_bytes(b"export", "merged", "merged", "pytorch_lora_weights.safetensors")
    run.folder.write_bytes(b"rows", "images", "skill=counting", "train-0.parquet")
    run.folder.write_bytes(b"card of the images", "images", "README.md")
    scored = {"dsg": 0.804, "interval": [0.78, 0.83], "images": 240}
    run.folder.write_json({"models": {"merged": scored, "unscored": {"dsg": None}}}, "done", "evaluate.json")
    assert RunFolder(str(place)).done("evaluate") is not None
    return str(place)


def pushed(endpoint: str, *arguments: str, token: str = "hf_0") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: the hub's library reads its settings at import."""
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token,
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-m", "selma_ray.cli", "push", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_adapter_is_pushed_with_a_card(hub: str, run_dir: str) -> None:
    done = pushed(hub, run_dir, "--to", "hub:owner/new", "--license", "openrail++", "--private")
    assert done.returncode == 0, done.stderr
    files = Hub.pushed["models/owner/new"]
    assert files.keys() == {*ADAPTER, "pytorch_lora_weights.safetensors", "README.md"}
    assert (files["adapter_model.safetensors"], files["pytorch_lora_weights.safetensors"]) == (b"weights", b"export")
    card = files["README.md"].decode()
    for part in ("license: openrail++", "| merged | 80.4 | 78.0 to 83.0 | 240 |", "load_lora_weights", "skills:"):
        assert part in card
    assert run_dir not in card
    assert "unscored" not in card


def test_images_are_pushed_as_a_dataset_with_the_card_that_they_have(hub: str, run_dir: str) -> None:
    done = pushed(hub, run_dir, "--what", "dataset", "--to", "hub:owner/images")
    assert done.returncode == 0, done.stderr
    assert Hub.pushed["datasets/owner/images"] == {
        "skill=counting/train-0.parquet": b"rows", "README.md": b"card of the images"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "endpoint", "message"),
    [
        (
            "hub:owner/taken",
            None,
            "the hub's owner/taken does not take it (403): set HF_TOKEN to a token that may write",
        ),
        ("hub:owner/new", "http://127.0.0.1:9", "the hub's owner/new cannot be reached"),
        ("hub:nothing", None, "--to must be hub:OWNER/NAME or a folder, got 'hub:nothing'"),
    ],
)
def test_what_the_hub_does_not_take_is_one_line(
    place: str, endpoint: str | None, message: str, hub: str, run_dir: str
) -> None:
    done = pushed(endpoint or hub, run_dir, "--to", place)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_gets_the_same_files(run_dir: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["push", run_dir, "--to", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {*ADAPTER, "pytorch_lora_weights.safetensors", "README.md"}
    assert not any(path.is_symlink() for path in out.iterdir())
    assert main(["push", run_dir, "--to", str(out)]) == 2
    assert "must be a folder that is empty or not there" in capsys.readouterr().err
    assert main(["push", run_dir, "--what", "pipeline", "--to", str(tmp_path / "other")]) == 1
    assert "holds no pipeline; run `selma merge` first" in capsys.readouterr().err
