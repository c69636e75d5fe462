"""How a merged model is served."""

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from selma_ray.config import StrictModel
from selma_ray.judging.config import JudgeConfig, JudgeSetting
from selma_ray.models.config import SamplingConfig

__all__ = ["JUDGE_METRICS", "CredentialsConfig", "ModelMetric", "ServingConfig", "is_loopback"]

JUDGE_METRICS = ("dsg", "dsg_dpg", "dsg_selma", "soft_dsg", "soft_tifa_am", "soft_tifa_gm", "vqascore")
"""Scores that need a judge, by evaluation's names."""

ModelMetric = Literal["clipscore", "pickscore", "hpsv2", "hpsv2.1", "imagereward"]
"""Scores that need a model of their own."""


class CredentialsConfig(StrictModel):
    """Whose signature images bear, as C2PA's content credentials; needs the extra c2pa, and the files on every node that speaks HTTP."""

    certificates_file: str
    """PEM file of the signer's certificate and those of its issuers, in this order; C2PA accepts no self-signed one."""
    key_file: str
    """PEM file of the signer's private key, in PKCS #8 without a password."""
    algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"
    """How the key signs."""
    timestamp_url: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")] | None = None
    """A timestamping service that is asked about each image; default: none."""


class ServingConfig(StrictModel):
    """The HTTP service: a generator and, next to it, an evaluator."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs api_keys_file."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_keys_file: str | None = None
    """File with one bearer key a line (or sha256:<hex digest of a key>), each with a rate limit of its own where a number
    of requests a minute follows it; default: loopback clients alone are answered."""
    cors_origins: list[Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/\s]+)$")]] = Field(
        default_factory=list
    )
    """Origins whose pages may ask this service from a browser, such as https://app.example.com, or "*"; default: none."""
    public_url: Annotated[str, StringConstraints(pattern=r"^https?://\S+[^/]$")] | None = None
    """Address under which clients reach the service, for links to images; default: the one that a request came to."""
    image_metadata: bool = True
    """Write into each image's file what drew it: prompts, model, seed, steps, guidance, size and scheduler. PNG has all of it, and the
    line `parameters` that other tools read, which is the Exif comment of JPEG and WebP."""
    credentials: CredentialsConfig | None = None
    """Sign each finished image as drawn by a model (C2PA); default: images bear no signature."""
    url_lifetime_s: float = Field(default=3600, gt=0)
    """Seconds for which a link to an image works (response_format url)."""
    url_store_mb: float = Field(default=256, gt=0)
    """Memory for images behind links, in MB; the oldest give way."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests that a key without a limit of its own may make a minute, all at once if it likes; default: no limit."""
    models: dict[
        Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")], Annotated[str, StringConstraints(min_length=1)]
    ] = Field(default_factory=dict, max_length=16)
    """More finished runs to serve, by the names that requests ask for their merged models: {anime: runs/anime}. Their base and experts
    are NAME/base and NAME/EXPERT; each has generators of its own, as many as this run, and is sampled as its own recipe says."""
    experts: bool = True
    """Serve the base model, every expert and mixes of experts too; a second denoiser in each generator's memory."""
    adapters: dict[
        Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")], Annotated[str, StringConstraints(min_length=1)]
    ] = Field(default_factory=dict, max_length=64)
    """LoRAs of others for the base model, by the names that requests ask for them, beside the experts and in mixes with them: PEFT
    folders, or .safetensors files as diffusers, kohya's scripts and A1111 have them, on a path that every node sees."""
    sampling: SamplingConfig = SamplingConfig()
    """Defaults of a request that names none."""
    cache_interval: int = Field(default=1, ge=1)
    """Denoising steps from one pass through the whole UNet to the next, with its deep features kept between (DeepCache); 1
    keeps none. It saves time and changes images: measure what it costs with `python -m benchmarks.sampling`."""
    safety_checker: bool = False
    """Ask the safety checker that pipelines of Stable Diffusion 1.x come with about every image; a flagged one is answered 400."""
    content_filter: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """A class of yours, as package.module:Class, that decides which prompts are drawn and which images are shown: see
    `selma_ray.serving.filters.ContentFilter`; default: all are."""
    application: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Name of the service among others on one cluster; default: that of the run's folder."""
    route_prefix: str = Field(default="/", pattern=r"^/([\w.-]+(/[\w.-]+)*)?$")
    """Where its paths begin; services of one cluster share an address, and need one each: /team-a answers /team-a/v1/models."""
    max_steps: int = Field(default=100, ge=1, le=1000)
    """Most denoising steps a request may ask for."""
    max_guidance_scale: float = Field(default=30, ge=1)
    """Largest classifier-free guidance scale a request may ask for."""
    max_prompt_chars: int = Field(default=2000, ge=1)
    """Longest prompt."""
    max_images: int = Field(default=10, ge=1)
    """Most images a request may ask for (OpenAI's n)."""
    max_previews: int = Field(default=8, ge=0)
    """Most partial images that a streamed request may ask for."""
    max_size_px: int | None = Field(default=None, ge=8)
    """Longest side of an image a request may ask for; default: half as much again as the longer side of sampling's size, as models
    draw poorly what is far beyond the size they were made for, and hold up everybody else."""
    max_body_mb: float = Field(default=16, gt=0)
    """Largest request body in MB."""
    max_upload_pixels: int = Field(default=16_777_216, ge=1)
    """Most pixels of the images of a request that are sent to be scored or edited, all together."""
    upload_background: str = "white"
    """Colour on which transparent images are scored, by name or as #rrggbb."""
    max_batch_size: int = Field(default=8, ge=1)
    """Images that share a denoising step; larger sizes than the default share fewer."""
    fixed_rows: int | None = Field(default=None, ge=1)
    """Rows of every call of the denoiser, filled up where there are fewer (an image has two with guidance, else one): on the CPU in
    fp32 an image is then the same to the byte whatever is drawn beside it. 2 costs a lone guided image nothing and full batches
    about a third of their speed, 4 the other way round; default: as many as there are, and images differ by at most a step of 255
    in a few pixels."""
    size_weights: dict[Annotated[str, StringConstraints(pattern=r"^\d+x\d+$")], Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict
    )
    """Shares of the time, relative to 1, of sizes (WIDTHxHEIGHT) that are to have more or less of it than others where several are
    drawn: {1024x1024: 0.5}."""
    max_queued_requests: int = Field(default=64, ge=1)
    """Images that may wait in a replica beyond those in its full batch; as many requests (at least 8) may wait for a replica with
    room, more are answered 429."""
    request_timeout_s: float = Field(default=120, gt=0)
    """Seconds after which a request is answered 504; one that would take longer, by the measured time of its images and of what is
    before them, is refused at once."""
    drain_s: float = Field(default=30, ge=0)
    """Seconds that accepted requests have to finish once the service is told to end; new ones are answered 503 meanwhile."""
    stall_timeout_s: float = Field(default=120, gt=0)
    """Seconds without a denoising step, with work at hand, after which a generator is replaced; set it well above a step."""
    judge: JudgeSetting | None = JudgeConfig()
    """The judge behind dsg, soft_dsg, vqascore and their kin in POST /v1/scores: its name, or its settings as those of
    evaluation.judge; null serves the scores of score_models alone. The miniature's was not taught vqascore's question ("Does this
    figure show ...?"): of it, that score says nothing."""
    score_models: dict[ModelMetric, Annotated[str, StringConstraints(min_length=1)]] = Field(default_factory=dict)
    """More scores, each with its model, a folder or a hub name: {clipscore: openai/clip-vit-base-patch32}."""
    judge_batch_size: int = Field(default=16, ge=1)
    """Images that are judged at once, of eight questions each; with more questions fewer, with fewer questions more."""
    api_replicas: int = Field(default=1, ge=1, le=64)
    """Replicas that speak HTTP; several share the keys' limits, answers to repeated requests and images behind links."""
    generator_replicas: int = Field(default=1, ge=1)
    """Replicas of the generator, the fewest where max_generator_replicas is given."""
    max_generator_replicas: int | None = Field(default=None, ge=1)
    """Most replicas of the generator, added while requests wait; default: their number stays."""
    evaluator_replicas: int = Field(default=1, ge=0)
    """Replicas of the evaluator, the fewest where max_evaluator_replicas is given; 0 serves no scores."""
    max_evaluator_replicas: int | None = Field(default=None, ge=1)
    """Most replicas of the evaluator, added while requests wait; default: their number stays."""
    num_cpus: float = Field(default=0.5, gt=0)
    """CPUs of a replica."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a generator replica; a fraction shares one."""
    evaluator_num_gpus: float = Field(default=0, ge=0)
    """GPUs of an evaluator replica; a fraction shares one."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of a replica's numeric libraries; default: every core of its node."""

    @field_validator("upload_background")
    @classmethod
    def _a_colour(cls, value: str) -> str:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(value)
        except ValueError:
            raise ValueError("must be a colour such as white or #ffffff") from None
        return value

    @model_validator(mode="after")
    def _fixed_rows_without_step_caching(self) -> Self:
        if self.fixed_rows is not None and self.cache_interval > 1:
            raise ValueError(
                f"fixed_rows must be left out where cache_interval is above 1, whose steps have rows of two kinds; got {self.fixed_rows}"
            )
        return self

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> Self:
        if self.api_keys_file is None and not is_loopback(self.host):
            raise ValueError(
                f"api_keys_file must name a file of bearer keys where host is not loopback; host is {self.host!r}"
            )
        return self

    @model_validator(mode="after")
    def _defaults_within_bounds(self) -> Self:
        sampling = self.sampling
        for value, bound in (
            ("steps", "max_steps"),
            ("guidance_scale", "max_guidance_scale"),
            ("width_px", "longest_side_px"),
            ("height_px", "longest_side_px"),
        ):
            if getattr(sampling, value) > getattr(self, bound):
                key = bound.replace("longest_side_px", "max_size_px")
                raise ValueError(
                    f"{key} must be at least sampling.{value}, which is {getattr(sampling, value)}; {key} is {getattr(self, bound)}"
                )
        return self

    @model_validator(mode="after")
    def _largest_request_fits(self) -> Self:
        if self.max_images > self.max_batch_size + self.max_queued_requests:
            raise ValueError(
                f"max_images must be at most max_batch_size + max_queued_requests; max_images is {self.max_images}"
            )
        return self

    @model_validator(mode="after")
    def _something_to_score_with(self) -> Self:
        if self.evaluator_replicas and not self.metrics:
            raise ValueError(
                "evaluator_replicas must be 0 where neither judge nor score_models is given; "
                f"evaluator_replicas is {self.evaluator_replicas}"
            )
        return self

    @model_validator(mode="after")
    def _the_evaluator_has_the_gpus(self) -> Self:
        if self.judge and self.judge.num_gpus:
            raise ValueError(
                f"judge.num_gpus must be left out, got {self.judge.num_gpus:g}; set serving.evaluator_num_gpus, its replica's"
            )
        return self

    @property
    def longest_side_px(self) -> int:
        """Return the longest side of an image a request may ask for."""
        if self.max_size_px is not None:
            return self.max_size_px
        return max(self.sampling.width_px, self.sampling.height_px) * 3 // 2

    @property
    def weights_by_size_px(self) -> dict[tuple[int, int], float]:
        """Return size_weights by (height, width)."""
        sizes = {tuple(map(int, size.split("x"))): weight for size, weight in self.size_weights.items()}
        return {(height_px, width_px): weight for (width_px, height_px), weight in sizes.items()}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores that are served, the default first; none without an evaluator."""
        if not self.evaluator_replicas:
            return ()
        return (*(JUDGE_METRICS if self.judge else ()), *self.score_models)

    @model_validator(mode="after")
    def _most_replicas_above_fewest(self) -> Self:
        for name in ("generator_replicas", "evaluator_replicas"):
            fewest, most = getattr(self, name), getattr(self, f"max_{name}")
            if most is not None and most < fewest:
                raise ValueError(f"max_{name} must be at least {name}, which is {fewest}; max_{name} is {most}")
        return self


def is_loopback(host: str) -> bool:
    """Tell whether `host` (a name or an address) can be reached from its own machine only."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
