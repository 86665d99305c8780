"""What is measured: scenes of the test split, what a model paints of their captions, and what the judge sees there."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.picturebook.data import pixels
from masafusion_lab.editor import noise_for
from masafusion_lab.fusion import Branch, Hint, Plan
from masafusion_lab.given import Given
from masafusion_lab.hub import PICTUREBOOK
from masafusion_lab.lockstep import lockstep
from masafusion_lab.model import StableDiffusion
from masafusion_lab.picturebook.captions import WORDINGS, caption
from masafusion_lab.picturebook.draw import draw
from masafusion_lab.picturebook.judge import Judge, follows
from masafusion_lab.picturebook.scene import Scene, scene
from masafusion_lab.picturebook.sketch import sketch
from masafusion_lab.picturebook.sketcher import Sketcher

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
