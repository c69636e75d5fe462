"""The JSON bodies of the HTTP API: OpenAI's Images API, what diffusion models can be asked beyond it, and scores."""

import secrets
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import OutputFormat
from selma_ray.serving.errors import invalid_request
from selma_ray.serving.requests import ImageRequest

__all__ = [
    "GeneratedImage",
    "Generation",
    "GenerationBody",
    "Model",
    "ModelList",
    "Score",
    "ScoreBody",
    "ScoredQuestion",
    "image_requests",
]

Number = TypeVar("Number", int, float)

_MAX_SEED = 2**53 - 1  # what every JSON reader keeps exact
_SIZE_STEP_PX = 8
_MIN_SIZE_PX = 16


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=())


class GenerationBody(_Body):
    """What POST /v1/images/generations takes."""

    prompt: str = Field(min_length=1)
    """What the image should show."""
    model: str | None = None
    """A name from GET /v1/models; none takes the only one."""
    n: int | None = Field(default=None, ge=1)
    """Number of images; image i has seed + i."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, multiples of 8, or auto for the model's own."""
    response_format: Literal["b64_json", "url"] | None = None
    """b64_json; url is refused, as images are not stored."""
    output_format: OutputFormat | None = None
    """File format; png is the default."""
    user: str | None = Field(default=None, max_length=512)
    """The caller's name for its end user; not used."""
    quality: Literal["auto"] | None = None
    """Accepted as OpenAI's default; num_inference_steps is the measure here."""
    background: Literal["auto", "opaque"] | None = None
    """Images are opaque."""
    moderation: Literal["auto", "low"] | None = None
    """Accepted as OpenAI's values; the pipeline's own safety checker decides, where it has one."""
    stream: Literal[False] | None = None
    """Partial images are not streamed."""
    negative_prompt: str | None = None
    """What the image should not show."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Classifier-free guidance scale; up to 1 is none."""
    seed: int | None = Field(default=None, ge=0, le=_MAX_SEED)
    """Seed of the first image; none draws one."""


class GeneratedImage(BaseModel):
    """One image of an answer."""

    b64_json: str
    seed: int
    revised_prompt: None = None


class Generation(BaseModel):
    """What POST /v1/images/generations answers."""

    created: int
    """Seconds since 1970."""
    data: list[GeneratedImage]
    model: str
    size: str
    output_format: OutputFormat


class ScoreBody(_Body):
    """What POST /v1/scores takes."""

    prompt: str = Field(min_length=1)
    """What the image should show."""
    image: str = Field(min_length=1)
    """A PNG, JPEG or WebP file in base64, or as a data: URL."""


class ScoredQuestion(BaseModel):
    """A question about an image and how it was answered."""

    id: int
    question: str
    category: str
    parents: tuple[int, ...]
    answer: str | None
    """None, with a reason, where the judge's answer could not be read."""
    p_yes: float | None
    reason: str | None
    counted: bool | None
    """Whether it counts: a yes, with a yes to what it depends on."""


class Score(BaseModel):
    """What POST /v1/scores answers."""

    prompt: str
    score: float | None
    """How well the image follows the prompt, in [0, 1]; none where no answer could be read."""
    judge: str
    questions: list[ScoredQuestion]


class Model(BaseModel):
    """One entry of GET /v1/models."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "selma_ray"


class ModelList(BaseModel):
    """What GET /v1/models answers."""

    data: list[Model]
    object: Literal["list"] = "list"


def image_requests(body: GenerationBody, config: ServingConfig) -> list[ImageRequest]:
    """Return one request an image; raises RequestError where the body leaves the service's bounds."""
    sampling = config.sampling
    for param, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt or "")):
        if len(text) > config.max_prompt_chars:
            raise invalid_request(
                f"{param} must have at most {config.max_prompt_chars} characters, got {len(text)}",
                param,
                "string_too_long",
            )
    if body.response_format == "url":
        raise invalid_request(
            "response_format url is not supported, as images are not stored; use b64_json", "response_format"
        )
    num_images = _at_most("n", body.n or 1, config.max_images)
    steps = _at_most("num_inference_steps", body.num_inference_steps or sampling.steps, config.max_steps)
    guidance_scale = sampling.guidance_scale if body.guidance_scale is None else body.guidance_scale
    width_px, height_px = _size_px(body.size, config)
    first_seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    return [
        ImageRequest(
            prompt=body.prompt,
            seed=first_seed + index,
            steps=steps,
            guidance_scale=_at_most("guidance_scale", guidance_scale, config.max_guidance_scale),
            width_px=width_px,
            height_px=height_px,
            negative_prompt=sampling.negative_prompt if body.negative_prompt is None else body.negative_prompt,
        )
        for index in range(num_images)
    ]


def _at_most(param: str, value: Number, bound: Number) -> Number:
    if value > bound:
        raise invalid_request(f"{param} must be at most {bound}, got {value}", param)
    return value


def _size_px(size: str | None, config: ServingConfig) -> tuple[int, int]:
    """Return (width, height) in pixels."""
    if size in (None, "auto"):
        return config.sampling.width_px, config.sampling.height_px
    width, _, height = size.partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and len(size) <= 11):
        raise invalid_request(f"size must read WIDTHxHEIGHT or auto, got {size[:20]!r}", "size")
    for side_px in (int(width), int(height)):
        if side_px % _SIZE_STEP_PX or not _MIN_SIZE_PX <= side_px <= config.max_size_px:
            raise invalid_request(
                f"size must have sides of {_MIN_SIZE_PX} to {config.max_size_px} px, multiples of {_SIZE_STEP_PX}, got {size}",
                "size",
            )
    return int(width), int(height)
