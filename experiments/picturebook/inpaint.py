"""The inpainting UNet of the picture-book world: a region, and the picture without it, beside the latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.picturebook import clip, grown, unet
from experiments.picturebook.data import pixels
from experiments.picturebook.training import as_told, fit


@dataclass
class Inpaint(grown.Grown):
    """things_part: of the regions those that are things, grown; the others are boxes and ellipses anywhere.

    `blank` of the regions are the whole picture; inside: what a cell of the region weighs more than another.
    """

    things_part: float = 0.5
    inside: float = 3.0


def regions(g: np.random.Generator, things: np.ndarray, part: float, blank: float) -> np.ndarray:
    """Regions (B, 1, h, w), 0 or 1, for the cells (B, h, w), uint8, that things cover."""
    n, h, w = things.shape
    y, x = (np.mgrid[:h, :w] + 0.5) / np.array([h, w])[:, None, None]
    centre, half = g.random((2, n, 1, 1)), g.uniform(0.1, 0.45, (2, n, 1, 1))
    dy, dx = np.abs(y - centre[0]) / half[0], np.abs(x - centre[1]) / half[1]
    drawn = np.where(g.random((n, 1, 1)) < 0.5, np.maximum(dy, dx), dy**2 + dx**2) < 1
    rings = int(g.integers(1, 4))
    covered = F.max_pool2d(torch.from_numpy(things).float()[:, None], 2 * rings + 1, 1, rings)[:, 0].numpy() > 0
    out = np.where((g.random((n, 1, 1)) < part), covered, drawn)
    return (out | (g.random((n, 1, 1)) < blank))[:, None].astype(np.float32)


class Training(grown.Training):
    """The picture's velocity, beside it the region and the latents of the picture with grey there."""

    def __init__(self, s: Inpaint) -> None:
        super().__init__(s, 5)
        self.album, self.things = s.album(size=s.size), s.album("things", s.size // 4).pictures
        self.ids, self.latents = clip.tokens(self.words, s.album()), unet.latents(self.vae, self.album)

    def batch(self, g: np.random.Generator) -> tuple[Any, ...]:
        """Latents (B, 4, h, w), noise alike, timesteps (B), ids (B, n), a region (B, 1, h, w), pixels (B, 3, H, W)."""
        s: Any = self.s
        which = np.sort(g.integers(len(self.ids), size=s.batch))
        ids = self.ids[which, g.integers(self.ids.shape[1], size=s.batch)]
        ids[g.random(s.batch) < s.drop] = self.empty
        A = regions(g, self.things[which], s.things_part, s.blank)
        drawn = self.drawn(g, self.latents[which].astype(np.float32))
        return *drawn, torch.from_numpy(ids), torch.from_numpy(A), pixels(self.album.pictures[which])

    def training_step(self, batch: tuple[Any, ...], k: int) -> Tensor:
        """The loss; cells of the region before the rest."""
        x0, noise, t, ids, A, picture = batch
        with torch.no_grad():
            grey = F.interpolate(A, picture.shape[-2:])
            known = self.vae.encode((1 - grey) * (2 * picture - 1)).latent_dist.mean * self.vae.config.scaling_factor
        s: Any = self.s
        return self.loss(x0, noise, t, ids, torch.cat([A, known], 1), 1 + s.inside * A)


def main(words: list[str] | None = None) -> None:
    """Train it."""
    with as_told(Inpaint, words) as s:
        fit(Training, s, "unet_inpaint")


if __name__ == "__main__":
    main()
