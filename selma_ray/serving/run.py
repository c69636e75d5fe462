"""Start and stop the service from a program."""

import base64
import json
import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import serve

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect
from selma_ray.errors import ConfigError, ServingError, first_line, last_line
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.deployment import application
from selma_ray.serving.evaluator import Scorer
from selma_ray.serving.generator import OpenExperts
from selma_ray.serving.keys import first_key
from selma_ray.serving.served import ServedModels

__all__ = ["APPLICATION_NAME", "Service", "start_service"]

APPLICATION_NAME = "selma"

# Ray Serve replaces a proxy that is not ready in 5 s, which on a busy machine none is.
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
_FAILED = ("UNHEALTHY", "DEPLOY_FAILED")


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    config: ServingConfig

    def generate(self, prompt: str, seed: int) -> bytes:
        """Fetch one image over HTTP as a PNG file; raises ServingError with the service's reason."""
        answer = self._post("/v1/images/generations", {"prompt": prompt, "seed": seed})
        return base64.b64decode(answer["data"][0]["b64_json"])

    def stop(self) -> None:
        """Shut Ray Serve down, after the requests in progress."""
        serve.shutdown()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.config.api_keys_file:
            headers["Authorization"] = f"Bearer {first_key(self.config.api_keys_file)}"
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
) -> Service:
    """Serve `models` and return once they answer; the caller stops it.

    Raises ConfigError where Ray Serve runs on this cluster already, ServingError where a replica cannot start.
    """
    connect(cluster)
    # Importing Ray Serve sets its own level; what fails is raised here and shown once.
    logging.getLogger("ray.serve").setLevel("DEBUG" if cluster.log_level == "DEBUG" else "CRITICAL")
    if serve.status().proxies:
        raise ConfigError(
            "Ray Serve runs on this cluster already; deploy with `serve deploy`, or stop it with `serve shutdown`"
        )
    app = application(models, config, cluster, open_scorer, open_experts)
    port = config.port or _free_port(config.host)
    try:
        serve.start(
            http_options={"host": config.host, "port": port},
            logging_config={"log_level": cluster.log_level},
            controller_options={"runtime_env": {"env_vars": _PATIENCE}},
        )
        serve.run(app, name=APPLICATION_NAME, route_prefix="/")
    except Exception as error:
        reason = _reason()
        serve.shutdown()
        raise ServingError(f"the service did not start: {reason or first_line(error)}") from error
    return Service(f"http://{_reachable(config.host)}:{port}", config)


def _reason() -> str:
    """Return the last line of what the first failed deployment says about itself."""
    started = serve.status().applications.get(APPLICATION_NAME)
    deployments = started.deployments.values() if started else ()
    failed = [deployment for deployment in deployments if deployment.status in _FAILED and deployment.message]
    return last_line(failed[0].message) if failed else ""


def _free_port(host: str) -> int:
    with socket.create_server((_reachable(host), 0)) as server:
        return int(server.getsockname()[1])


def _reachable(host: str) -> str:
    """Return the host under which this machine reaches an address to listen on."""
    return {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(host, host)
