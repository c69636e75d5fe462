"""Ray's nodes as processes of this machine, started by `ray start`: for tests in which nodes come and go."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

__all__ = ["ENVIRONMENT", "NEEDS_MOUNT_NAMESPACE", "RAY", "RayNode", "free_port", "own_address", "wait_until"]

RAY = str(Path(sys.executable).with_name("ray"))
NEEDS_MOUNT_NAMESPACE = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="a node with another filesystem needs a mount namespace, which this machine does not give",
)
# Nodes and drivers that are to find one another. On a busy machine a node takes its time to start.
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "180"}


class RayNode:
    """One node: `ray start WORDS… --block` and all the processes that it starts, which cannot see the folder `hidden` of this machine."""

    def __init__(
        self, *words: str, log: Path, environment: Mapping[str, str] = ENVIRONMENT, hidden: Path | None = None
    ) -> None:
        self._log = log
        # A node whose agent finds its port taken, by another node of this machine, does not come up.
        self._agent_port = free_port()
        agent = f"--dashboard-agent-listen-port={self._agent_port}"
        start = [RAY, "start", *words, agent, "--block", "--disable-usage-stats"]
        if hidden is not None:  # another filesystem lies over it in a mount namespace of the node's own
            start = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden), *start]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                start,
                env={**environment, "PYTHONUNBUFFERED": "1"}, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the node, its workers among them."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @property
    def started(self) -> bool:
        """Tell whether the node is up."""
        return "Ray runtime started" in self._log.read_text()

    @property
    def takes_jobs(self) -> bool:
        """Tell whether a head takes jobs: they go through its agent, which comes up long after the dashboard on a busy machine."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._agent_port}/api/local_raylet_healthz", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """End the node as a power cut would: kill -9 of all its processes at once."""
        for process in self.processes():
            process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End the node in good order where that is quick, then what is left of it."""
        family = self.processes()
        self.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        self.process.wait()


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def own_address() -> str:
    """Return the address of this machine by which Ray's nodes know it."""
    import ray

    return ray.util.get_node_ip_address()


def wait_until(
    holds: Callable[[], bool], log: Path, process: subprocess.Popen | None = None, timeout_s: float = 240
) -> None:
    """Wait for a condition; fails with the end of a log where it does not come in time, or the process ends before."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert process is None or process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline_s, f"it did not come in time: {log.read_text()[-3000:]}"
        time.sleep(0.2)
