"""Start and stop the service from a program."""

import asyncio
import base64
import errno
import ipaddress
import json
import logging
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect
from selma_ray.cluster.placement import is_local
from selma_ray.errors import ConfigError, ServingError, first_line, last_line
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.credentials import open_signer
from selma_ray.serving.deployment import application
from selma_ray.serving.evaluator import Scorer
from selma_ray.serving.experts import OpenExperts
from selma_ray.serving.keys import new_key, read_keys
from selma_ray.serving.replicas import API
from selma_ray.serving.served import Hosted, ServedModels

__all__ = ["Service", "check_start", "start_service"]

logger = logging.getLogger(__name__)

_DEFAULT_NAME = "selma"
_ENDING = (signal.SIGINT, signal.SIGTERM)
_POLL_S = 0.5
_ANSWER_S = 3.0  # beyond the time to drain

# Ray Serve replaces a proxy that is not ready in 5 s, which on a busy machine none is.
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
_FAILED = ("UNHEALTHY", "DEPLOY_FAILED")


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    config: ServingConfig
    name: str = _DEFAULT_NAME
    """Its name among the applications of Ray Serve."""
    key: str = ""
    """A key of this program's own, accepted where keys are asked for."""
    alone: bool = True
    """Whether Ray Serve runs for it alone, and ends with it."""

    def generate(self, prompt: str, seed: int) -> bytes:
        """Fetch one image over HTTP as a PNG file; raises ServingError with the service's reason."""
        answer = self._post("/v1/images/generations", {"prompt": prompt, "seed": seed})
        return base64.b64decode(answer["data"][0]["b64_json"])

    def wait(self) -> None:
        """Return when the process is interrupted or told to terminate; whoever does so again ends it at once.

        What the process ignores, as a shell's background job ignores Ctrl-C, it goes on ignoring.
        """
        told = threading.Event()
        handlers = {number: signal.getsignal(number) for number in _ENDING}
        before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

        def note(number: int, frame: Any) -> None:
            told.set()
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        while not told.wait(_POLL_S):  # a wait without end would hold the signal back
            pass

    def drain(self) -> None:
        """Refuse new requests, and wait for those that were accepted as long as serving.drain_s says; a service that is dead has none."""
        timeout_s = self.config.drain_s
        try:
            cut_off = sum(_ask_all(self.name, "drain", timeout_s, within_s=timeout_s + _ANSWER_S))
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the service ends without its requests in progress: %s", first_line(error))
            return
        if cut_off:
            logger.warning("%d requests were cut off after serving.drain_s %g; set it higher", cut_off, timeout_s)

    def stop(self) -> None:
        """End the service, and Ray Serve where it runs for it alone."""
        if self.alone:
            serve.shutdown()
        else:
            serve.delete(self.name)

    def leave(self, within_s: float) -> None:
        """End the service of a process that ends: return after so many seconds whether it has ended or still does, on its own.

        A local Ray ends with the process, and Ray Serve in it. Told to end before, its controller would kill itself in the middle of calls
        that wait for it, which the raylet reports as a crash.
        """
        if self.alone:
            return
        thread = threading.Thread(target=self.stop, name="shutdown", daemon=True)
        thread.start()
        thread.join(within_s)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.config.api_keys_file:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        # The service is on this machine: a proxy set for the way out must not be asked.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=self.config.request_timeout_s + 5) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ServingError(
                f"POST {path} was answered {error.code}: {error.read(500).decode(errors='replace')}"
            ) from None
        except OSError as error:
            raise ServingError(
                f"POST {self.url}{path} was not answered ({error}); the service's logs say why"
            ) from None


def start_service(
    models: ServedModels,
    config: ServingConfig,
    cluster: ClusterConfig,
    open_scorer: Callable[[], Scorer],
    open_experts: OpenExperts | None = None,
    name: str = _DEFAULT_NAME,
    others: Mapping[str, Hosted] | None = None,
) -> Service:
    """Serve `models`, and those of other runs by name, and return once they answer; the caller stops it.

    `name` is its name where the configuration gives none.

    On a cluster whose Ray Serve runs already it is served beside what is there, at that address. Raises ConfigError where the address
    cannot be listened on, or its name or its paths are another's, ServingError where a replica cannot start.
    """
    connect(cluster)
    # Importing Ray Serve sets its own level; what fails is raised here and shown once.
    logging.getLogger("ray.serve").setLevel("DEBUG" if cluster.log_level == "DEBUG" else "CRITICAL")
    name = config.application or name
    running = _running()
    if running is None:
        check_start(config, cluster)
        if (cluster.address or os.environ.get("RAY_ADDRESS")) in ("auto", "local"):  # this machine listens
            _check_address(config)
        address = _Address(config.host, config.port or _free_port(config.host))
    else:
        _check_beside(running, name, config)
        address = running.address
    key, accepted = new_key()
    app = application(models, config, cluster, open_scorer, open_experts, [accepted], others)
    prefix = "" if config.route_prefix == "/" else config.route_prefix
    service = Service(address.url + prefix, config, name, key, alone=running is None and is_local(cluster))
    try:
        if running is None:
            serve.start(
                http_options={"host": address.host, "port": address.port},
                logging_config={"log_level": cluster.log_level},
                controller_options={"runtime_env": {"env_vars": _PATIENCE}},
            )
        serve.run(app, name=name, route_prefix=config.route_prefix)
        _ask_all(name, "ready", within_s=config.request_timeout_s)
    except Exception as error:
        reason = _reason(name)
        service.stop()
        raise ServingError(f"the service did not start: {reason or first_line(error)}") from error
    return service


def _ask_all(name: str, method: str, *arguments: Any, within_s: float) -> list[Any]:
    """Call a method of every replica of an application's API; returns their answers.

    In a thread of its own where this one runs an asyncio loop, as a notebook's does: Ray Serve refuses to wait there.
    """

    def ask() -> list[Any]:
        return serve.get_deployment_handle(API, name).broadcast(method, *arguments).results(timeout_s=within_s)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return ask()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ask).result()


@dataclass(frozen=True)
class _Address:
    host: str
    port: int

    @property
    def url(self) -> str:
        """Return the address as clients on this machine write it."""
        return f"http://{_in_url(_reachable(self.host))}:{self.port}"


@dataclass(frozen=True)
class _Running:
    """Ray Serve as it runs on the cluster: where it listens, and the paths of its applications by name."""

    address: _Address
    prefixes: dict[str, str | None]


def _running() -> _Running | None:
    if not serve.status().proxies:
        return None
    from ray.serve.context import _get_global_client  # nothing public tells where it listens

    details = _get_global_client().get_serve_details()
    listens = details["http_options"]
    prefixes = {name: each["route_prefix"] for name, each in details["applications"].items()}
    return _Running(_Address(listens["host"], listens["port"]), prefixes)


def _check_beside(running: _Running, name: str, config: ServingConfig) -> None:
    """Raise ConfigError where a service cannot stand beside those that run on the cluster."""
    if name in running.prefixes:
        raise ConfigError(
            f"a service named {name} runs on this cluster already, at {running.address.url}{running.prefixes[name]}; stop it, or set "
            "serving.application to another name"
        )
    taken = {prefix: other for other, prefix in running.prefixes.items()}
    if config.route_prefix in taken:
        raise ConfigError(
            f"the service {taken[config.route_prefix]} has the paths from {config.route_prefix} on this cluster; set serving.route_prefix "
            f"to others, such as /{name}"
        )
    if config.port not in (0, running.address.port):
        raise ConfigError(
            f"the services of this cluster listen on port {running.address.port}, serving.port is {config.port}; set it to that, or to 0"
        )


def check_start(config: ServingConfig, cluster: ClusterConfig) -> None:
    """Raise ConfigError, before anything is started, where the keys' file or the signer's is unusable, or the address is not to be had.

    On a cluster that was joined, what listens may be a service that this one will stand beside.
    """
    if config.api_keys_file:
        read_keys(config.api_keys_file)
    open_signer(config)
    if is_local(cluster):
        _check_address(config)


def _check_address(config: ServingConfig) -> None:
    """Raise ConfigError where something else has the address: Ray's proxies would share it, and answer each other's clients at random."""
    try:
        _listening(config.host, config.port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"serving.port {config.port} of {config.host} is taken; stop what listens there, or set serving.port (0 takes a free one)"
            ) from None
        raise ConfigError(
            f"serving.host {config.host}, port {config.port}, cannot be listened on ({error.strerror or error}); "
            "name an address of this machine, such as 127.0.0.1"
        ) from None


def _reason(name: str) -> str:
    """Return the last line of what the first failed deployment says about itself."""
    started = serve.status().applications.get(name)
    deployments = started.deployments.values() if started else ()
    failed = [deployment for deployment in deployments if deployment.status in _FAILED and deployment.message]
    return last_line(failed[0].message) if failed else ""


def _free_port(host: str) -> int:
    with _listening(_reachable(host), 0) as server:
        return int(server.getsockname()[1])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens alone; raises OSError where that is not possible."""
    family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


def _in_url(host: str) -> str:
    """Return a host as URLs have it: IPv6 addresses in brackets."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def _reachable(host: str) -> str:
    """Return the host under which this machine reaches an address to listen on."""
    return {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(host, host)
