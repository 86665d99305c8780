"""T2I-Adapters of the trained UNet for sketch, canny and pose maps: kind=sketch, kind=canny or kind=pose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import T2IAdapter
from torch import Tensor

from experiments.picturebook import unet
from experiments.picturebook.data import pixels
from experiments.picturebook.training import fit, frozen, settings, weights

CHANNELS = {"sketch": 1, "canny": 1, "pose": 3}
"""Of the hint pictures."""


@dataclass
class Adapter(unet.Unet):
    """The UNet's settings, of which the network's own must be those that it was trained with; kind: of the hint."""

    kind: str = "sketch"
    steps: int = 1500
    lr: float = 5e-4
    warmup: int = 100
    decay: float = 0.99
    coarse: int = 0
    drop: float = 0.2
    blocks: int = 1
    levels: list[int] = field(default_factory=lambda: [64, 128, 192])


def build(s: Adapter) -> T2IAdapter:
    """The untrained adapter."""
    return T2IAdapter(in_channels=CHANNELS[s.kind], channels=list(s.levels), num_res_blocks=s.blocks,
                      downscale_factor=4, adapter_type="full_adapter")  # fmt: skip


class Training(unet.Training):
    """The UNet's loss, with the UNet frozen, at timesteps of which most are noisy, as T2I-Adapter does."""

    def __init__(self, s: Adapter) -> None:
        super().__init__(s)
        self.unet, self.adapter = unet.trained(s).to(memory_format=torch.channels_last), build(s)
        self.drawn = s.album(s.kind).pictures

    def batch(self, g: np.random.Generator) -> tuple[Tensor, ...]:
        """The UNet's batch, and the hints (B, 1 or 3, SIZE, SIZE) in [0, 1]."""
        state = g.bit_generator.state
        which = np.sort(g.integers(len(self.ids), size=self.s.batch))
        g.bit_generator.state = state  # the UNet's batch draws the same pictures
        hints = self.drawn[which]
        return *super().batch(g), pixels(hints if hints.ndim == 4 else hints[..., None])

    def timesteps(self, u: np.ndarray) -> np.ndarray:
        """Cubic: the hint matters while the picture is laid out."""
        return (1000 * (1 - u**3)).astype(np.int64).clip(max=999)

    def features(self, *hint: Tensor) -> list[Tensor]:
        """The adapter's features, one a level."""
        return self.adapter(*hint)


def trained(s: Any, kind: str) -> T2IAdapter:
    """The trained adapter of a kind."""
    return frozen(
        build(settings(Adapter, [f"root={s.root}", f"kind={kind}"])), weights(s, f"adapter_{kind}", "adapter")
    )


def main(words: list[str] | None = None) -> None:
    """Train one."""
    s = settings(Adapter, words)
    fit(Training, s, f"adapter_{s.kind}")


if __name__ == "__main__":
    main()
