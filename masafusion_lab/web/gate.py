"""A gate before the page's server: what the page never asks for is refused before anybody reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

LARGEST = 40_000_000
"""Bytes of a request: a picture as text, with two drawings."""

UNUSED = re.compile(r"/(gradio_api/)?(upload|proxy=|component_server|stream|dev|vibe|deep_link|monitoring)")
"""Paths of Gradio's server that this page has no use for: uploads beside the drawing, other servers' files, tools."""


class Gate:
    """Refuses unused paths with 403, and requests that are too large, or do not say how large, with 413 or 411."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on what may pass (ASGI)."""
        status = _refusal(scope) if scope["type"] == "http" else 0
        if not status:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b""})


def _refusal(scope: Any) -> int:
    """The status that a request is refused with, or 0."""
    if UNUSED.match(scope["path"]):
        return 403
    headers = dict(scope["headers"])
    if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411
        return 413 if int(length) > LARGEST else 0
    return 0
