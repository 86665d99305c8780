"""The cases of a benchmark, from whichever set it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image

from masafusion_lab import InputError, hints
from masafusion_lab.data import folder as folders
from masafusion_lab.data import magicbrush, picturebook, piebench
from masafusion_lab.data.case import Case, Made
from masafusion_lab.data.pictures import named, open_picture
from masafusion_lab.picturebook.edits import EDITS
from masafusion_lab.pidinet import sketch
from masafusion_lab.protocol import Bench, lack
from masafusion_lab.runs import case_folder, write_picture
from masafusion_lab.store import home


def cases(
    bench: Bench, folder: Path, pidinet: Path | None = None, usual: Mapping[str, str] = folders.NONE
) -> list[Case]:
    """The cases that a benchmark runs over; conditions that are drawn for them are kept in `folder`.

    `pidinet`: the weights that draw sketches; `usual`: see `folder.read_cases`. Raises InputError with all that
    is wrong with the set.
    """
    if why := lack(bench):
        raise InputError(why)
    if bench.data == "picturebook":
        if strange := set(bench.kinds) - set(EDITS):
            raise InputError(f"bench.kinds: {strange.pop()!r} is none of {', '.join(EDITS)}")
        assert bench.count is not None
        assert bench.sessions is not None
        alone = picturebook.cases("test", bench.count, kinds=bench.kinds or EDITS)
        found = [*alone, *picturebook.sessions("test", bench.sessions)]
    else:
        found = _selected(_read(bench, usual), bench)
    if bench.hint == "sketch" and pidinet is None and any(not case.hints for case in found):
        raise InputError("bench.hint=sketch: give the weights that draw it, pidinet=FILE, or take bench.hint=canny")
    if twice := [id for id, times in Counter(case.id for case in found).items() if times > 1]:
        raise InputError(f"bench.data={bench.data}: case {twice[0]!r} is there twice")
    if not found:
        raise InputError("bench.count, bench.sessions: no cases are left; take more")
    return [_hinted(case, bench.hint, folder / "hints", pidinet) for case in found]


def _read(bench: Bench, usual: Mapping[str, str]) -> list[Case]:
    root = Path(bench.root)
    if bench.data == "piebench":
        return piebench.read_cases(root)
    if bench.data == "folder":
        return folders.read_cases(root, usual)
    if not (root / "edit_sessions.json").is_file() and (root / "data").is_dir():
        unpacked = case_folder(home() / "sets", str(root.resolve()))
        if not (unpacked / "edit_sessions.json").is_file():
            magicbrush.unpack(root, unpacked)
        return magicbrush.read_sessions(unpacked, texts=root)
    return magicbrush.read_sessions(root)


def _selected(found: Sequence[Case], bench: Bench) -> list[Case]:
    """The first so many cases that stand alone, of the kinds, and all turns of the first so many sessions."""
    kinds = sorted({case.kind for case in found if case.kind})
    if strange := set(bench.kinds) - set(kinds):
        raise InputError(f"bench.kinds: {strange.pop()!r} is none of {', '.join(kinds) or 'this set, which has none'}")
    alone = (case for case in found if case.session is None and (not bench.kinds or case.kind in bench.kinds))
    names = set(islice(dict.fromkeys(case.session for case in found if case.session is not None), bench.sessions))
    return [*islice(alone, bench.count), *(case for case in found if case.session in names)]


def _hinted(case: Case, kind: str, folder: Path, pidinet: Path | None) -> Case:
    """The case with a condition drawn from its target picture, once, where it has none and there is one."""
    if not kind or case.hints or case.truth is None:
        return case
    file = case_folder(folder, f"{case.id} {named(case.truth)} {pidinet}").with_suffix(f".{kind}.png")
    return replace(case, hints={kind: Made(f"{case.id}: its {kind}", partial(_drawn, case, kind, file, pidinet))})


def _drawn(case: Case, kind: str, file: Path, pidinet: Path | None) -> Image.Image:
    if not file.is_file():
        assert case.truth is not None
        truth = open_picture(case.truth)
        write_picture(file, hints.canny(truth) if kind == "canny" else sketch(truth, pidinet))
    with Image.open(file, formats=["PNG"]) as drawn:
        return drawn.convert("L")
