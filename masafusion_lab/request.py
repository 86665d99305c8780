"""What a call asks for: its experiment, checked for the task at hand before anything heavy is loaded, and its cases."""

from __future__ import annotations

import ast
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masafusion_lab import InputError, config
from masafusion_lab.configfile import short
from masafusion_lab.keys import suggest
from masafusion_lab.protocol import NETWORKS, QUICK, lack
from masafusion_lab.sources import assigned

if TYPE_CHECKING:
    from masafusion_lab.data.case import Case

log = logging.getLogger(__name__)

EXAMPLE = Path(__file__).with_name("example") / "example.yaml"
"""The built-in example: image, mask, sketch, source and target, as if they were given."""

OUT = "runs/bench"
"""Folder of a benchmark that names none: always the same, so that the same command goes on."""

OF_ALL_ROWS = ("out", "box", *config.PROMPTS, *config.FILES)
"""Keys beside bench.* that no row of a benchmark may have for itself."""


def read(
    words: Iterable[str],
    files: Iterable[Path],
    *,
    edits: bool = True,
    runs: bool = False,
    needs: Callable[[config.Experiment], Iterable[str]] = lambda experiment: (),
) -> config.Experiment:
    """The experiment of a call, fit for the task; without a picture it is of the built-in example.

    `edits`: whether the task is an edit; `runs`: whether it runs now, so that the log says if it is of the example;
    `needs`: what else is wrong with it, a line each. Raises InputError.
    """
    words, files = list(words), list(files)
    given = {word.partition("=")[0] for word in words}.union(*map(config.read_yaml, files))
    if not given & {"image", "cases"}:
        if not EXAMPLE.is_file():
            raise InputError(f"no image=FILE is given, and the built-in example {EXAMPLE} is not in this installation")
        for key, (_, value) in config.read_yaml(EXAMPLE).items():
            if key not in given and not (key == "mask" and "box" in given):
                words.append(f"{key}={EXAMPLE.with_name(str(value)) if key in config.FILES else value}")
    wrong = _wrong_for_an_edit if edits else _missing
    experiment = config.load(files, words, needs=lambda e: [*wrong(e), *needs(e)])
    if runs and not given & {"image", "cases"}:
        log.info("no image= is given: this is the built-in example, %s", EXAMPLE)
    return experiment


def _missing(e: config.Experiment) -> Iterator[str]:
    """The pictures that are not given, and the files that are named and not there."""
    if not e.image and not e.cases:
        yield "image: missing; give image=FILE, or cases=FOLDER"
    yield from _not_there(e)
    yield from _unwritable(e)


def _not_there(e: config.Experiment) -> Iterator[str]:
    """The files and folders to read that are named and not there."""
    for key in config.FILES:
        value = getattr(e, key)
        known = (key in ("mask", "sketch", "canny") and value == "auto") or (key == "cases" and drawn_cases(value))
        if value and not known and not os.path.exists(value):
            yield f"{key}={value}: no such file"
    adapters = {f"model.adapter.{kind}": folder for kind, folder in e.model.adapter.items()}
    for key, value in {"model.path": e.model.path, "model.unet": e.model.unet, **adapters}.items():
        if value.startswith(("/", ".", "~")) and not Path(value).expanduser().is_dir():
            yield f"{key}={value}: no such folder"


def _wrong_for_an_edit(e: config.Experiment) -> Iterator[str]:
    """What an edit lacks, or has twice."""
    yield from _missing(e)
    if not e.target and not e.instruction and not e.cases and e.method["name"] != "replay":
        yield 'target: missing; say what the picture shall show, target="a rabbit in the snow"'
    own = ("cases", "pidinet") if drawn_cases(e.cases) else ("cases", "pidinet", *config.PROMPTS)
    for key in (*config.PROMPTS, *config.FILES, "box") if e.cases else ():
        if (value := getattr(e, key)) and key not in own:
            yield f"{key}={value}: is not read beside cases={e.cases}; say it there, in a manifest"
    if e.mask and e.box:
        yield f"mask={e.mask}, box={e.box}: one region, not two"
    if e.mask == "auto" and not (e.sketch and e.source_sketch):
        yield "mask=auto: is where two sketches differ; give source_sketch=FILE and sketch=FILE"
    if e.sketch == "auto" and not e.pidinet:
        yield "sketch=auto: give the weights that draw it, pidinet=FILE (table5_pidinet.pth), or take canny=auto"


def _unwritable(e: config.Experiment) -> Iterator[str]:
    """The folders that cannot be made or written to; a store that is there may be one that is only read."""
    if e.out and (why := _why_not(Path(e.out))):
        yield f"out={short(e.out)}: {why}"
    store = Path(e.store).expanduser()
    if e.store and not store.is_dir() and (why := _why_not(store)):
        yield f"store={short(e.store)}: {why}"


def _why_not(folder: Path) -> str:
    """What keeps a folder from being made or written to, found by trying it, of which nothing is left; "": nothing."""
    folder = folder.absolute()
    above = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        for place in (folder, *(above / name for name in folder.relative_to(above).parts)):
            with suppress(FileNotFoundError):
                place.stat()  # raises for a name that is too long, and below a file
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        return f"cannot be written to ({error.strerror}: {short(str(above))}); give another folder"
    return ""


def benchmark(
    files: Iterable[Path], words: Iterable[str], quick: bool = False, writes: bool = True
) -> tuple[config.Experiment, dict[str, config.Experiment]]:
    """The experiment of a benchmark, with its folder, and those of its rows by name; no case is looked at.

    `quick`: of ten cases, in a folder of their own; `writes`: whether anything will be written there. Raises InputError
    with all that is wrong.
    """
    files, words = list(files), list(words)
    if quick:
        words += [f"bench.{key}={value}" for key, value in QUICK.items()]
    base = config.load(files, words, needs=lambda e: [*_wrong_for_a_benchmark(e), *(_unwritable(e) if writes else ())])
    chosen = {name: text for name, text in base.bench.rows.items() if name in (base.bench.only or base.bench.rows)}
    rows, problems = {}, []
    for name, text in chosen.items():
        try:
            own = shlex.split(text)
            if whole := [word for word in own if word.startswith(("bench.", *(f"{key}=" for key in OF_ALL_ROWS)))]:
                raise InputError(f"{whole[0]}: holds for all rows; write it beside bench.rows, not in one")
            rows[name] = config.load(files, [*words, *own])
        except (InputError, ValueError) as error:
            problems.append(f"row {name!r}: {error}")
    if problems:
        raise InputError("\n  ".join([f"{len(problems)} of {len(chosen)} rows cannot be used:", *problems]))
    return replace(base, out=f"{base.out or OUT}{'-quick' * quick}"), rows


def _wrong_for_a_benchmark(e: config.Experiment) -> Iterator[str]:
    """What a benchmark lacks, or names that is not there."""
    bench = e.bench
    yield from _not_there(e)
    if not bench.rows:
        yield "bench.rows: missing; take --config configs/table1_picturebook.yaml, or name rows in a file"
    for name in [name for name in bench.only if bench.rows and name not in bench.rows]:
        yield f"bench.only: {name!r} is no row; they are {', '.join(bench.rows)}{suggest(name, bench.rows)}"
    for name in [name for name in bench.encoders if name not in NETWORKS]:
        yield f"bench.encoders.{name}: must be one of {', '.join(NETWORKS)}{suggest(name, NETWORKS)}"
    if why := lack(bench):
        yield why
    kinds = ast.literal_eval(assigned("masafusion_lab.picturebook.changes", "EDITS"))
    for name in [name for name in bench.kinds if bench.data == "picturebook" and name not in kinds]:
        yield f"bench.kinds: {name!r} is none of {', '.join(kinds)}{suggest(name, kinds)}"
    own = ("pidinet", *config.PROMPTS) if bench.data == "folder" else ("pidinet",)
    for key in (*config.PROMPTS, *config.FILES, "box"):
        if (value := getattr(e, key)) and key not in own:
            yield f"{key}={value}: is not read by a benchmark; its cases are those of bench.data={bench.data}"


def drawn_cases(cases: str) -> int:
    """How many of the picture-book world's test edits "picturebook:8" names; 0 of anything else."""
    match = re.fullmatch(r"picturebook:(\d{1,6})", cases)
    return int(match[1]) if match else 0


def cases_of(e: config.Experiment) -> list[Case]:
    """The cases that an experiment names, by `cases` or by `image` and what goes with it. Raises InputError.

    Its prompts are those of every case of a folder or manifest that has none of its own.
    """
    from masafusion_lab import hints, pidinet
    from masafusion_lab.data.case import HINTS, Case
    from masafusion_lab.data.pictures import open_hint, open_picture

    if count := drawn_cases(e.cases):
        from masafusion_lab.data import picturebook

        return list(picturebook.cases("test", count))
    if e.cases:
        from masafusion_lab.data.folder import read_cases

        return read_cases(Path(e.cases), {key: getattr(e, key) for key in config.PROMPTS})
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
