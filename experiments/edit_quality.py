"""Are edits done, and is the rest kept? Test edits of the picture-book world, whose region and judge are known.

    python -m experiments.edit_quality [--count 50] [--inversion direct,null_text] [--json FILE] [KEY=VALUE ...]

keep_gain_db: PSNR outside the region against the source, of MaSaFusion less that of plain DDIM-inversion editing of
the same cases. edit_success: the part of the edits that the world's judge finds done. What is there is not made again.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.commandline import at_least, in_one_line, some_of
from masafusion_lab import config, interrupt, lab, phases
from masafusion_lab.data.case import Picture
from masafusion_lab.data.picturebook import cases
from masafusion_lab.metrics import mse_kept, psnr
from masafusion_lab.picturebook.changes import EDITS
from masafusion_lab.picturebook.judge import Judge, done
from masafusion_lab.progress import bar
from masafusion_lab.runs import write_json
from masafusion_lab.scoring import pair

BARS = {"keep_gain_db": 3.0, "edit_success": 0.6}


def targets(method: str, inversion: str, count: int, out: Path, words: Sequence[str]) -> list[Path]:
    """The edited test pictures of one method with one inversion."""
    experiment = config.load(words=[f"method.name={method}", f"inversion.name={inversion}", *words])
    folders = phases.edit(lab.build(experiment, track=bar), list(cases("test", count)), out / f"{method}-{inversion}")
    return [folder / "target.png" for folder in folders]


def measure(edited: Sequence[Picture], judge: Judge) -> dict[str, list[float]]:
    """By case: PSNR outside the region against the source, and whether the judge finds the edit done."""
    found: dict[str, list[float]] = defaultdict(list)
    for case, picture in zip(cases("test", len(edited)), edited, strict=True):
        its = pair(case, picture)
        assert its.mask is not None
        found["kept_db"].append(float(psnr(mse_kept(its.at_source, its.source, its.mask, area=True))))
        found["done"].append(float(done(judge(its.edited[None]), its.drawn)[0]))
    return found


def run(count: int, inversions: Sequence[str], out: Path, words: Sequence[str]) -> dict[str, Any]:
    """The numbers of all inversions, with those by kind of edit."""
    judge, facts = Judge.load(), {"count": count}
    plain = measure(targets("plain", "ddim", count, out, words), judge)
    truth = measure([case.truth for case in cases("test", count) if case.truth is not None], judge)
    rows = {"plain, DDIM": plain, "truth": truth}
    for inversion in inversions:
        ours = rows[f"masafusion, {inversion}"] = measure(targets("masafusion", inversion, count, out, words), judge)
        facts[inversion] = {
            "keep_gain_db": float(np.mean(ours["kept_db"]) - np.mean(plain["kept_db"])),
            "edit_success": float(np.mean(ours["done"])),
        }
    facts["rows"] = {name: {key: float(np.mean(values)) for key, values in row.items()} for name, row in rows.items()}
    facts["by_kind"] = {
        name: {kind: float(np.mean(row["done"][k :: len(EDITS)])) for k, kind in enumerate(EDITS[:count])}
        for name, row in rows.items()
    }
    return facts | facts[inversions[0]]


def show(facts: dict[str, Any]) -> None:
    """Print the numbers as tables."""
    console = Console()
    table = Table(
        "", "outside A, dB", "edit done", *EDITS, title=f"{facts['count']} test edits of the picture-book world"
    )
    for name, row in facts["rows"].items():
        kinds = (f"{value:.2f}" for value in facts["by_kind"][name].values())
        table.add_row(name, f"{row['kept_db']:.1f}", f"{row['done']:.2f}", *kinds)
    console.print(table)
    for inversion, numbers in facts.items():
        if isinstance(numbers, dict) and BARS.keys() <= numbers.keys():
            for key, bar_ in BARS.items():
                verdict = "reached" if numbers[key] >= bar_ else "NOT reached"
                console.print(f"{inversion}: {key} {numbers[key]:.2f}, at least {bar_:g}: {verdict}")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=at_least(1), default=50, help="test edits, the kinds in turn")
    parser.add_argument("--inversion", type=some_of(phases.INVERSIONS), default=["direct", "null_text"],
                        help="of MaSaFusion, separated by commas")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/edit_quality"), help="where the edits are kept")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("words", nargs="*", help="key=value settings of the edits, such as batch=5")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    with in_one_line(parser), interrupt.handled():
        facts = run(given.count, given.inversion, given.out, given.words)
    show(facts)
    if given.json:
        write_json(given.json, facts)


if __name__ == "__main__":
    main()
