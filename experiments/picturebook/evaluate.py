"""How good the model is: `python -m experiments.picturebook.evaluate` prints each measure beside the bar it must pass.

All prompts and pictures are of the test split, all noise comes from --seed and the prompt's number: a second run gives
the same figures. `judge` and `sketch_ceiling` measure the instruments themselves, on drawn pictures.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from experiments.picturebook.data import pixels
from masafusion_lab import InputError
from masafusion_lab.editor import noise_for
from masafusion_lab.fusion import Branch, Hint, Plan
from masafusion_lab.given import Given
from masafusion_lab.hub import PICTUREBOOK
from masafusion_lab.inversion import invert, retrace
from masafusion_lab.lockstep import lockstep
from masafusion_lab.model import StableDiffusion
from masafusion_lab.picturebook.captions import WORDINGS, caption
from masafusion_lab.picturebook.draw import draw
from masafusion_lab.picturebook.judge import Judge, follows
from masafusion_lab.picturebook.scene import Scene, scene
from masafusion_lab.picturebook.sketch import sketch
from masafusion_lab.picturebook.sketcher import Sketcher, agreement
from masafusion_lab.runs import write_json

log = logging.getLogger(__name__)
BATCH = 25


@dataclass(frozen=True)
class Told:
    """A scene of the test split under its number, with the caption that is its prompt."""

    number: int
    scene: Scene

    @property
    def prompt(self) -> str:
        """The wordings take turns."""
        return caption(self.scene, self.number % WORDINGS)


def told(n: int | None = None, *, things: int | None = None, unseen: bool | None = None) -> Iterator[Told]:
    """The first n scenes of the test split, or one after the other without end; options as of `scene`."""
    for k in itertools.count() if n is None else range(n):
        yield Told(k, scene("test", k, things=things, unseen=unseen))


def parts(items: Iterable[Told]) -> Iterator[list[Told]]:
    """The items in batches."""
    items = iter(items)
    while some := list(itertools.islice(items, BATCH)):
        yield some


@dataclass(frozen=True)
class Bench:
    """What is measured: the model of a folder with the judge, the sketcher and CLIP that lie in it.

    count: at most so many prompts or pictures a measure; steps of DDIM and guidance w are those of all measures.
    """

    folder: Path = PICTUREBOOK
    count: int | None = None
    dtype: str = "float32"
    seed: int = 0
    steps: int = 50
    w: float = 7.5

    @cached_property
    def model(self) -> StableDiffusion:
        """The model."""
        return StableDiffusion.load("picturebook" if self.folder == PICTUREBOOK else str(self.folder), dtype=self.dtype)

    @cached_property
    def judge(self) -> Judge:
        """The judge."""
        return Judge.load(self.folder / "judge")

    @cached_property
    def sketcher(self) -> Sketcher:
        """The sketcher."""
        return Sketcher.load(self.folder / "judge" / "sketcher")

    def number(self, n: int) -> int:
        """n, or fewer if told so."""
        return min(n, self.count or n)

    def drawn(self, items: Sequence[Told], size: int = 128) -> Tensor:
        """The scenes' own pictures."""
        return pixels(np.stack([draw(item.scene, size) for item in items]))

    @torch.no_grad()
    def painted(self, items: Iterable[Told], *, sketched: bool = False) -> Iterator[tuple[Sequence[Told], Tensor]]:
        """What the model makes of the prompts, under the scenes' sketches if asked, batch by batch."""
        model, schedule = self.model, self.model.schedule(self.steps)
        plan = Plan({"x": Branch("x", "prompt", hint=Hint() if sketched else None)}, {"x": "x"})
        for some in parts(items):
            hints = None
            if sketched:
                lines = np.stack([sketch(item.scene, model.native) for item in some])
                hints = model.hint("sketch", pixels(lines[..., None]))
            text = model.embed([item.prompt for item in some] + [""])
            given = Given({"prompt": text[:-1], "empty": text[-1:].expand_as(text[:-1])}, hint=hints)
            shape = (model.unet.config.in_channels, *(model.native // model.factor,) * 2)
            x = torch.stack([noise_for(self.seed, item.prompt, shape, str(item.number)) for item in some])
            *_, last = lockstep(model, plan, {"x": x.to(model.device)}, given, schedule=schedule, w=self.w)
            log.info("painted prompts %d to %d", some[0].number, some[-1].number)
            yield some, model.decode(last.x["x"]).cpu()

    def shares(self, items: Iterable[Told]) -> list[dict[str, bool]]:
        """What of each scene the judge finds in what the model makes of its prompt."""
        return [found for some, made in self.painted(items) for found in self.found(some, made)]

    def found(self, items: Sequence[Told], pictures: Tensor) -> list[dict[str, bool]]:
        """What of each scene the judge finds in its picture."""
        verdict = self.judge(pictures)
        return [{name: bool(value) for name, value in follows(verdict[k : k + 1], item.scene).items()}
                for k, item in enumerate(items)]  # fmt: skip

    @cached_property
    def singles(self) -> list[tuple[Told, dict[str, bool]]]:
        """What the judge finds for prompts of one thing, in combinations that training shows."""
        items = list(told(self.number(200), things=1, unseen=False))
        return list(zip(items, self.shares(items), strict=True))

    @property
    def sketches(self) -> Iterator[Told]:
        """The scenes whose sketches are followed."""
        return told(self.number(100))


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
    if strange := [key for key in keys if key not in MEASURES]:
        raise InputError(f"--only {strange[0]}: no such measure; there are {', '.join(MEASURES)}")
    out: dict[str, dict[str, object]] = {}
    for key in keys:
        bar, measure = MEASURES[key]
        began = time.perf_counter()
        try:
            taken = measure(bench)
        except (InputError, ArithmeticError) as error:
            out[key] = {"bar": bar, "passed": False, "error": str(error)}
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
    ask.add_argument("--only", default=",".join(MEASURES), help="keys with commas between (default: all)")
    ask.add_argument("--count", type=int, help="at most so many prompts or pictures a measure")
    ask.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    ask.add_argument("--seed", type=int, default=0, help="of the noise")
    ask.add_argument("--json", type=Path, help="a file for the figures")
    asked = ask.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        bench = Bench(Path(asked.model), asked.count, asked.dtype, asked.seed)
        results = evaluate(bench, asked.only.split(","))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    facts = {"model": asked.model, "count": asked.count, "dtype": asked.dtype, "seed": asked.seed, "steps": bench.steps,
             "w": bench.w}  # fmt: skip
    Console().print(table(results, ", ".join(f"{name} {value}" for name, value in facts.items())))
    for key, result in results.items():
        if "error" in result:
            print(f"{key}: {result['error']}", file=sys.stderr)
    if asked.json:
        values = {key: result.get("value") for key, result in results.items()}
        write_json(asked.json, values | facts | {"measures": results})
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
