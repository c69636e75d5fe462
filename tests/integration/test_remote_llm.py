"""Prompts written by a server that speaks OpenAI's API: vLLM's own, on loopback."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.threads import thread_env
from selma_ray.errors import LLMError
from selma_ray.miniature.captions import parse_caption
from selma_ray.miniature.locate import llm_dir
from selma_ray.prompts.config import LLMConfig, PromptsConfig, RemoteConfig
from selma_ray.prompts.llm import llm_errors
from selma_ray.prompts.stream import prompt_stream, prompt_summary, read_prompts
from selma_ray.skills import load_skill
from selma_ray.storage import RunFolder
from tests.local_ray import free_port

KEY_ENV = "SELMA_TEST_API_KEY"

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start vLLM's server with an API key; returns the address of its API."""
    port = free_port()
    words = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llm_dir()), "--served-model-name", "writer",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager", "--no-enable-chunked-prefill",
    ]  # fmt: skip
    environment = {**os.environ, **thread_env(1), "VLLM_API_KEY": "sk-loopback", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def wait_until_healthy(url: str, process: subprocess.Popen, log: Any, timeout_s: float = 400) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline_s, "the server did not start in time"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)


def write(folder: RunFolder, url: str, **options: Any) -> list[str]:
    remote = RemoteConfig(url=url, api_key_env=KEY_ENV, max_retries=1)
    llm = LLMConfig(engine="remote", name="writer", max_tokens=400, remote=remote, **options)
    config = PromptsConfig(per_skill=8, per_request=6, requests_in_flight=2, max_requests=30, llm=llm)
    with llm_errors(llm):
        prompt_stream([load_skill("miniature/common")], config, 0, folder, ClusterConfig()).materialize()
    return read_prompts(folder, "common")["prompt"].to_pylist()


@pytest.mark.parametrize("chat", [True, False])
def test_the_server_writes_captions_inside_the_grammar(
    server_url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-loopback")
    folder = RunFolder(str(tmp_path / "run"))
    captions = write(folder, server_url, chat=chat)
    assert len(captions) == 8
    for caption in captions:
        parse_caption(caption)
    assert "unparsed" not in prompt_summary(folder, ["common"])["reasons"]
    assert not [path for path in folder.files() if b"sk-loopback" in folder.read_bytes(path)]


def test_a_wrong_key_and_a_server_out_of_reach_are_one_line(
    server_url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-wrong")
    with pytest.raises(LLMError, match="refused a request") as refused:
        write(RunFolder(str(tmp_path / "refused")), server_url)
    assert "\n" not in str(refused.value)
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(LLMError, match=r"did not answer a request that was tried 2 times; start the server"):
        write(RunFolder(str(tmp_path / "nowhere")), nowhere)
