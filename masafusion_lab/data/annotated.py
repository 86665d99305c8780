"""A set of pictures while it is annotated: a folder, and the manifest in it that is written anew at each annotation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from masafusion_lab import InputError
from masafusion_lab.data.case import Case
from masafusion_lab.data.folder import SUFFIXES, TEXTS, read_cases
from masafusion_lab.runs import case_folder, write_picture, write_text

MANIFEST = "manifest.jsonl"
DRAWINGS = "annotations"
"""Folder of the masks and sketches, beside the manifest."""


def annotated(folder: Path) -> dict[str, Case]:
    """The cases of a folder by id: those in its manifest as they are annotated, its other pictures without prompts.

    Raises InputError for a manifest that cannot be used.
    """
    known = _said(folder)
    pictures = folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    seen = {case.image for case in known}
    new = [case for case in (read_cases(folder) if pictures else []) if case.image not in seen]
    return {case.id: case for case in sorted([*new, *known], key=lambda case: str(case.image))}


def is_whole(case: Case) -> bool:
    """Whether a case says what it shows, what it shall show, and where."""
    return bool(case.source and case.target and case.mask is not None)


def annotate(folder: Path, id: str, texts: Mapping[str, str], drawings: Mapping[str, Image.Image | None]) -> Case:
    """Keep what is said of a picture (source, target, instruction) and drawn over it (mask, sketch, canny, pose).

    A drawing that is None is taken away. Of several who annotate a folder none undoes another's pictures; the manifest
    is whole at any moment, and names no file that is not. Raises InputError.
    """
    folder = folder.resolve()
    with FileLock(folder / f".{MANIFEST}.lock"):
        cases = annotated(folder)
        if id not in cases:
            raise InputError(f"{id!r} is no picture of {folder} any more; load the page again")
        rows = {case.id: _row(case, folder) for case in (*_said(folder), cases[id])}
        row = {column: value for column, value in rows[id].items() if column not in drawings and column != "box"}
        row |= {column: text for column, text in texts.items() if column in TEXTS}
        for column, drawing in drawings.items():
            name = f"{DRAWINGS}/{case_folder(Path(), id)}-{column}.png"
            if drawing is not None:
                write_picture(folder / name, drawing)
                row[column] = name
        rows[id] = row
        write_text(folder / MANIFEST, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows.values()))
        return annotated(folder)[id]


def _said(folder: Path) -> list[Case]:
    """The cases of the manifest, if there is one."""
    manifest = folder / MANIFEST
    return read_cases(manifest) if manifest.exists() else []


def _row(case: Case, folder: Path) -> dict[str, Any]:
    """The row of a manifest that is read to this case."""

    def name(picture: Any) -> str:
        return Path(picture).resolve().relative_to(folder).as_posix()

    row: dict[str, Any] = {"id": case.id, "image": name(case.image)}
    row |= {text: value for text in ("source", "target", "instruction") if (value := getattr(case, text))}
    if isinstance(case.mask, tuple):
        row["box"] = list(case.mask)
    elif case.mask is not None:
        row["mask"] = name(case.mask)
    row |= {kind: name(hint) for kind, hint in case.hints.items()}
    return row | ({"truth": name(case.truth)} if case.truth else {})
