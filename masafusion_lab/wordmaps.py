"""Where the network looks for words: cross-attention of one resolution, added up while it is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.attention import Sight
from masafusion_lab.fusion import Row
from masafusion_lab.sites import Site

CELLS = 64
"""Side of Stable Diffusion's latents, by which published resolutions are counted."""


class WordMaps:
    """A tap that adds up how much each pixel of the branches attends to each token, under their prompts.

    `added` (branches, B, h, w, n), of all layers and heads since it was last None. `resolution`: the side of the maps,
    of 64; `own`: whether of branches that follow another's words it is seen what they would attend to alone.
    """

    def __init__(self, resolution: int, branches: Sequence[str] = ("S", "T"), *, own: bool = False) -> None:
        self.resolution, self.branches, self.own = resolution, tuple(branches), own
        self.added: Tensor | None = None

    def wants(self, site: Site, i: int, row: Row) -> bool:
        """Cross-attention of its resolution, of its branches."""
        branch, half = row
        return has(site, self.resolution) and branch in self.branches and half == "text"

    def see(self, sight: Sight) -> None:
        """Add some pixels' attention, in steps that have all branches."""
        if len(sight.p) < len(self.branches):
            return
        p = torch.stack([sight.p[branch, "text"] for branch in self.branches]).sum(2)
        if self.added is None:
            self.added = p.new_zeros(*p.shape[:2], *sight.grid, p.shape[-1])
        self.added.flatten(2, 3)[:, :, sight.first : sight.first + p.shape[2]] += p

    def at(self, marks: Tensor) -> Tensor:
        """The attention (branches, B, h, w) to the tokens that are marked, of each branch by (branches, B, n)."""
        assert self.added is not None, "first_maps() refuses a resolution that no layer has"
        return (self.added * marks[:, :, None, None]).sum(-1)


def has(site: Site, resolution: int) -> bool:
    """Whether it is a layer of cross-attention whose maps have that side, of 64."""
    return site.cross and 2**site.level * resolution == CELLS


def first_maps(sites: Sequence[Site], resolution: int, key: str) -> int:
    """The place among the sites of the first layer of a resolution. Raises InputError, naming the key, for none."""
    for place, site in enumerate(sites):
        if has(site, resolution):
            return place
    raise InputError(f"{key}={resolution}: no layer has such maps; take 16")
