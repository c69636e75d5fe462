"""The playground at `/`: one page that asks the API as any client does, with nothing loaded from elsewhere."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

__all__ = ["PAGE_PATHS", "add_page"]

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/settings.js": ("settings.js", "text/javascript"),
    "/page.js": ("page.js", "text/javascript"),
}
PAGE_PATHS = tuple(_FILES)
"""Answered without a key: the page asks for one itself."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_page(app: FastAPI) -> None:
    """Add the page and its files to `app`; its headers allow no script, style or connection but the service's own."""
    for path, (name, media_type) in _FILES.items():
        response = _file(name, media_type)
        app.add_api_route(path, response, methods=["GET"], include_in_schema=False, response_class=Response)


def _file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = files(__package__).joinpath(name).read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=media_type, headers={"Content-Security-Policy": _POLICY})

    return answer
