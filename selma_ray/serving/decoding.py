"""Latents to images, on a thread beside the denoiser's: finished images first, previews while there is time.

Shapes: N images, C latent channels, h x w latent pixels.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from selma_ray.errors import RenderError
from selma_ray.models.batches import HalvingBatches, is_out_of_memory, spare_others
from selma_ray.serving.denoiser import Denoiser
from selma_ray.serving.errors import RequestError, failed_image, too_large_for_memory
from selma_ray.serving.pace import Pace
from selma_ray.serving.requests import ImageRequest

__all__ = ["CheckImages", "Decoder", "DecodingThread", "Latents"]

logger = logging.getLogger(__name__)

_PIXELS_AT_ONCE = 2**20  # more make no card faster, and take the denoiser's memory

CheckImages = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[RequestError | None]]
"""Tells of each image and its prompt whether it may be shown: None, or the refusal that its client gets."""


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of one image that are to be decoded: finished ones, or, where `preview` counts them, unfinished ones."""

    ticket: int
    request: ImageRequest
    values: torch.Tensor
    """1 x C x h x w."""
    denoiser: Denoiser
    preview: int | None = None


class Decoder:
    """Decodes in chunks that fit the memory; on the CPU one image at a time, so that its bytes depend on nothing else."""

    def __init__(self, check: CheckImages | None = None, pace: Pace | None = None) -> None:
        self._check = check
        self._pace = pace or Pace()
        self._chunks: dict[tuple[int, int], HalvingBatches] = {}

    @torch.inference_mode()
    def decode(self, latents: Sequence[Latents]) -> list[Image.Image | Exception]:
        """Return an image or its error for each of `latents`, which are of one size and one denoiser."""
        size_px = latents[0].request.size_px
        chunks = self._chunks.setdefault(size_px, HalvingBatches(_chunk_size(size_px, latents[0].denoiser)))
        started_s = time.monotonic()
        nested = spare_others(lambda some: chunks.map(self._chunk, some), latents)
        self._pace.note_decoding(size_px, len(latents), time.monotonic() - started_s)
        return [_answered(image, each.request) for image, each in zip(nested, latents, strict=True)]

    def _chunk(self, latents: Sequence[Latents]) -> list[Image.Image | Exception]:
        """Decode together, then ask about what could be decoded whether it may be shown."""
        decoded = latents[0].denoiser.decode(torch.cat([each.values for each in latents]))
        images = [_as_wanted(image, each.request) for image, each in zip(decoded, latents, strict=True)]
        shown = [index for index, image in enumerate(images) if isinstance(image, Image.Image)]
        if self._check is None or not shown:
            return images
        pictures = [image for image in images if isinstance(image, Image.Image)]
        refusals = self._check(pictures, [latents[index].request.prompt for index in shown])
        for index, refusal in zip(shown, refusals, strict=True):
            if refusal is not None:
                images[index] = refusal
        return images


def _as_wanted(image: Image.Image | Exception, request: ImageRequest) -> Image.Image | Exception:
    """Return an image with what its request wants to stay as it was."""
    return image if isinstance(image, Exception) or request.source is None else request.source.kept(image)


def _chunk_size(size_px: tuple[int, int], denoiser: Denoiser) -> int:
    if denoiser.device.type == "cpu":
        return 1
    return max(1, _PIXELS_AT_ONCE // (size_px[0] * size_px[1]))


def _answered(image: Image.Image | Exception, request: ImageRequest) -> Image.Image | Exception:
    """Turn what is known to go wrong into the refusal that the client gets."""
    if isinstance(image, RenderError):
        logger.error("seed %d: %s", request.seed, image)
        return failed_image()
    if isinstance(image, Exception) and is_out_of_memory(image):
        return too_large_for_memory(request.size_px)
    return image


class DecodingThread:
    """Decodes what it is given and passes it to `deliver`, called on this thread; finished images go before previews.

    Of an image there is one preview in the queue at most, the newest, and none once the image itself is finished.
    """

    def __init__(self, decoder: Decoder, deliver: Callable[[Latents, Image.Image | Exception], None]) -> None:
        self._decoder = decoder
        self._deliver = deliver
        self._changed = threading.Condition()
        self._finished: deque[tuple[Latents, Any]] = deque()
        self._previews: OrderedDict[int, tuple[Latents, Any]] = OrderedDict()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def put(self, latents: Iterable[Latents]) -> None:
        """Queue latents, called on the thread whose work made them."""
        with self._changed:
            for each in latents:
                entry = (each, _computed(each.values))
                self._previews.pop(each.ticket, None)
                if each.preview is None:
                    self._finished.append(entry)
                else:
                    self._previews[each.ticket] = entry
            self._changed.notify()

    def drop(self, tickets: Iterable[int]) -> None:
        """Forget what nobody waits for any more."""
        gone = set(tickets)
        with self._changed:
            self._finished = deque(entry for entry in self._finished if entry[0].ticket not in gone)
            for ticket in gone:
                self._previews.pop(ticket, None)

    def is_alive(self) -> bool:
        """Tell whether the thread still works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop after the images in progress."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        stream: Any = None
        while entries := self._next():
            device = entries[0][0].values.device
            if device.type == "cuda" and stream is None:
                stream = torch.cuda.Stream(device)
            with _on(stream):
                for latents, computed in entries:
                    if computed is not None:
                        stream.wait_event(computed)
                        latents.values.record_stream(stream)
                images = self._decoder.decode([latents for latents, _ in entries])
            for (latents, _), image in zip(entries, images, strict=True):
                self._deliver(latents, image)

    def _next(self) -> list[tuple[Latents, Any]]:
        """Wait for work and return what is decoded together; nothing when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._finished or self._previews)
            if self._closed:
                return []
            if not self._finished:
                return [self._previews.popitem(last=False)[1]]
            first, _ = self._finished[0]
            together = [
                entry
                for entry in self._finished
                if (entry[0].denoiser, entry[0].request.size_px) == (first.denoiser, first.request.size_px)
            ]
            self._finished = deque(entry for entry in self._finished if entry not in together)
            return together


def _computed(tensor: torch.Tensor) -> Any:
    """Return what another stream waits for before it reads a tensor; None where it is there already."""
    if tensor.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
