"""The sketcher's training: worn pictures of the train split with the sketches that are drawn of their scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from experiments.picturebook.data import pixels
from experiments.picturebook.judge import worn
from experiments.picturebook.training import Part, Settings, as_told, fit, frozen, weights
from masafusion_lab.picturebook.judge import keep
from masafusion_lab.picturebook.sketcher import Sketcher, agreement


@dataclass
class Sketching(Settings):
    """noise: the largest deviation of fine and of coarse noise; light: the largest change of brightness."""

    steps: int = 800
    batch: int = 32
    lr: float = 2e-3
    cooldown: float = 0.5
    decay: float = 0.99
    noise: float = 0.05
    light: float = 0.08


class Training(Part):
    """Cross-entropy of every pixel and 1 - Dice of each sketch, as lines are few among many pixels."""

    def __init__(self, s: Sketching) -> None:
        super().__init__(s)
        self.sketcher = Sketcher()
        self.pictures, self.lines = s.album().pictures, s.album("sketch").pictures
        self.wear = (s.noise, s.light)

    def batch(self, g: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, 128, 128) and their sketches (B, 1, 128, 128), both in [0, 1]."""
        which = np.sort(g.integers(len(self.pictures), size=self.s.batch))
        return worn(pixels(self.pictures[which]), g, *self.wear), pixels(self.lines[which][..., None])

    def training_step(self, batch: tuple[Tensor, Tensor], k: int) -> Any:
        """The loss."""
        x, lines = batch
        logits = self.sketcher.look(x)
        found = logits.sigmoid()
        dice = 2 * (found * lines).sum((1, 2, 3)) / (found.square() + lines.square()).sum((1, 2, 3))
        f1 = agreement(found[0, 0].detach().cpu().numpy(), lines[0, 0].cpu().numpy())
        self.log_dict({"dice": dice.detach().mean(), "f1": f1}, on_step=False, on_epoch=True, batch_size=len(x))
        return F.binary_cross_entropy_with_logits(logits, lines) + (1 - dice).mean()


def trained(s: Settings) -> Sketcher:
    """The trained sketcher."""
    return frozen(Sketcher(), weights(s, "sketcher", "sketcher"))


def main(words: list[str] | None = None) -> None:
    """Train it, and write the folder that ships, inside the judge's."""
    with as_told(Sketching, words) as s:
        fit(Training, s, "sketcher")
        keep(trained(s).half(), Path(s.root) / "judge" / "model" / "sketcher")


if __name__ == "__main__":
    main()
