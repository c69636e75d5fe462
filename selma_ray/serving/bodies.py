"""The JSON bodies of the HTTP API: OpenAI's Images API, what diffusion models can be asked beyond it, and scores."""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import OutputFormat
from selma_ray.serving.errors import invalid_request, metric_not_served
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames

__all__ = [
    "AnsweredQuestion",
    "AskedQuestion",
    "DrawnCandidate",
    "GeneratedImage",
    "Generation",
    "GenerationBody",
    "Model",
    "ModelList",
    "ScoreBody",
    "ScoredImage",
    "Scores",
    "image_requests",
    "wanted_metrics",
]

Number = TypeVar("Number", int, float)

_MAX_SEED = 2**53 - 1  # what every JSON reader keeps exact
_SIZE_STEP_PX = 8
_MIN_SIZE_PX = 16


Weights = Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=())


class GenerationBody(_Body):
    """What POST /v1/images/generations takes."""

    prompt: str = Field(min_length=1)
    """What the image should show."""
    model: str | Weights | None = None
    """A name from GET /v1/models, or experts with weights such as {"counting": 0.6, "style": 0.4}; default: the merged model."""
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
    stream: bool | None = None
    """Answer with server-sent events: partial images as they form, then each finished image."""
    partial_images: int | None = Field(default=None, ge=0)
    """How many partial images to stream of each image, evenly over the steps."""
    negative_prompt: str | None = None
    """What the image should not show."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Classifier-free guidance scale; up to 1 is none."""
    seed: int | None = Field(default=None, ge=0, le=_MAX_SEED)
    """Seed of the first image; default: drawn at random."""
    best_of: int | None = Field(default=None, ge=1)
    """Images to draw, of which the n best by `metric` are returned."""
    metric: str | None = Field(default=None, min_length=1, max_length=64)
    """What best_of chooses by, a metric of POST /v1/scores; default: the first that is served, dsg where there is a judge."""


class GeneratedImage(BaseModel):
    """One image of an answer."""

    b64_json: str
    seed: int
    revised_prompt: None = None
    scores: dict[str, float | None] | None = None
    """The image's scores, where best_of was asked for."""


class DrawnCandidate(BaseModel):
    """An image that best_of has drawn, whether it was chosen or not."""

    seed: int
    scores: dict[str, float | None]


class Generation(BaseModel):
    """What POST /v1/images/generations answers."""

    created: int
    """Seconds since 1970."""
    data: list[GeneratedImage]
    model: str | dict[str, float]
    size: str
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    candidates: list[DrawnCandidate] | None = None
    """Every image that best_of has drawn, in the order of seeds."""


class AskedQuestion(_Body):
    """A yes/no question about an image, as DSG has them."""

    id: int = Field(ge=1)
    question: str = Field(min_length=1, max_length=500)
    category: str = Field(default="question", max_length=64)
    parents: list[Annotated[int, Field(ge=0)]] = Field(default=[], max_length=64)
    """Ids of the questions that it depends on; 0 stands for none."""


class ScoreBody(_Body):
    """What POST /v1/scores takes."""

    prompt: str = Field(min_length=1)
    """What the images should show."""
    image: str | None = Field(default=None, min_length=1)
    """A PNG, JPEG or WebP file in base64, or as a data: URL."""
    images: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    """Several such files, in place of `image`."""
    metrics: list[Annotated[str, Field(min_length=1, max_length=64)]] | None = Field(
        default=None, min_length=1, max_length=32
    )
    """Which scores are wanted, by name; default: the first that is served, dsg where there is a judge."""
    questions: list[AskedQuestion] | None = Field(default=None, min_length=1, max_length=64)
    """What dsg and its kin ask; default: what the service's source of questions knows of the prompt."""


class AnsweredQuestion(BaseModel):
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


class ScoredImage(BaseModel):
    """How well an image follows the prompt."""

    scores: dict[str, float | None]
    """By metric; those of a judge lie in [0, 1], the others have the scale of their publication. None where there is no score."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why a score is none, by metric."""
    questions: list[AnsweredQuestion]
    """Empty where no score was asked for that needs them."""


class Scores(BaseModel):
    """What POST /v1/scores answers."""

    object: Literal["list"] = "list"
    prompt: str
    judge: str | None
    """The judge and its revision; null where none is served."""
    data: list[ScoredImage]
    """One entry an image, in the order of the request."""


class Model(BaseModel):
    """One entry of GET /v1/models."""

    id: str
    created: int
    kind: Literal["merged", "base", "expert"]
    """Experts can be mixed with weights."""
    object: Literal["model"] = "model"
    owned_by: str = "selma_ray"


class ModelList(BaseModel):
    """What GET /v1/models answers."""

    data: list[Model]
    object: Literal["list"] = "list"


def image_requests(body: GenerationBody, config: ServingConfig, names: ModelNames) -> list[ImageRequest]:
    """Return one request an image to draw; raises RequestError where the body leaves the service's bounds."""
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
    num_previews = _at_most("partial_images", body.partial_images or 0, config.max_previews)
    if num_previews and not body.stream:
        raise invalid_request("partial_images needs stream: true", "partial_images")
    width_px, height_px = _size_px(body.size, config)
    common: dict[str, Any] = {
        "prompt": body.prompt,
        "steps": _at_most("num_inference_steps", body.num_inference_steps or sampling.steps, config.max_steps),
        "guidance_scale": _at_most(
            "guidance_scale",
            sampling.guidance_scale if body.guidance_scale is None else body.guidance_scale,
            config.max_guidance_scale,
        ),
        "width_px": width_px,
        "height_px": height_px,
        "negative_prompt": sampling.negative_prompt if body.negative_prompt is None else body.negative_prompt,
        "mix": names.mix_of(body.model),
        "num_previews": num_previews,
    }
    first_seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    return [ImageRequest(seed=first_seed + index, **common) for index in range(_num_images(body, config))]


def wanted_metrics(
    metrics: Sequence[str] | None, config: ServingConfig, param: Literal["metric", "metrics"]
) -> list[str]:
    """Return the scores that a body asks for, each once; raises RequestError for one that is not served."""
    wanted = list(dict.fromkeys(metrics or config.metrics[:1]))
    for metric in wanted or [""]:
        if metric not in config.metrics:
            raise metric_not_served(param, metric, config.metrics)
    return wanted


def _num_images(body: GenerationBody, config: ServingConfig) -> int:
    """Return how many images are to be drawn."""
    wanted = _at_most("n", body.n or 1, config.max_images)
    if body.best_of is None:
        return wanted
    if body.stream:
        raise invalid_request("best_of cannot be streamed, as images are chosen when all are drawn", "best_of")
    if body.best_of < wanted:
        raise invalid_request(f"best_of must be at least n, which is {wanted}; got {body.best_of}", "best_of")
    return _at_most("best_of", body.best_of, config.max_images)


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
