"""How fast the engine is, as ratios within one run, and what the default edits take.

    python -m experiments.speed [--json FILE] [--only nti_ratio,edit_over_rows,...]

nti_ratio: an inner step of null-text inversion with trainable UNet weights, as published, over ours with frozen ones,
on a random model of SD 1.4's shape at 512x512; nti_ratio_picturebook: on the built-in model, whose weights are few.
edit_over_rows: a DI edit (50 inversion rows and 500 of Algorithm 1) over 550 bare UNet rows at the best batch size.
di_seconds, nti_seconds: `masafusion edit` with a fresh store, start to end. sd14_peak_gb: peak memory of a two-step
edit on the model of SD 1.4's shape. app_seconds: `masafusion app`, from start to its first page.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from experiments.commandline import in_one_line, show, some_of
from masafusion_lab import InputError, lab, phases
from masafusion_lab.model import StableDiffusion
from masafusion_lab.progress import bar
from masafusion_lab.request import cases_of, read
from masafusion_lab.runs import write_json

BARS = {"nti_ratio": (">=", 2.5), "edit_over_rows": ("<=", 1.10), "di_seconds": ("<=", 40.0),
        "nti_seconds": ("<=", 150.0), "app_seconds": ("<=", 5.0)}  # fmt: skip


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """The median time of a call, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def latents(model: StableDiffusion, rows: int) -> torch.Tensor:
    """Gaussian latents of the model's own size."""
    side = model.native // model.factor
    return torch.randn(rows, model.unet.config.in_channels, side, side, device=model.device)


def inner_step(model: StableDiffusion, trainable: bool) -> Callable[[], None]:
    """One gradient step of an embedding through the UNet; `trainable`: gradients of all weights are summed up too."""
    schedule, x, text = model.schedule(), latents(model, 1), model.embed([""])
    null = text.clone().requires_grad_()
    optimizer = torch.optim.Adam([null], 1e-2)

    def step() -> None:
        model.unet.requires_grad_(trainable)
        optimizer.zero_grad()
        model.eps(x, 10, schedule, null).square().mean().backward()
        optimizer.step()
        model.unet.requires_grad_(False)

    return step


def nti_ratio(model: StableDiffusion, repeats: int) -> float:
    """The published form, in which the UNet's weights gather gradients too, over ours; both with the text eps kept."""
    ours = seconds(inner_step(model, False), repeats)
    return seconds(inner_step(model, True), repeats) / ours


def edit_over_rows(model: StableDiffusion) -> dict[str, float]:
    """The denoising of the example, with its inversion, over as many bare rows."""
    schedule = model.schedule()

    def bare(rows: int) -> float:
        x, text = latents(model, rows), model.embed([""]).expand(rows, -1, -1)
        with torch.no_grad():
            return seconds(lambda: model.eps(x, 10, schedule, text)) / rows

    row = min(bare(rows) for rows in (1, 2, 4, 8, 10, 16))
    with tempfile.TemporaryDirectory() as folder:
        experiment = read([f"store={folder}/store"], [])
        example = lab.build(experiment, track=bar)
        start = time.perf_counter()
        (out,) = phases.edit(example, cases_of(experiment), Path(folder) / "run")
        spent = time.perf_counter() - start
        result = json.loads((out / "result.json").read_text())
    return {"row_ms": 1000 * row, "edit_over_rows": spent / (550 * row), "rows": result["rows"]}


def command(words: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Seconds and result of `masafusion edit` in a process and with a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        call = ["edit", f"out={folder}/run", f"store={folder}/store", "tracking.mode=off", *words]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "masafusion_lab.cli", *call], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start, json.loads(Path(folder, "run", "result.json").read_text())


def app_seconds() -> float:
    """Seconds from the start of `masafusion app` until its page has come."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        call = [sys.executable, "-m", "masafusion_lab.cli", "app", f"out={folder}"]
        with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            assert server.stdout is not None
            try:
                if not (said := server.stdout.readline().split()):
                    raise InputError("app_seconds: the lab did not start; see why with masafusion app")
                urllib.request.urlopen(said[0]).read()
                return time.perf_counter() - start
            finally:
                server.send_signal(signal.SIGINT)


@cache
def sd14() -> tempfile.TemporaryDirectory[str]:
    """The folder of a random model of SD 1.4's shape, made once."""
    folder = tempfile.TemporaryDirectory()
    subprocess.run([sys.executable, "-m", "experiments.random_sd", folder.name], check=True)
    return folder


def load(path: str = "picturebook") -> StableDiffusion:
    """A model on this machine's device, in the precision that is usual there."""
    return StableDiffusion.load(path, device="auto", dtype="auto")


NUMBERS: dict[str, Callable[[], Any]] = {
    "nti_ratio": lambda: nti_ratio(load(sd14().name), 3),
    "nti_ratio_picturebook": lambda: nti_ratio(load(), 9),
    "edit_over_rows": lambda: edit_over_rows(load()),
    "di_seconds": lambda: command([])[0],
    "nti_seconds": lambda: command(["inversion.name=null_text"])[0],
    "sd14_peak_gb": lambda: command([f"model.path={sd14().name}", "steps=2", "size=512"])[1]["peak_memory_gb"],
    "app_seconds": app_seconds,
}
"""How each is taken, some with others beside it."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=some_of(NUMBERS), default=list(NUMBERS), help="numbers, separated by commas")
    parser.add_argument("--json", type=Path, help="also write the numbers there, as they come")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    found: dict[str, float] = {"threads": torch.get_num_threads()}
    with in_one_line(parser):
        try:
            for name in (name for name in NUMBERS if name in given.only):
                taken = NUMBERS[name]()
                found |= taken if isinstance(taken, dict) else {name: taken}
                if given.json:
                    write_json(given.json, found)
        finally:
            show(found, BARS)


if __name__ == "__main__":
    main()
