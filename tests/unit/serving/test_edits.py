"""Images that are changed in running batches are those of diffusers' own image-to-image and inpainting pipelines."""

import inspect
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image

from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.drawing import Source
from selma_ray.models.family import open_predictor
from selma_ray.models.rendering import load_pipeline
from selma_ray.models.schedulers import use_scheduler
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.errors import RequestError
from selma_ray.serving.requests import ImageRequest
from tests.unit.models.tiny_families import FAMILIES
from tests.unit.models.tiny_flow_models import save_tiny_sd3
from tests.unit.serving.solo import FULL_SIZE_PX, run_mix, solo_image, stepped

TOLERANCE = 1  # of 255, as for images drawn from noise: kernels round by the number of rows
SIZE_PX = (64, 48)  # width, height
WITHOUT_ORACLE = ("flux2", "sana")
"""Families whose own pipelines only draw anew what they are shown as a reference, or change no image."""


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family not in WITHOUT_ORACLE])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(family: str, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models") / family
    if family == "sd3":
        # diffusers' inpainting of SD3 takes 16 channels for granted.
        save_tiny_sd3(folder, tiny_pipeline_dir, latent_channels=16)
    else:
        FAMILIES[family](folder, tiny_pipeline_dir)
    return load_pipeline(ModelConfig(name=str(folder)), "cpu")


def photograph(seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(SIZE_PX, Image.Resampling.BICUBIC)


def left_half() -> Image.Image:
    mask = Image.new("L", SIZE_PX, 0)
    mask.paste(255, (0, 0, 28, SIZE_PX[1]))
    return mask


def request_for(strength: float, mask: Image.Image | None = None, **changes: Any) -> ImageRequest:
    request = ImageRequest("a red ball", 3, 7, 2.5, *SIZE_PX, source=Source(photograph(), strength, mask))
    return replace(request, **changes)


@torch.inference_mode()
def changed_by_diffusers(pipeline: Any, request: ImageRequest) -> np.ndarray:
    """Change an image by diffusers' own call."""
    source = request.source
    assert source is not None
    masked = source.mask is not None
    own: Any = (AutoPipelineForInpainting if masked else AutoPipelineForImage2Image).from_pipe(pipeline)
    size = {"width": request.width_px, "height": request.height_px}
    options: dict[str, Any] = size if "height" in inspect.signature(own.__call__).parameters else {}
    if masked:
        options["mask_image"] = source.mask
    sampling = SamplingConfig(guidance_scale=request.guidance_scale, negative_prompt=request.negative_prompt)
    # What diffusers' inpainting of SD3 decodes lacks the autoencoder's shift, so that its latents are decoded here.
    only_latents = masked and type(own).__name__ == "StableDiffusion3InpaintPipeline"
    answer = own(
        prompt=request.prompt,
        image=source.image,
        num_inference_steps=request.steps,
        strength=source.strength,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent" if only_latents else "pil",
        **type(open_predictor(pipeline)).call_arguments(pipeline, sampling, 1),
        **options,
    ).images
    image = denoiser_for(pipeline).decode(answer)[0] if only_latents else answer[0]
    return np.asarray(image, dtype=int)


def changed_here(pipeline: Any, requests: list[ImageRequest], seed: int = 0) -> dict[int, np.ndarray]:
    rng = random.Random(seed)
    return run_mix(StepBatch(denoiser_for(pipeline), rng.randint(1, 6), FULL_SIZE_PX), requests, rng)


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
def test_image_to_image_is_that_of_diffusers(pipeline: Any, strength: float) -> None:
    request = request_for(strength)
    (image,) = changed_here(pipeline, [request]).values()
    assert np.abs(image - changed_by_diffusers(pipeline, request)).max() <= TOLERANCE


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_is_that_of_diffusers_where_the_mask_is_and_the_image_itself_elsewhere(
    pipeline: Any, strength: float
) -> None:
    request = request_for(strength, left_half())
    (image,) = changed_here(pipeline, [request]).values()
    inside = np.asarray(left_half()) > 0
    assert np.abs(image - changed_by_diffusers(pipeline, request))[inside].max() <= TOLERANCE
    assert np.array_equal(image[~inside], np.asarray(photograph(), dtype=int)[~inside])
    assert np.abs(image - np.asarray(photograph(), dtype=int))[inside].max() > TOLERANCE


def test_changes_share_a_batch_with_images_from_noise(pipeline: Any) -> None:
    requests = [
        request_for(0.5),
        request_for(0.9, left_half(), seed=4),
        ImageRequest("a blue cup", 5, 5, 2.5, *SIZE_PX),
        request_for(0.7, guidance_scale=1.0),
    ]
    images = changed_here(pipeline, requests)
    for index in (0, 3):
        assert np.abs(images[index] - changed_by_diffusers(pipeline, requests[index])).max() <= TOLERANCE
    assert np.abs(images[2] - solo_image(pipeline, requests[2])).max() <= TOLERANCE


@pytest.mark.parametrize("name", WITHOUT_ORACLE)
def test_families_without_such_a_pipeline_start_from_the_image_too(
    name: str, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    FAMILIES[name](tmp_path / name, tiny_pipeline_dir)
    pipeline = load_pipeline(ModelConfig(name=str(tmp_path / name)), "cpu")
    plain = ImageRequest("a red ball", 3, 7, 2.5, 64, 64)  # sides that all of them can draw
    picture, half = (image.resize((64, 64)) for image in (photograph(), left_half()))
    sources = [Source(picture, strength, None) for strength in (0.15, 0.3, 0.9, 1.0)]
    requests = [replace(plain, source=source) for source in (*sources, Source(picture, 1.0, half))]
    coded, little, much, anew, masked = (image for _, image in sorted(changed_here(pipeline, requests).items()))
    assert np.abs(little - coded).mean() < np.abs(much - coded).mean()
    # From noise alone, which is that of an image without a source.
    assert np.abs(anew - solo_image(pipeline, plain)).max() <= TOLERANCE
    outside = np.asarray(half) < 128
    assert np.array_equal(masked[outside], np.asarray(picture, dtype=int)[outside])
    assert np.abs(masked - np.asarray(picture, dtype=int))[~outside].max() > TOLERANCE


SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mask", [None, left_half()], ids=["whole", "masked"])
def test_every_scheduler_starts_where_diffusers_starts(
    tiny_pipeline_dir: Path, scheduler: str, mask: Image.Image | None
) -> None:
    pipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    # diffusers' inpainting pipeline sets this itself.
    use_scheduler(pipeline, scheduler, {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else None)
    request = request_for(0.6, mask)
    (image,) = changed_here(pipeline, [request]).values()
    inside = slice(None) if mask is None else np.asarray(mask) > 0
    assert np.abs(image - changed_by_diffusers(pipeline, request))[inside].max() <= TOLERANCE


def test_a_strength_that_leaves_no_step_is_the_callers_error(tiny_pipeline_dir: Path) -> None:
    pipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    batch = StepBatch(denoiser_for(pipeline), 2, FULL_SIZE_PX)
    batch.submit(request_for(0.1))
    (outcome,) = stepped(batch)
    assert isinstance(outcome.error, RequestError)
    assert (outcome.error.status, outcome.error.param) == (400, "strength")
    assert "strength 0.1 leaves none of 7 steps" in str(outcome.error)


def test_an_autoencoder_that_overflows_in_half_precision_encodes_in_full(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILIES["sdxl"](tmp_path, tiny_pipeline_dir)
    pipeline: Any = load_pipeline(ModelConfig(name=str(tmp_path), dtype="fp16"), "cpu")
    encode, seen = pipeline.vae.encode, []

    def noted(pixels: torch.Tensor) -> Any:
        seen.append((pixels.dtype, pipeline.vae.dtype))
        return encode(pixels)

    monkeypatch.setattr(pipeline.vae, "encode", noted)
    with torch.inference_mode():
        course = denoiser_for(pipeline).start(request_for(0.5))
    assert seen == [(torch.float32, torch.float32)]
    assert (pipeline.vae.dtype, course.latents_NCHW.dtype) == (torch.float16, torch.float16)
    assert torch.isfinite(course.latents_NCHW).all()
