"""A benchmark: rows x cases, single- and multi-turn, edited and scored; what is done is never done again.

FOLDER/edits/ROW/single|multi/CASE/   a case's pictures and result.json, scores.json; or error.json
FOLDER/results.parquet, table.*, report.html   made anew from them at the end
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from masafusion_lab import InputError, config, interrupt, phases, protocol, request
from masafusion_lab.data import sets
from masafusion_lab.data.case import Case
from masafusion_lab.data.digests import check_inputs
from masafusion_lab.inversion import Track, silent
from masafusion_lab.lab import Lab, build, changes, chosen
from masafusion_lab.loading import choose_device
from masafusion_lab.memory import release
from masafusion_lab.once import Once
from masafusion_lab.protocol import Protocol
from masafusion_lab.results import Changed, damage, fail_case, of_settings
from masafusion_lab.runs import case_folder, read_json
from masafusion_lab.scoring import Scorer

log = logging.getLogger(__name__)

RESULTS = ("target_original_size.png", "target.png")
"""What the next turn starts from: the result at the size that the picture had."""


@dataclass(frozen=True)
class Cell:
    """A case in one row of the table, edited by itself ("single") or as a turn of its session ("multi").

    `before`: in a session the turn before; `final`: whether it is the session's last.
    """

    row: str
    setting: str
    case: Case
    before: Case | None = None
    final: bool = True


@dataclass(frozen=True)
class Benchmark:
    """Rows (name -> experiment), cases and protocol, in a folder."""

    folder: Path
    rows: Mapping[str, config.Experiment]
    cases: Sequence[Case]
    settings: tuple[str, ...]
    protocol: Protocol

    @property
    def sessions(self) -> dict[str, list[Case]]:
        """The cases of each session by turn."""
        found: dict[str, list[Case]] = {}
        for case in self.cases:
            if case.session is not None:
                found.setdefault(case.session, []).append(case)
        return {name: sorted(turns, key=lambda case: case.turn) for name, turns in found.items()}

    def cells(self, row: str) -> Iterator[Cell]:
        """All of a row: the cases by themselves, then the sessions turn by turn, all first turns first."""
        if "single" in self.settings:
            yield from (Cell(row, "single", case) for case in self.cases)
        if "multi" in self.settings:
            turns = [
                Cell(row, "multi", case, its[k - 1] if k else None, k + 1 == len(its))
                for its in self.sessions.values()
                for k, case in enumerate(its)
            ]
            yield from sorted(turns, key=lambda cell: cell.case.turn)

    def place(self, row: str, setting: str, case: Case) -> Path:
        """The folder of a case; a first turn is the same by itself and in its session, and made once."""
        setting = "single" if case.turn == 1 else setting
        return case_folder(case_folder(self.folder / "edits", row) / setting, case.id)

    def at(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.place(cell.row, cell.setting, cell.case)

    def parts(self) -> Iterator[Benchmark]:
        """What one process edits at a time: of a row as many cases that stand alone, or sessions, as it batches."""
        units = [*([case] for case in self.cases if case.session is None), *self.sessions.values()]
        for name, row in self.rows.items():
            size = _together(row)
            for k in range(0, len(units), size):
                its = [case for unit in units[k : k + size] for case in unit]
                yield replace(self, rows={name: row}, cases=its)


def read(files: Iterable[Path], words: Iterable[str], quick: bool = False) -> tuple[config.Experiment, Benchmark]:
    """The experiment of a call and its benchmark. Raises InputError with all that is wrong, before a model is read."""
    return of(*request.benchmark(files, words, quick))


def of(base: config.Experiment, rows: Mapping[str, config.Experiment]) -> tuple[config.Experiment, Benchmark]:
    """The experiment with its folder, and its benchmark. Raises InputError for cases that cannot be used.

    And Changed, without `force`, where the folder holds results of other pictures or prompts under the same settings.
    """
    folder = Path(base.out)
    turns = ("single", "multi") if base.bench.turns == "both" else (base.bench.turns,)
    usual = {key: getattr(base, key) for key in config.PROMPTS}
    found = sets.cases(base.bench, folder, Path(base.pidinet) if base.pidinet else None, usual)
    if turns == ("multi",) and not any(case.session for case in found):
        raise InputError("bench.turns=multi: there are no sessions; raise bench.sessions, or take bench.turns=single")
    made = Benchmark(folder, rows, found, turns, protocol.of(base.bench))
    if not base.force:
        _check_inputs(made)
    return base, made


def _check_inputs(bench: Benchmark) -> None:
    """Raise Changed for a result made of other inputs; a later turn's picture is the run's own, and may be another."""
    ask = Once()
    for name, row in bench.rows.items():
        settings = changes(row, *chosen(row))
        for cell in bench.cells(name):
            if cell.before is None:
                check_inputs(cell.case, bench.at(cell), changed=settings, ask=ask)


def edit(
    bench: Benchmark, *, labs: Callable[[str, config.Experiment], Lab | str] | None = None, track: Track = silent
) -> None:
    """Edit what is not done yet. A case that fails is on record in its folder, with the reason, and stops no other.

    `labs`: of `labs_of_rows()`, whose last model is used on. Raises InputError for what would fail every other
    case too, such as a full disk.
    """
    lab_of = labs or labs_of_rows()
    with _unwarned():
        for batch in track([batch for name in bench.rows for batch in _batches(name, bench)], "editing"):
            interrupt.check()
            _edit_batch(bench, batch, lab_of)  # which keeps no lab: the next row's model may need its room


def _edit_batch(bench: Benchmark, batch: Sequence[Cell], lab_of: Callable[[str, config.Experiment], Lab | str]) -> None:
    """Edit cells of one row, or put on record why they have no lab or no picture to start from."""
    row = bench.rows[batch[0].row]
    lab, ready = lab_of(batch[0].row, row), []
    for cell in batch:
        if isinstance(lab, str):
            if error_of(bench.at(cell), row) is not None:
                fail_case(bench.at(cell), lab, bench.folder)
        elif (case := _started(bench, cell)) is not None:
            ready.append((cell, case))
    if isinstance(lab, Lab) and ready:
        _edit(lab, bench, ready)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without warnings of what is odd about a picture or mask: a set's are as they are, and each is read often."""
    reading = logging.getLogger(sets.__package__)
    level = reading.level
    reading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reading.setLevel(level)


def _batches(row: str, bench: Benchmark) -> Iterator[list[Cell]]:
    """Cells of a row that are edited together: of one setting and turn; a first turn once."""
    left: dict[Path, Cell] = {}
    for cell in bench.cells(row):
        left.setdefault(bench.at(cell), cell)
    size = _together(bench.rows[row])
    for _, kin in groupby(left.values(), key=lambda cell: (cell.setting, cell.setting == "multi" and cell.case.turn)):
        its = list(kin)
        yield from (its[k : k + size] for k in range(0, len(its), size))


def _together(row: config.Experiment) -> int:
    """How many cases are edited at once: on the CPU one if it is exact, for rounding grows over turns."""
    with suppress(InputError):  # for a device that is not here; said when the row begins
        return 1 if row.bench.exact and choose_device(row.model.device).type == "cpu" else row.batch
    return 1


def labs_of_rows() -> Callable[[str, config.Experiment], Lab | str]:
    """What gives the lab of a row, or why it has none; rows of one model, one after the other, share it.

    Another model is read when nothing holds the one before any more.
    """
    last: dict[str, Any] = {}

    def lab(name: str, row: config.Experiment) -> Lab | str:
        if last.get("row") != name:
            log.info("row %r", name)
            of_model = row.model, config.method(row).needs.network
            if last.get("settings") != of_model:
                last.clear()
                release()
            try:
                last["lab"] = build(row, model=last.get("model"))
                last["model"], last["settings"] = last["lab"].model, of_model
            except InputError as error:
                log.warning("row %r: %s", name, error)
                last["lab"] = str(error)
            last["row"] = name
        return last["lab"]

    return lab


def _started(bench: Benchmark, cell: Cell) -> Case | None:
    """The case of a cell with what it starts from; None, on record, if the turn before has given nothing."""
    if cell.before is None:
        return cell.case
    before = bench.place(cell.row, cell.setting, cell.before)
    files = read_json(before / "result.json").get("files", ())
    picture = next((name for name in RESULTS if name in files), None)
    if picture is None:
        fail_case(bench.at(cell), f"turn {cell.before.turn} of its session has given no picture", bench.folder)
        return None
    return replace(cell.case, image=before / picture)


def _edit(lab: Lab, bench: Benchmark, ready: Sequence[tuple[Cell, Case]]) -> None:
    """Edit cases together; if that fails one by one, and what fails then is put on record."""
    places, first = [bench.at(cell) for cell, _ in ready], ready[0][0]
    force = bench.rows[first.row].force or first.before is not None  # a later turn follows what the turn before gave
    try:
        if len(ready) > 1:
            phases.edit(lab, [case for _, case in ready], places[0].parent, force=force)
        else:
            phases.edit(lab, [ready[0][1]], places[0], force=force)
    except Exception as error:
        if _is_everybodys(error):
            raise
        if len(ready) > 1:
            for one in ready:
                _edit(lab, bench, [one])
            return
        log.warning("%s, %s: %s", ready[0][0].row, ready[0][1].id, error, exc_info=error)
        why = f"{'' if isinstance(error, InputError) else f'{type(error).__name__}: '}{error}"
        fail_case(places[0], why, bench.folder)
    else:
        for place in places:
            (place / "error.json").unlink(missing_ok=True)


def _is_everybodys(error: Exception) -> bool:
    """Whether it is the machine that fails (a disk is full, a folder may not be written), or a result must stay."""
    cause = error.__cause__ if isinstance(error, InputError) else error
    return isinstance(error, Changed) or (isinstance(cause, OSError) and cause.errno is not None)


def error_of(place: Path, row: config.Experiment) -> str | None:
    """Why a case has no result under the settings of its row; None if it has one."""
    if said := read_json(place / "error.json").get("error"):
        return str(said)
    if not (place / "result.json").is_file():
        return "not edited yet"
    if why := damage(place):
        return f"{why.replace(f'{place}{os.sep}', '')}; run the benchmark again"
    if not of_settings(place, changes(row, *chosen(row))):
        return "edited under other settings; run the benchmark again"
    return None


def score(bench: Benchmark, scorer: Scorer, *, again: bool = False, track: Track = silent) -> list[dict[str, Any]]:
    """A record of each cell, in the rows' order: what it is, why it failed or its values by measure, NaN where none."""
    records: list[dict[str, Any]] = []
    for cell in track([cell for name in bench.rows for cell in bench.cells(name)], "scoring"):
        interrupt.check()
        place, case = bench.at(cell), cell.case
        why = error_of(place, bench.rows[cell.row])
        values, missing = ({}, {}) if why else scorer.score(case, place, again=again)
        records.append(
            {
                "row": cell.row,
                "setting": cell.setting,
                "case": case.id,
                "session": case.session or "",
                "turn": case.turn,
                "final": cell.final,
                "kind": case.kind,
                "error": why or "",
                "missing": "\n".join(f"{name}: {' '.join(reason.split())}" for name, reason in missing.items()),
                **{name: values.get(name, math.nan) for name in bench.protocol.columns},
            }
        )
    return records
