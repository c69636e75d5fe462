"""What the OpenAPI description says beyond the routes: the bodies, their bounds here, and how refusals look."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from selma_ray.serving.bodies import EditBody, GenerationBody, ScoreBody
from selma_ray.serving.config import ServingConfig

__all__ = ["describe"]

_REFUSED = (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504)
_BODIES = (GenerationBody, EditBody, ScoreBody)
_FILE = {"type": "string", "format": "binary", "description": "A PNG, JPEG or WebP file."}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def describe(app: FastAPI, config: ServingConfig) -> None:
    """Let `app` describe its bodies with this service's bounds, and an error of OpenAI's shape under every status that refuses."""
    written = app.openapi

    def described() -> dict[str, Any]:
        """Return the whole description."""
        schema = written()
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for body_class in _BODIES:
            schemas.update(_schemas_of(body_class))
        edit = schemas["EditBody"]
        edit["properties"] = {"image": _FILE, "mask": _FILE, **edit["properties"]}
        edit["required"] = ["image", *edit["required"]]
        for name, bounds in _bounds(config).items():
            for parameter, bound in bounds.items():
                _bound(schemas[name]["properties"][parameter], bound)
        schemas["Error"] = _ERROR
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for operations in schema["paths"].values():
            for operation in operations.values():
                for status in _REFUSED:
                    operation["responses"][str(status)] = {"description": "Refused", "content": content}
        return schema

    app.openapi = described  # type: ignore[method-assign]


def _schemas_of(body_class: type[BaseModel]) -> dict[str, Any]:
    schema = body_class.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), body_class.__name__: schema}


def _bounds(config: ServingConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what the configuration bounds, by body and parameter, in JSON Schema's words."""
    prompt, images = {"maxLength": config.max_prompt_chars}, {"maximum": config.max_images}
    drawing: dict[str, dict[str, Any]] = {
        "prompt": prompt,
        "negative_prompt": prompt,
        "n": images,
        "best_of": images,
        "num_inference_steps": {"maximum": config.max_steps},
        "guidance_scale": {"maximum": config.max_guidance_scale},
        "partial_images": {"maximum": config.max_previews},
    }
    return {
        "GenerationBody": drawing,
        "EditBody": drawing,
        "ScoreBody": {"prompt": prompt, "images": {"maxItems": config.max_images}},
    }


def _bound(schema: dict[str, Any], bound: dict[str, Any]) -> None:
    """Add a bound to a parameter that may be null too, or may not."""
    branches = [branch for branch in schema.get("anyOf", [schema]) if branch.get("type") != "null"]
    for branch in branches:
        branch.update(bound)
