"""The JSON bodies of the HTTP API: OpenAI's Images API, what diffusion models can be asked beyond it, and scores."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from selma_ray.serving.encoding import OutputFormat

__all__ = [
    "AnsweredQuestion",
    "AskedQuestion",
    "DrawnCandidate",
    "EditBody",
    "GeneratedImage",
    "Generation",
    "GenerationBody",
    "Model",
    "ModelList",
    "Quality",
    "ScoreBody",
    "ScoredImage",
    "Scores",
    "Usage",
]

Quality = Literal["low", "medium", "standard", "high", "hd", "xhigh", "max", "auto"]

_MAX_SEED = 2**53 - 1  # what every JSON reader keeps exact

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
    """b64_json, or url: a signed link that works for a while; a stream has b64_json alone."""
    output_format: OutputFormat | None = None
    """File format; png is the default."""
    output_compression: int | None = Field(default=None, ge=0, le=100)
    """Quality of WebP and JPEG; default: 95. PNG is lossless whatever it says."""
    quality: Quality | None = None
    """A number of steps where num_inference_steps names none: half the default for low, twice for high and hd, three times for
    xhigh and max, within the service's bound."""
    background: Literal["auto", "opaque", "transparent"] | None = None
    """Images are opaque; transparent is refused."""
    moderation: Literal["auto", "low"] | None = None
    """Ignored: the service's own filters decide, where it has any."""
    style: Literal["vivid", "natural"] | None = None
    """Ignored; say it in the prompt."""
    user: str | None = Field(default=None, max_length=512)
    """The caller's name for its end user; returned as safety_identifier."""
    safety_identifier: str | None = Field(default=None, max_length=512)
    """The caller's name for its end user; returned, and used for nothing."""
    input_fidelity: Literal["low", "high"] | None = None
    """Ignored; strength is what decides how much of an image stays."""
    complexity: Literal["low", "medium", "high"] | None = None
    """Ignored."""
    frame_count: int | None = Field(default=None, ge=1)
    """1: there are no animations."""
    frame_duration_ms: int | None = Field(default=None, ge=1)
    """Ignored, as there is one frame."""
    svg: dict[str, Any] | None = Field(default=None, max_length=16)
    """Ignored, as images have pixels."""
    stream: bool | None = None
    """Answer with server-sent events: partial images as they form, then each finished image."""
    partial_images: int | None = Field(default=None, ge=0)
    """How many partial images to stream of each image, evenly over the steps."""
    negative_prompt: str | None = None
    """What the image should not show."""
    num_inference_steps: int | None = Field(
        default=None, ge=1, validation_alias=AliasChoices("num_inference_steps", "steps")
    )
    """Denoising steps; `steps` is another name for it."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Classifier-free guidance scale; up to 1 is none."""
    seed: int | None = Field(default=None, ge=-1, le=_MAX_SEED)
    """Seed of the first image; -1 or none: drawn at random."""
    prompt_syntax: Literal["plain", "a1111"] | None = None
    """plain: every character is part of the prompt; a1111: `<lora:NAME:WEIGHT>` adds an expert."""
    best_of: int | None = Field(default=None, ge=1)
    """Images to draw, of which the n best by `metric` are returned."""
    metric: str | None = Field(default=None, min_length=1, max_length=64)
    """What best_of chooses by, a metric of POST /v1/scores; default: the first that is served, dsg where there is a judge."""
    questions: "list[AskedQuestion] | None" = Field(default=None, min_length=1, max_length=64)
    """What the judge is asked to choose the best_of by; default: what the service's source of questions knows of the prompt."""


class EditBody(GenerationBody):
    """What POST /v1/images/edits takes beside its files: `image` (of several the first is changed), and `mask`, a PNG of the same size
    that is transparent where the image is drawn anew.
    """

    size: str | None = None
    """WIDTHxHEIGHT in pixels, multiples of 8, which the image is brought to; auto: its own where that can be drawn."""
    strength: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """How far the image is changed: 1 draws nearly anew, and takes all the steps; default: 0.8, with a mask 1."""


class GeneratedImage(BaseModel):
    """One image of an answer."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    revised_prompt: None = None
    scores: dict[str, float | None] | None = None
    """The image's scores, where best_of was asked for."""


class Usage(BaseModel):
    """What a request took, in the fields of OpenAI's: tokens of the prompt; images take none here."""

    input_tokens: int
    input_tokens_details: dict[Literal["text_tokens", "image_tokens"], int]
    output_tokens: int = 0
    total_tokens: int
    image_steps: int
    """Denoising steps of all images together."""


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
    quality: Quality = "auto"
    background: Literal["opaque"] = "opaque"
    safety_identifier: str | None = None
    usage: Usage | None = None
    warnings: list[str] = Field(default_factory=list)
    """What was asked for and has no meaning here, and what of the prompt the model does not see."""
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
