"""Multipart forms from strangers, as OpenAI's clients send images with parameters: bounded, and read off the event loop."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from selma_ray.serving.errors import invalid_request
from selma_ray.serving.parsing import explained

__all__ = ["Form", "form_body_of", "read_form"]

Body = TypeVar("Body", bound=BaseModel)

_MAX_FILES = 32
_MAX_FIELDS = 64
_MAX_FIELD_BYTES = 64 * 1024
_JSON_STARTS = ("{", "[")
_EXAMPLE = 'curl -F image=@photo.png -F prompt="a red ball"'


@dataclass(frozen=True)
class Form:
    """The fields of a form by name, and its files by name, in the order in which they came."""

    fields: dict[str, Any]
    files: dict[str, list[bytes]]

    def validated(self, body_class: type[Body]) -> Body:
        """Return the fields as `body_class`, with numbers read from their text; raises RequestError (400)."""
        try:
            return body_class.model_validate(self.fields, strict=False)
        except ValidationError as error:
            raise explained(error) from None


async def read_form(request: Request, files: Sequence[str]) -> Form:
    """Return a request's form, whose files may have the names of `files`; raises RequestError: 400, or 415 for another type."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise invalid_request(
            f"the body must be multipart/form-data, such as {_EXAMPLE} sends; got {content_type[:80] or 'none'}",
            code="unsupported_media_type",
            status=415,
        )
    content = await request.body()
    if not content:
        raise invalid_request(f"the body is empty; send a form, such as {_EXAMPLE} does", code="empty_body")
    return await asyncio.to_thread(_parsed, content, request.headers, files)


def _parsed(content: bytes, headers: Headers, files: Sequence[str]) -> Form:
    try:
        parts = asyncio.run(_parts(content, headers))
    except (MultiPartException, KeyError, ValueError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "its parts cannot be told apart"
        raise invalid_request(f"the body must be a multipart form: {reason}", code="invalid_form") from None
    form = Form({}, {})
    for name, value in parts:
        plain = name.removesuffix("[]")
        if isinstance(value, bytes):
            if plain not in files:
                raise invalid_request(
                    f"unknown file: {name[:80]}; files are {', '.join(files)}", name[:80], "unknown_parameter"
                )
            form.files.setdefault(plain, []).append(value)
        elif plain in files:
            raise invalid_request(
                f"{plain} must be a file, not text; with curl: -F {plain}=@photo.png", plain, "invalid_image"
            )
        else:
            _add_field(form.fields, name, value)
    return form


async def _parts(content: bytes, headers: Headers) -> list[tuple[str, str | bytes]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield content

    parser = MultiPartParser(
        headers, stream(), max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
    )
    parser.spool_max_size = len(content)  # it is in memory already
    form = await parser.parse()
    try:
        return [(name, await _content(value)) for name, value in form.multi_items()]
    finally:
        await form.close()


async def _content(value: UploadFile | str) -> bytes | str:
    return value if isinstance(value, str) else await value.read()


def _add_field(fields: dict[str, Any], name: str, text: str) -> None:
    """Add a field: an object's entry where its name reads model[counting], an object or a list where its text is JSON of one."""
    outer, bracket, key = name.removesuffix("]").partition("[")
    if bracket and name.endswith("]") and isinstance(fields.setdefault(outer, {}), dict):
        fields[outer][key] = text
    elif name in fields:
        raise invalid_request(f"{name[:80]} is given twice; give it once", name[:80])
    else:
        fields[name] = _read(name, text)


def _read(name: str, text: str) -> Any:
    if name == "prompt" or name == "negative_prompt" or not text.startswith(_JSON_STARTS):
        return text
    try:
        return from_json(text)
    except ValueError as error:
        raise invalid_request(f"{name[:80]} must be JSON: {error}", name[:80], "invalid_json") from None


def form_body_of(body_class: type[BaseModel]) -> dict[str, Any]:
    """Return what an OpenAPI description says of a form that `read_form` reads."""
    schema = {"$ref": f"#/components/schemas/{body_class.__name__}"}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
