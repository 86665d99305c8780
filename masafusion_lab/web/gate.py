"""A gate before the page's server: what the page never asks for is refused before anybody reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST = 40_000_000
"""Bytes of a request: a picture as text, with two drawings."""

PAGE = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|call/.*|heartbeat/.*|info|app_id|startup-events|cancel|reset|theme\.css)/?"
)
"""Paths of Gradio's server that this page, or a program in its place, asks for."""

FILE = "/gradio_api/file="


class Gate:
    """Refuses with 403 all but the page's paths and the files below `served`, and a request that is too large."""

    def __init__(self, app: Callable[..., Any], served: Path) -> None:
        self.app, self.served = app, served.resolve()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on what may pass (ASGI)."""
        status = self.refusal(scope) if scope["type"] == "http" else 0
        if not status:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b""})

    def refusal(self, scope: Any) -> int:
        """The status that a request is refused with, or 0."""
        path = scope["path"]
        if path.startswith(FILE):
            inside = "\0" not in path and (self.served / path.removeprefix(FILE)).resolve().is_relative_to(self.served)
            return 0 if inside else 403
        if not PAGE.fullmatch(path):
            return 403
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = dict(scope["headers"])
            length = b"" if b"transfer-encoding" in headers else headers.get(b"content-length", b"")  # it overrules it
            return 411 if not length.isdigit() else 413 if int(length) > LARGEST else 0
        return 0
