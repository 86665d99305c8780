"""What a benchmark takes on 1, 8 or 64 devices, from what an edit of each of its rows takes on this one.

    python -m experiments.scale [--config FILE] [--edits 1053] [--cases 1] [--devices 1,8,64] [--json FILE] [KEY=VALUE]

Each row of the benchmark (Table 1's ten) edits the same few cases; as in the benchmark, an inversion that several rows
read is paid by the first. Workers pay for loading the model, and then take the next edit when they are free, row by row
as in launch.py. A row that cannot run here is named and left out. Of the published model and set:
--config configs/table1_magicbrush.yaml bench.root=FOLDER pidinet=table5_pidinet.pth.
"""

from __future__ import annotations

import argparse
import heapq
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.commandline import at_least, in_one_line
from masafusion_lab import bench, interrupt, phases, publish
from masafusion_lab.forecast import duration
from masafusion_lab.progress import bar
from masafusion_lab.runs import write_json


def costs(file: Path, count: int, words: Sequence[str], folder: Path) -> tuple[float, dict[str, float], dict[str, str]]:
    """Seconds to load a model, of an edit by row, and why a row has none."""
    places = [f"bench.count={count}", f"bench.sessions={count}", f"out={folder}", f"store={folder / 'store'}"]
    _, made = bench.read([file], [*places, *words])
    made = replace(made, cases=made.cases[:count], settings=("single",))
    start = time.perf_counter()
    phases.build(next(reversed(made.rows.values())))
    loading = time.perf_counter() - start
    bench.edit(made, track=bar)
    found = publish.progress(made)
    lost = {name: bench.error_of(made.place(name, "single", made.cases[0]), row) for name, row in made.rows.items()}
    return (
        loading,
        {name: its.seconds / its.done for name, its in found.items() if its.done},
        {name: why or "failed" for name, why in lost.items() if not found[name].done},
    )


def makespan(seconds: Mapping[str, float], edits: int, devices: int, loading: float) -> float:
    """Seconds until the last of the edits of all rows is done, each device taking the next one when it is free."""
    free = [loading] * devices
    for each in seconds.values():
        for _ in range(edits):
            heapq.heapreplace(free, free[0] + each)
    return max(free)


def numbers(text: str) -> list[int]:
    """Some whole numbers from 1 on, separated by commas."""
    return [at_least(1)(each) for each in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table1 = Path(__file__).parents[1] / "configs" / "table1_picturebook.yaml"
    parser.add_argument("--config", type=Path, default=table1, help="of the benchmark")
    parser.add_argument("--edits", type=at_least(1), default=1053, help="of each row; 1053 is MagicBrush's test set")
    parser.add_argument("--cases", type=at_least(1), default=1, help="that are measured")
    parser.add_argument("--devices", type=numbers, default=[1, 8, 64], help="separated by commas")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("words", nargs="*", help="key=value settings, such as model.path=CompVis/stable-diffusion-v1-4")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    with in_one_line(parser), interrupt.handled(), tempfile.TemporaryDirectory() as folder:
        loading, seconds, lost = costs(given.config, given.cases, given.words, Path(folder) / "bench")
    found = {n: makespan(seconds, given.edits, n, loading) for n in given.devices}
    rows = Table("row", "seconds an edit")
    for name, each in seconds.items():
        rows.add_row(name, f"{each:.1f}")
    table = Table("devices", "time", "device hours", title=f"{given.edits} edits x {len(seconds)} rows")
    for devices, spent in found.items():
        table.add_row(str(devices), duration(spent), f"{devices * spent / 3600:.1f}")
    Console().print(rows, table)
    for name, why in lost.items():
        print(f"left out: {name}: {why}")
    if given.json:
        write_json(given.json, {"loading": loading, "seconds": seconds, "lost": lost, "makespan": found})


if __name__ == "__main__":
    main()
