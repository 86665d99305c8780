"""What a benchmark of many edits takes on 1, 8 or 64 devices, from what one edit of each method takes on this one.

    python -m experiments.scale [--edits 1053] [--methods masafusion,plain] [--devices 1,8,64] [--json FILE] [KEY=VALUE]

Each method edits the built-in example once, with a fresh inversion; the time to load the model is measured too, and
paid by every worker. Workers take the next edit when they are free, as in launch.py, the longest methods first.
"""

from __future__ import annotations

import argparse
import heapq
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from masafusion_lab import config, phases
from masafusion_lab.forecast import duration
from masafusion_lab.methods import METHODS
from masafusion_lab.progress import bar
from masafusion_lab.request import cases_of, read
from masafusion_lab.runs import read_json, write_json


def costs(methods: Sequence[str], words: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Seconds to load the model, and of one edit by method."""
    with tempfile.TemporaryDirectory() as folder:
        base = read([f"store={folder}/store", *words], [])
        start = time.perf_counter()
        model = phases.build(base).model
        loading, found = time.perf_counter() - start, {}
        for method in methods:
            experiment = config.load(words=[f"method.name={method}", f"store={folder}/{method}-store"], base=base)
            lab = phases.build(experiment, model=model, track=bar)
            (out,) = phases.edit(lab, cases_of(experiment), Path(folder) / method)
            found[method] = sum(read_json(out / "result.json")["seconds"].values())
        return loading, found


def makespan(seconds: Mapping[str, float], edits: int, devices: int, loading: float) -> float:
    """Seconds until the last of the edits of all methods is done, each device taking the next one when it is free."""
    free = [loading] * devices
    for each in sorted(seconds.values(), reverse=True):
        for _ in range(edits):
            heapq.heapreplace(free, free[0] + each)
    return max(free)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1053, help="of each method; 1053 is MagicBrush's test set")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--devices", default="1,8,64", help="separated by commas")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("words", nargs="*", help="key=value settings, such as model.path=CompVis/stable-diffusion-v1-4")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    loading, seconds = costs(given.methods.split(","), given.words)
    found = {int(n): makespan(seconds, given.edits, int(n), loading) for n in given.devices.split(",")}
    table = Table("devices", "time", "device hours", title=f"{given.edits} edits x {len(seconds)} methods")
    for devices, spent in found.items():
        table.add_row(str(devices), duration(spent), f"{devices * spent / 3600:.1f}")
    Console().print(table)
    if given.json:
        write_json(given.json, {"loading": loading, "seconds": seconds, "makespan": found})


if __name__ == "__main__":
    main()
