"""What MaSaFusion costs with null-text and with direct inversion: seconds, UNet rows, memory, beside the paper's ratio.

    python -m experiments.timing [--repeat N] [--out FOLDER] [KEY=VALUE ...]

Each run is the command line's own, in a process and with a store of its own: reading the model is in "whole", not in
the phases. The paper reports 43.9 s (DI) and 184.2 s (NTI) an image on a V100, 4.2 times as much.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.commandline import at_least, in_one_line
from experiments.methods import inversion_rows
from experiments.speed import command
from masafusion_lab import config, lab
from masafusion_lab.look import panel, save, styled
from masafusion_lab.runs import write_json

RUNS = {
    "DI": ["inversion.name=direct"],
    "NTI, paper": ["inversion.name=null_text", "inversion.preset=paper"],
    "NTI, reference": ["inversion.name=null_text", "inversion.preset=reference"],
}
PAPER = {"DI": 43.9, "NTI, paper": 184.2}
NUMBERS = {
    "invert": ("invert, s", 1), "edit": ("edit, s", 1), "whole": ("whole, s", 1), "inverted": ("rows to invert", 0),
    "rows": ("rows of the edit", 0), "memory_gb": ("memory, GB", 1), "ratio": ("seconds over DI's", 1),
}  # fmt: skip
"""Key to heading and digits."""


def run(repeat: int, words: list[str]) -> dict[str, dict[str, float]]:
    """By inversion the medians: seconds by phase and whole, UNet rows by phase, the most memory held.

    Those of an inversion are at most so many, its early stop aside, and a backward pass counts as two forward ones.
    """
    found = {}
    for name, settings in RUNS.items():
        experiment, taken = config.load(words=[*settings, *words]), []
        inverted = inversion_rows(lab.chosen(experiment)[0], experiment.steps)
        for _ in range(repeat):
            whole, result = command([*settings, *words])
            edit = sum(spent for phase, spent in result["seconds"].items() if phase != "invert")
            taken.append({"invert": result["seconds"]["invert"], "edit": edit, "whole": whole, "inverted": inverted,
                          "rows": result["rows"], "memory_gb": result["peak_memory_gb"]})  # fmt: skip
        found[name] = {key: statistics.median(each[key] for each in taken) for key in taken[0]}
    for row in found.values():
        row["ratio"] = (row["invert"] + row["edit"]) / (found["DI"]["invert"] + found["DI"]["edit"])
    return found


@styled
def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of seconds an image, its inversion and its edit, with the ratios."""
    figure, axes = panel(6, 2.2)
    names = list(found)
    axes.barh(names, [found[name]["invert"] for name in names], label="inversion")
    axes.barh(names, [found[name]["edit"] for name in names], left=[found[name]["invert"] for name in names],
              label="edit")  # fmt: skip
    for k, name in enumerate(names):
        paper = f", paper {PAPER[name] / PAPER['DI']:.1f}x" if name in PAPER else ""
        total = found[name]["invert"] + found[name]["edit"]
        axes.text(total, k, f" {found[name]['ratio']:.1f}x{paper}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("seconds an image")
    axes.legend()
    save(figure, path.with_suffix(".pdf"), path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=at_least(1), default=1, help="runs of each, of which the median is taken")
    parser.add_argument("--out", type=Path, default=Path("runs/timing"), help="where figure and numbers go")
    parser.add_argument("words", nargs="*", help="key=value settings, such as model.path=FOLDER image=FILE")
    given = parser.parse_args(argv)
    with in_one_line(parser):
        found = run(given.repeat, given.words)
    table = Table("", *found)
    for key, (head, digits) in NUMBERS.items():
        table.add_row(head, *(f"{row[key]:.{digits}f}" for row in found.values()))
    table.add_row("the paper's", *(f"{PAPER[name] / PAPER['DI']:.1f}" if name in PAPER else "" for name in found))
    Console().print(table)
    write_json(given.out / "timing.json", found)
    draw(found, given.out / "timing")
    print(given.out / "timing.png")


if __name__ == "__main__":
    main()
