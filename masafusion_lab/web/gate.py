"""A gate before the page's server: what the page never asks for is refused before anybody reads it.

A page of another site cannot reach it either: not under a name that it points at this machine (its Host is none of
ours), and not from a browser that has both open (its Origin is not this page's).
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from masafusion_lab import InputError

LARGEST = 40_000_000
"""Bytes of a request: a picture as text, with two drawings."""

PAGE = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|call/.*|heartbeat/.*|info|app_id|startup-events|cancel|reset|theme\.css)/?"
)
"""Paths of Gradio's server that this page, or a program in its place, asks for."""

FILE = "/gradio_api/file="

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERY = ("0.0.0.0", "::", "")
"""Hosts to serve at that mean every address of this machine."""

HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Of every answer. Gradio's page runs scripts of its own text, but nothing from elsewhere."""

REFUSED = b"Refused: the lab answers its own page alone, under localhost, its address, or the name that --host gave.\n"


def check_place(host: str, port: int | None) -> None:
    """Raise InputError unless this machine can serve at the host and port; None: at some port."""
    if port is not None and not 1 <= port <= 65535:
        raise InputError(f"--port {port}: must be 1 to 65535")
    try:
        family, kind, proto, _, place = socket.getaddrinfo(host or None, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except PermissionError:
        raise InputError(f"--port {port}: only root may serve there; take one from 1024 on") from None
    except (OSError, UnicodeError) as error:
        if port is not None and getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InputError(f"--port {port}: something is served there already; take another") from None
        raise InputError(
            f"--host {host}: is no address of this machine; leave it out, or take 0.0.0.0 for all"
        ) from None


class Gate:
    """Refuses all but the page's paths and the files below `served`, too large a request, and those of other sites.

    `host`: where it is served; under that name and those of the loopback it may be asked.
    """

    def __init__(self, app: Callable[..., Any], served: Path, host: str = LOOPBACK[0]) -> None:
        self.app, self.served, self.host = app, served.resolve(), host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on what may pass (ASGI), and answer with HEADERS."""

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [pair for pair in message["headers"] if not pair[0].lower().startswith(b"access-control-")]
                message = {**message, "headers": [*own, *((k.encode(), v.encode()) for k, v in HEADERS.items())]}
            await send(message)

        if scope["type"] == "websocket":  # of which the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        status = self.refusal(scope) if scope["type"] == "http" else 0
        if status:
            plain = [(b"connection", b"close"), (b"content-type", b"text/plain")]
            await answer({"type": "http.response.start", "status": status, "headers": plain})
            await answer({"type": "http.response.body", "body": REFUSED if status == 403 else b""})
            return
        await self.app(scope, receive, answer)

    def is_ours(self, place: str) -> bool:
        """Whether host and port, as a browser names them, are this server's."""
        try:
            name = urlsplit(f"//{place}").hostname or ""
        except ValueError:
            return False
        if self.host in EVERY:
            try:
                return bool(ipaddress.ip_address(name))  # which no other site can have for a name
            except ValueError:
                return name in (*LOOPBACK, socket.gethostname().lower())
        return name in (*LOOPBACK, self.host.lower())

    def is_foreign(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request is for another site's name, or of another site's page, but for a link to this one."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if not self.is_ours(host) or (origin and origin.partition("://")[2] != host):
            return True
        of_site, mode = headers.get(b"sec-fetch-site", b"none"), headers.get(b"sec-fetch-mode")
        return of_site not in (b"same-origin", b"none") and mode != b"navigate"

    def refusal(self, scope: Any) -> int:
        """The status that a request is refused with, or 0."""
        path = scope["path"]
        if self.is_foreign(dict(scope["headers"])):
            return 403
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
