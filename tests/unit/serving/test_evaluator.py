"""The evaluator's batches: images of concurrent requests together, as many as what is asked about them allows."""

import asyncio
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from selma_ray.config import validate
from selma_ray.errors import ConfigError
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, decode_upload, encode
from selma_ray.serving.errors import RequestError
from selma_ray.serving.evaluator import Asked, Evaluator, Judged, PixelBudget, count_uploads


@dataclass(frozen=True)
class Named:
    question: str


class Recorder:
    """Scores an image by the red of its first pixel and keeps the batches it was given."""

    judge = "red"
    metrics: tuple[str, ...] = ("dsg", "clipscore")
    metrics_of_questions = frozenset({"dsg"})

    def __init__(self) -> None:
        self.batches: list[list[Asked]] = []

    def questions(self, prompt: str, given: Sequence[Mapping[str, Any]] | None = None) -> Sequence[Named]:
        return [Named(str(number)) for number in range(int(prompt))]

    def score(self, asked: Sequence[Asked]) -> list[Judged]:
        self.batches.append(list(asked))
        reds = [each.image.getpixel((0, 0))[0] for each in asked]  # type: ignore[index]
        return [
            Judged(dict.fromkeys(each.metrics, red / 255), each.questions)
            for each, red in zip(asked, reds, strict=True)
        ]


@pytest.fixture(autouse=True)
def outside_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve's batching asks its replica for a number that it only warns about."""
    monkeypatch.setattr(
        "ray.serve.batching._BatchQueue._warn_if_max_batch_size_exceeds_max_ongoing_requests", lambda _: None
    )


def png(red: int) -> bytes:
    return encode(Image.new("RGB", (8, 8), (red, 0, 0)), PNG)


def test_batches_are_weighed_by_what_is_asked_and_a_bad_image_joins_none() -> None:
    """One test: Ray Serve keeps a method's batches for the process, in the event loop that asked first."""
    recorder = Recorder()
    requests = [("6", 1, ["dsg"]), ("40", 1, ["dsg"]), ("1", 5, ["clipscore"]), ("9", 2, ["dsg", "clipscore"])]

    async def ask() -> list[Any]:
        evaluator = Evaluator(
            lambda: recorder, ServingConfig(judge_batch_size=2, num_threads=1)
        )  # 16 questions at once
        answers = [
            evaluator.score(prompt, [png(10 * index + image) for image in range(count)], metrics)
            for index, (prompt, count, metrics) in enumerate(requests)
        ]
        return await asyncio.gather(*answers, evaluator.score("1", [b"no image"], ["dsg"]), return_exceptions=True)

    *answers, refusal = asyncio.run(ask())
    for index, answer in enumerate(answers):
        for image, found in enumerate(answer["data"]):
            assert set(found["scores"].values()) == {(10 * index + image) / 255}
    assert [len(answer["data"][0]["questions"]) for answer in answers] == [6, 40, 0, 9]
    costs = [[each.cost for each in batch] for batch in recorder.batches]
    assert sorted(cost for batch in costs for cost in batch) == [1, 1, 1, 1, 1, 6, 10, 10, 40]
    assert all(sum(batch) <= 16 or len(batch) == 1 for batch in costs)
    assert len(costs) < 9  # some shared a batch
    assert isinstance(refusal, RequestError)
    assert refusal.status == 400


def test_the_images_of_a_request_are_bounded_together_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [png(red) for red in range(4)]
    assert count_uploads(images, 256) == 256
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    with pytest.raises(RequestError, match="at most 255 pixels together, got 256") as refusal:
        count_uploads(images, 255)
    assert refusal.value.status == 413


def test_requests_wait_for_room_for_their_pixels() -> None:
    async def most_in_flight() -> int:
        budget, held, most = PixelBudget(100), 0, 0

        async def hold(pixels: int) -> None:
            nonlocal held, most
            async with budget.taken(pixels):
                held += pixels
                most = max(most, held)
                await asyncio.sleep(0.001)
                held -= pixels

        await asyncio.gather(*(hold(pixels) for pixels in (60, 50, 100, 40, 10, 100, 30)))
        assert held == 0
        return most

    assert asyncio.run(most_in_flight()) == 100


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    """Return a JPEG whose left half is red, and which its camera says is to be turned by a quarter."""
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, "JPEG", exif=exif, quality=95)


def cut_out(mode: str) -> Image.Image:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    return image if mode == "RGBA" else image.convert(mode)


def painted() -> Image.Image:
    image = Image.new("P", (8, 8), 3)
    image.putpalette([0, 0, 0] * 256)
    return image


SEEN = {
    "a transparent pixel": (saved(cut_out("RGBA")), (8, 8), (4, 4), (255, 255, 255)),
    "an opaque pixel beside it": (saved(cut_out("RGBA")), (8, 8), (0, 0), (255, 0, 0)),
    "a half transparent one": (saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), (8, 8), (4, 4), (127, 127, 127)),
    "grey with alpha": (saved(Image.new("LA", (8, 8), (0, 0))), (8, 8), (4, 4), (255, 255, 255)),
    "a palette with a transparent colour": (
        saved(painted(), transparency=3), (8, 8), (4, 4), (255, 255, 255)
    ),
    "16 bits of grey": (saved(Image.new("I;16", (8, 8), 32896)), (8, 8), (4, 4), (128, 128, 128)),
    "CMYK": (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (8, 8), (4, 4), (255, 0, 0)),
    "a turned photograph": (turned(), (16, 32), (8, 4), (255, 0, 0)),
    "WebP with alpha": (saved(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "WEBP", lossless=True), (8, 8), (4, 4), (255,) * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_scores_see_what_a_person_sees(name: str) -> None:
    content, size, position, colour = SEEN[name]
    image = decode_upload(content, 10**4)
    assert (image.mode, image.size) == ("RGB", size)
    assert image.getpixel(position) == pytest.approx(colour, abs=3)


def test_the_background_can_be_chosen() -> None:
    content = saved(cut_out("RGBA"))
    assert decode_upload(content, 100, "#00ff00").getpixel((4, 4)) == (0, 255, 0)
    with pytest.raises(ConfigError, match="upload_background must be a colour"):
        validate(ServingConfig, {"upload_background": "no colour"}, "recipe")
