"""The attention layers of a UNet in running order, their places and sizes, and how a text names some of them."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from masafusion_lab import InputError
from masafusion_lab.fusion import Span


@dataclass(frozen=True)
class Site:
    """One attention layer. `depth` counts self- or cross-attention layers in running order: down, mid, up.

    `level`: how often the latent's sides are halved there.
    """

    name: str
    depth: int
    cross: bool
    heads: int = 1
    level: int = 0

    def grid(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of this layer's pixels for a latent of h x w."""
        return -(-h // 2**self.level), -(-w // 2**self.level)


def layers(text: str, sites: Sequence[Site]) -> Container[int]:
    """The depths of self-attention layers that a text names: all, decoder, a range a:b, or a list such as 3,4,9.

    10/16 is the layer as deep in this model as layer 10 in one of 16. Raises InputError for what names none.
    """
    own = [site for site in sites if not site.cross]
    if text == "all":
        return Span()
    if text == "decoder":
        return {site.depth for site in own if site.name.startswith("up_blocks")}

    def place(part: str) -> int:
        number, _, of = part.partition("/")
        if (depth := int(number) * len(own) // int(of) if of else int(number)) < 0:
            raise ValueError("layers are counted from 0, in running order")
        return depth

    try:
        if ":" in text:
            a, b = text.split(":")
            return Span(place(a or "0"), place(b) if b else None)
        depths = {place(part) for part in text.split(",")}
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"{text!r} names no layers: give all, decoder, a range (8:16, 10/16:) or a list (3,4,9)"
        ) from None
    if max(depths) >= len(own):
        raise InputError(f"{text!r}: layer {max(depths)} is not there; this model has 0 to {len(own) - 1}")
    return depths


def self_layers(sites: Sequence[Site]) -> int:
    """The number of self-attention layers."""
    return sum(not site.cross for site in sites)


def found(unet: Any) -> dict[Site, Any]:
    """The attention layers of a diffusers UNet by site, in running order."""
    layers = [(name, module) for name, module in unet.named_modules() if re.search(r"\.attn[12]$", name)]
    layers.sort(key=lambda layer: _running_order(layer[0]))
    deepest, sites = len(unet.down_blocks) - 1, dict[Site, Any]()
    for name, module in layers:
        cross, (place, block, *_) = name.endswith("attn2"), _running_order(name)
        level = (block, deepest, deepest - block)[place]
        depth = sum(site.cross == cross for site in sites)
        sites[Site(name, depth, cross, int(module.heads), level)] = module
    return sites


def _running_order(name: str) -> tuple[int, ...]:
    """Down, mid, up (a UNet lists its middle block last); within a block, by the numbers in the name."""
    place = ["down_blocks", "mid_block", "up_blocks"].index(name.split(".")[0])
    return place, *map(int, re.findall(r"\d+", name))
