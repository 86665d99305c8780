"""What a benchmark leaves and says, made from its records alone: a Parquet file, tables, a page, a table in W&B."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from masafusion_lab import benchpage, config, tables
from masafusion_lab.bench import Benchmark, error_of, score
from masafusion_lab.loading import choose_device
from masafusion_lab.progress import bar
from masafusion_lab.runs import case_folder, read_json, write_parquet, write_text
from masafusion_lab.scoring import Scorer
from masafusion_lab.tables import Record
from masafusion_lab.tracking import log_table, recording

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a row is: cases done, failed and left; seconds and UNet rows of those done."""

    done: int = 0
    failed: int = 0
    left: int = 0
    seconds: float = 0.0
    rows: int = 0


def progress(bench: Benchmark) -> dict[str, Progress]:
    """How far each row is; a first turn counts once."""
    found = {}
    for name, row in bench.rows.items():
        its = found[name] = Progress()
        for place in dict.fromkeys(bench.at(cell) for cell in bench.cells(name)):
            result, why = read_json(place / "result.json"), error_of(place, row)
            if why is None:
                its.done += 1
                its.seconds += sum(result["seconds"].values())
                its.rows += result["rows"]
            elif (place / "error.json").is_file():
                its.failed += 1
            else:
                its.left += 1
    return found


def print_scores(experiment: config.Experiment, bench: Benchmark, *, again: bool = False) -> int:
    """Score a benchmark (`again`: what is scored too), publish it, and print its tables; how many edits failed."""
    scorer = Scorer.of(bench.protocol, experiment.bench.encoders, choose_device(experiment.model.device))
    records = score(bench, scorer, again=again, track=bar)
    with recording(experiment, bench.folder) as loggers:
        found = publish(bench, records, scorer, loggers)
    tables.show(found)
    print(bench.folder / "report.html")
    failed = [record for record in records if record["error"]]
    for why, n in Counter(record["error"] for record in failed).most_common(5):
        log.warning("%d edits are missing: %s", n, why)
    return len(failed)


def print_progress(bench: Benchmark) -> None:
    """Print how far each row of a benchmark is, and about how long the rest will take."""
    table, rest = Table("row", "done", "failed", "left", "s an edit", "UNet rows an edit", box=None), 0.0
    found = progress(bench)
    for name, its in found.items():
        mean = its.seconds / its.done if its.done else 0.0
        rest += mean * its.left
        each = (f"{mean:.1f}", f"{its.rows / its.done:.0f}") if its.done else ("", "")
        table.add_row(Text(name), str(its.done), str(its.failed), str(its.left), *each)
    unknown = [name for name, its in found.items() if its.left and not its.done]
    Console(highlight=False).print(table, f"about {rest / 60:.0f} minutes left of the rows begun", sep="\n")
    if unknown:
        Console(highlight=False).print(Text(f"not begun: {', '.join(unknown)}"), soft_wrap=True)


def publish(
    bench: Benchmark, records: Sequence[Record], scorer: Scorer, loggers: Sequence[Any] = ()
) -> list[tables.Table]:
    """Write results.parquet, table.md, table.csv and report.html into the benchmark's folder, and tell the loggers.

    Of MagicBrush's protocol also the pictures in the layout that its own script reads.
    """
    found = tables.tables(records, bench.protocol)
    write_parquet(bench.folder / "results.parquet", records)
    write_text(bench.folder / "table.md", tables.as_markdown(found))
    write_text(bench.folder / "table.csv", tables.as_csv(found))
    if bench.protocol.name == "magicbrush":
        as_magicbrush(bench)
    cases = {case.id: case for case in bench.cases}
    lines = benchpage.contact(
        bench.folder,
        records,
        lambda record: bench.place(record["row"], record["setting"], cases[record["case"]]),
        cases,
    )
    facts = {
        "protocol": vars(bench.protocol),
        "networks": dict(scorer.facts),
        "cases": len(cases),
        "rows": {name: {"method": row.method, "inversion": row.inversion} for name, row in bench.rows.items()},
    }
    benchpage.write_page(bench.folder, found, records, lines, facts, bench.protocol, cost(bench))
    for logger in loggers:
        log_table(
            logger, "bench/table", [dict(zip(tables.FIELDS, line, strict=True)) for line in tables.plain(found)], step=0
        )
        for table in found:
            ranks = zip(table.names, table.stand.average.tolist(), strict=True)
            logger.log_metrics({f"bench/{table.title}/rank/{name}": rank for name, rank in ranks if rank == rank})
    return found


def cost(bench: Benchmark) -> dict[str, float]:
    """By row the mean seconds of an edit, and of an inversion like its own, which another row may have stored.

    A row is left out if of no such inversion the seconds are known, as of those that earlier versions stored.
    """
    edits: dict[str, list[float]] = {}
    inversions: dict[str, list[float]] = {}
    like: dict[str, str] = {}
    for name, row in bench.rows.items():
        reads = config.method(row).needs.inversion
        for place in dict.fromkeys(bench.at(cell) for cell in bench.cells(name)):
            if error_of(place, row) is None:
                result = read_json(place / "result.json")
                like[name] = json.dumps(result["inversion"], sort_keys=True)
                edits.setdefault(name, []).append(sum(s for phase, s in result["seconds"].items() if phase != "invert"))
                known = result.get("inversion_seconds")
                if known is None and not (reads and result["from_store"]):
                    known = result["seconds"]["invert"]
                if known is not None:
                    inversions.setdefault(like[name], []).append(known)
    return {name: fmean(its) + fmean(inversions[like[name]]) for name, its in edits.items() if like[name] in inversions}


def as_magicbrush(bench: Benchmark) -> None:
    """Link all results into magicbrush/ROW/ID/ID_1.png, ID_inde_K.png and ID_iter_K.png, as its script wants them."""
    for row, experiment in bench.rows.items():
        for cell in bench.cells(row):
            picture, case = bench.at(cell) / "target.png", cell.case
            if case.session is None:
                continue
            how = "1" if case.turn == 1 else f"{'inde' if cell.setting == 'single' else 'iter'}_{case.turn}"
            link = case_folder(bench.folder / "magicbrush", row) / case.session / f"{case.session}_{how}.png"
            link.unlink(missing_ok=True)
            if error_of(bench.at(cell), experiment) is not None:  # what lies there is of other settings
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(picture, link)
            except OSError:  # a file system without links
                shutil.copyfile(picture, link)
