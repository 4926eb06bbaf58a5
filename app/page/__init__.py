"""The page at `/`: plain files beside this one, under a policy that lets nothing else in."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from app.served import Served

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # they belong to this version of the server
}
# By URL path. They hold no data, so that they need no API key: the page asks for one.
FILES = {
    "/" if path.name == "index.html" else f"/page/{path.name}": path
    for path in sorted(Path(__file__).parent.iterdir())
    if path.suffix in _TYPES
}


async def serve_file(served: Served, request: Request) -> Response:
    """The page, or one of the files that it is made of."""
    path = FILES[request.url.path]
    return Response(path.read_bytes(), headers=_HEADERS, media_type=_TYPES[path.suffix])
