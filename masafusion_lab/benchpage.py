"""The page of a benchmark: tables, plots, and a contact sheet to look at, cases on which methods disagree first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from masafusion_lab import InputError
from masafusion_lab.data.case import Case, Picture
from masafusion_lab.data.pictures import open_picture
from masafusion_lab.look import SERIES, save, styled
from masafusion_lab.metrics import MEASURES
from masafusion_lab.protocol import Protocol
from masafusion_lab.report import page
from masafusion_lab.runs import case_folder, replacing, write_text
from masafusion_lab.tables import NOTE, Record, Table, caption, cells, headings

SHOWN = 60
"""Cases of the contact sheet."""
THUMB = 128
"""Pixels of the short side of its pictures."""


@dataclass(frozen=True)
class Line:
    """A case of the contact sheet: what it asks, how far its results lie apart, and a cell for each row.

    `given`: thumbnails of the source and, where it is known, of the true target. A cell is (picture, page, error); of
    a case that failed the error alone. Paths are below the benchmark's folder.
    """

    case: Case
    given: Sequence[str]
    apart: float
    cells: Sequence[tuple[str, ...]]


def write_page(
    folder: Path, found: Sequence[Table], records: Sequence[Record], lines: Sequence[Line], facts: Mapping[str, Any],
    protocol: Protocol, cost: Mapping[str, float],
) -> Path:  # fmt: skip
    """Write report.html and its plots into a benchmark's folder; `cost`: row -> seconds an edit."""
    plots = [
        _plot(folder / "plots" / "by_kind.png", lambda figure: by_kind(figure, records, protocol)),
        _plot(folder / "plots" / "cost.png", lambda figure: quality(figure, found[0], cost)),
    ]
    shown = [
        {"table": table, "headings": headings(table), "caption": caption(table),
         "rows": list(zip(table.names, cells(table), strict=True))}
        for table in found
    ]  # fmt: skip
    text = page(
        "bench.html",
        title=folder.resolve().name,
        tables=shown,
        note=NOTE,
        plots=[plot.relative_to(folder).as_posix() for plot in plots if plot],
        names=found[0].names if found else [],
        lines=lines,
        left_out=len({record["case"] for record in records}) - len(lines),
        facts=facts,
    )
    path = folder / "report.html"
    write_text(path, text)
    return path


def contact(
    folder: Path, records: Sequence[Record], place: Callable[[Record], Path], cases: Mapping[str, Case]
) -> list[Line]:
    """The lines of the contact sheet, of the records edited by themselves, the SHOWN that lie farthest apart.

    The farthest first; writes thumbnails of theirs into FOLDER/thumbs. How far apart: the mean over pixels of the
    standard deviation over rows, in levels of 255.
    """
    by_case: dict[str, list[Path | str]] = {}  # by row its folder, or why there is none
    for record in records:
        if record["setting"] == records[0]["setting"]:
            by_case.setdefault(record["case"], []).append(record["error"] or place(record))
    apart = {case: _apart([where for where in its if isinstance(where, Path)]) for case, its in by_case.items()}
    lines = []
    for case in sorted(by_case, key=lambda case: -apart[case])[:SHOWN]:
        out, given = list[tuple[str, ...]](), []
        for where in by_case[case]:
            if isinstance(where, str):
                out.append(("", "", where))
                continue
            thumb = folder / "thumbs" / f"{where.parts[-3]}-{where.name}.png"
            _thumbnail(where / "target.png", thumb)
            files = thumb, where / "report.html"
            out.append((*(file.relative_to(folder).as_posix() for file in files), ""))
        for name, picture in (("source", cases[case].image), ("truth", cases[case].truth)):
            if picture is not None:
                thumb = case_folder(folder / "thumbs", case).with_suffix(f".{name}.png")
                try:
                    _thumbnail(picture, thumb)
                except InputError:  # said where the case failed, or is not scored
                    continue
                given.append(thumb.relative_to(folder).as_posix())
        lines.append(Line(cases[case], given, apart[case], out))
    return lines


def _apart(folders: Sequence[Path]) -> float:
    """How far results lie apart."""
    seen = [open_picture(folder / "target.png").resize((32, 32), Image.Resampling.BOX) for folder in folders]
    return float(np.std([np.asarray(image, np.float32) for image in seen], axis=0).mean()) if len(seen) > 1 else 0.0


def _thumbnail(picture: Picture, thumb: Path) -> None:
    small = open_picture(picture)
    small.thumbnail((2 * THUMB, 2 * THUMB))
    with replacing(thumb) as partial:
        small.save(partial)


@styled
def _plot(path: Path, draw: Callable[[Figure], bool]) -> Path | None:
    """Write what `draw` makes of a figure, if it has something to show."""
    figure = Figure((5.6, 3.2), layout="constrained")
    if not draw(figure):
        return None
    save(figure, path)
    return path


def by_kind(figure: Figure, records: Sequence[Record], protocol: Protocol) -> bool:
    """The mean of a measure by kind of edit, a mark a row: the judge's verdict where there is one, else the first."""
    kinds = sorted({record["kind"] for record in records if record["kind"]})
    alone = [record for record in records if record["setting"] == records[0]["setting"]]
    measure = "done" if "done" in protocol.columns else protocol.ranked[0]
    if len(kinds) < 2:
        return False
    axes = figure.subplots()
    rows = list(dict.fromkeys(record["row"] for record in alone))
    for k, row in enumerate(rows):
        its = [[r[measure] for r in alone if r["row"] == row and r["kind"] == kind] for kind in kinds]
        means = [float(np.nanmean(v)) if np.isfinite(v).any() else np.nan for v in map(np.array, its)]
        aside = 0.7 * ((k + 0.5) / len(rows) - 0.5)
        axes.plot(np.arange(len(kinds)) + aside, means, "osD^"[k // len(SERIES) % 4], label=row)
    axes.set_ylabel(MEASURES[measure].title)
    axes.set_xticks(range(len(kinds)), kinds, rotation=20)
    axes.grid(axis="y")
    figure.legend(loc="outside right upper")
    return True


def quality(figure: Figure, table: Table, cost: Mapping[str, float]) -> bool:
    """Seconds an edit against the average rank, a point a row, with the rank's interval."""
    stand = table.stand
    drawn = [r for r, name in enumerate(table.names) if name in cost and stand.average[r].isfinite()]
    if not drawn:
        return False
    axes = figure.subplots()
    for r in drawn:
        x, y = cost[table.names[r]], float(stand.average[r])
        below, above = y - float(stand.average_low[r]), float(stand.average_high[r]) - y
        axes.errorbar(x, y, [[max(0, below)], [max(0, above)]], fmt="o", capsize=3, linewidth=1)
        axes.annotate(table.names[r], (x, y), xytext=(6, 4), textcoords="offset points")
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.set(xlabel="seconds an edit, with its inversion", ylabel=f"average rank, {table.title} (the best on top)")
    return True
