"""Observers of attention that reduce at once what they see: word maps, self-attention, interference, distance.

What a tap has seen is in its `sums`: tensors by name, the batch first.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.attention import Sight
from masafusion_lab.fusion import Branch, Row, Span
from masafusion_lab.sites import Site

QUERIES, KEYS = 16, 32
"""Cells along the longer side that queries and keys of self-attention are pooled to, where a layer has more."""


@dataclass(frozen=True)
class Scope:
    """What a tap looks at: steps, layers (`Site.depth`), branches (None: all) and halves of guidance."""

    steps: Container[int] = Span()
    layers: Container[int] = Span()
    branches: Container[str] | None = None
    halves: Container[str] = ("text",)

    def holds(self, site: Site, i: int, row: Row) -> bool:
        """Whether this row of this layer and step is looked at."""
        branch, half = row
        named = self.branches is None or branch in self.branches
        return named and half in self.halves and i in self.steps and site.depth in self.layers

    def check(self, sites: Sequence[Site], steps: int) -> None:
        """Raise InputError if nothing would be seen in a run of `steps` steps by a model with these layers."""
        if not any(i in self.steps for i in range(steps)):
            raise InputError(f"steps {self.steps}: the run has steps 0 to {steps - 1}")
        deepest = max(site.depth for site in sites)
        if not any(depth in self.layers for depth in range(deepest + 1)):
            raise InputError(f"layers {self.layers}: the model has layers 0 to {deepest}, of each kind of attention")


@dataclass
class WordTap:
    """DAAM's sums: cross-attention, added up over the steps of a bin (Tang et al. 2023, section 2.2).

    "words/BRANCH/HALF/DEPTH" -> (B, bins, heads or 1, tokens + 1, h, w); the last token stands for all from number
    `tokens` on. `branches`: those that were seen.
    """

    bins: Sequence[range]
    tokens: int
    scope: Scope = Scope()
    heads: bool = True
    sums: dict[str, Tensor] = field(default_factory=dict)
    branches: dict[str, Branch] = field(default_factory=dict)
    own = False

    def wants(self, site: Site, i: int, row: Row) -> bool:
        """Cross-attention in its scope."""
        return site.cross and self.scope.holds(site, i, row) and any(i in steps for steps in self.bins)

    def see(self, sight: Sight) -> None:
        """Add to the step's bin."""
        bin = next(b for b, steps in enumerate(self.bins) if sight.step.i in steps)
        self.branches |= sight.step.branches
        for row, p in sight.p.items():
            p = p if self.heads else p.mean(1, keepdim=True)
            p = torch.cat([p[..., : self.tokens], p[..., self.tokens :].sum(-1, keepdim=True)], -1).mT
            sums = _sums(self, "words", row, sight.site, (len(p), len(self.bins), *p.shape[1:3], *sight.grid), p)
            sums.flatten(-2)[:, bin, :, :, sight.first : sight.first + p.shape[-1]] += p

    def bytes(self, site: Site, grid: tuple[int, int], branches: int) -> int:
        """What it holds of a layer, for one picture."""
        heads = site.heads if self.heads else 1
        return 4 * branches * len(self.bins) * heads * (self.tokens + 1) * grid[0] * grid[1] if site.cross else 0


@dataclass
class PixelTap:
    """Self-attention by itself, before any Take, the mean over heads, added up over the steps of a bin.

    "pixels/BRANCH/HALF/DEPTH" -> (B, bins, h', w', h", w"): for each cell of queries (their mean) the share of mass
    that goes to each cell of keys. Cells are `pooled`.
    """

    bins: Sequence[range]
    scope: Scope = Scope()
    sums: dict[str, Tensor] = field(default_factory=dict)
    own = True

    def wants(self, site: Site, i: int, row: Row) -> bool:
        """Self-attention in its scope."""
        return not site.cross and self.scope.holds(site, i, row) and any(i in steps for steps in self.bins)

    def see(self, sight: Sight) -> None:
        """Add to the step's bin."""
        bin = next(b for b, steps in enumerate(self.bins) if sight.step.i in steps)
        (f, *rows), (g, *columns) = pooled(sight.grid, QUERIES), pooled(sight.grid, KEYS)
        h, w = sight.grid
        for row, p in sight.p.items():
            p = p.mean(1)  # (B, queries, keys)
            if g > 1:
                p = F.avg_pool2d(p.unflatten(-1, sight.grid), g, ceil_mode=True, divisor_override=1).flatten(-2)
            n = torch.arange(sight.first, sight.first + p.shape[1], device=p.device)
            y, x = n // w // f, n % w // f
            size = (h - y * f).clamp(max=f) * (w - x * f).clamp(max=f)  # of the cell: at the rim it may be cut
            sums = _sums(self, "pixels", row, sight.site, (len(p), len(self.bins), *rows, *columns), p)
            sums[:, bin].flatten(1, 2).flatten(2).index_add_(1, y * rows[1] + x, p / size[:, None])

    def bytes(self, site: Site, grid: tuple[int, int], branches: int) -> int:
        """What it holds of a layer, for one picture."""
        (_, *rows), (_, *columns) = pooled(grid, QUERIES), pooled(grid, KEYS)
        return 0 if site.cross else 4 * branches * len(self.bins) * rows[0] * rows[1] * columns[0] * columns[1]


@dataclass
class FlowTap:
    """The interference meter: attention mass that crosses the border of the region A, by step, layer and head.

    "flow/BRANCH/HALF/DEPTH" -> (B, T, heads, 2), of self-attention: the share of mass that goes from queries inside A
    to keys outside, and from outside to inside. "spill/BRANCH/HALF/DEPTH" -> (B, T, heads, 2), of cross-attention:
    the mass of the words `edited` (prompt -> (B, n), 1 at their tokens) inside A and outside. Where nothing was seen,
    or there is no query, NaN. `mask`: A at latent resolution, (B, 1, h, w); a pixel of a layer belongs to A as much
    as the cell of it that does most.
    """

    mask: Tensor
    steps: int
    edited: Mapping[str, Tensor]
    scope: Scope = Scope()
    sums: dict[str, Tensor] = field(default_factory=dict)
    own = False

    def wants(self, site: Site, i: int, row: Row) -> bool:
        """Attention in its scope."""
        return self.scope.holds(site, i, row)

    def see(self, sight: Sight) -> None:
        """Add these queries to the step's mass."""
        inside, cross = _region(self.mask, sight.grid), sight.site.cross  # (B, pixels)
        done: dict[tuple[int, str], Tensor] = {}
        for row, p in sight.p.items():
            prompt = sight.step.branches[row[0]].prompt
            if cross and prompt not in self.edited:
                continue
            if (known := (id(p), prompt)) not in done:
                if not cross:  # where keys of two branches stand side by side, those of a place are one
                    p = p.unflatten(-1, (-1, inside.shape[-1])).sum(-2) if p.shape[-1] > inside.shape[-1] else p
                mass = (p @ (self.edited[prompt] if cross else inside).to(p)[:, None, :, None])[..., 0]  # of a query
                here = inside[:, None, sight.first : sight.first + p.shape[2]]  # (B, 1, queries)
                m, n = (mass, mass) if cross else (1 - mass, mass)
                sums = torch.stack([(here * m).sum(-1), ((1 - here) * n).sum(-1)], -1)  # (B, heads, 2)
                all_of = torch.stack([inside.sum(-1), (1 - inside).sum(-1)], -1)[:, None]
                done[known] = sums if cross else sums / all_of
            _tally(self, "spill" if cross else "flow", row, sight, self.steps, done[known])


@dataclass
class DistanceTap:
    """How differently two branches attend by themselves: total variation of a pixel's self-attention, 0 to 1.

    "distance/A:B/HALF/DEPTH" -> (B, T, heads, 2): the mean over the pixels of the region, and over those outside.
    """

    mask: Tensor
    steps: int
    pairs: Sequence[tuple[str, str]]
    scope: Scope = Scope()
    sums: dict[str, Tensor] = field(default_factory=dict)
    own = True

    def wants(self, site: Site, i: int, row: Row) -> bool:
        """Self-attention of the branches that are compared, in its scope."""
        return not site.cross and any(row[0] in pair for pair in self.pairs) and self.scope.holds(site, i, row)

    def see(self, sight: Sight) -> None:
        """Add these pixels to the step's mean."""
        inside = _region(self.mask, sight.grid)[:, None]
        for a, b in self.pairs:
            for half in {half for _, half in sight.p}:
                if (a, half) not in sight.p or (b, half) not in sight.p:
                    continue
                apart = (sight.p[a, half] - sight.p[b, half]).abs().sum(-1) / 2  # (B, heads, queries)
                here = inside[..., sight.first : sight.first + apart.shape[-1]]
                means = [(m * apart).sum(-1) / n.sum(-1) for m, n in ((here, inside), (1 - here, 1 - inside))]
                _tally(self, "distance", (f"{a}:{b}", half), sight, self.steps, torch.stack(means, -1))


def bins(steps: int, number: int) -> list[range]:
    """The steps of a run in `number` bins, as equal as can be; a step each where there are fewer."""
    number = min(number, steps)
    cuts = [round(steps * b / number) for b in range(number + 1)]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def pooled(grid: tuple[int, int], side: int) -> tuple[int, int, int]:
    """The pixels along a side of a cell, and the height and width in cells, of a grid with `side` cells at most."""
    f = -(-max(grid) // side)
    return f, -(-grid[0] // f), -(-grid[1] // f)


def _region(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A (B, pixels) at a layer's resolution."""
    return F.adaptive_max_pool2d(mask.float(), grid).flatten(1)


def _sums(tap: WordTap | PixelTap, kind: str, row: Row, site: Site, shape: Sequence[int], like: Tensor) -> Tensor:
    """A tap's sums of a row and layer, zero at first."""
    name = "/".join((kind, *row, str(site.depth)))
    if name not in tap.sums:
        tap.sums[name] = like.new_zeros(*shape)
    return tap.sums[name]


def _tally(tap: FlowTap | DistanceTap, kind: str, row: Row, sight: Sight, steps: int, value: Tensor) -> None:
    """Add a value (B, heads, 2) of some queries to those of its step, which is NaN as long as nothing was seen."""
    name = "/".join((kind, *row, str(sight.site.depth)))
    if name not in tap.sums:
        tap.sums[name] = value.new_full((len(value), steps, *value.shape[1:]), torch.nan)
    if sight.first == 0:
        tap.sums[name][:, sight.step.i] = 0
    tap.sums[name][:, sight.step.i] += value
