"""What does watching cost, do word maps find their things, and does fusion inside a region interfere less?

    python -m experiments.attention [--only overhead,word_iou,interference] [--count 200] [--json FILE] [KEY=VALUE ...]

overhead_time and overhead_memory: of all default taps in one edit, 0.1 being 10 %; with model.path=FOLDER size=512
steps=5 of another model. word_iou: of the map of a thing's word, cut by Otsu's threshold, with the thing's true region,
over test pictures that are inverted, not edited. interference: the share of the target's self-attention that crosses
the border of the region, by method, over test edits. Intervals are of 95 %, by the bootstrap over pictures. What is
there already is not made again.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from masafusion_lab import config, phases
from masafusion_lab.attention import Tap
from masafusion_lab.callbacks import Attend, peak_memory_gb
from masafusion_lab.data.case import Case
from masafusion_lab.data.picturebook import cases
from masafusion_lab.fusion import Branch, Plan, Span, Take
from masafusion_lab.given import Given
from masafusion_lab.lockstep import State, lockstep
from masafusion_lab.maps import Attention
from masafusion_lab.methods.protocol import Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.picturebook import picture
from masafusion_lab.picturebook.draw import coverage
from masafusion_lab.progress import bar
from masafusion_lab.request import cases_of, read
from masafusion_lab.runs import read_json, write_json
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site
from masafusion_lab.watch import Watch

BARS = {"overhead_time": 0.15, "overhead_memory": 0.10}
NUMBERS = "numbers.json"


@dataclass(frozen=True)
class Unmasked:
    """Fusion without a region: (13) everywhere, the target reading the source's K and V in every step and layer."""

    name: ClassVar[str] = "unmasked"
    guidance: float = 7.5

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """The source, and the target that reads it."""
        target = Branch("target", "target", take=Take(None, "S", "S", Span(), Span()))  # (13)
        return Plan({"S": Branch("source", "source", null="tuned"), "T": target}, {"target": "T"})

    def __call__(
        self,
        model: StableDiffusion,
        given: Given,
        source: Source,
        x: Tensor,
        *,
        schedule: Schedule,
        taps: Sequence[Tap] = (),
    ) -> Iterator[State]:
        """Edit; see `Method`."""
        plan, start = self.plan(model.sites, len(schedule)), {"target": source.states[0]}
        replay = {"source": source.states}
        yield from lockstep(model, plan, start, given, schedule=schedule, replay=replay, w=self.guidance, taps=taps)


def one_edit(words: Sequence[str], watched: bool) -> tuple[float, float]:
    """Seconds of the example's denoising, the processor's where the model runs on it, and peak gigabytes."""
    experiment = read(words, [])
    lab = phases.build(experiment)
    (case,) = cases_of(experiment)
    ((_, record, _),) = phases.invert(lab, [case])
    editor = phases.Editor(lab.model, lab.method, lab.schedule)
    item = phases._item(case, lab.prepare(case), record)
    if watched:
        watch = Watch(bins=max(1, min(Watch.bins, len(lab.schedule) // 5)))  # short runs are looked at as often
        editor.watch = lambda batch: watch.begin(editor, batch).taps
    start = time.process_time()
    (edited,) = editor.predict_step([item])
    spent = time.process_time() - start if lab.model.device.type == "cpu" else edited.seconds["denoise"]
    return spent, peak_memory_gb() or 0.0


def overhead(words: Sequence[str], repeats: int) -> dict[str, float]:
    """What watching adds to one edit, each measured in a process of its own, the two by turns; medians."""
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(repeats):
        for watched in found:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[watched].append(pool.submit(one_edit, words, watched).result())
    (seconds, gb), (seconds_watched, gb_watched) = (np.median(found[watched], axis=0) for watched in (False, True))
    return {
        "overhead_time": float(seconds_watched / seconds - 1),
        "overhead_memory": float(gb_watched / gb - 1),
        "seconds": float(seconds),
        "peak_gb": float(gb),
    }


def numbers(
    out: Path,
    words: Sequence[str],
    over: Sequence[Case],
    measure: Callable[[Attention], Mapping[str, Any]],
    method: Any = None,
) -> list[dict[str, Any]]:
    """What is measured of each case's attention; it is kept in the case's folder, and found there the next time."""
    lab = phases.build(config.load(words=words), track=bar)

    def keep(folder: Path, pictures: Mapping[str, Image.Image], attention: Attention) -> dict[str, Image.Image]:
        write_json(folder / NUMBERS, measure(attention))
        return {}

    folders = phases.edit(
        replace(lab, method=method or lab.method),
        over,
        out,
        callbacks=[Attend(Watch(), keep=keep)],
        whole=lambda folder: (folder / NUMBERS).is_file(),
    )
    return [read_json(folder / NUMBERS) for folder in folders]


def word_iou(count: int, out: Path, words: Sequence[str]) -> dict[str, Any]:
    """IoU of word maps with the true regions of things, a mean a picture; by chance, with another picture's."""
    scenes = [picture("test", index) for index in range(count)]
    things = [{t.kind: coverage(scene, k) > 0.5 for k, t in enumerate(scene.things)} for scene, _, _ in scenes]
    over = [
        Case(f"test-{k:05d}", Image.fromarray(pixels), caption, "") for k, (_, caption, pixels) in enumerate(scenes)
    ]

    def measure(attention: Attention) -> dict[str, float]:
        k = int(attention.facts["case"].removeprefix("test-"))
        maps = attention.words("source")
        masks = {kind: maps.word(kind).mask(*region.shape).numpy() for kind, region in things[k].items()}
        other = list(things[(k + 1) % count].values())
        return {
            "iou": float(np.mean([iou(mask, things[k][kind]) for kind, mask in masks.items()])),
            "by_chance": float(np.mean([iou(mask, region) for mask in masks.values() for region in other])),
        }

    found = numbers(out / "word_iou", [*words, "method.name=replay"], over, measure)
    mean, interval = bootstrap([of["iou"] for of in found])
    return {
        "word_iou": mean,
        "word_iou_interval": interval,
        "word_iou_by_chance": float(np.mean([of["by_chance"] for of in found])),
    }


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two regions."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def interference(count: int, out: Path, words: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """The shares that cross the border of the region by method, and how much less that is with MaSaFusion."""

    def measure(attention: Attention) -> dict[str, float]:
        leaving, entering = attention.interference().nanmean((0, 1)).tolist()
        return {"leaving": leaving, "entering": entering, "interference": (leaving + entering) / 2}

    over, found = list(cases("test", count)), dict[str, np.ndarray]()
    by_method: dict[str, Any] = {}
    for name in methods:
        method = Unmasked() if name == Unmasked.name else None
        more = [] if method else [f"method.name={name}"]
        of = numbers(out / name, [*words, *more], over, measure, method)
        found[name] = np.array([each["interference"] for each in of])
        mean, interval = bootstrap(found[name])
        parts = {part: float(np.mean([each[part] for each in of])) for part in ("leaving", "entering")}
        by_method[name] = {"mean": mean, "interval": interval, **parts}
    less = {name: bootstrap(found[name] - found[methods[0]]) for name in methods[1:]}
    return {
        "interference": by_method,
        "interference_less": {name: {"mean": mean, "interval": interval} for name, (mean, interval) in less.items()},
    }


def bootstrap(values: Sequence[float] | np.ndarray, resamples: int = 10_000) -> tuple[float, tuple[float, float]]:
    """The mean and its 95 % interval, by resampling."""
    values = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(values.mean()), (float(low), float(high))


def show(found: Mapping[str, Any]) -> None:
    """Print the numbers."""
    table = Table("number", "value", "95 % interval", "")
    for name, limit in BARS.items():
        if name in found:
            verdict = f"at most {limit:g}: {'reached' if found[name] <= limit else 'NOT reached'}"
            table.add_row(name, f"{found[name]:.3f}", "", verdict)
    rows = {}
    if "word_iou" in found:
        said = f"by chance {found['word_iou_by_chance']:.3f}"
        rows["word_iou"] = found["word_iou"], found["word_iou_interval"], said
    for name, its in found.get("interference", {}).items():
        said = f"leaving {its['leaving']:.3f}, entering {its['entering']:.3f}"
        rows[f"interference, {name}"] = its["mean"], its["interval"], said
    for name, its in found.get("interference_less", {}).items():
        rows[f"interference, {name} less {next(iter(found['interference']))}"] = its["mean"], its["interval"], ""
    for name, (mean, (low, high), said) in rows.items():
        table.add_row(name, f"{mean:.3f}", f"{low:.3f} to {high:.3f}", said)
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="overhead,word_iou,interference", help="numbers, separated by commas")
    parser.add_argument("--count", type=int, default=200, help="pictures and edits")
    parser.add_argument("--repeats", type=int, default=3, help="edits with and without taps")
    parser.add_argument("--methods", default="masafusion,unmasked,plain", help="the first is compared with the others")
    parser.add_argument("--out", type=Path, default=Path("runs/attention"), help="where the edits are kept")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("words", nargs="*", help="key=value settings of the edits, such as batch=5")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    found: dict[str, Any] = {"count": given.count}
    for name, work in {
        "overhead": lambda: overhead(given.words, given.repeats),
        "word_iou": lambda: word_iou(given.count, given.out, given.words),
        "interference": lambda: interference(given.count, given.out, given.words, given.methods.split(",")),
    }.items():
        if name in given.only.split(","):
            found |= work()
    show(found)
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
