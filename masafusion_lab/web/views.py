"""What the annotation lab shows, as HTML and as values of its drawing, from what studio.py knows."""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from masafusion_lab.annotate import LAYERS, canvas_size, layer_of, to_url
from masafusion_lab.report import pages
from masafusion_lab.web.desk import Desk, Job
from masafusion_lab.web.studio import Past

THUMB = 240
"""Pixels of a small picture's long side."""


def part(name: str, *args: Any, **options: Any) -> str:
    """A part of the page: the macro of that name in app.html, in which every text is escaped."""
    return str(getattr(pages().get_template("app.html").module, name)(*args, **options))


def drawing(
    picture: Image.Image | None,
    drawings: Mapping[str, Image.Image | None],
    said: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """What makes the page's drawing show a picture, or keep its own, with drawings over it, by column.

    One that is not named stays as it is. `said`: what to know of them; `more`: what else the page is told.
    """
    put = {layer_of(column): each and to_url(each) for column, each in drawings.items()}
    stamp = secrets.token_hex(4)  # the page heeds only what has changed
    sent: dict[str, Any] = {"put": put, "said": ". ".join(said), "stamp": stamp, **more}
    if picture is not None:
        full = picture.resize(canvas_size(*picture.size), Image.Resampling.LANCZOS)
        sent |= {"picture": to_url(full), "put": dict.fromkeys(LAYERS) | put}
    return sent


def progress(desk: Desk, job: Job) -> str:
    """How far a computation is, or how many are before it."""
    if job.stop.is_set():
        return part("progress", "stopping at the end of this step", 0, 0, None)
    before = desk.before(job)
    if not before:
        left = None if job.left is None else f"about {_duration(job.left)}"
        return part("progress", job.what or "about to begin", job.done, job.total, left)
    if not (many := sum(bool(each.owner) for each in before)):
        return part("progress", "loading the model", 0, 0, None)
    return part("progress", f"waiting: {many} {'run' if many == 1 else 'runs'} before yours", 0, 0, None)


def _duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 100 else f"{round(whole / 60)} min"


def facts(past: Past) -> str:
    """What is known of a finished run."""
    return part("facts", past.result, past.folder, _changed(past))


def cards(runs: Sequence[Past]) -> str:
    """The runs side by side: source and target small, what was asked, and what is not the default."""
    return part("runs", [_card(past) for past in runs])


def _card(past: Past) -> dict[str, Any]:
    settings = " · ".join(f"{key}={value}" for key, value in _changed(past).items())
    return {
        "name": past.folder.name,
        "state": "killed" if past.killed else past.state.get("state", "unknown"),
        "target": past.result["prompts"]["target"] if past.done else past.state.get("error") or "",
        "said": f"{past.result['method']['name']} · {settings or 'defaults'}" if past.done else "",
        "thumbs": [_thumb(past.folder / f"{name}.png") for name in ("source", "target")] if past.done else [],
    }


def _changed(past: Past) -> dict[str, Any]:
    """The settings of a run that are not the defaults, without the files that each run has of its own."""
    files = ("image", "mask", "sketch", "canny", "pose", "cases", "model.path", "pidinet")
    return {key: value for key, value in past.result.get("changed", {}).items() if key not in files}


def _thumb(path: Path) -> str:
    """A small picture as a data: URL."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMB, THUMB))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
