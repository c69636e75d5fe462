"""Latents to images: nothing black is answered, chunks fit, and a card's memory is respected."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from selma_ray.config import validate
from selma_ray.errors import ConfigError, RenderError
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_predictor
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.decoding import Decoder, Latents
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.errors import RequestError
from selma_ray.serving.filters import check_safety_checker, open_filters
from selma_ray.serving.requests import ImageRequest
from tests.tiny_models import save_tiny_sdxl
from tests.unit.models.tiny_flow_models import save_tiny_flux, save_tiny_sd3

SAVERS: dict[str, Any] = {"sdxl": save_tiny_sdxl, "sd3": save_tiny_sd3, "flux": save_tiny_flux}


@pytest.fixture(scope="module", params=["sd", *SAVERS])
def pipeline(request: pytest.FixtureRequest, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "sd":
        return load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    folder = tmp_path_factory.mktemp("family") / request.param
    SAVERS[request.param](*((folder,) if request.param == "sdxl" else (folder, tiny_pipeline_dir)))
    return load_pipeline(ModelConfig(name=str(folder)), "cpu")


def latents_of(pipeline: Any, seed: int = 0, not_finite: bool = False, **changes: Any) -> Latents:
    request = ImageRequest("a red ball", seed, 2, 1.0, 64, 64)
    denoiser = denoiser_for(pipeline)
    values = open_predictor(pipeline).start(request).latents_NCHW
    if not_finite:
        values = values.clone()
        values[0, 0, 3, 3] = torch.nan
    return Latents(seed, request, values, denoiser, **changes)


def test_an_image_that_is_not_finite_is_an_error_and_spares_its_neighbours(pipeline: Any) -> None:
    good, bad = latents_of(pipeline), latents_of(pipeline, 1, not_finite=True)
    both = torch.cat([good.values, bad.values, good.values])
    with torch.inference_mode():
        first, failed, last = open_predictor(pipeline).decode(both)
    assert isinstance(failed, RenderError)
    assert "not finite" in str(failed)
    assert np.array_equal(np.asarray(first), np.asarray(last))
    image, refusal = Decoder().decode([good, bad])
    assert isinstance(image, Image.Image)
    assert isinstance(refusal, RequestError)
    assert (refusal.status, refusal.code) == (500, "image_failed")


def test_tokens_are_counted_with_those_that_the_model_sees(pipeline: Any) -> None:
    name = type(pipeline).__name__
    limit = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512}.get(name, 77)
    predictor = open_predictor(pipeline)
    (few, seen), (many, _) = predictor.tokens("a ball"), predictor.tokens("x " * 600)
    assert few < 20
    assert many >= 600
    assert seen == min(limit, max(each.model_max_length for each in _tokenizers(pipeline)))


def _tokenizers(pipeline: Any) -> list[Any]:
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return [each for name in names if (each := getattr(pipeline, name, None)) is not None]


def test_the_autoencoders_precision_survives_a_failed_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_sdxl(tmp_path / "sdxl")
    pipeline: Any = load_pipeline(ModelConfig(name=str(tmp_path / "sdxl"), dtype="fp16"), "cpu")
    assert pipeline.vae.dtype == torch.float16
    assert pipeline.vae.config.force_upcast
    predictor = open_predictor(pipeline)
    latents_NChw = torch.randn(2, 4, 16, 16, dtype=torch.float16)
    inner, seen = pipeline.vae.decode, []

    def decode(latents: torch.Tensor, **options: Any) -> Any:
        seen.append((len(latents), pipeline.vae.dtype))
        if len(latents) > 1:
            raise torch.OutOfMemoryError("no")
        return inner(latents, **options)

    monkeypatch.setattr(pipeline.vae, "decode", decode)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        predictor.decode(latents_NChw)
    assert pipeline.vae.dtype == torch.float16
    with torch.inference_mode():
        (image,) = predictor.decode(latents_NChw[:1])
    assert isinstance(image, Image.Image)
    assert seen == [(2, torch.float32), (1, torch.float32)]
    move = pipeline.vae.to

    def half_moved(*arguments: Any, **options: Any) -> Any:
        if arguments == (torch.float32,):
            pipeline.vae.decoder.to(torch.float32)
            raise torch.OutOfMemoryError("no")
        return move(*arguments, **options)

    monkeypatch.setattr(pipeline.vae, "to", half_moved)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        predictor.decode(latents_NChw[:1])
    assert {parameter.dtype for parameter in pipeline.vae.parameters()} == {torch.float16}


class OnCard:
    """A denoiser that says it is on a card, where chunks are larger than one; decoding fits `most` images."""

    def __init__(self, most: int) -> None:
        self.device = torch.device("cuda")
        self.most = most
        self.sizes: list[int] = []

    def decode(self, latents_NChw: torch.Tensor) -> list[Image.Image]:
        self.sizes.append(len(latents_NChw))
        if len(latents_NChw) > self.most:
            raise torch.OutOfMemoryError("no")
        return [Image.new("RGB", (8, 8), (int(value), 0, 0)) for value in latents_NChw[:, 0, 0, 0]]


def card_latents(denoiser: OnCard, count: int, side_px: int) -> list[Latents]:
    request = ImageRequest("a red ball", 0, 2, 1.0, side_px, side_px)
    return [Latents(each, request, torch.full((1, 1, 1, 1), float(each)), denoiser) for each in range(count)]  # type: ignore[arg-type]


def reds(images: list[Any]) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in images]


def test_latents_are_decoded_in_chunks_that_fit() -> None:
    decoder, denoiser = Decoder(), OnCard(most=3)
    assert reds(decoder.decode(card_latents(denoiser, 10, 64))) == list(range(10))
    assert denoiser.sizes == [10, 5, 2, 2, 2, 2, 2]
    denoiser.sizes.clear()
    assert reds(decoder.decode(card_latents(denoiser, 4, 64))) == [0, 1, 2, 3]
    assert denoiser.sizes == [2, 2], "what did not fit once is not tried again"
    roomy = OnCard(most=99)
    Decoder().decode(card_latents(roomy, 6, 512))
    Decoder().decode(card_latents(roomy, 2, 1024))
    assert roomy.sizes == [4, 2, 1, 1], "at most a megapixel at once"


def checker(flags_all: bool) -> Any:
    """Return a safety checker of the real class, whose thresholds are beyond every similarity, or below."""
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tiny | {"vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 16},
        vision_config=tiny | {"image_size": 32, "patch_size": 16, "projection_dim": 16},
        projection_dim=16,
    )  # fmt: skip
    model = StableDiffusionSafetyChecker(config)
    threshold = -2.0 if flags_all else 2.0
    model.concept_embeds_weights.data.fill_(threshold)
    model.special_care_embeds_weights.data.fill_(2.0)
    return model


def guarded(tiny_pipeline_dir: Path, flags_all: bool) -> Any:
    pipeline: Any = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline.register_modules(safety_checker=checker(flags_all), feature_extractor=extractor)
    return pipeline


@pytest.mark.parametrize("flags_all", [True, False])
def test_a_flagged_image_is_refused_where_the_checker_is_asked_for(tiny_pipeline_dir: Path, flags_all: bool) -> None:
    pipeline = guarded(tiny_pipeline_dir, flags_all)
    filters = open_filters(ServingConfig(safety_checker=True), pipeline)
    (answer,) = Decoder(filters.check_images).decode([latents_of(pipeline)])
    (unasked,) = Decoder().decode([latents_of(pipeline)])
    assert isinstance(unasked, Image.Image), "off by default"
    if not flags_all:
        assert isinstance(answer, Image.Image)
        assert answer.tobytes() == unasked.tobytes()
        return
    assert isinstance(answer, RequestError)
    assert (answer.status, answer.code) == (400, "content_policy_violation")
    assert "change the prompt" in str(answer)


def test_a_checker_that_the_model_lacks_is_refused_in_one_line(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    config = ServingConfig(safety_checker=True)
    for check in (
        lambda: check_safety_checker(config, ModelConfig(name=str(tiny_pipeline_dir))),
        lambda: open_filters(config, load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")),
    ):
        with pytest.raises(ConfigError, match=r"^serving\.safety_checker must be false for a model .*has no safety_"):
            check()
    guarded(tiny_pipeline_dir, True).save_pretrained(tmp_path)
    check_safety_checker(config, ModelConfig(name=str(tmp_path)))


class NoCats:
    """A content filter as people write them."""

    def refused_prompt(self, prompt: str) -> str | None:
        return "no cats here" if "cat" in prompt else None

    def refused_images(self, images: Any, prompts: Any) -> list[str | None]:
        if "broken" in prompts[0]:
            raise RuntimeError("the filter is broken")
        return ["too small" if image.width < 64 else None for image in images]


def test_a_filter_of_ones_own_decides_about_prompts_and_images(tiny_pipeline_dir: Path) -> None:
    filters = open_filters(ServingConfig(content_filter="tests.unit.serving.test_decoding:NoCats"), None)
    filters.check_prompts(["a dog"])
    with pytest.raises(RequestError, match="no cats here") as refusal:
        filters.check_prompts(["a dog", "a cat"])
    assert (refusal.value.status, refusal.value.code, refusal.value.param) == (
        400,
        "content_policy_violation",
        "prompt",
    )
    pictures = [Image.new("RGB", (side, side)) for side in (64, 32)]
    fine, small = filters.check_images(pictures, ["a dog"] * 2)
    assert fine is None
    assert "too small" in str(small)
    pipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    latents = latents_of(pipeline)
    broken = Latents(0, ImageRequest("broken", 0, 2, 1.0, 64, 64), latents.values, latents.denoiser)
    (answer,) = Decoder(filters.check_images).decode([broken])
    assert isinstance(answer, RuntimeError), "what a filter fails on is not shown"


@pytest.mark.parametrize("path", ["no.such.module:Filter", "selma_ray.serving.filters:Nothing", "builtins:object"])
def test_filters_that_cannot_be_used_are_named(path: str) -> None:
    with pytest.raises(ConfigError, match=r"serving\.content_filter must"):
        open_filters(ServingConfig(content_filter=path), None)
    with pytest.raises(ConfigError, match="content_filter"):
        validate(ServingConfig, {"content_filter": "no colon"}, "recipe")
