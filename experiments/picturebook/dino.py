"""The ViT that stands where DINO (Caron et al. 2021) stands: it learns without labels that crops of one picture are
alike; its CLS token scores how near two pictures are, independently of CLIP.

Student, teacher and crops are DINO's, the loss is MoCo v3's (Chen et al. 2021): to tell the pictures of a batch apart.
By prototypes, centred or shared evenly, it told backgrounds and hues and no kind of thing. So a batch holds pictures
before and after edits of them, which differ by the edit alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from experiments.picturebook.data import SIZE, pixels
from experiments.picturebook.instruct import albums
from experiments.picturebook.training import Part, Settings, as_told, fit, frozen, settings, weights


@dataclass
class Dino(Settings):
    """batch: edits, of two pictures each; views: two global ones, then local ones of half the side.

    momentum: of the teacher; temperature: of the loss; light, tint: how much brightness and contrast, and each channel,
    are jittered; grey: the part of views without colour.
    """

    steps: int = 800
    batch: int = 32
    lr: float = 8e-4
    decay: float = 0.99
    pictures: int = 25_000
    width: int = 192
    layers: int = 4
    views: int = 5
    momentum: float = 0.99
    temperature: float = 0.1
    light: float = 0.3
    tint: float = 0.1
    grey: float = 0.1


def build(s: Dino) -> ViTModel:
    """The untrained ViT; its attention is not fused, which for few tokens is faster to train."""
    config = ViTConfig(hidden_size=s.width, intermediate_size=4 * s.width, num_hidden_layers=s.layers,
                       num_attention_heads=s.width // 64, image_size=SIZE, attn_implementation="eager")  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


class Network(nn.Module):
    """The ViT and a head."""

    def __init__(self, s: Dino) -> None:
        super().__init__()
        self.vit = build(s)
        self.head = nn.Sequential(nn.Linear(s.width, 2 * s.width), nn.GELU(), nn.Linear(2 * s.width, 128))

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors (B, 128), float32, of pictures in [-1, 1]."""
        cls = self.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return F.normalize(self.head(cls).float())


def view(x: Tensor, g: np.random.Generator, size: int, scale: tuple[float, float], s: Dino) -> Tensor:
    """A crop of each picture (B, 3, H, W) in [0, 1], of such a part of its area, mirrored or not, in [-1, 1]."""
    b = len(x)
    side = np.sqrt(g.uniform(*scale, b))
    grid = np.zeros((b, 2, 3), np.float32)
    grid[:, 0, 0], grid[:, 1, 1] = side * g.choice([-1, 1], b), side
    grid[:, :, 2] = g.uniform(-1, 1, (b, 2)) * (1 - side)[:, None]
    at = F.affine_grid(torch.from_numpy(grid), [b, 3, size, size], align_corners=False)
    crop = F.grid_sample(x, at, padding_mode="border", align_corners=False)

    def factor(by: float, channels: int = 1) -> Tensor:
        return torch.from_numpy(g.uniform(1 - by, 1 + by, (b, channels, 1, 1)).astype(np.float32))

    grey = crop.mean(1, keepdim=True)
    crop = torch.where(torch.from_numpy(g.random((b, 1, 1, 1)) < s.grey), grey, crop * factor(s.tint, 3))
    mean = crop.mean((1, 2, 3), keepdim=True)
    return 2 * (factor(s.light) * (mean + factor(s.light) * (crop - mean))).clamp(0, 1) - 1


class Training(Part):
    """By its view the student finds the picture of which the teacher, its running average, saw another one."""

    def __init__(self, s: Dino) -> None:
        super().__init__(s)
        self.student = Network(s)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.edits = [album.pictures for album in albums(s)]

    def batch(self, g: np.random.Generator) -> list[Tensor]:
        """The views, global ones first."""
        s: Any = self.s
        which = np.sort(g.choice(s.pictures, s.batch, replace=False))
        x = torch.cat([pixels(album[which]) for album in self.edits])
        large = [view(x, g, SIZE, (0.6, 1.0), s) for _ in range(2)]
        return large + [view(x, g, SIZE // 2, (0.3, 0.6), s) for _ in range(s.views - 2)]

    def training_step(self, views: list[Tensor], k: int) -> Any:
        """The cross-entropy of all pairs of a teacher's and another view; `found`: how often the picture is right."""
        s: Any = self.s
        large, small = torch.cat(views[:2]), torch.cat(views[2:])
        with torch.no_grad():
            keys = self.teacher(large).chunk(2)
        queries = torch.cat([self.student(large), self.student(small)]).chunk(len(views))
        own = torch.arange(len(keys[0]), device=large.device)
        with torch.autocast(large.device.type, enabled=False):
            scores = [q @ key.T / s.temperature for i, key in enumerate(keys) for j, q in enumerate(queries) if i != j]
        loss = torch.stack([F.cross_entropy(score, own) for score in scores]).mean()
        found = (scores[0].argmax(1) == own).float().mean()
        self.log_dict({"loss": loss.detach(), "found": found}, on_step=False, on_epoch=True, batch_size=s.batch)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """The teacher follows."""
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data.lerp_(fast.data, 1 - self.s.momentum)  # type: ignore[attr-defined]


def trained(s: Settings) -> ViTModel:
    """The teacher's ViT."""
    return frozen(build(settings(Dino, [f"root={s.root}"])), weights(s, "dino", "teacher.vit"))


def main(words: list[str] | None = None) -> None:
    """Train it, and write the folder that ships: pictures of 128x128 pixels in [-1, 1]."""
    with as_told(Dino, words) as s:
        fit(Training, s, "dino")
        trained(s).half().save_pretrained(Path(s.root) / "dino" / "model")


if __name__ == "__main__":
    main()
