"""What a sweep of fusion windows costs with shared rows, and whether several workers end in the same bytes.

    python -m experiments.sweep_cost [--json FILE] [--steps 50] [--grid 5] [--cases 4] [KEY=VALUE ...]

rows_target, rows_both: UNet rows after the inversion of all windows [a, b) on the grid, of fusion of the target
(Figure 12, second row) or of the intermediate image too; rows_*_alone: of the same engine point by point. wall_ratio:
its time point by point over the time of the sweep, on the built-in example. equal: whether the pictures are, to one
level of 255. launcher_equal: whether two local workers, one of them killed, end in the bytes of one process.
launcher_efficiency: the time of two processes with half of the cases each over that of two workers with all of them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.commandline import at_least, in_one_line, show
from masafusion_lab import InputError, config, launch, phases, survey
from masafusion_lab.axes import Launch
from masafusion_lab.data.picturebook import cases
from masafusion_lab.forecast import count, usual_rows
from masafusion_lab.progress import bar
from masafusion_lab.request import cases_of, read
from masafusion_lab.runner import Runner
from masafusion_lab.runs import read_json, write_json, write_text
from masafusion_lab.sweep import sweep

BARS = {"rows_target": ("<=", 3200), "rows_both": ("<=", 4200), "wall_ratio": (">=", 4.5), "equal": (">=", 1),
        "launcher_equal": (">=", 1), "launcher_efficiency": (">=", 0.9)}  # fmt: skip


def windows(steps: int, grid: int, store: Path, words: Sequence[str]) -> config.Experiment:
    """The experiment of all windows of the built-in example."""
    return read([f"steps={steps}", f"axes.method.fusion_steps=windows(0,{steps},{grid})", f"store={store}", *words], [])


def rows(experiment: config.Experiment, runner_of: Any) -> tuple[int, int, int]:
    """UNet rows of a sweep on its first case, shared and point by point, and how many at once."""
    runner, case, points = runner_of(experiment)
    works = runner.ready(runner.works(case, points))
    given = experiment.sweep.rows
    runner.rows = usual_rows(runner, works[0]) if given == "auto" else int(given)
    return count(runner, works), sum(count(runner, [work]) for work in works), runner.rows


def cost(steps: int, grid: int, folder: Path, words: Sequence[str]) -> dict[str, float]:
    """Rows, and the time of one sweep beside that of its points one by one."""
    target = windows(steps, grid, folder / "store", words)
    both = config.load(words=["method.fusion_of=both"], base=target)
    lab = phases.build(target, track=bar)

    def runner_of(experiment: config.Experiment, out: str = "count") -> tuple[Runner, Any, Any]:
        surveyed = survey.read(experiment, cases_of(experiment), folder / out)
        return Runner(surveyed, lab, track=bar), surveyed.cases[0], surveyed.points

    found: dict[str, float] = {}
    found["rows_target"], found["rows_target_alone"], most = rows(target, runner_of)
    found["rows_both"], found["rows_both_alone"], _ = rows(both, runner_of)
    points = runner_of(target)[2]
    pictures, seconds = [], []
    for out, parts in (("together", [points]), ("apart", [[point] for point in points])):
        runner, case, points = runner_of(target, out)
        runner.rows = most
        start = time.perf_counter()
        for part in parts:
            runner.run(case, part)
        seconds.append(time.perf_counter() - start)
        places = (runner.survey.place(case, point) / "target.png" for point in points)
        pictures.append([np.asarray(Image.open(place), int) for place in places])
    worst = max(int(np.abs(a - b).max()) for a, b in zip(*pictures, strict=True))
    same = sum(bool((a == b).all()) for a, b in zip(*pictures, strict=True))
    found |= {"rows_at_once": most, "seconds_shared": seconds[0], "seconds_alone": seconds[1]}
    return found | {"wall_ratio": seconds[1] / seconds[0], "identical": same, "levels": worst, "equal": worst <= 1}


def manifest(folder: Path, count: int) -> Path:
    """Test edits of the picture-book world as files."""
    lines = ["id,image,mask,sketch,truth,source,target"]
    for case in cases("test", count):
        for name, picture in (("image", case.image), ("mask", case.mask), ("sketch", case.hints["sketch"]),
                              ("truth", case.truth)):  # fmt: skip
            (folder / case.id).mkdir(parents=True, exist_ok=True)
            picture.save(folder / case.id / f"{name}.png")  # type: ignore[union-attr]
        files = ",".join(f"{case.id}/{name}.png" for name in ("image", "mask", "sketch", "truth"))
        lines.append(f'{case.id},{files},"{case.source}","{case.target}"')
    write_text(folder / "cases.csv", "\n".join(lines) + "\n")
    return folder / "cases.csv"


def workers(steps: int, grid: int, number: int, folder: Path, words: Sequence[str]) -> dict[str, float]:
    """Two local workers beside one process, and beside two halves."""
    paths = [manifest(folder / "cases", number)]
    head, *lines = paths[0].read_text().splitlines()
    for n in (0, 1):
        paths.append(paths[0].with_name(f"half-{n}.csv"))
        write_text(paths[-1], "\n".join([head, *lines[n::2]]) + "\n")
    plan = f"steps={steps} axes.method.fusion_steps=windows(0,{steps},{grid}) store={folder}/shared sweep.rows=8"
    every, *halves = (config.load(words=[*plan.split(), f"cases={path}", *words]) for path in paths)
    sweep(every, cases_of(every), folder / "one", track=bar)

    def prepared(experiment: config.Experiment, out: str) -> Path:
        (folder / out).mkdir()
        write_json(folder / out / "plan.json", read_json(folder / "one/plan.json"))
        write_text(folder / out / "config.yaml", config.to_yaml(experiment))
        return folder / out

    how = Launch("local", workers=2)
    two = launch.workers("sweep", prepared(every, "two"), how, every.model.device)
    apart = [replace(worker, folder=str(prepared(half, f"half-{n}")))
             for n, (worker, half) in enumerate(zip(two, halves, strict=True))]  # fmt: skip
    start = time.perf_counter()
    for process in [launch.start(worker) for worker in apart]:
        process.wait()
    in_halves, start = time.perf_counter() - start, time.perf_counter()
    deque(launch.local(two, how, folder / "two"), 0)
    efficiency = in_halves / (time.perf_counter() - start)
    place, started, start_of = prepared(every, "killed"), list[Any](), launch.start

    def kill() -> None:
        while not list(place.glob("cases/*/*.safetensors")):  # until a worker is in the middle of an item
            time.sleep(0.02)
        started[0].kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    launch.start = lambda *its: started.append(start_of(*its)) or started[-1]  # type: ignore[func-returns-value]
    deque(launch.local([replace(worker, folder=str(place)) for worker in two], how, place), 0)
    launch.start = start_of
    made = [{p.relative_to(folder / out): p.read_bytes() for p in (folder / out).rglob("target.png")}
            for out in ("one", "two", "killed")]  # fmt: skip
    was_killed = len(started) == 3
    return {"launcher_equal": was_killed and made[0] == made[1] == made[2], "launcher_efficiency": efficiency}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--steps", type=at_least(1), default=50, help="denoising steps")
    parser.add_argument("--grid", type=at_least(1), default=5, help="of the windows, in steps")
    parser.add_argument("--cases", type=at_least(0), default=4, help="that two workers share, 2 or more; 0: without")
    parser.add_argument("words", nargs="*", help="key=value settings")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    with in_one_line(parser), tempfile.TemporaryDirectory() as folder:
        if given.cases == 1:
            raise InputError("--cases 1: two workers cannot share it; 2 or more, or 0")
        found = cost(given.steps, given.grid, Path(folder), given.words)
        if given.cases:
            found |= workers(given.steps, given.grid, given.cases, Path(folder), given.words)
    show(found, BARS)
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
