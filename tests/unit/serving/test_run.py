"""What is refused before a service starts, in one line and at once."""

import hashlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import ConfigError
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.run import _free_port, _in_url, check_start


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "as Ray's proxies listen"])
def test_a_port_that_is_taken_is_refused_at_once(shared: bool) -> None:
    with socket.socket() as other:
        if shared:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        started_s = time.monotonic()
        with pytest.raises(
            ConfigError, match=rf"^serving\.port {port} of 127\.0\.0\.1 is taken; stop what listens there"
        ):
            check_start(ServingConfig(port=port), ClusterConfig())
        assert time.monotonic() - started_s < 3
        check_start(ServingConfig(port=port), ClusterConfig(address="head.example.com:6379"))
    check_start(ServingConfig(port=port), ClusterConfig())


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_this_machine_is_refused_at_once(tmp_path: Path, host: str) -> None:
    (tmp_path / "keys").write_text("sha256:" + hashlib.sha256(b"key").hexdigest())
    config = ServingConfig(host=host, port=0, api_keys_file=str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match=rf"^serving\.host {host}, port 0, cannot be listened on .*127\.0\.0\.1$"):
        check_start(config, ClusterConfig())


def test_a_keys_file_that_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check_start(ServingConfig(port=0, api_keys_file=str(tmp_path / "none")), ClusterConfig())


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("localhost", "localhost")])
def test_addresses_are_printed_as_urls_have_them(host: str, shown: str) -> None:
    assert _in_url(host) == shown


def test_a_free_port_is_found_at_either_kind_of_address() -> None:
    assert _free_port("127.0.0.1") > 0
    if socket.has_ipv6:
        assert _free_port("::1") > 0


@pytest.mark.parametrize("module", ["selma_ray.run.serve", "selma_ray.serving.replicas"])
def test_whoever_starts_a_service_or_speaks_http_loads_no_torch(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "peft", "vllm", "deepspeed")
    program = f"import sys, {module}; sys.exit(', '.join(each for each in {heavy} if each in sys.modules) or None)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
