"""Which guidance w the model wants: L1 against the true target, and edits done, on validation edits, over w.

    python -m experiments.picturebook.guidance [--count 40] [--w 1.5,2.5,4,7.5] [--json FILE] [KEY=VALUE ...]

Inversion and edit have the same w. The best has the smallest mean L1 of all rows. What is there is not made again.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.commandline import at_least, in_one_line, some_of
from masafusion_lab import config, interrupt, lab, phases
from masafusion_lab.data.picturebook import cases
from masafusion_lab.metrics import l1
from masafusion_lab.picturebook.judge import Judge, done
from masafusion_lab.progress import bar
from masafusion_lab.runs import write_json
from masafusion_lab.scoring import pair

ROWS = {"plain": "method.name=plain", "MaSaFusion": "method.name=masafusion", "P2P": "method.name=prompt_to_prompt",
        "MaSaFusion, NTI": "method.name=masafusion inversion.name=null_text inversion.preset=reference"}  # fmt: skip


def measure(row: str, w: float, count: int, out: Path, words: Sequence[str]) -> tuple[float, float]:
    """L1 and the part of the edits that is done, means over validation edits."""
    guided = [f"method.guidance={w}", *([f"inversion.guidance={w}"] if "null_text" in ROWS[row] else [])]
    experiment = config.load(words=[*ROWS[row].split(), *guided, *words])
    edits = list(cases("validation", count))
    folders = phases.edit(lab.build(experiment, track=bar), edits, out / f"{row}-{w:g}".replace(", ", "-"))
    judge, found = Judge.load(), []
    for case, folder in zip(edits, folders, strict=True):
        its = pair(case, folder / "target.png")
        assert its.at_truth is not None
        assert its.truth is not None
        found.append((float(l1(its.at_truth, its.truth)), float(done(judge(its.edited[None]), its.drawn)[0])))
    error, are_done = np.mean(found, axis=0)
    return float(error), float(are_done)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=at_least(1), default=40, help="validation edits, the kinds in turn")
    parser.add_argument("--w", default="1,1.5,2,2.5,3,4,5,7.5", help="guidances, separated by commas")
    parser.add_argument("--only", type=some_of(ROWS), default=list(ROWS), help="rows, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/guidance"), help="where the edits are kept")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("words", nargs="*", help="key=value settings of the edits, such as steps=20")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    tried = [float(w) for w in given.w.split(",")]
    with in_one_line(parser), interrupt.handled():
        found = {row: {w: measure(row, w, given.count, given.out, given.words) for w in tried} for row in given.only}
    best = min(tried, key=lambda w: sum(of[w][0] for of in found.values()))
    table = Table("L1 (edits done) at w", *(f"{w:g}" for w in tried), title=f"{given.count} validation edits")
    for row, of in found.items():
        table.add_row(row, *(f"{error:.4f} ({are_done:.2f})" for error, are_done in of.values()))
    Console().print(table)
    print(f"the smallest mean L1 of all rows is at w = {best:g}")
    if given.json:
        write_json(given.json, {"count": given.count, "guidance": best, "rows": found})


if __name__ == "__main__":
    main()
