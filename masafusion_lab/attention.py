"""The one attention processor: (6)-(8), with rows of the batch that may read one another's Q, K and V."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from masafusion_lab.fusion import Branch

CHUNK = 2**21
"""Attention weights that are shown to taps at a time."""
Row: TypeAlias = tuple[str, str]
"""A branch, and a half of guidance."""


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


@dataclass(frozen=True)
class Sight:
    """What a tap sees at once: the weights of a layer's queries from number `first` on.

    `grid`: the layer's height and width, pixels being numbered row by row; `p`: (B, heads, queries, keys), float32, by
    (branch, half of guidance); rows that attend alike share one tensor.
    """

    site: Site
    step: Step
    grid: tuple[int, int]
    first: int
    p: Mapping[Row, Tensor]


class Tap(Protocol):
    """An observer of attention weights; it never changes them."""

    own: bool
    """Whether it sees what a branch attends to by itself, instead of what its Take makes of that."""

    def wants(self, site: Site, i: int, row: Row) -> bool:
        """Whether `see` shall be shown this row of this layer and step."""
        ...

    def see(self, sight: Sight) -> None:
        """All rows that it wants, some queries of them: called until all queries have been shown."""
        ...


@dataclass(frozen=True)
class Route:
    """How the rows of one layer are computed: unique (q, k, v) rows, and which of them each row outputs."""

    triples: tuple[tuple[int, int, int], ...]
    out: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What every attention layer is told: the step, which (branch, half) each row is, their rules, and who watches.

    `grid`: the latents' height and width, which taps ask for.
    """

    i: int
    rows: tuple[Row, ...]
    branches: Mapping[str, Branch]
    taps: Sequence[Tap] = ()
    grid: tuple[int, int] = (1, 1)
    _routes: dict[Any, Route] = field(default_factory=dict)

    @cached_property
    def _index(self) -> dict[Row, int]:
        return {row: r for r, row in enumerate(self.rows)}

    def route(self, site: Site) -> Route:
        """Equal triples are computed once: a row that reads all of another's Q, K, V costs nothing of its own."""
        takes = tuple(self._triple(row, site) for row in self.rows)
        if takes not in self._routes:
            triples = tuple(dict.fromkeys(takes))
            self._routes[takes] = Route(triples, tuple(triples.index(t) for t in takes))
        return self._routes[takes]

    def watched(self, site: Site) -> list[tuple[Tap, dict[Row, tuple[int, int]]]]:
        """The taps that want something of a layer, with the rows they want, each as its q and k rows."""
        found = []
        for tap in self.taps:
            rows = [row for row in self.rows if tap.wants(site, self.i, row)]
            if rows:
                own = {row: (self._index[row],) * 2 for row in rows}
                found.append((tap, own if tap.own else {row: self._triple(row, site)[:2] for row in rows}))
        return found

    def _triple(self, row: Row, site: Site) -> tuple[int, int, int]:
        (name, half), own = row, self._index[row]
        take = self.branches[name].take
        if site.cross or self.i not in take.steps or site.depth not in take.layers or half not in take.halves:
            return own, own, own
        q, k, v = (own if b is None else self._index[b, half] for b in (take.q, take.k, take.v))
        return q, k, v


class RoutedAttention:
    """Scaled dot-product attention as diffusers' own, bit for bit, but that rows follow `step.route(site)`."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        step: Step | None = None,
    ) -> Tensor:
        """Attend. hidden_states (R * B, N, C), rows outermost; text (R * B, n, d) in cross-attention, else None."""
        x, text = hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if step is None:
            q, k, v = attn.to_q(x), attn.to_k(text), attn.to_v(text)  # (6), (7)
        else:
            route, n = step.route(self.site), len(step.rows)
            q = _project(attn.to_q, x, [t[0] for t in route.triples], n)
            k = _project(attn.to_k, text, [t[1] for t in route.triples], n)
            v = _project(attn.to_v, text, [t[2] for t in route.triples], n)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (U * B, heads, N, c)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(x))
            attention_mask = attention_mask.view(len(x), attn.heads, -1, attention_mask.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)  # (8)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if step is None:
            return out
        if watched := step.watched(self.site):
            self._show(watched, attn, x, text, q, k, step, route)
        return _rows(out, route.out, len(route.triples))

    def _show(
        self,
        watched: Sequence[tuple[Tap, Mapping[Row, tuple[int, int]]]],
        attn: Any,
        x: Tensor,
        text: Tensor,
        q: Tensor,
        k: Tensor,
        step: Step,
        route: Route,
    ) -> None:
        """Show taps the weights of the rows that they want, CHUNK at a time, each pair of q and k computed once."""
        there = {triple[:2]: u for u, triple in enumerate(route.triples)}
        q, k = (y.unflatten(0, (len(route.triples), -1)) for y in (q, k))
        pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for pair in dict.fromkeys(pair for _, rows in watched for pair in rows.values()):
            if pair in there:
                pairs[pair] = q[there[pair]], k[there[pair]]
            else:  # what a row that reads another's would have attended to
                own = (
                    _project(layer, y, [pair[0]], len(step.rows)) for layer, y in ((attn.to_q, x), (attn.to_k, text))
                )
                pairs[pair] = tuple(y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in own)
        grid = self.site.grid(*step.grid)
        queries = x.shape[1]
        if grid[0] * grid[1] != queries:
            raise ValueError(f"{self.site.name}: {queries} pixels are not the {grid[0]}x{grid[1]} of its level")
        size = max(1, CHUNK // (len(pairs) * k[0, :, :, :, 0].numel()))
        for first in range(0, queries, size):
            p = {
                pair: (a[:, :, first : first + size] * attn.scale @ b.mT).float().softmax(-1)
                for pair, (a, b) in pairs.items()
            }
            for tap, rows in watched:
                tap.see(Sight(self.site, step, grid, first, {row: p[pair] for row, pair in rows.items()}))


def _project(layer: nn.Module, x: Tensor, rows: Sequence[int], n: int) -> Tensor:
    """`layer` of the listed rows of x (n * B, ...), each projected once however often it is listed."""
    unique = sorted(set(rows))
    return _rows(layer(_rows(x, unique, n)), [unique.index(r) for r in rows], len(unique))


def _rows(x: Tensor, rows: Sequence[int], n: int) -> Tensor:
    """The listed rows of x (n * B, ...) as (len(rows) * B, ...); x itself where that is what is asked."""
    if list(rows) == list(range(n)):
        return x
    return x.unflatten(0, (n, -1))[list(rows)].flatten(0, 1)


def install(unet: nn.Module) -> tuple[Site, ...]:
    """Give every attention layer of a diffusers UNet the processor, once; return the sites in running order.

    Without a `step` in `cross_attention_kwargs` the UNet computes exactly what it did before.
    """
    layers = [(name, module) for name, module in unet.named_modules() if re.search(r"\.attn[12]$", name)]
    layers.sort(key=lambda layer: _running_order(layer[0]))
    deepest, sites = len(unet.get_submodule("down_blocks")) - 1, list[Site]()  # type: ignore[arg-type]
    for name, module in layers:
        cross, (place, block, *_) = name.endswith("attn2"), _running_order(name)
        level = (block, deepest, deepest - block)[place]
        sites.append(Site(name, sum(s.cross == cross for s in sites), cross, int(module.heads), level))
        if not isinstance(module.processor, RoutedAttention):
            module.set_processor(RoutedAttention(sites[-1]))
    return tuple(sites)


def _running_order(name: str) -> tuple[int, ...]:
    """Down, mid, up (a UNet lists its middle block last); within a block, by the numbers in the name."""
    place = ["down_blocks", "mid_block", "up_blocks"].index(name.split(".")[0])
    return place, *map(int, re.findall(r"\d+", name))
