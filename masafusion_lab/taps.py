"""Observers of attention that reduce at once what they see: word maps, self-attention, interference, distance.

What a tap has seen is in its `sums`: tensors by name, the batch first.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

    def check(self, sites: Sequence[Site], steps: Sequence[int]) -> None:
        """Raise InputError if nothing would be seen in a run of these steps by a model with these layers."""
        if not any(i in self.steps for i in steps):
            raise InputError(f"steps {self.steps}: the run has steps {steps[0]} to {steps[-1]}")
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

    Of self-attention two shares, (B, T, heads, 2), of what pixels inside A read, and those outside:
      "flow/BRANCH/HALF/DEPTH"   by place: from keys on the other side of the border;
      "mixed/BRANCH/HALF/DEPTH"  by what is read: inside, of all but what is made anew; outside, of what is made anew.
    Made anew are the values inside A of branches on any latent but `kept`, that of the source: those that a rule takes
    from the source are kept wherever they lie. "spill/BRANCH/HALF/DEPTH" -> (B, T, heads, 2), of cross-attention: the
    mass of the words `edited` (prompt -> (B, n), 1 at their tokens) inside A and outside. NaN where nothing was seen,
    there is no query, or A has no pixel on a layer's grid. `mask`: A at latent resolution, (B, 1, h, w).
    """

    mask: Tensor
    steps: int
    edited: Mapping[str, Tensor]
    scope: Scope = Scope()
    kept: str = "source"
    sums: dict[str, Tensor] = field(default_factory=dict)
    own = False

    def wants(self, site: Site, i: int, row: Row) -> bool:
        """Attention in its scope."""
        return self.scope.holds(site, i, row)

    def see(self, sight: Sight) -> None:
        """Add these queries to the step's mass."""
        inside = region(self.mask, sight.grid)  # (B, pixels)
        all_of = torch.stack([inside.sum(-1), (1 - inside).sum(-1)], -1)[:, None]  # (B, 1, 2)
        nowhere = torch.where(all_of[..., :1] > 0, 0, torch.nan)
        done: dict[tuple[Any, ...], Sequence[Tensor]] = {}
        for row, p in sight.p.items():
            branch, values = sight.step.branches[row[0]], sight.values[row]
            prompt = branch.prompt if row[1] == "text" else branch.null
            if sight.site.cross and prompt not in self.edited:
                continue
            new = tuple(sight.step.branches[name].x != self.kept for name in values)
            if (known := (id(p), prompt, new)) not in done:
                here = inside[:, None, sight.first : sight.first + p.shape[2]]  # (B, 1, queries)
                if sight.site.cross:
                    mass = _mass(p, self.edited[prompt])
                    done[known] = [torch.stack([(here * mass).sum(-1), ((1 - here) * mass).sum(-1)], -1)]
                else:  # of each query the mass on keys inside A, and on those that are made anew: (B, heads, queries)
                    place = _mass(p, inside.repeat(1, len(new)))
                    one = len(set(new)) == 1
                    made = place * new[0] if one else _mass(p, torch.cat([inside * n for n in new], -1))
                    across = [(here * (1 - m), (1 - here) * m) for m in (place, made)]
                    done[known] = [torch.stack([a.sum(-1), b.sum(-1)], -1) / all_of for a, b in across]
            for kind, sums in zip(("spill",) if sight.site.cross else ("flow", "mixed"), done[known], strict=True):
                _tally(self, kind, row, sight, self.steps, sums + nowhere)


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
        inside = region(self.mask, sight.grid)[:, None]
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


def region(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A (B, pixels) at a layer's resolution, 0 or 1: those of which half or more is in the mask (B, 1, h, w)."""
    return (F.adaptive_avg_pool2d(mask.float(), grid) >= 0.5).float().flatten(1)


def _mass(p: Tensor, keys: Tensor) -> Tensor:
    """The mass (B, heads, queries) of weights p on keys (B, n)."""
    return (p @ keys.to(p)[:, None, :, None])[..., 0]


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
