"""Where the error of what is kept comes from, and how it grows over the turns of a session.

    python -m experiments.error_budget [--count 8] [--sessions 4] [--out FOLDER] [KEY=VALUE ...]

Budget: outside A, the squared error of test edits by autoencoder, inversion, fusion and seam (two latent cells beside
A). Drift: outside all regions so far, PSNR against the session's first picture after each turn; in pixels, decoded
and encoded again between turns as everywhere else, and in latents, where the next turn starts from the latent of the
one before.
"""

from __future__ import annotations

import argparse
import logging
from collections import deque
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.commandline import at_least, in_one_line
from masafusion_lab import InputError, config, interrupt
from masafusion_lab.data.case import Case
from masafusion_lab.data.picturebook import cases, sessions
from masafusion_lab.editor import Editor, Item
from masafusion_lab.inversion import Direct
from masafusion_lab.lab import Lab, build
from masafusion_lab.look import WIDTH, save, styled
from masafusion_lab.metrics import budget, mse_kept, psnr
from masafusion_lab.progress import bar
from masafusion_lab.runner import heeded
from masafusion_lab.runs import write_json

MODES = ("pixels", "latents")


@torch.no_grad()
def turn(lab: Lab, case: Case, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The latents x_0 of reconstruction and target of an edit that starts from latents x0 (1, C, h, w)."""
    model, inversion = lab.model, lab.inversion
    if not isinstance(inversion, Direct):
        raise InputError("inversion.name: direct or ddim, which need no training")
    prepared = lab.prepare(case)
    text, empty = model.embed([case.source]), model.embed([""])
    record = inversion.invert(model, x0, text, empty, lab.schedule)
    item = Item(case.id, case.source, case.target, prepared.pixels, record, prepared.mask, prepared.hints)
    ready = Editor(model, lab.method, lab.schedule, seed=lab.seed).ready([item])
    last = deque(heeded(lab.method(model, *ready, schedule=lab.schedule)), 1).pop()
    return record.states[-1], last.x["target"]


def decoded(lab: Lab, x0: Tensor) -> Tensor:
    """The picture (3, H, W) of latents (1, C, h, w), of 8-bit levels as it would be saved."""
    return (255 * lab.model.decode(x0)[0].cpu()).round() / 255


def budgets(lab: Lab, number: int) -> dict[str, float]:
    """The mean budget of the first test edits."""
    found = []
    for case in bar(list(cases("test", number)), "error budget"):
        prepared = lab.prepare(case)
        assert prepared.mask_full is not None
        x0 = lab.model.encode(prepared.pixels[None])
        pictures = (decoded(lab, latent) for latent in (x0, *turn(lab, case, x0)))
        found.append(budget(prepared.pixels, *pictures, prepared.mask_full, 2 * lab.model.factor))
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def kept_sessions() -> Iterator[list[Case]]:
    """The test sessions, but those in which the background is edited, after which nothing is left to keep."""
    for index in count():
        turns = list(sessions("test", [index]))
        if all(case.kind != "background" for case in turns):
            yield turns


def drift(lab: Lab, number: int) -> dict[str, list[float]]:
    """By mode the mean PSNR, outside all regions so far, after each turn; the first is that of the round trip alone."""
    found: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for mode in MODES:
        for turns in bar(list(islice(kept_sessions(), number)), f"drift in {mode}"):
            first = lab.prepare(turns[0]).pixels
            x0, edited, line = lab.model.encode(first[None]), torch.zeros_like(first[:1]), []
            line.append(float(psnr((decoded(lab, x0) - first).square().mean())))
            for case in turns:
                mask = lab.prepare(case).mask_full
                assert mask is not None
                edited = torch.maximum(edited, mask)
                _, x0 = turn(lab, case, x0)
                picture = decoded(lab, x0)
                line.append(float(psnr(mse_kept(picture, first, edited, area=True))))
                if mode == "pixels":
                    x0 = lab.model.encode(picture[None])
            found[mode].append(line)
    return {mode: np.mean(lines, axis=0).tolist() for mode, lines in found.items()}


@styled
def draw(parts: dict[str, float], turns: dict[str, list[float]], path: Path) -> None:
    """The budget as bars, the drift as lines."""
    figure = Figure((WIDTH, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh(list(parts), [1e4 * value for value in parts.values()])
    left.invert_yaxis()
    left.set_xlabel("squared error outside A, x1e4")
    for mode, values in turns.items():
        right.plot(range(len(values)), values, marker="o", label=f"in {mode}")
    right.set(xlabel="turn", ylabel="PSNR of what is kept, dB", xticks=range(max(map(len, turns.values()))))
    right.legend()
    save(figure, path.with_suffix(".pdf"), path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=at_least(1), default=8, help="test edits of the budget, the kinds in turn")
    parser.add_argument("--sessions", type=at_least(1), default=4, help="test sessions of the drift, three turns each")
    parser.add_argument("--out", type=Path, default=Path("runs/error_budget"), help="where figure and numbers go")
    parser.add_argument("words", nargs="*", help="key=value settings, such as inversion.name=ddim steps=50")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    with in_one_line(parser), interrupt.handled():
        lab = build(config.load(words=["steps=20", *given.words]))
        parts, turns = budgets(lab, given.count), drift(lab, given.sessions)
    table = Table("outside A", "squared error x1e4", "of the total")
    for name, value in parts.items():
        table.add_row(name, f"{1e4 * value:.2f}", f"{value / parts['total']:.0%}")
    lines = Table("PSNR of what is kept, dB", *(f"turn {k}" if k else "round trip" for k in range(4)))
    for mode, values in turns.items():
        lines.add_row(f"in {mode}", *(f"{value:.2f}" for value in values))
    Console().print(table, lines)
    write_json(given.out / "error_budget.json", {"budget": parts, "drift": turns})
    draw(parts, turns, given.out / "error_budget")
    print(given.out / "error_budget.png")


if __name__ == "__main__":
    main()
