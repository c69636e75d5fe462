"""What a body asks for: image requests within the service's bounds, and warnings of what is ignored."""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from selma_ray.serving.bodies import GenerationBody
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.errors import invalid_request, metric_not_served
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames

__all__ = ["image_requests", "token_warnings", "wanted_metrics", "warnings_of"]

Number = TypeVar("Number", int, float)

_SIZE_STEP_PX = 8
_MIN_SIZE_PX = 16
_STEPS_BY_QUALITY = {"low": 0.5, "high": 2, "hd": 2, "xhigh": 3, "max": 3}
_IGNORED = ("moderation", "style", "input_fidelity", "complexity", "frame_duration_ms", "svg")
"""OpenAI's parameters that have no meaning here and whose absence changes nothing that was asked for."""
_LORA = re.compile(r"<lora:([^:<>]{1,100})(?::([^:<>]{1,20}))?>")
_WEIGHTED = re.compile(r"\([^()]{1,200}:\s*\d+(?:\.\d+)?\)")


def image_requests(body: GenerationBody, config: ServingConfig, names: ModelNames, run: str = "") -> list[ImageRequest]:
    """Return one request an image to draw; raises RequestError where the body leaves the service's bounds."""
    sampling = config.sampling
    for param, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt or "")):
        if len(text) > config.max_prompt_chars:
            raise invalid_request(
                f"{param} must have at most {config.max_prompt_chars} characters, got {len(text)}",
                param,
                "string_too_long",
            )
    _refuse_what_would_change_the_meaning(body)
    num_previews = _at_most("partial_images", body.partial_images or 0, config.max_previews)
    if num_previews and not body.stream:
        raise invalid_request("partial_images needs stream: true", "partial_images")
    width_px, height_px = _size_px(body.size, config)
    prompt, model = _read_prompt(body, names)
    common: dict[str, Any] = {
        "prompt": prompt,
        "steps": _steps(body, config),
        "guidance_scale": _at_most(
            "guidance_scale",
            sampling.guidance_scale if body.guidance_scale is None else body.guidance_scale,
            config.max_guidance_scale,
        ),
        "width_px": width_px,
        "height_px": height_px,
        "negative_prompt": sampling.negative_prompt if body.negative_prompt is None else body.negative_prompt,
        "mix": names.mix_of(model),
        "num_previews": num_previews,
        "run": run,
    }
    first_seed = secrets.randbelow(2**32) if body.seed in (None, -1) else body.seed
    return [ImageRequest(seed=first_seed + index, **common) for index in range(_num_images(body, config))]


def _refuse_what_would_change_the_meaning(body: GenerationBody) -> None:
    """Raise RequestError (400) for what an answer without it would silently not be."""
    if body.background == "transparent":
        raise invalid_request("background transparent is not possible, images are opaque; use opaque", "background")
    if (body.frame_count or 1) > 1:
        raise invalid_request(f"frame_count must be 1, as images do not move; got {body.frame_count}", "frame_count")
    if body.stream and body.response_format == "url":
        raise invalid_request("response_format must be b64_json in a stream; leave it out", "response_format")


def warnings_of(body: GenerationBody, config: ServingConfig) -> list[str]:
    """Return what of a body is ignored, by name."""
    warnings = [f"{name} is ignored: it has no meaning here" for name in _IGNORED if getattr(body, name) is not None]
    if body.output_compression not in (None, 100) and (body.output_format or "png") == "png":
        warnings.append("output_compression is ignored: png is lossless; use webp or jpeg")
    if body.num_inference_steps is not None and body.quality not in (None, "auto"):
        warnings.append("quality is ignored: num_inference_steps says how many steps are taken")
    elif _wanted_steps(body, config) > config.max_steps:
        warnings.append(
            f"quality {body.quality} is limited to {config.max_steps} steps, the most that are allowed here"
        )
    if body.prompt_syntax != "a1111" and (_LORA.search(body.prompt) or _WEIGHTED.search(body.prompt)):
        warnings.append('the prompt is taken literally; with prompt_syntax "a1111", <lora:NAME:WEIGHT> adds an expert')
    return warnings


def token_warnings(tokens: int, limit: int) -> list[str]:
    """Return a warning where a prompt has more tokens than the model's text encoder reads."""
    if tokens <= limit:
        return []
    return [f"the prompt has {tokens} tokens, of which the model sees the first {limit}; shorten it"]


def _wanted_steps(body: GenerationBody, config: ServingConfig) -> int:
    return max(1, round(config.sampling.steps * _STEPS_BY_QUALITY.get(body.quality or "auto", 1)))


def _steps(body: GenerationBody, config: ServingConfig) -> int:
    if body.num_inference_steps is not None:
        return _at_most("num_inference_steps", body.num_inference_steps, config.max_steps)
    return min(_wanted_steps(body, config), config.max_steps)


def _read_prompt(body: GenerationBody, names: ModelNames) -> tuple[str, str | Mapping[str, float] | None]:
    """Return the prompt without its tags and the model with the experts that they add; raises RequestError for other syntax."""
    if body.prompt_syntax != "a1111":
        return body.prompt, body.model
    weighted = _WEIGHTED.search(body.prompt)
    if weighted:
        raise invalid_request(
            f"prompt: weights such as {weighted.group()[:40]!r} cannot be applied; leave out the brackets and the number",
            "prompt",
            "unsupported_prompt_syntax",
        )
    prompt = _LORA.sub("", body.prompt).strip()
    if not prompt:
        raise invalid_request("prompt must have words beside its tags", "prompt")
    added = list(_tagged(body.prompt))
    if not added:
        return prompt, body.model
    mix = names.mix_of(body.model)
    if mix is None:
        raise invalid_request(
            "prompt: <lora:…> adds to the base, an expert or a mix, not to the merged model; name model base",
            "prompt",
            "unsupported_prompt_syntax",
        )
    weights = dict(mix)
    for name, weight in added:
        name = name.removeprefix(names.prefix)
        if name not in names.experts:
            raise names.unknown(name, names.expert_names)
        weights[name] = weights.get(name, 0.0) + weight
    return prompt, weights


def _tagged(prompt: str) -> Iterator[tuple[str, float]]:
    for name, weight in _LORA.findall(prompt):
        try:
            yield name, float(weight or 1)
        except ValueError:
            raise invalid_request(
                f"prompt: the weight of <lora:{name}:{weight}> must be a number; fix it",
                "prompt",
                "unsupported_prompt_syntax",
            ) from None


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
        raise invalid_request(f"{param} must be at most {bound:g}, got {value:g}", param)
    return value


def _size_px(size: str | None, config: ServingConfig) -> tuple[int, int]:
    """Return (width, height) in pixels."""
    if size in (None, "auto"):
        return config.sampling.width_px, config.sampling.height_px
    width, _, height = size.partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and len(size) <= 11):
        default = f"{config.sampling.width_px}x{config.sampling.height_px}"
        raise invalid_request(f"size must read WIDTHxHEIGHT, such as {default}, or auto, got {size[:20]!r}", "size")
    for side_px in (int(width), int(height)):
        if side_px % _SIZE_STEP_PX or not _MIN_SIZE_PX <= side_px <= config.longest_side_px:
            raise invalid_request(
                f"size must have sides of {_MIN_SIZE_PX} to {config.longest_side_px} px, multiples of {_SIZE_STEP_PX}, got {size}",
                "size",
            )
    return int(width), int(height)
