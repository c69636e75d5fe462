"""A server on loopback that speaks S3, for tests that keep a run there."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moto.server import ThreadedMotoServer

__all__ = ["BUCKET", "Outage", "object_store"]

BUCKET = "selma"


@dataclass
class Outage:
    """A time in which the store answers every request 503, or so much later."""

    late_s: float = 0.0
    met: int = 0
    """Requests that came in that time."""
    _until_s: float = 0.0

    def begin(self, seconds: float) -> None:
        """Start one of so many seconds."""
        self._until_s = time.monotonic() + seconds

    def around(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """Return the server's application with its outages."""

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if time.monotonic() < self._until_s:
                self.met += 1
                if not self.late_s:
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                    start_response("503 Slow Down", [("Content-Length", "0")])
                    return [b""]
                time.sleep(self.late_s)
            return app(environ, start_response)

        return answer


@contextmanager
def object_store(outage: Outage | None = None) -> Iterator[Mapping[str, str]]:
    """Yield the environment by which clients find the server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        if outage is not None:
            of_moto: Any = server._server
            of_moto.app = outage.around(of_moto.app)
        host, port = server.get_host_and_port()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
    finally:
        server.stop()
