"""How good the model is: `python -m experiments.picturebook.evaluate` prints each measure beside the bar it must pass.

All prompts and pictures are of the test split, all noise comes from --seed and the prompt's number: a second run gives
the same figures. `judge` and `sketch_ceiling` measure the instruments themselves, on drawn pictures.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from experiments.commandline import at_least, in_one_line, some_of
from experiments.picturebook.painted import Bench, Told, parts, told
from masafusion_lab import InputError
from masafusion_lab.hub import PICTUREBOOK
from masafusion_lab.inversion import invert, retrace
from masafusion_lab.picturebook.sketch import sketch
from masafusion_lab.picturebook.sketcher import agreement
from masafusion_lab.runs import write_json

log = logging.getLogger(__name__)


def mean(values: Sequence[float] | Sequence[bool]) -> float:
    """Their mean."""
    if not values:
        raise InputError("none of these few prompts asks for it; take a larger --count")
    return float(np.mean(values))


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Of each picture."""
    return peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3)).tolist()


def vae(bench: Bench, measure: Callable[[Tensor, Tensor], list[float]]) -> float:
    """A measure of the autoencoder's roundtrip."""
    out = []
    for some in parts(told(bench.number(200))):
        drawn = bench.drawn(some, bench.model.native)
        out += measure(bench.model.decode(bench.model.encode(drawn)).cpu(), drawn)
    return mean(out)


def ssim(a: Tensor, b: Tensor) -> list[float]:
    """Of each picture."""
    return structural_similarity_index_measure(a, b, data_range=1.0, reduction="none").reshape(-1).tolist()  # type: ignore[union-attr]


def single(bench: Bench, attribute: str) -> float:
    """How often an attribute is right where the prompt names one thing; the pose, where it has one."""
    return mean([found[attribute] for item, found in bench.singles
                 if attribute != "pose" or item.scene.things[0].pose])  # fmt: skip


def whole(bench: Bench, **options: int | bool) -> float:
    """How often all kinds are there in their own colours."""
    found = bench.shares(told(bench.number(100), **options))  # type: ignore[arg-type]
    return mean([one["kind"] and one["colour"] for one in found])


def outlines(bench: Bench, pictures: Iterator[tuple[Sequence[Told], Tensor]]) -> float:
    """The agreement of the sketches asked for with those of the pictures."""
    return mean([
        agreement(found[0].numpy(), sketch(item.scene) / 255)
        for some, made in pictures
        for item, found in zip(some, bench.sketcher(made), strict=True)
    ])  # fmt: skip


@torch.no_grad()
def clip_retrieval(bench: Bench, draws: int = 10, among: int = 100) -> float:
    """How often a picture's own caption is the nearest of 100 different ones."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = bench.folder / "clip"
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: missing; this model has no CLIP of its own, train it with all of its parts")
    clip, words = CLIPModel.from_pretrained(folder).float().eval(), CLIPTokenizer.from_pretrained(folder)
    found, items = [], told()
    for _ in range(draws):
        captions: dict[str, Told] = {}
        while len(captions) < bench.number(among):
            item = next(items)
            captions.setdefault(item.prompt, item)
        pictures = 2 * bench.drawn(list(captions.values()), clip.config.vision_config.image_size) - 1
        ids = words(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        scores = clip(pixel_values=pictures, input_ids=ids).logits_per_image
        found += (scores.argmax(1) == torch.arange(len(captions))).tolist()
    return mean(found)


@torch.no_grad()
def dino(bench: Bench) -> dict[str, float]:
    """Of pictures of one thing the part whose nearest other one, to the DINO network, has its kind, its colour, ...

    A network that saw no kinds would reach a mean of 0.69 of the three.
    """
    from transformers import ViTModel

    folder = bench.folder / "dino"
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: missing; this model has no DINO of its own, train it with all of its parts")
    network = ViTModel.from_pretrained(folder, add_pooling_layer=False).float().eval()
    items = list(told(bench.number(400), things=1))
    seen = torch.cat(
        [network(2 * bench.drawn(some, network.config.image_size) - 1).last_hidden_state[:, 0] for some in parts(items)]
    )
    near = torch.nn.functional.normalize(seen)
    nearest = (near @ near.T).fill_diagonal_(-1).argmax(1).tolist()
    facts = [{"kind": item.scene.things[0].kind, "colour": item.scene.things[0].colour,
              "background": item.scene.background} for item in items]  # fmt: skip
    return {name: mean([its[name] == facts[k][name] for its, k in zip(facts, nearest, strict=True)])
            for name in facts[0]}  # fmt: skip


@torch.no_grad()
def inversion_psnr(bench: Bench) -> float:
    """DDIM inversion and back, both at w = 1, against the drawn picture: the autoencoder's loss is part of it."""
    model, schedule, out = bench.model, bench.model.schedule(bench.steps), []
    for some in parts(told(bench.number(50))):
        drawn = bench.drawn(some, model.native)
        text = model.embed([item.prompt for item in some])
        x_T = invert(model, model.encode(drawn), text, schedule)[0]
        back = retrace(model, x_T, text, torch.zeros_like(text), schedule, w=1.0)[-1]  # w = 1 asks no null
        out += psnr(model.decode(back).cpu(), drawn)
    return mean(out)


def judge(bench: Bench) -> dict[str, float]:
    """Of each attribute the part of drawn test pictures in which it is right for every thing; poses, of animals."""
    found = [(item, one) for some in parts(told(bench.number(1000)))
             for item, one in zip(some, bench.found(some, bench.drawn(some)), strict=True)]  # fmt: skip
    animals = [one["pose"] for item, one in found if any(t.pose for t in item.scene.things)]
    every = {name: mean([one[name] for _, one in found]) for name in found[0][1]}
    return every | {"pose": mean(animals)}


MEASURES: dict[str, tuple[float, Callable[[Bench], float | dict[str, float]]]] = {
    "vae_psnr": (30.0, lambda bench: vae(bench, psnr)),
    "vae_ssim": (0.95, lambda bench: vae(bench, ssim)),
    "kind": (0.90, lambda bench: single(bench, "kind")),
    "colour": (0.90, lambda bench: single(bench, "colour")),
    "background": (0.95, lambda bench: single(bench, "background")),
    "pose": (0.85, lambda bench: single(bench, "pose")),
    "two_things": (0.70, lambda bench: whole(bench, things=2)),
    "unseen": (0.75, lambda bench: whole(bench, things=1, unseen=True)),
    "sketch_f1": (0.80, lambda bench: outlines(bench, bench.painted(bench.sketches, sketched=True))),
    "sketch_ceiling": (0.95, lambda bench: outlines(bench, ((s, bench.drawn(s)) for s in parts(bench.sketches)))),
    "clip_retrieval": (0.80, clip_retrieval),
    "dino": (0.8, dino),
    "inversion_psnr": (28.0, inversion_psnr),
    "judge": (0.99, judge),
}
"""The bar of each measure and how it is taken; of several figures the mean must pass."""


def evaluate(bench: Bench, keys: Sequence[str] = tuple(MEASURES)) -> dict[str, dict[str, object]]:
    """Value, bar, whether it passed and seconds by key; "error" instead of a value where it could not be taken."""
    out: dict[str, dict[str, object]] = {}
    for key in keys:
        bar, measure = MEASURES[key]
        began = time.perf_counter()
        try:
            taken = measure(bench)
        except Exception as error:  # such as a damaged file's, of each library its own
            said = str(error)
            if not isinstance(error, InputError | ArithmeticError):
                log.exception("%s", key)
                said = f"{type(error).__name__}: {' '.join(said.split())}"
            out[key] = {"bar": bar, "passed": False, "error": said}
            continue
        value = mean(list(taken.values())) if isinstance(taken, dict) else taken
        out[key] = {"value": value, "bar": bar, "passed": value >= bar, "seconds": time.perf_counter() - began}
        if isinstance(taken, dict):
            out[key]["parts"] = taken
        log.info("%s %.4f", key, value)
    return out


def table(results: dict[str, dict[str, object]], caption: str) -> Table:
    """One row a measure."""
    rows = Table("measure", "value", "bar", "", "seconds", caption=caption)
    for key, result in results.items():
        if "error" in result:
            rows.add_row(key, "-", f"{result['bar']:g}", "error", "")
            continue
        rows.add_row(key, f"{result['value']:.4f}", f"{result['bar']:g}", "pass" if result["passed"] else "FAIL",
                     f"{result['seconds']:.0f}")  # fmt: skip
        for name, value in result.get("parts", {}).items():  # type: ignore[attr-defined]
            rows.add_row(f"  {name}", f"{value:.4f}", "", "", "")
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Print the table, write the figures; 0 if every bar is passed."""
    ask = argparse.ArgumentParser("evaluate", description=__doc__.splitlines()[0])
    ask.add_argument("--model", default=str(PICTUREBOOK), help="a folder (default: the one that is shipped)")
    ask.add_argument("--only", type=some_of(MEASURES), default=list(MEASURES), help="keys, separated by commas")
    ask.add_argument("--count", type=at_least(1), help="at most so many prompts or pictures a measure")
    ask.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    ask.add_argument("--guidance", type=float, default=Bench.w, help=f"w (default: {Bench.w})")
    ask.add_argument("--seed", type=int, default=0, help="of the noise")
    ask.add_argument("--json", type=Path, help="a file for the figures")
    asked = ask.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    bench = Bench(Path(asked.model), asked.count, asked.dtype, asked.seed, w=asked.guidance)
    results = evaluate(bench, asked.only)
    facts = {"model": asked.model, "count": asked.count, "dtype": asked.dtype, "seed": asked.seed, "steps": bench.steps,
             "w": bench.w}  # fmt: skip
    Console().print(table(results, ", ".join(f"{name} {value}" for name, value in facts.items())))
    for key, result in results.items():
        if "error" in result:
            print(f"{key}: {result['error']}", file=sys.stderr)
    if asked.json:
        values = {key: result.get("value") for key, result in results.items()}
        with in_one_line(ask):
            write_json(asked.json, values | facts | {"measures": results})
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
