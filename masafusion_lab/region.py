"""The region A: how it comes from a mask, as data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from masafusion_lab.choices import Checked


@dataclass(frozen=True)
class Region(Checked):
    """How the region A, in latent cells, comes from a mask, and a mask from two sketches."""

    downsample: Literal["max", "area", "nearest"] = "max"
    """A latent cell is inside if the mask touches it (max), fills half of it (area), or covers its middle (nearest)."""
    threshold: float = 0.5
    """Grey of the mask, 0 to 1, above which a pixel is inside."""
    soft: bool = False
    """Whether greys of the mask stay, as shares of the prediction inside, instead of being cut at the threshold."""
    feather: int = 0
    """Latent cells over which the border fades to either side; 0: it is hard, as in (9) and (10)."""
    margin: int | None = None
    """Of mask=auto: pixels by which what differs is grown; null: a fortieth of the short side."""
    hull: bool = False
    """Of mask=auto: whether the convex hull is taken."""
    by: str = "auto"
    """What of the mask's picture is the region. auto: what is transparent in a photograph, what is drawn on nothing, of
    two values the lighter, of two colours the one that is not grey, black and white with soft borders as they are; or
    alpha (what is transparent), opaque, light, dark, label:1, colour:#ff0000."""

    def problems(self) -> Iterator[str]:
        """What cannot be, a line each."""
        for name, value, right, allowed in (
            ("by", self.by, re.fullmatch(BY, self.by), "auto, alpha, opaque, light, dark, label:1 or colour:#ff0000"),
            ("threshold", self.threshold, 0 <= self.threshold < 1, "at least 0 and below 1"),
            ("feather", self.feather, self.feather >= 0, "at least 0"),
            ("margin", self.margin, self.margin is None or self.margin >= 0, "at least 0"),
        ):
            if not right:
                yield f"region.{name}={value}: must be {allowed}"


BY = r"auto|alpha|opaque|light|dark|label:\d{1,5}|colour:#[0-9a-fA-F]{6}"

USUAL = Region()
"""Hard, and of every cell that the mask touches."""
