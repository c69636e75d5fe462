"""JSON bodies from strangers: their type, size and counts are checked before they are validated, off the event loop."""

import asyncio
import codecs
import difflib
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from selma_ray.serving.bodies import EditBody, GenerationBody, ScoreBody
from selma_ray.serving.errors import RequestError, invalid_request

__all__ = ["explained", "read_body", "request_body_of"]

Body = TypeVar("Body", bound=BaseModel)

_MAX_COMMAS = 100_000  # more values than the longest legal body has, and no more than are parsed in milliseconds
_MAX_ENTRIES = 64
"""Most entries of one list or object in any body."""
_MAX_DEPTH = 6
_SHOWN_CHARS = 80
_SHOWN_VALUE_CHARS = 40
_RULE = re.compile(r"^(Input|String|List|Dictionary|Value) should")
_OBJECT = re.compile(r"must be a valid dictionary( or instance of \w+)?")
_PARAMETERS = {each.__name__: tuple(each.model_fields) for each in (GenerationBody, EditBody, ScoreBody)}
_SIZE, _MIX = "size (WIDTHxHEIGHT)", "model (experts with weights)"
_OTHER_NAMES = {
    "steps": "num_inference_steps", "cfg_scale": "guidance_scale", "cfg": "guidance_scale", "guidance": "guidance_scale",
    "width": _SIZE, "height": _SIZE, "image_size": _SIZE, "aspect_ratio": _SIZE, "loras": _MIX, "lora": _MIX,
    "num_images": "n", "num_images_per_prompt": "n", "batch_size": "n", "num_outputs": "n", "negative": "negative_prompt",
    "text": "prompt", "inputs": "prompt", "denoising_strength": "strength", "format": "output_format",
}  # fmt: skip
"""What other programs call parameters of ours."""


async def read_body(request: Request, body_class: type[Body]) -> Body:
    """Return a request's body as `body_class`; raises RequestError (400, or 415 for another type than JSON)."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content = await request.body()
    if not content:
        raise invalid_request('the body is empty; send JSON such as {"prompt": "a red ball"}', code="empty_body")
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise invalid_request(
            f"the body must be JSON, sent with the header Content-Type: application/json; got {content_type[:80] or 'none'}",
            code="unsupported_media_type",
            status=415,
        )
    return await asyncio.to_thread(_validated, content, body_class)


def _validated(content: bytes, body_class: type[Body]) -> Body:
    if content.count(b",") > _MAX_COMMAS:
        raise invalid_request(f"the body has more than {_MAX_COMMAS} values; send fewer", code="too_many_values")
    try:
        value = from_json(content.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise invalid_request(
            f"the body must be JSON in UTF-8: {error}{_remedy(content)}", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise invalid_request(f"the body must be a JSON object, got {_kind(value)}", code="invalid_json")
    _bound_counts(value, "the body", 0)
    try:
        return body_class.model_validate(value)
    except ValidationError as error:
        raise explained(error) from None


def _remedy(content: bytes) -> str:
    """Return what to change about a body that is no JSON, where its beginning or its end tells."""
    if content.startswith(codecs.BOM_UTF16_LE) or content.startswith(codecs.BOM_UTF16_BE):
        return "; it is UTF-16, encode it as UTF-8"
    if content.lstrip().startswith((b"{'", b"{ '")):
        return "; names and texts stand in double quotes"
    if b"\\ud" in content.lower():
        return "; a surrogate such as \\ud800 must have its other half"
    return ""


def _bound_counts(value: Any, where: str, depth: int) -> None:
    """Refuse what no legal body has, so that validation meets no more than it can name."""
    if isinstance(value, dict | list):
        if len(value) > _MAX_ENTRIES:
            raise invalid_request(
                f"{where} must have at most {_MAX_ENTRIES} entries, got {len(value)}", _param(where), "too_many_values"
            )
        if depth == _MAX_DEPTH:
            raise invalid_request(f"{where} is nested too deep", _param(where))
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            _bound_counts(entry, str(key)[:_SHOWN_CHARS] if depth == 0 else where, depth + 1)


def _param(where: str) -> str | None:
    return None if where == "the body" else where


def _kind(value: Any) -> str:
    return {list: "a list", dict: "an object", str: "a string", type(None): "null", bool: "a boolean"}.get(
        type(value), "a number"
    )


def explained(error: ValidationError) -> RequestError:
    """Return the first fault of a body as OpenAI's API words it: the parameter, the rule and what was given, where it is short."""
    faults = error.errors(include_url=False, include_context=False)
    # A union has a fault in each branch: the one that lies deepest is of the branch that was meant.
    fault = max((each for each in faults if each["loc"][:1] == faults[0]["loc"][:1]), key=lambda each: len(each["loc"]))
    param = str(fault["loc"][0])[:_SHOWN_CHARS] if fault["loc"] else None
    where = _place(fault["loc"]) or "the body"
    if fault["type"] == "extra_forbidden":
        return invalid_request(
            f"unknown parameter: {where}{_suggestion(error.title, where)}", param, "unknown_parameter"
        )
    if fault["type"] == "missing":
        return invalid_request(f"missing required parameter: {where}", param, "missing_required_parameter")
    if where == "model" and fault["type"] == "string_type":
        rule = 'must be a name, or experts with weights such as {"NAME": 0.5}'
    else:
        rule = _OBJECT.sub("must be an object", _RULE.sub("must", fault["msg"]))
    return invalid_request(f"{where} {rule}{_got(fault['input'])}", param)


def _got(value: Any) -> str:
    """Return what was given, where it can be shown in a few characters."""
    if isinstance(value, list | dict):
        return f", got {_kind(value)}"
    shown = json.dumps(value, ensure_ascii=False)
    return f", got {shown}" if len(shown) <= _SHOWN_VALUE_CHARS else ""


def _suggestion(body: str, name: str) -> str:
    """Return which parameter of a body was meant, where one is near or is what others call it."""
    known = _PARAMETERS[body]
    if name in _OTHER_NAMES and _OTHER_NAMES[name].split()[0] in known:
        return f"; it is {_OTHER_NAMES[name]} here"
    nearest = [] if "." in name else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _place(location: tuple[int | str, ...]) -> str:
    """Return where a fault is, such as questions[2].id; names that pydantic gives to the branches of a union are left out."""
    place = ""
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not place:
            place = part
        elif part not in ("str", "[key]") and not part.startswith(("dict[", "list[")):
            place += f".{part}"
    return place[:_SHOWN_CHARS]


def request_body_of(body_class: type[BaseModel]) -> dict[str, Any]:
    """Return what an OpenAPI description says of a body that `read_body` reads."""
    schema = {"$ref": f"#/components/schemas/{body_class.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
