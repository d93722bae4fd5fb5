"""GET /: the playground's page, one file without network, and the headers that keep it so."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

PAGE = Path(__file__).with_name("playground.html")


@cache
def page() -> str:
    """The page's HTML."""
    return PAGE.read_text(encoding="utf-8")


def _policy() -> str:
    """Only the page's own script and style run, and only this server is asked."""
    sources = {}
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        sources[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


HEADERS = {
    "content-security-policy": _policy(),
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def playground_routes() -> APIRouter:
    """The page alone."""
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    async def playground() -> Response:
        """A page to try the experts."""
        return Response(page(), media_type="text/html", headers=HEADERS)

    return routes
