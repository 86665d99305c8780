"""What an edit was made from, as digests: the same picture is known again, another is told from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from masafusion_lab.data.case import Box, Case, Made, Picture
from masafusion_lab.data.pictures import named
from masafusion_lab.hub import fingerprint
from masafusion_lab.once import Ask, call
from masafusion_lab.results import RESULT, Changed, begin_case, of_settings
from masafusion_lab.runs import read_json

UNREAD = "not read"
"""In place of the digest of a hint, for a result whose method reads none."""


def digest(picture: Picture | Box) -> str:
    """The sha256 of a file's bytes, or of a picture's mode, size and pixels; a box in words; "" for what is no file."""
    if isinstance(picture, tuple):
        return named(picture)
    if isinstance(picture, Made):
        picture = picture.make()
    if isinstance(picture, Image.Image):
        return hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()
    try:
        return fingerprint([Path(picture)])
    except OSError:  # said when it is opened
        return ""


def inputs(case: Case) -> dict[str, str]:
    """By name what a case's result depends on beside the settings: prompts as they are, digests of pictures."""
    texts = {"source": case.source, "target": case.target, "instruction": case.instruction, **case.settings}
    pictures = {"image": case.image, "mask": case.mask, **case.hints}
    return {name: text for name, text in texts.items() if text} | {
        name: digest(picture) for name, picture in pictures.items() if picture is not None
    }


def check_inputs(
    case: Case,
    folder: Path,
    *,
    force: bool = False,
    changed: Mapping[str, Any] | None = None,
    weights: Mapping[str, str] | None = None,
    ask: Ask = call,
) -> None:
    """Raise Changed if the folder holds a result of the case made from other inputs or weights under these settings.

    With `force` that result goes, so that it is made again. `changed`: see `lab.changes`, None: the folder says it all;
    `weights`: of the model, None: not looked at; `ask`: see `Once`. What a result does not say of itself is not looked
    at either, nor are hints and settings that its method does not read.
    """
    result = read_json(folder / RESULT)
    if not result or (changed is not None and not of_settings(folder, changed)):
        return
    other = []
    for entry, now in (("inputs", ask(inputs, case)), ("weights", weights)):
        if now and (then := result.get(entry)):
            other += [name for name in {**then, **now} if then.get(name) not in (now.get(name), UNREAD)]
    fields = [f"method.{field}" for field in result.get("method", ())]
    other = [name for name in other if not name.startswith("method.") or ".".join(name.split(".")[:2]) in fields]
    if other and not force:
        raise Changed(
            f"{case.id}: {', '.join(other)}: changed since {folder} was made; write elsewhere with out=FOLDER, or "
            "force=true to make it again"
        )
    if other:
        begin_case(folder)
