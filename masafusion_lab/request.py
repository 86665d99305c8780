"""What a call asks for: its experiment, checked for the task at hand before anything heavy is loaded, and its cases."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masafusion_lab import InputError, config

if TYPE_CHECKING:
    from masafusion_lab.data.case import Case

log = logging.getLogger(__name__)

EXAMPLE = Path(__file__).parents[1] / "examples" / "example.yaml"
"""The built-in example: image, mask, sketch, source and target, as if they were given."""


def read(words: Iterable[str], files: Iterable[Path], *, edits: bool = True) -> config.Experiment:
    """The experiment of a call, fit for the task; without a picture it is of the built-in example."""
    words, files = list(words), list(files)
    given = {word.partition("=")[0] for word in words}.union(*map(config.read_yaml, files))
    if not given & {"image", "cases"}:
        if not EXAMPLE.is_file():
            raise InputError(f"no image=FILE is given, and the built-in example {EXAMPLE} is not in this installation")
        log.info("no image= is given: this is the built-in example, %s", EXAMPLE)
        for key, (_, value) in config.read_yaml(EXAMPLE).items():
            if key not in given and not (key == "mask" and "box" in given):
                words.append(f"{key}={EXAMPLE.with_name(str(value)) if key in config.FILES else value}")
    return config.load(files, words, needs=_wrong_for_an_edit if edits else _missing)


def _missing(e: config.Experiment) -> Iterator[str]:
    """The pictures that are not given, and the files that are named and not there."""
    if not e.image and not e.cases:
        yield "image: missing; give image=FILE, or cases=FOLDER"
    for key in config.FILES:
        value = getattr(e, key)
        known = (key in ("mask", "sketch", "canny") and value == "auto") or (key == "cases" and drawn_cases(value))
        if value and not known and not os.path.exists(value):
            yield f"{key}={value}: no such file"
    if e.model.path.startswith(("/", ".", "~")) and not Path(e.model.path).expanduser().is_dir():
        yield f"model.path={e.model.path}: no such folder"


def _wrong_for_an_edit(e: config.Experiment) -> Iterator[str]:
    """What an edit lacks, or has twice."""
    yield from _missing(e)
    if not e.target and not e.instruction and not e.cases and e.method["name"] != "replay":
        yield 'target: missing; say what the picture shall show, target="a rabbit in the snow"'
    for key in (*config.PROMPTS, *config.FILES, "box") if e.cases else ():
        if (value := getattr(e, key)) and key not in ("cases", "pidinet"):
            yield f"{key}={value}: is not read beside cases={e.cases}; say it there, in a manifest"
    if e.mask and e.box:
        yield f"mask={e.mask}, box={e.box}: one region, not two"
    if e.mask == "auto" and not (e.sketch and e.source_sketch):
        yield "mask=auto: is where two sketches differ; give source_sketch=FILE and sketch=FILE"
    if e.sketch == "auto" and not e.pidinet:
        yield "sketch=auto: give the weights that draw it, pidinet=FILE (table5_pidinet.pth), or take canny=auto"


def drawn_cases(cases: str) -> int:
    """How many of the picture-book world's test edits "picturebook:8" names; 0 of anything else."""
    match = re.fullmatch(r"picturebook:(\d{1,6})", cases)
    return int(match[1]) if match else 0


def cases_of(e: config.Experiment) -> list[Case]:
    """The cases that an experiment names, by `cases` or by `image` and what goes with it. Raises InputError."""
    from masafusion_lab import hints, pidinet
    from masafusion_lab.data.case import HINTS, Case
    from masafusion_lab.data.pictures import open_hint, open_picture

    if count := drawn_cases(e.cases):
        from masafusion_lab.data import picturebook

        return list(picturebook.cases("test", count))
    if e.cases:
        from masafusion_lab.data.folder import read_cases

        return read_cases(Path(e.cases))
    drawn: dict[str, Any] = {kind: Path(getattr(e, kind)) for kind in HINTS if getattr(e, kind)}
    if e.canny == "auto":
        drawn["canny"] = hints.canny(open_picture(Path(e.hint_from or e.image)))
    if e.sketch == "auto":
        drawn["sketch"] = pidinet.sketch(open_picture(Path(e.hint_from or e.image)), Path(e.pidinet))
    region: Any = Path(e.mask) if e.mask else None
    if e.box:
        region = config.box(e.box)
    elif e.mask == "auto":
        sketches = (open_hint(Path(e.source_sketch)), open_hint(drawn["sketch"]))
        region = hints.region_from_sketches(*sketches, dilate=e.region.margin, hull=e.region.hull)
    image = Path(e.image)
    return [Case(image.stem, image, e.source, e.target, e.instruction, mask=region, hints=drawn)]
