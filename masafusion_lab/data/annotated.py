"""A set of pictures while it is annotated: a folder, and the manifest in it that is written anew at each annotation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from masafusion_lab import InputError
from masafusion_lab.data.case import Case
from masafusion_lab.data.folder import SUFFIXES, read_cases
from masafusion_lab.runs import case_folder, write_picture, write_text

MANIFEST = "manifest.jsonl"
DRAWINGS = "annotations"
"""Folder of the masks and sketches, beside the manifest."""


def annotated(folder: Path) -> dict[str, Case]:
    """The cases of a folder by id: those in its manifest as they are annotated, its other pictures with captions alone.

    A picture whose id the manifest gives to another goes by its whole name.
    Raises InputError for a manifest that cannot be used.
    """
    known = _said(folder)
    pictures = folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    seen, taken = {case.image for case in known}, {case.id for case in known}
    new = [case for case in (read_cases(folder) if pictures else []) if case.image not in seen]
    new = [replace(case, id=Path(str(case.image)).name) if case.id in taken else case for case in new]
    return {case.id: case for case in sorted([*new, *known], key=lambda case: str(case.image))}


def is_whole(case: Case) -> bool:
    """Whether a case says what it shows, what it shall show, and where."""
    return bool(case.source and case.target and case.mask is not None)


def annotate(folder: Path, id: str, texts: Mapping[str, str], drawings: Mapping[str, Image.Image | None]) -> None:
    """Keep what is said of a picture (source, target, instruction) and drawn over it (mask, sketch, canny, pose).

    A text that is empty and a drawing that is None are taken away; what is not named stays. Where nothing changes the
    manifest is not written. Of several who annotate a folder none undoes another's pictures; the manifest is whole at
    any moment, and names no file that is not there. Raises InputError.
    """
    folder = folder.resolve()
    with FileLock(folder / f".{MANIFEST}.lock"):
        cases = annotated(folder)
        if id not in cases:
            raise InputError(f"{id!r} is no picture of {folder} any more; load the page again")
        rows = {case.id: _row(case, folder) for case in (*_said(folder), cases[id])}
        anew = {*texts, *drawings, *(["box"] if "mask" in drawings else [])}
        row = {column: value for column, value in rows[id].items() if column not in anew}
        row |= {column: text for column, text in texts.items() if text}
        for column, drawing in drawings.items():
            if drawing is not None:
                row[column] = f"{DRAWINGS}/{case_folder(Path(), id)}-{column}.png"
                write_picture(folder / row[column], drawing)
        if row == rows[id]:
            return
        rows[id] = row
        if row.keys() == {"id", "image"}:
            del rows[id]
        if rows:
            lines = (json.dumps(row, ensure_ascii=False) for row in rows.values())
            write_text(folder / MANIFEST, "".join(f"{line}\n" for line in lines))
        else:  # which nobody could read
            (folder / MANIFEST).unlink(missing_ok=True)


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
