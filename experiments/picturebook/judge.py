"""The judge's training: drawn pictures of the train split, blurred, lit and noised as a generator's might be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.picturebook.data import Album, pixels
from experiments.picturebook.training import Part, Settings, as_told, fit, frozen, weights
from masafusion_lab.picturebook.judge import LOOKS, Judge, answers, keep


@dataclass
class Judging(Settings):
    """told: pictures to learn from; noise: the largest deviation of fine and of coarse noise; light: of brightness."""

    steps: int = 1200
    batch: int = 64
    lr: float = 2e-3
    cooldown: float = 0.5
    decay: float = 0.99
    told: int = 30_000
    noise: float = 0.05
    light: float = 0.08


def told(album: Album, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The answers to the first pictures of an album, (count,) and (count, 12, 6); kept beside them."""
    path = album.folder / f"{album.split}-{count}-answers.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        backgrounds, tables = zip(*(answers(album.scene(i)) for i in range(count)), strict=True)
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, background=backgrounds, table=np.stack(tables).astype(np.float16))
        part.replace(path)
    with np.load(path) as kept:
        return kept["background"], kept["table"].astype(np.float32)


def worn(x: Tensor, g: np.random.Generator, noise: float, light: float) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], some blurred, all under another light, with fine and coarse noise."""
    b, _, h, w = x.shape

    def amount(top: float) -> Tensor:
        return torch.from_numpy(g.uniform(0, top, (b, 1, 1, 1)).astype(np.float32))

    def gauss(*shape: int) -> Tensor:
        return torch.from_numpy(g.standard_normal((b, *shape), np.float32))

    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), amount(1))
    x = x * (1 + light * (2 * amount(1) - 1)) + light / 2 * (2 * amount(1) - 1)
    coarse = F.interpolate(gauss(3, h // 8, w // 8), (h, w), mode="bilinear")
    return (x + amount(noise) * gauss(1, h, w) + amount(noise) * coarse).clamp(0, 1)


def around(place: Tensor, n: int) -> Tensor:
    """The weights (K, n * n) of the four cells of an n x n grid around places (K, 2), whose mean is the place."""
    at = (place * n - 0.5).clamp(0, n - 1)
    x, y = (1 - (at[:, k, None] - torch.arange(n, device=at.device)).abs() for k in (0, 1))
    return (y.clamp(min=0)[:, :, None] * x.clamp(min=0)[:, None]).flatten(1)


class Training(Part):
    """Cross-entropy of every answer, and of each map with the cells around its thing's centre."""

    def __init__(self, s: Judging) -> None:
        super().__init__(s)
        self.judge = Judge()
        self.wear = (s.noise, s.light)
        self.pictures = s.album().pictures
        self.background, self.table = told(s.album(), min(s.told, s.pictures))

    def batch(self, g: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, 3, 128, 128) with their answers (B,), (B, 12, 6)."""
        which = np.sort(g.integers(len(self.table), size=self.s.batch))
        pictures = worn(pixels(self.pictures[which]), g, *self.wear)
        return pictures, torch.from_numpy(self.background[which]), torch.from_numpy(self.table[which])

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], k: int) -> Any:
        """The sum of the losses."""
        x, background, table = batch
        seen, maps = self.judge.look(x)
        here = table[..., 0] > 0
        asked = table[here]
        looks = {name: (getattr(seen, name)[here], asked[:, k].long()) for k, name in enumerate(LOOKS, 1)}
        loss = (
            F.cross_entropy(seen.background, background)
            + 4 * F.binary_cross_entropy_with_logits(seen.presence, table[..., 0])
            + 0.5 * F.cross_entropy(maps.flatten(2)[here], around(asked[:, 4:], maps.shape[-1]))
            + sum(F.cross_entropy(logits, right) for logits, right in looks.values())
        )
        right = {name: (logits.argmax(-1) == right).float().mean() for name, (logits, right) in looks.items()}
        right["kinds"] = ((seen.presence > 0) == here).all(-1).float().mean()
        self.log_dict({"loss": loss.detach(), **right}, on_step=False, on_epoch=True, batch_size=len(x))
        return loss


def trained(s: Settings) -> Judge:
    """The trained judge."""
    return frozen(Judge(), weights(s, "judge", "judge"))


def main(words: list[str] | None = None) -> None:
    """Train it, and write the folder that ships."""
    with as_told(Judging, words) as s:
        fit(Training, s, "judge")
        keep(trained(s).half(), Path(s.root) / "judge" / "model")


if __name__ == "__main__":
    main()
