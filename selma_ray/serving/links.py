"""Images behind links: kept in memory for a while, and found by whoever has the signed link."""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.responses import Response

from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import OutputFormat
from selma_ray.serving.errors import RequestError, too_large

__all__ = ["FILES_PATH", "ImageLinks"]

FILES_PATH = "/v1/images/files/"
"""Where linked images are, answered without a key: the signature in the link is one."""


class ImageLinks:
    """A bounded store of images, the oldest of which give way; links bear the time at which they end, and a signature."""

    def __init__(self, config: ServingConfig, now_s: Callable[[], float] = time.time) -> None:
        self._lifetime_s = config.url_lifetime_s
        self._max_bytes = int(config.url_store_mb * 1e6)
        self._public_url = config.public_url
        self._now_s = now_s
        self._secret = secrets.token_bytes(32)
        self._images: OrderedDict[str, tuple[float, OutputFormat, bytes]] = OrderedDict()
        self._bytes = 0

    def keep(self, image: bytes, output_format: OutputFormat, asked_at: str) -> str:
        """Store an image and return its link, under the address that the request came to unless the configuration has one.

        Raises RequestError (413) for an image that the store cannot hold.
        """
        if len(image) > self._max_bytes:
            raise too_large("the image is larger than the store behind links; use response_format b64_json")
        self._drop_ended()
        while self._images and self._bytes + len(image) > self._max_bytes:
            self._drop(next(iter(self._images)))
        name = f"{secrets.token_hex(16)}.{output_format}"
        ends_s = self._now_s() + self._lifetime_s
        self._images[name] = (ends_s, output_format, image)
        self._bytes += len(image)
        base = self._public_url or asked_at.rstrip("/")
        return f"{base}{FILES_PATH}{name}?expires={int(ends_s)}&signature={self._signature(name, int(ends_s))}"

    def answer(self, name: str, expires: str, signature: str) -> Response:
        """Return a linked image; raises RequestError: 403 for a wrong signature, 404 where the image is gone."""
        if not (expires.isascii() and expires.isdigit() and len(expires) < 20):
            expires = "0"
        if not hmac.compare_digest(self._signature(name, int(expires)).encode(), signature.encode()):
            raise RequestError("the link is not one of this service; ask for the image again", 403, "invalid_signature")
        self._drop_ended()
        if name not in self._images:
            raise RequestError("the image is kept no longer; ask for it again", 404, "image_expired")
        _, output_format, image = self._images[name]
        # A page of another origin may show it, as the link alone gives access.
        return Response(
            image, media_type=f"image/{output_format}", headers={"Cross-Origin-Resource-Policy": "cross-origin"}
        )

    def _signature(self, name: str, ends_s: int) -> str:
        return hmac.new(self._secret, f"{name} {ends_s}".encode(errors="replace"), hashlib.sha256).hexdigest()

    def _drop_ended(self) -> None:
        while self._images and next(iter(self._images.values()))[0] < self._now_s():
            self._drop(next(iter(self._images)))

    def _drop(self, name: str) -> None:
        self._bytes -= len(self._images.pop(name)[2])
