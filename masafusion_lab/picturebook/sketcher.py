"""The sketcher: from the pixels of a picture-book picture its sketch, as `sketch.sketch` draws it from the scene.

An edge detector would not do: it finds every stripe, dot, shadow and blade of grass, which sketches leave out.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from masafusion_lab.picturebook import MODEL
from masafusion_lab.picturebook.judge import Block, fit_size, restore


class Sketcher(nn.Module):
    """A U-Net of three levels at half, quarter and eighth resolution: picture -> logits of white lines on black."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.config = {"width": width}
        a, b, c = width, 2 * width, 3 * width
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, a, 3, 1, 1))
        self.fine = nn.ModuleList([Block(a), Block(b)])
        self.down = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1), nn.Conv2d(b, c, 3, 2, 1)])
        self.middle = nn.Sequential(Block(c), Block(c))
        self.up = nn.ModuleList([nn.Conv2d(c, b, 1), nn.Conv2d(b, a, 1)])
        self.mend = nn.ModuleList([Block(b), Block(a)])
        self.out = nn.Sequential(nn.GroupNorm(8, a), nn.ReLU(), nn.Conv2d(a, 4, 3, 1, 1), nn.PixelShuffle(2))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Sketcher:
        """The trained sketcher of a folder, or the one that is shipped; raises InputError where it is not whole."""
        return restore(cls, Path(folder or MODEL / "judge" / "sketcher"))

    def look(self, pixels: Tensor) -> Tensor:
        """Logits (B, 1, H, W) of pixels (B, 3, H, W) in [0, 1]."""
        x = self.stem(2 * pixels.contiguous(memory_format=torch.channels_last) - 1)
        passed = []
        for block, down in zip(self.fine, self.down, strict=True):
            passed.append(block(x))
            x = down(passed[-1])
        x = self.middle(x)
        for up, mend, skip in zip(self.up, self.mend, reversed(passed), strict=True):
            x = mend(F.interpolate(up(x), scale_factor=2.0, mode="nearest") + skip)
        return self.out(x).float()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Sketches (B, 1, 128, 128) in [0, 1], white on black, of pictures (B, 3, H, W) in [0, 1]."""
        return self.look(fit_size(pictures)).sigmoid()


def agreement(found: np.ndarray, asked: np.ndarray, tolerance: float = 2) -> float:
    """The F1 of the lines in two sketches (H, W), uint8 or in [0, 1]: a line counts up to `tolerance` pixels away."""
    lines = [sketch > (127 if sketch.dtype == np.uint8 else 0.5) for sketch in (found, asked)]
    if not all(line.any() for line in lines):
        return float(not any(line.any() for line in lines))
    away = [cv2.distanceTransform((~line).astype(np.uint8), cv2.DIST_L2, 5) for line in lines]
    precision, recall = (away[1][lines[0]] <= tolerance).mean(), (away[0][lines[1]] <= tolerance).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))
