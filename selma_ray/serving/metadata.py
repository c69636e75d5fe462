"""How an image was drawn, kept in its file: each value under a name of its own, and the line that other tools read."""

import json

from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames

__all__ = ["PARAMETERS", "metadata_of"]

PARAMETERS = "parameters"
"""The key of the line that AUTOMATIC1111's web UI writes, and most viewers and galleries read."""


def metadata_of(request: ImageRequest, names: ModelNames, scheduler: str) -> dict[str, str]:
    """Return what an image's file says about how it was drawn."""
    model = _model_of(request, names)
    values = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "model": model,
        "seed": str(request.seed),
        "steps": str(request.steps),
        "guidance_scale": f"{request.guidance_scale:g}",
        "size": f"{request.width_px}x{request.height_px}",
        "scheduler": scheduler,
        "strength": "" if request.source is None else f"{request.source.strength:g}",
    }
    return {PARAMETERS: _parameters(values)} | {name: value for name, value in values.items() if value}


def _model_of(request: ImageRequest, names: ModelNames) -> str:
    """Return the name that a client would ask for, or its mix as JSON."""
    shown = names.shown(request.mix)
    return shown if isinstance(shown, str) else json.dumps(shown)


def _parameters(values: dict[str, str]) -> str:
    settings = {
        "Steps": values["steps"],
        "Sampler": values["scheduler"],
        "CFG scale": values["guidance_scale"],
        "Seed": values["seed"],
        "Size": values["size"],
        "Model": values["model"],
    }
    if values["strength"]:
        settings["Denoising strength"] = values["strength"]
    lines = [values["prompt"]]
    if values["negative_prompt"]:
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """Return a value in quotes where it would be taken for several, as the web UI does."""
    return json.dumps(value) if set(value) & set(',:\n"') else value
