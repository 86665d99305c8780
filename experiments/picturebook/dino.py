"""DINO (Caron et al. 2021): a ViT that learns without labels that crops of one picture are alike; its CLS token scores
how near two pictures are, independently of CLIP.

As DINOv2 (Oquab et al. 2023) has it, the teacher shares its batch evenly among the prototypes, by Sinkhorn and Knopp's
rule: centred only, it ends by telling the six backgrounds apart and nothing else. For the same reason half of the
batches are of one background each, and colours are jittered as published, grey included: else its hue is enough. From
the start that is too hard (every answer stays even), so the first 600 steps go without: `alike=0 light=0 grey=0`.
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
from experiments.picturebook.training import Part, Settings, fit, frozen, settings, weights


@dataclass
class Dino(Settings):
    """views: two global ones, then local ones of half the side; momentum: of the teacher.

    light, tint: how much brightness and contrast, and each channel, are jittered; grey: the part of views without
    colour; alike: of batches whose pictures share their background.
    """

    steps: int = 1500
    batch: int = 64
    lr: float = 5e-4
    decay: float = 0.99
    width: int = 192
    layers: int = 4
    views: int = 6
    prototypes: int = 256
    momentum: float = 0.99
    light: float = 0.4
    tint: float = 0.15
    grey: float = 0.2
    alike: float = 0.5


def build(s: Dino) -> ViTModel:
    """The untrained ViT; its attention is not fused, which for few tokens is faster to train."""
    config = ViTConfig(hidden_size=s.width, intermediate_size=4 * s.width, num_hidden_layers=s.layers,
                       num_attention_heads=s.width // 64, image_size=SIZE, attn_implementation="eager")  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


class Network(nn.Module):
    """The ViT and a head of prototypes."""

    def __init__(self, s: Dino) -> None:
        super().__init__()
        self.vit = build(s)
        self.head = nn.Sequential(nn.Linear(s.width, 2 * s.width), nn.GELU(), nn.Linear(2 * s.width, 128))
        self.prototypes = nn.Parameter(torch.randn(s.prototypes, 128))

    def forward(self, x: Tensor) -> Tensor:
        """Cosines (B, prototypes), float32, of the CLS tokens of pictures in [-1, 1]."""
        cls = self.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        y = self.head(cls).float()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for the teacher's temperature
            return F.linear(F.normalize(y), F.normalize(self.prototypes))


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


def shared(cosines: Tensor, temperature: float = 0.05, rounds: int = 3) -> Tensor:
    """What the teacher says: shares (B, prototypes) that sum to 1 a view, and to about as much a prototype."""
    q = (cosines / temperature).exp()
    for _ in range(rounds):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


class Training(Part):
    """Every view of the student says what the teacher, its running average, says of a global view of the picture."""

    def __init__(self, s: Dino) -> None:
        super().__init__(s)
        self.student = Network(s)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        album = s.album()
        self.pictures, lies = album.pictures, [album.scene(k).background for k in range(album.count)]
        self.alike = [np.flatnonzero(np.array(lies) == background) for background in sorted(set(lies))]

    def batch(self, g: np.random.Generator) -> list[Tensor]:
        """The views, global ones first."""
        s: Any = self.s
        of = self.alike[g.integers(len(self.alike))] if g.random() < s.alike else np.arange(len(self.pictures))
        x = pixels(self.pictures[np.sort(g.choice(of, s.batch))])
        large = [view(x, g, SIZE, (0.5, 1.0), s) for _ in range(2)]
        return large + [view(x, g, SIZE // 2, (0.2, 0.5), s) for _ in range(s.views - 2)]

    def training_step(self, views: list[Tensor], k: int) -> Any:
        """The cross-entropy of all pairs of a teacher's and another view; `used`: prototypes that the student uses."""
        s: Any = self.s
        large, small = torch.cat(views[:2]), torch.cat(views[2:])
        with torch.no_grad():
            said = shared(self.teacher(large)).chunk(2)
        out = torch.cat([self.student(large), self.student(small)])
        guessed = (out / 0.1).log_softmax(-1).chunk(len(views))
        pairs = [(p, q) for i, p in enumerate(said) for j, q in enumerate(guessed) if i != j]
        loss = -torch.stack([(p * q).sum(-1).mean() for p, q in pairs]).mean()
        used = torch.special.entr(torch.cat(guessed).exp().mean(0)).sum().exp()
        self.log_dict({"loss": loss.detach(), "used": used}, on_step=False, on_epoch=True, batch_size=s.batch)
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
    s = settings(Dino, words)
    fit(Training, s, "dino")
    trained(s).half().save_pretrained(Path(s.root) / "dino" / "model")


if __name__ == "__main__":
    main()
