"""What does watching cost, do word maps find their things, and does fusion inside a region interfere less?

    python -m experiments.attention [--only overhead,word_iou,interference] [--count 200] [--json FILE] [KEY=VALUE ...]

overhead_time and overhead_memory: of all default taps in one edit, 0.1 being 10 %; `--shape sd14`: on a random model of
SD 1.4's shape at 512x512, in five steps. word_iou: of the map of a thing's word, cut by Otsu's threshold, with the
thing's true region, over test pictures that are inverted, not edited.

interference: the paper's is between preserving and generating (sections 1, 4.1): pixels that shall show something new
are made of what is there "instead of the eagle itself" (4.2), and what is new spreads to where all shall stay. So it is
counted by whose values are read: of the self-attention under the prompt by which the target is denoised, inside A and
outside, the mean of two shares, what pixels inside read of all but what is made anew, and what those outside read of
what is. With (13) all values are the source's, old things inside A among them. So part of it follows from the rules and
is no finding: inside 1, outside 0 with (13); outside 0 with (9). crossing: by place alone, the shares that leave and
enter A. Nothing of it follows from the rules, but of (9) and (13) it says where the source is read, and takes old
things inside A for the edit's own; with (10) it is of the intermediate image's map. words_outside: the share outside A
of the edited words' cross-attention by which the target is denoised; 0 by rule where the source's prompt denoises the
outside. distance: total variation inside A, 0 to 1, of the self-attention of the intermediate image, whose map (10)
borrows, and of the source: from the target's own, which is made with the former's and near it by that too, and from the
true target's, inverted, under the target prompt: "an underlying correct image" (4.1), which no method has seen.

Intervals are of 95 %, by the bootstrap over pictures. What is there already is not made again, so a run that was killed
goes on. In 50 steps a picture of word_iou is 100 UNet rows, of interference 150 and, by method, 500, 200, 300 and 100;
steps=20 batch=8 is a run for less.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count as counter
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.commandline import at_least, in_one_line, some_of
from experiments.overhead import BARS, SHAPES, overhead, shaped
from masafusion_lab import config, phases
from masafusion_lab.callbacks import Attend
from masafusion_lab.data.case import Case
from masafusion_lab.data.picturebook import cases
from masafusion_lab.maps import Attention
from masafusion_lab.picturebook import picture
from masafusion_lab.picturebook.draw import coverage
from masafusion_lab.progress import bar, console
from masafusion_lab.runs import read_json, replacing, write_json
from masafusion_lab.watch import Watch

METHODS = {
    "masafusion": "method.name=masafusion",
    "no_region": "method.name=masafusion_no_adapter method.use_mask=false",  # (13) everywhere
    "region_only": "method.name=masafusion_no_adapter",  # (14)
    "plain": "method.name=plain",
}
NAMES = ("overhead", "word_iou", "interference")
NUMBERS = "meters.json"
METERS = {"interference": ("inside", "outside"), "crossing": ("leaving", "entering"), "words_outside": ()}
"""What is told of a method, with its parts."""


def numbers(
    out: Path,
    words: Sequence[str],
    over: Sequence[Case],
    measure: Callable[[Attention], Mapping[str, Any]],
    **look: Any,
) -> list[dict[str, Any]]:
    """What is measured of each case's attention; it is kept in the case's folder, and found there the next time."""
    experiment, begun = config.load(words=words), counter(1)
    batches = -(-len(over) // experiment.batch)

    def track(items: Iterable[Any], what: str) -> Iterable[Any]:
        return bar(items, f"{out.name}: {what}, {next(begun)} of {3 * batches} or less")  # inversions, edits, pictures

    def keep(folder: Path, pictures: Mapping[str, Image.Image], attention: Attention) -> dict[str, Image.Image]:
        write_json(folder / NUMBERS, {"key": attention.facts["key"], "numbers": measure(attention)})
        return {}

    def measured(folder: Path) -> bool:
        return bool(of := read_json(folder / NUMBERS)) and of.get("key") == read_json(folder / "result.json").get("key")

    lab, attend = phases.build(experiment, track=track), Attend(Watch(bins=1, **look), keep=keep)
    folders = phases.edit(lab, over, out, callbacks=[attend], whole=measured)
    return [{k: float(v) for k, v in read_json(folder / NUMBERS)["numbers"].items()} for folder in folders]


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


def own_map(attention: Attention, latent: str) -> Tensor:
    """What each cell attends to, shares of its mass (h', w', h", w"): the mean over finest layers, steps and heads."""
    mean = attention.pixels(latent).mean
    return mean / mean.sum((2, 3), keepdim=True)


def keep_map(attention: Attention, maps: Path) -> dict[str, float]:
    """Keep the map of a true target."""
    with replacing(maps / f"{attention.facts['case']}.safetensors") as partial_file:
        save_file({"map": own_map(attention, "source").half()}, partial_file)
    return {}


def shares(attention: Attention, maps: Path) -> dict[str, float]:
    """The meters of one edit; see above. `maps`: where those of the true targets are."""
    inside, outside = attention.interference().nanmean((0, 1)).tolist()
    leaving, entering = attention.interference(kind="flow").nanmean((0, 1)).tolist()
    found = {
        "interference": (inside + outside) / 2,
        "inside": inside,
        "outside": outside,
        "crossing": (leaving + entering) / 2,
        "leaving": leaving,
        "entering": entering,
        "words_outside": float(attention.spilled().nanmean()),
    }
    if "t2i" in attention.facts["latents"]:
        truth = load_file(maps / f"{attention.facts['case']}.safetensors")["map"].float()
        part = F.adaptive_avg_pool2d(attention.tensors["mask"][None].float(), truth.shape[:2])[0]
        for latent, name in (("t2i", "intermediate"), ("source", "source")):
            apart = attention.curves("distance", f"{attention.branch(latent)}:{attention.branch('target')}")
            found[f"distance from target, {name}"] = float(apart[..., 0].nanmean())
            apart = (own_map(attention, latent) - truth).abs().sum((2, 3)) / 2
            found[f"distance from truth, {name}"] = float((part * apart).sum() / part.sum())
        of = found["distance from truth, source"] - found["distance from truth, intermediate"]
        found["distance from truth, source less intermediate"] = of
    return found


def interference(count: int, out: Path, words: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """The meters by method, and how much more they are of each other method than of the first, pair by pair."""
    over, maps = list(cases("test", count)), out / "truth-maps"
    if "masafusion" in methods:
        truths = [Case(case.id, case.truth, case.target, "") for case in over if case.truth is not None]
        numbers(out / "truth", [*words, "method.name=replay"], truths, partial(keep_map, maps=maps), heads=False)
    measure = partial(shares, maps=maps)
    each = {name: numbers(out / name, [*words, *METHODS[name].split()], over, measure, heads=False) for name in methods}
    found = {name: {meter: np.array([of[meter] for of in its]) for meter in its[0]} for name, its in each.items()}
    first, *others = methods
    return {
        "interference": {
            name: {**described(its.pop("interference")), **{meter: described(of) for meter, of in its.items()}}
            for name, its in ((name, dict(its)) for name, its in found.items())
        },
        "interference_less": {
            name: {meter: described(found[name][meter] - found[first][meter]) for meter in METERS} for name in others
        },
    }


def described(values: np.ndarray) -> dict[str, Any]:
    """Mean and interval of what has a value."""
    mean, interval = bootstrap(values[np.isfinite(values)])
    return {"mean": mean, "interval": interval}


def bootstrap(values: Sequence[float] | np.ndarray, resamples: int = 10_000) -> tuple[float, tuple[float, float]]:
    """The mean and its 95 % interval, by resampling."""
    values = np.asarray(values)
    if not values.size:
        return np.nan, (np.nan, np.nan)
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

    if "word_iou" in found:
        its = {"mean": found["word_iou"], "interval": found["word_iou_interval"]}
        table.add_row("word_iou", *written(its), f"by chance {found['word_iou_by_chance']:.3f}")
    by_method = found.get("interference", {})
    for name, its in by_method.items():
        for meter in its:
            if meter.startswith("distance"):
                table.add_row(f"{meter}, {name}", *written(its[meter]), "")
    Console().print(table)
    if not by_method:
        return
    table = Table("", *("\n".join([meter, *parts]) for meter, parts in METERS.items()))
    for name, its in by_method.items():
        rows = {"interference": its, **its}
        cells = ([*written(rows[meter]), *(written(its[part])[0] for part in METERS[meter])] for meter in METERS)
        table.add_row(name, *map("\n".join, cells), end_section=True)
    for name, its in found["interference_less"].items():
        table.add_row(f"{name} less\n{next(iter(by_method))}", *("\n".join(written(its[meter])) for meter in METERS))
    Console().print(table)


def written(its: Mapping[str, Any]) -> tuple[str, str]:
    """A mean, and its interval."""
    low, high = its["interval"]
    return f"{its['mean']:.3f}", f"{low:.3f}–{high:.3f}"


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=some_of(NAMES), default=list(NAMES), help="numbers, separated by commas")
    parser.add_argument("--count", type=at_least(2), default=200, help="pictures and edits, for an interval 2 or more")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="edits with and without taps")
    parser.add_argument("--shape", choices=SHAPES, default="picturebook", help="of the model of overhead")
    parser.add_argument("--methods", type=some_of(METHODS), default=["masafusion", "no_region", "plain"],
                        help=f"of {', '.join(METHODS)}; the others less the first")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/attention"), help="where the edits are kept")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("words", nargs="*", help="key=value settings of the edits, such as batch=8 steps=20")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING if console.is_terminal else logging.INFO, format="%(message)s")
    found: dict[str, Any] = {"count": given.count, "words": given.words}
    with in_one_line(parser), shaped(given.shape) as shape:
        for name, work in {
            "overhead": lambda: {"shape": given.shape, **overhead([*shape, *given.words], given.repeats)},
            "word_iou": lambda: word_iou(given.count, given.out, given.words),
            "interference": lambda: interference(given.count, given.out, given.words, given.methods),
        }.items():
            if name in given.only:
                found |= work()
                if given.json:
                    write_json(given.json, found)
    show(found)


if __name__ == "__main__":
    main()
