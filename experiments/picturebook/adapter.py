"""T2I-Adapters for sketch, canny and pose maps; they are trained together with the UNet."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import T2IAdapter

from experiments.picturebook.training import Settings, frozen, last, weights

CHANNELS = {"sketch": 1, "canny": 1, "pose": 3}
"""Of the hint pictures."""


def build(kind: str, levels: Sequence[int]) -> T2IAdapter:
    """The untrained adapter of a UNet of these channels."""
    return T2IAdapter(in_channels=CHANNELS[kind], channels=list(levels), num_res_blocks=1, downscale_factor=4,
                      adapter_type="full_adapter")  # fmt: skip


def trained(s: Settings, kind: str, levels: Sequence[int]) -> T2IAdapter:
    """The trained adapter of a kind, from the UNet's checkpoint, or as it ships."""
    name = "unet" if last(s, "unet").exists() else f"adapter_{kind}"
    return frozen(build(kind, levels), weights(s, name, f"adapters.{kind}"))
