"""The tables of a benchmark, with intervals, ranks and marks of significance: text, Markdown, CSV and plain rows."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor

from masafusion_lab.metrics import MEASURES
from masafusion_lab.protocol import Protocol
from masafusion_lab.ranks import Standing, standing

Record = Mapping[str, Any]

BLOCKS: dict[str, Callable[[Record], bool]] = {
    "single-turn": lambda record: record["setting"] == "single",
    "multi-turn, final turn": lambda record: record["setting"] == "multi" and record["final"],
    "multi-turn, all turns": lambda record: record["setting"] == "multi",
}
"""Title to the records in it: MagicBrush's all-turn, its final-turn, and every turn of the sessions."""

NOTE = (
    "± is half of a 95 % interval (paired bootstrap, sessions drawn whole); * is worse than the best of its column by "
    "more than chance; rank is the mean over the ranked columns, ties averaged; a missing value is left out, and "
    "the number of those that are there follows in brackets."
)


@dataclass(frozen=True)
class Table:
    """One block: `names` of rows, measures `columns`, how rows stand, `cases` in all and `failed` by row.

    `why`: of a column in which something is missing, the reasons with their counts.
    """

    title: str
    names: Sequence[str]
    columns: Sequence[str]
    ranked: Sequence[str]
    stand: Standing
    cases: int
    failed: Mapping[str, int]
    why: Mapping[str, Mapping[str, int]]


def tables(records: Sequence[Record], protocol: Protocol, *, draws: int = 2000) -> list[Table]:
    """The tables of a benchmark's records, in the order of BLOCKS, but those without records."""
    return [
        _table(title, its, protocol, draws)
        for title, belongs in BLOCKS.items()
        if (its := [record for record in records if belongs(record)])
    ]


def _table(title: str, records: Sequence[Record], protocol: Protocol, draws: int) -> Table:
    names, columns = list(dict.fromkeys(record["row"] for record in records)), protocol.columns
    cases = list(dict.fromkeys(record["case"] for record in records))
    groups = {record["case"]: record["session"] or record["case"] for record in records}
    values = torch.full((len(names), len(columns), len(cases)), torch.nan, dtype=torch.float64)
    where = {case: n for n, case in enumerate(cases)}, {name: r for r, name in enumerate(names)}
    why: dict[str, dict[str, int]] = {}
    for record in records:
        values[where[1][record["row"]], :, where[0][record["case"]]] = torch.tensor(
            [record[column] for column in columns], dtype=torch.float64
        )
        for said in filter(None, record["missing"].split("\n")):
            column, _, reason = said.partition(": ")
            why.setdefault(column, {}).setdefault(reason, 0)
            why[column][reason] += 1
    stand = standing(
        values,
        [MEASURES[column].higher_is_better for column in columns],
        [groups[case] for case in cases],
        ranked=[columns.index(column) for column in protocol.ranked],
        draws=draws,
    )
    failed = {name: sum(bool(r["error"]) for r in records if r["row"] == name) for name in names}
    return Table(title, names, columns, protocol.ranked, stand, len(cases), failed, why)


def cells(table: Table) -> Iterator[list[tuple[str, bool]]]:
    """The text of each row's columns, and whether it is the column's best: mean ± half interval, * if clearly worse."""
    s = table.stand
    for r in range(len(table.names)):
        out = []
        for m, column in enumerate(table.columns):
            shown = MEASURES[column]
            if not math.isfinite(s.mean[r, m]):
                out.append(("n/a", False))
                continue
            half = float(s.high[r, m] - s.low[r, m]) / 2 * shown.times
            text = f"{float(s.mean[r, m]) * shown.times:.{shown.digits}f}"
            text += f"±{half:.{shown.digits}f}" if math.isfinite(half) else ""
            few = f" ({int(s.count[r, m])})" if s.count[r, m] < table.cases else ""
            out.append((text + "*" * bool(s.worse[r, m]) + few, _is_least(s.rank[:, m], r)))
        rank = f"{float(s.average[r]):.2f}"
        if math.isfinite(s.average_low[r]):
            rank += f" [{float(s.average_low[r]):.1f}, {float(s.average_high[r]):.1f}]"
        out.append((rank if math.isfinite(s.average[r]) else "n/a", _is_least(s.average, r)))
        yield out


def _is_least(x: Tensor, r: int) -> bool:
    """Whether x[r] is the least of those that are not NaN."""
    return bool(x[r] <= x.nan_to_num(math.inf).min())


def headings(table: Table) -> list[str]:
    """The columns' titles, each with the direction that is better, and the rank's."""
    marks = {True: "↑", False: "↓"}
    return [
        *(f"{MEASURES[column].title} {marks[MEASURES[column].higher_is_better]}" for column in table.columns),
        "rank ↓",
    ]


def caption(table: Table) -> str:
    """How many cases, what failed, and what is missing."""
    lines = [f"{table.cases} case{'s' if table.cases > 1 else ''}."]
    if failed := {name: n for name, n in table.failed.items() if n}:
        lines.append("Not edited: " + ", ".join(f"{name} {n}" for name, n in failed.items()) + ".")
    for column, reasons in table.why.items():
        said = "; ".join(f"{reason} ({n})" for reason, n in reasons.items())
        lines.append(f"{MEASURES[column].title} is missing where: {said}.")
    return " ".join(lines)


def show(found: Sequence[Table]) -> None:
    """Print tables, each in as many parts as the terminal's width asks for, with the note that explains them."""
    out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for table in found:
        for part in as_rich(table, out.width):
            out.print(part, "")
        out.print(Text(caption(table)), "")
    out.print(Text(NOTE))


def as_rich(table: Table, width: int) -> Iterator[RichTable]:
    """For a terminal of `width` characters: below a mean its interval, below a rank its own."""
    shown = [[(re.sub(r"(?=±)| (?=[\[(])", "\n", text), best) for text, best in row] for row in cells(table)]
    heads = headings(table)
    needs = [
        max(map(len, "\n".join([head.replace(" ", "\n"), *(row[m][0] for row in shown)]).splitlines()))
        for m, head in enumerate(heads)
    ]
    names, first = max(map(len, table.names)), 0
    while first < len(heads):
        last, left = first + 1, width - names - needs[first] - 2
        while last < len(heads) and left >= needs[last] + 2:
            left, last = left - needs[last] - 2, last + 1
        part = RichTable("", title=None if first else table.title, title_justify="left", box=SIMPLE, show_edge=False)
        part.padding = (0, 1, 0, 0)
        for m in range(first, last):
            part.add_column(heads[m], justify="right", width=needs[m])
        for name, row in zip(table.names, shown, strict=True):
            part.add_row(Text(name), *(Text(text, "bold" if best else "") for text, best in row[first:last]))
        yield part
        first = last


def as_markdown(found: Sequence[Table]) -> str:
    """All tables, with the note that explains them."""
    out = []
    for table in found:
        out += [
            f"### {table.title}",
            "",
            "|  | " + " | ".join(headings(table)) + " |",
            "|---|" + "---|" * len(headings(table)),
        ]
        for name, row in zip(table.names, cells(table), strict=True):
            texts = (f"**{text}**" if best else text.replace("*", "\\*") for text, best in row)
            out.append(f"| {_unmarked(name)} | " + " | ".join(texts) + " |")
        out += ["", _unmarked(caption(table)), ""]
    return "\n".join([*out, NOTE, ""])


def _unmarked(text: str) -> str:
    """A text in one line of Markdown in which nothing of it is markup, an entity or the end of a cell."""
    return re.sub(r"([\\`*{}\[\]<>|~&#$!]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def as_csv(found: Sequence[Table]) -> str:
    """One line a number, unrounded, under FIELDS; of each row the last is its average rank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    for line in plain(found):
        writer.writerow([_no_formula(cell) if isinstance(cell, str) else cell for cell in line])
    return text.getvalue()


def _no_formula(text: str) -> str:
    """A text in one line that no spreadsheet takes for a formula, of which some read signs of full width too."""
    line = " ".join(text.split())
    return f"'{line}" if line.startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20")) else line


FIELDS = ("block", "row", "measure", "mean", "low", "high", "cases", "rank", "worse")


def plain(found: Sequence[Table]) -> Iterator[list[Any]]:
    """The lines of `as_csv`; what there is not is None."""
    for table in found:
        s = table.stand
        for r, name in enumerate(table.names):
            for m, column in enumerate(table.columns):
                numbers = [_number(part[r, m]) for part in (s.mean, s.low, s.high)]
                rank, worse = _number(s.rank[r, m]), bool(s.worse[r, m])
                yield [table.title, name, column, *numbers, int(s.count[r, m]), rank, worse]
            average = [_number(part[r]) for part in (s.average, s.average_low, s.average_high)]
            yield [table.title, name, "average rank", *average, len(table.ranked), None, None]


def _number(x: Any) -> float | None:
    return float(x) if math.isfinite(x) else None
