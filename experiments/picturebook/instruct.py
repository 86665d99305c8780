"""InstructPix2Pix's UNet of the picture-book world, and HIVE's: the picture beside the latent, the instruction as text.

`grades=true` goes on from the former with edits done by parts, each told with its grade: HIVE's conditional reward.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.picturebook import grown, unet
from experiments.picturebook.data import Album
from experiments.picturebook.training import Settings, as_told, fit, last
from masafusion_lab.picturebook.edits import edit
from masafusion_lab.picturebook.scene import Scene

GRADES = 5


def suffix(grade: int = GRADES) -> str:
    """What an instruction is told to end with for a result of that grade, of GRADES."""
    return f", {grade} of {GRADES}"


@dataclass
class Instruct(grown.Grown):
    """grades: train HIVE's, on graded results, from InstructPix2Pix's; unpaired: how often both are left out."""

    pictures: int = 25_000
    grades: bool = False
    unpaired: float = 0.05


@dataclass(frozen=True)
class Edits(Album):
    """The pictures before the edits of a split, or after them; for captions, their instructions."""

    after: bool = False

    @cached_property
    def captions(self) -> list[list[str]]:
        """Every instruction, in its one wording."""
        path = self.folder / f"{self.split}-{self.count}.json"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps([[edit(self.split, k).instruction] for k in range(self.count)]))
            part.replace(path)
        return json.loads(path.read_text())

    def scene(self, index: int) -> Scene:
        """The scene before or after an edit."""
        made = edit(self.split, index)
        return made.target if self.after else made.source


def albums(s: Settings) -> list[Album]:
    """The albums before and after the edits."""
    folders = {when: Path(s.root) / "data" / f"edits-{when}" for when in ("before", "after")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    made = (Edits(f, "train", s.pictures, after=when == "after") for when, f in folders.items())
    return list(made)


class Training(grown.Training):
    """The edited picture's velocity, the source beside it as InstructPix2Pix has it: its latents, unscaled."""

    def __init__(self, s: Instruct) -> None:
        super().__init__(s, 4, "unet_instruct" if s.grades and not last(s, "unet_hive").exists() else "unet")
        before, after = albums(s)
        self.before, self.after = unet.latents(self.vae, before), unet.latents(self.vae, after)
        self.told = [wordings[0] for wordings in before.captions]

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Ids (B, n)."""
        return self.words(list(texts), padding="max_length", return_tensors="np").input_ids.astype(np.int64)

    def batch(self, g: np.random.Generator) -> tuple[Any, ...]:
        """Latents (B, 4, h, w), noise alike, timesteps (B), ids (B, n), the source's latents.

        Either is left out as often as `drop` and `blank` say, both together as often as `unpaired`.
        """
        s: Any = self.s
        which = np.sort(g.integers(len(self.told), size=s.batch))
        source, target = (x[which].astype(np.float32) for x in (self.before, self.after))
        texts = [self.told[k] for k in which]
        if s.grades:
            grade = g.integers(1, GRADES + 1, size=s.batch)
            target = source + ((grade - 1) / (GRADES - 1)).astype(np.float32)[:, None, None, None] * (target - source)
            texts = [text + suffix(k) for text, k in zip(texts, grade, strict=True)]
        ids, u = self.tokens(texts), g.random(s.batch)
        ids[u < s.drop + s.unpaired] = self.empty
        source[(u >= s.drop) & (u < s.drop + s.unpaired + s.blank)] = 0
        return *self.drawn(g, target), torch.from_numpy(ids), torch.from_numpy(source)

    def training_step(self, batch: tuple[Any, ...], k: int) -> Tensor:
        """The loss."""
        x0, noise, t, ids, source = batch
        return self.loss(x0, noise, t, ids, source / self.vae.config.scaling_factor)


def main(words: list[str] | None = None) -> None:
    """Train it."""
    with as_told(Instruct, words) as s:
        fit(Training, s, "unet_hive" if s.grades else "unet_instruct")


if __name__ == "__main__":
    main()
