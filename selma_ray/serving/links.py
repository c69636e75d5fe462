"""Images behind links: kept in memory for a while, and found by whoever has the signed link."""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.responses import Response

from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import OutputFormat
from selma_ray.serving.errors import RequestError, too_large

__all__ = ["FILES_PATH", "ImageLinks", "ImageStore", "StoredImage"]

FILES_PATH = "/v1/images/files/"
"""Where linked images are, answered without a key: the signature in the link is one."""


@dataclass(frozen=True)
class StoredImage:
    """An image's file and until when it is kept."""

    name: str
    ends_s: float
    """Seconds since 1970."""
    output_format: OutputFormat
    content: bytes


class ImageStore:
    """A bounded store of images, the oldest of which give way."""

    def __init__(self, max_bytes: int, now_s: Callable[[], float] = time.time) -> None:
        self._max_bytes = max_bytes
        self._now_s = now_s
        self._images: OrderedDict[str, StoredImage] = OrderedDict()
        self._bytes = 0

    def keep(self, image: StoredImage) -> None:
        """Store an image; raises RequestError (413) for one that the store cannot hold."""
        if len(image.content) > self._max_bytes:
            raise too_large("the image is larger than the store behind links; use response_format b64_json")
        self._drop_ended()
        while self._images and self._bytes + len(image.content) > self._max_bytes:
            self._drop(next(iter(self._images)))
        self._images[image.name] = image
        self._bytes += len(image.content)

    def get(self, name: str) -> StoredImage | None:
        """Return an image, None once it is kept no longer."""
        self._drop_ended()
        return self._images.get(name)

    def _drop_ended(self) -> None:
        while self._images and next(iter(self._images.values())).ends_s < self._now_s():
            self._drop(next(iter(self._images)))

    def _drop(self, name: str) -> None:
        self._bytes -= len(self._images.pop(name).content)


class ImageLinks:
    """Links to images that are kept elsewhere: they bear the time at which they end, and a signature.

    Replicas that share a store and a secret answer one another's links.
    """

    def __init__(
        self,
        config: ServingConfig,
        keep: Callable[[StoredImage], Awaitable[None]],
        find: Callable[[str], Awaitable[StoredImage | None]],
        secret: bytes,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._lifetime_s = config.url_lifetime_s
        self._public_url = config.public_url
        self._keep, self._find = keep, find
        self._secret = secret
        self._now_s = now_s

    async def keep(self, image: bytes, output_format: OutputFormat, asked_at: str) -> str:
        """Store an image and return its link, under the address that the request came to unless the configuration has one.

        Raises RequestError (413) for an image that the store cannot hold.
        """
        name = f"{secrets.token_hex(16)}.{output_format}"
        ends_s = self._now_s() + self._lifetime_s
        await self._keep(StoredImage(name, ends_s, output_format, image))
        base = self._public_url or asked_at.rstrip("/")
        return f"{base}{FILES_PATH}{name}?expires={int(ends_s)}&signature={self._signature(name, int(ends_s))}"

    async def answer(self, name: str, expires: str, signature: str) -> Response:
        """Return a linked image; raises RequestError: 403 for a wrong signature, 404 where the image is gone."""
        if not (expires.isascii() and expires.isdigit() and len(expires) < 20):
            expires = "0"
        if not hmac.compare_digest(self._signature(name, int(expires)).encode(), signature.encode()):
            raise RequestError("the link is not one of this service; ask for the image again", 403, "invalid_signature")
        image = await self._find(name)
        if image is None:
            raise RequestError("the image is kept no longer; ask for it again", 404, "image_expired")
        # A page of another origin may show it, as the link alone gives access.
        return Response(
            image.content,
            media_type=f"image/{image.output_format}",
            headers={"Cross-Origin-Resource-Policy": "cross-origin"},
        )

    def _signature(self, name: str, ends_s: int) -> str:
        return hmac.new(self._secret, f"{name} {ends_s}".encode(errors="replace"), hashlib.sha256).hexdigest()
