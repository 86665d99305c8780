"""The one attention processor: (6)-(8), with rows of the batch that may read one another's Q, K and V."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Given, Span, Words


@dataclass(frozen=True)
class Site:
    """One attention layer. `depth` counts self- or cross-attention layers in running order: down, mid, up.

    `scale`: latent cells along a side of one of its pixels: 1, 2, 4 ...
    """

    name: str
    depth: int
    cross: bool
    scale: int = 1


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
        return int(number) * len(own) // int(of) if of else int(number)

    try:
        if ":" in text:
            a, b = text.split(":")
            return Span(place(a or "0"), place(b) if b else None)
        return {place(part) for part in text.split(",")}
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"{text!r} names no layers: give all, decoder, a range (8:16, 10/16:) or a list (3,4,9)"
        ) from None


class Tap(Protocol):
    """An observer of attention weights; it never changes them."""

    def wants(self, site: Site, i: int) -> bool:
        """Whether `see` shall be called for this layer and step."""
        ...

    def see(self, site: Site, i: int, p: Mapping[tuple[str, str], Tensor]) -> None:
        """The attention weights (B, heads, pixels, keys) by (branch, half of guidance)."""
        ...


Triple: TypeAlias = tuple[int, int, int]
"""The rows whose q, k and v are attended."""
Recipe: TypeAlias = tuple[str, tuple[Triple, ...]]
"""How an output is made, and of which triples: plain or masked of one; union or words of two."""


@dataclass(frozen=True)
class Route:
    """How the rows of one layer are computed: unique triples, what is made of them, and which of it each row outputs.

    The first `plain` outputs are those triples as they are; then come `recipes`, whose triples are numbers of triples.
    """

    triples: tuple[Triple, ...]
    plain: int
    recipes: tuple[tuple[str, tuple[int, ...]], ...]
    out: tuple[int, ...]


ALONE = Route(((0, 0, 0),), 1, (), (0,))
"""One row that reads itself."""


@dataclass(frozen=True)
class Step:
    """What every attention layer is told: the step, which (branch, half) each row is, their rules, and who watches.

    `given`: the region and the words that rules refer to.
    """

    i: int
    rows: tuple[tuple[str, str], ...]
    branches: Mapping[str, Branch]
    taps: Sequence[Tap] = ()
    given: Given | None = None
    _routes: dict[Any, Route] = field(default_factory=dict)

    @cached_property
    def index(self) -> dict[tuple[str, str], int]:
        """The row of each (branch, half)."""
        return {row: r for r, row in enumerate(self.rows)}

    def route(self, site: Site) -> Route:
        """Equal recipes are followed once: a row that reads all of another's Q, K, V costs nothing of its own."""
        recipes = tuple(self._recipe(row, site) for row in self.rows)
        if recipes not in self._routes:
            unique = sorted(dict.fromkeys(recipes), key=lambda recipe: recipe[0] != "plain")
            triples = tuple(dict.fromkeys(triple for _, its in unique for triple in its))
            plain = sum(how == "plain" for how, _ in unique)
            joined = tuple((how, tuple(map(triples.index, its))) for how, its in unique[plain:])
            self._routes[recipes] = Route(triples, plain, joined, tuple(map(unique.index, recipes)))
        return self._routes[recipes]

    def _recipe(self, row: tuple[str, str], site: Site) -> Recipe:
        (name, half), own = row, self.index[row]
        itself = (own, own, own)
        rule = self.branches[name].words if site.cross else self.branches[name].take
        if rule is None or self.i not in rule.steps or site.depth not in rule.layers or half not in rule.halves:
            return "plain", (itself,)
        if isinstance(rule, Words):
            other = self.index[rule.of, half]
            return "words", ((other, other, other), itself)
        half = "text" if rule.from_text else half
        q, k, v = (own if b is None else self.index[b, half] for b in (rule.q, rule.k, rule.v))
        return rule.keys, ((q, k, v), itself)[: 2 if rule.keys == "union" else 1]

    def region(self, site: Site) -> Tensor:
        """A in the pixels of a layer, (B, 1, 1, N), nearest."""
        assert self.given is not None
        assert self.given.mask is not None
        size = [-(-side // site.scale) for side in self.given.mask.shape[-2:]]
        return F.interpolate(self.given.mask, size).flatten(1)[:, None, None]


@dataclass(frozen=True)
class Term:
    """A summand of rows' attention, weight * softmax(q k^T / sqrt(c) + bias) @ map @ v, each (.., heads, N, c)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    map: Tensor | None = None
    weight: Tensor | None = None

    def out(self) -> Tensor:
        """What it adds to the output; its attention weights are never in memory."""
        v = self.v if self.map is None else self.map @ self.v
        out = F.scaled_dot_product_attention(self.q, self.k, v, attn_mask=self.bias)  # (8)
        return out if self.weight is None else self.weight * out

    def p(self, pixels: slice = slice(None)) -> Tensor:
        """What it adds to the attention weights (.., heads, N, keys) of those pixels."""
        p = self.q[..., pixels, :] @ self.k.mT * self.q.shape[-1] ** -0.5
        p = (p if self.bias is None else p + self.bias).softmax(-1)
        p = p if self.map is None else p @ self.map
        return p if self.weight is None else self.weight[..., pixels, :] * p


def terms(how: str, parts: Sequence[tuple[Tensor, Tensor, Tensor]], step: Step, site: Site) -> list[Term]:
    """The summands of an output that is made in this way of q, k, v (B, heads, N, c); see `Recipe`."""
    q, k, v = parts[0]
    if how == "union":
        _, own_k, own_v = parts[1]
        return [Term(q, torch.cat([k, own_k], -2), torch.cat([v, own_v], -2))]
    if how == "words":
        assert step.given is not None
        assert step.given.words is not None
        own_q, own_k, own_v = parts[1]
        theirs, own = (y[step.i][:, None].to(v.dtype) for y in (step.given.words.theirs, step.given.words.own))
        return [Term(q, k, own_v, map=theirs), Term(own_q, own_k, own_v, map=own.diag_embed())]
    mask, never = step.region(site).to(v.dtype), torch.finfo(v.dtype).min / 2  # finite: all keys may be forbidden
    inside, outside = mask.masked_fill(mask == 0, never), mask.masked_fill(mask == 1, never)
    return [Term(q, k, v, inside, weight=mask.mT), Term(q, k, v, outside, weight=1 - mask.mT)]


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
        route, n = (ALONE, 1) if step is None else (step.route(self.site), len(step.rows))
        q = _project(attn.to_q, x, [t[0] for t in route.triples], n)  # (6), (7)
        k = _project(attn.to_k, text, [t[1] for t in route.triples], n)
        v = _project(attn.to_v, text, [t[2] for t in route.triples], n)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (U * B, heads, N, c)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(x))
            attention_mask = attention_mask.view(len(x), attn.heads, -1, attention_mask.shape[-1])
        plain, size = route.plain * (len(x) // n), len(x) // n
        sums = [[Term(q[:plain], k[:plain], v[:plain], attention_mask)]] if plain else []
        for how, its in route.recipes:
            assert step is not None
            parts = [tuple(y[t * size : (t + 1) * size] for y in (q, k, v)) for t in its]
            sums.append(terms(how, parts, step, self.site))
        outs = [reduce(add, (term.out() for term in each)) for each in sums]
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        watching = [tap for tap in step.taps if tap.wants(self.site, step.i)] if step else []
        if step and watching:
            p = [p for each in sums for p in reduce(add, (term.p() for term in each)).unflatten(0, (-1, size))]
            for tap in watching:
                tap.see(self.site, step.i, {row: p[o] for row, o in zip(step.rows, route.out, strict=True)})
        return gather(out, route.out, len(out) // size)


def _project(layer: nn.Module, x: Tensor, rows: Sequence[int], n: int) -> Tensor:
    """`layer` of the listed rows of x (n * B, ...), each projected once however often it is listed."""
    unique = sorted(set(rows))
    return gather(layer(gather(x, unique, n)), [unique.index(r) for r in rows], len(unique))


def gather(x: Tensor, rows: Sequence[int], n: int) -> Tensor:
    """The listed rows of x (n * B, ...) as (len(rows) * B, ...); x itself where that is what is asked."""
    if list(rows) == list(range(n)):
        return x
    return x.unflatten(0, (n, -1))[list(rows)].flatten(0, 1)


def install(unet: Any) -> tuple[Site, ...]:
    """Give every attention layer of a diffusers UNet the processor, once; return the sites in running order.

    Without a `step` in `cross_attention_kwargs` the UNet computes exactly what it did before.
    """
    found = [(name, module) for name, module in unet.named_modules() if re.search(r"\.attn[12]$", name)]
    found.sort(key=lambda layer: _running_order(layer[0]))
    sites: list[Site] = []
    for name, module in found:
        cross = name.endswith("attn2")
        sites.append(Site(name, sum(s.cross == cross for s in sites), cross, _scale(name, len(unet.down_blocks))))
        if not isinstance(module.processor, RoutedAttention):
            module.set_processor(RoutedAttention(sites[-1]))
    return tuple(sites)


def _running_order(name: str) -> tuple[int, ...]:
    """Down, mid, up (a UNet lists its middle block last); within a block, by the numbers in the name."""
    place = ["down_blocks", "mid_block", "up_blocks"].index(name.split(".")[0])
    return place, *map(int, re.findall(r"\d+", name))


def _scale(name: str, levels: int) -> int:
    """Latent cells along a side of a pixel of the layer of that name, in a UNet of so many levels."""
    place, number = _running_order(name)[:2]
    return 2 ** (number, levels - 1, levels - 1 - number)[place]
