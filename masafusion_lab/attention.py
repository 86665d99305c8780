"""The one attention processor: (6)-(8), with rows of the batch that may read one another's Q, K and V."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from masafusion_lab.fusion import Branch


@dataclass(frozen=True)
class Site:
    """One attention layer. `depth` counts self- or cross-attention layers in running order: down, mid, up."""

    name: str
    depth: int
    cross: bool


class Tap(Protocol):
    """An observer of attention weights; it never changes them."""

    def wants(self, site: Site, i: int) -> bool:
        """Whether `see` shall be called for this layer and step."""
        ...

    def see(self, site: Site, i: int, p: Mapping[tuple[str, str], Tensor]) -> None:
        """The attention weights (B, heads, pixels, keys) by (branch, half of guidance)."""
        ...


@dataclass(frozen=True)
class Route:
    """How the rows of one layer are computed: unique (q, k, v) rows, and which of them each row outputs."""

    triples: tuple[tuple[int, int, int], ...]
    out: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What every attention layer is told: the step, which (branch, half) each row is, their rules, and who watches."""

    i: int
    rows: tuple[tuple[str, str], ...]
    branches: Mapping[str, Branch]
    taps: Sequence[Tap] = ()
    _routes: dict[Any, Route] = field(default_factory=dict)

    @cached_property
    def _index(self) -> dict[tuple[str, str], int]:
        return {row: r for r, row in enumerate(self.rows)}

    def route(self, site: Site) -> Route:
        """Equal triples are computed once: a row that reads all of another's Q, K, V costs nothing of its own."""
        takes = tuple(self._triple(row, site) for row in self.rows)
        if takes not in self._routes:
            triples = tuple(dict.fromkeys(takes))
            self._routes[takes] = Route(triples, tuple(triples.index(t) for t in takes))
        return self._routes[takes]

    def _triple(self, row: tuple[str, str], site: Site) -> tuple[int, int, int]:
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
        watching = [tap for tap in step.taps if tap.wants(self.site, step.i)]
        if watching:
            p = _rows((q @ k.mT * attn.scale).softmax(-1), route.out, len(route.triples)).unflatten(0, (n, -1))
            for tap in watching:
                tap.see(self.site, step.i, dict(zip(step.rows, p, strict=True)))
        return _rows(out, route.out, len(route.triples))


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
    sites: list[Site] = []
    for name, module in layers:
        cross = name.endswith("attn2")
        sites.append(Site(name, sum(s.cross == cross for s in sites), cross))
        if not isinstance(module.processor, RoutedAttention):
            module.set_processor(RoutedAttention(sites[-1]))
    return tuple(sites)


def _running_order(name: str) -> tuple[int, ...]:
    """Down, mid, up (a UNet lists its middle block last); within a block, by the numbers in the name."""
    place = ["down_blocks", "mid_block", "up_blocks"].index(name.split(".")[0])
    return place, *map(int, re.findall(r"\d+", name))
