"""The one attention processor: (6)-(8), with rows of the batch that may read one another's Q, K and V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Row, Words
from masafusion_lab.given import Given
from masafusion_lab.sites import Site, found

CHUNK = 2**21
"""Attention weights that are shown to taps at a time."""


@dataclass(frozen=True)
class Sight:
    """What a tap sees at once: the weights of a layer's queries from number `first` on.

    `grid`: the layer's height and width, pixels being numbered row by row; `p`: (B, heads, queries, keys), float32, by
    (branch, half of guidance); rows that attend alike share one tensor. `values`: the branch whose values a row's keys
    stand for, of as many pixels each as there are; of keys side by side two.
    """

    site: Site
    step: Step
    grid: tuple[int, int]
    first: int
    p: Mapping[Row, Tensor]
    values: Mapping[Row, tuple[str, ...]]


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


Triple: TypeAlias = tuple[int, int, int]
"""The rows whose q, k and v are attended."""
Recipe: TypeAlias = tuple[str, tuple[Triple, ...]]
"""How an output is made, and of which triples: plain, masked or seen of one; union or words of two."""


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

    `grid`: the latents' height and width, which taps ask for; `given`: the region and the words that rules refer to.
    """

    i: int
    rows: tuple[Row, ...]
    branches: Mapping[str, Branch]
    taps: Sequence[Tap] = ()
    grid: tuple[int, int] = (1, 1)
    given: Given | None = None
    _routes: dict[Any, Route] = field(default_factory=dict)

    @cached_property
    def index(self) -> dict[Row, int]:
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

    def watched(self, site: Site) -> list[tuple[Tap, dict[Row, Recipe]]]:
        """The taps that want something of a layer, with the rows they want and how their weights come about."""
        found = []
        for tap in self.taps:
            rows = [row for row in self.rows if tap.wants(site, self.i, row)]
            if rows:
                own: dict[Row, Recipe] = {row: ("plain", ((self.index[row],) * 3,)) for row in rows}
                found.append((tap, own if tap.own else {row: self._recipe(row, site) for row in rows}))
        return found

    def _recipe(self, row: Row, site: Site) -> Recipe:
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
        unseen = rule.keys == "seen" and (self.given is None or self.given.seen() is None)
        return "plain" if unseen else rule.keys, ((q, k, v), itself)[: 2 if rule.keys == "union" else 1]

    def regions(self, how: str, site: Site) -> tuple[Tensor, Tensor]:
        """Which keys and which pixels of a layer belong to A, or to what was seen, (B, 1, 1, N) each, nearest."""
        assert self.given is not None
        seen = self.given.seen() if how == "seen" else self.given.mask
        assert seen is not None
        keys, pixels = (seen[0][:, None], seen[1][:, None]) if how == "seen" else (seen, seen)
        keys, pixels = (F.interpolate(A, site.grid(*self.grid)).flatten(1)[:, None, None] for A in (keys, pixels))
        return keys, pixels


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
        """What it adds to the attention weights (.., heads, N, keys) of those pixels, float32."""
        p = (self.q[..., pixels, :] * self.q.shape[-1] ** -0.5 @ self.k.mT).float()
        p = (p if self.bias is None else p + self.bias).softmax(-1)
        p = p if self.map is None else p @ self.map.float()
        return p if self.weight is None else self.weight[..., pixels, :] * p


def terms(how: str, parts: Sequence[tuple[Tensor, Tensor, Tensor]], step: Step, site: Site) -> list[Term]:
    """The summands of an output that is made in this way of q, k, v (B, heads, N, c); see `Recipe`."""
    q, k, v = parts[0]
    if how == "plain":
        return [Term(q, k, v)]
    if how == "union":
        _, own_k, own_v = parts[1]
        return [Term(q, torch.cat([k, own_k], -2), torch.cat([v, own_v], -2))]
    if how == "words":
        assert step.given is not None
        assert step.given.words is not None
        own_q, own_k, own_v = parts[1]
        theirs, own = (y[step.i][:, None].to(v.dtype) for y in (step.given.words.theirs, step.given.words.own))
        return [Term(q, k, own_v, map=theirs), Term(own_q, own_k, own_v, map=own.diag_embed())]
    (mask, pixels), never = step.regions(how, site), torch.finfo(v.dtype).min / 2  # finite: all keys may be forbidden
    mask, pixels = mask.to(v.dtype), pixels.to(v.dtype).mT
    inside, outside = mask.masked_fill(mask == 0, never), mask.masked_fill(mask == 1, never)
    return [Term(q, k, v, inside, weight=pixels), Term(q, k, v, outside, weight=1 - pixels)]


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
        """Attend. hidden_states (R * B, N, C), rows outermost; text (R * B, n, d) in cross-attention, else None.

        Raises InputError for a mask of tokens: rows that read one another share what it would tell apart.
        """
        if attention_mask is not None:
            raise InputError("attention_mask: is not supported; leave it out, for SD 1.x and 2.x read every token")
        x, text = hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        route, n = (ALONE, 1) if step is None else (step.route(self.site), len(step.rows))
        q = _project(attn.to_q, x, [t[0] for t in route.triples], n)  # (6), (7)
        k = _project(attn.to_k, text, [t[1] for t in route.triples], n)
        v = _project(attn.to_v, text, [t[2] for t in route.triples], n)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (U * B, heads, N, c)
        plain, size = route.plain * (len(x) // n), len(x) // n
        sums = [[Term(q[:plain], k[:plain], v[:plain])]] if plain else []
        for how, its in route.recipes:
            assert step is not None
            parts = [tuple(y[t * size : (t + 1) * size] for y in (q, k, v)) for t in its]
            sums.append(terms(how, parts, step, self.site))
        outs = [reduce(add, (term.out() for term in each)) for each in sums]
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if step is None:
            return out
        if watched := step.watched(self.site):
            self._show(watched, attn, x, text, q, k, step, route)
        return gather(out, route.out, len(out) // size)

    def _show(
        self,
        watched: Sequence[tuple[Tap, Mapping[Row, Recipe]]],
        attn: Any,
        x: Tensor,
        text: Tensor,
        q: Tensor,
        k: Tensor,
        step: Step,
        route: Route,
    ) -> None:
        """Show taps the weights of the rows that they want, CHUNK at a time, those that come about alike once."""
        there = {triple[:2]: u for u, triple in enumerate(route.triples)}
        q, k = (y.unflatten(0, (len(route.triples), -1)) for y in (q, k))

        def part(pair: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
            """q and k of two rows, k in the place of v too, which weights do not ask for."""
            if pair in there:
                return q[there[pair]], k[there[pair]], k[there[pair]]
            both = zip((attn.to_q, attn.to_k), (x, text), pair, strict=True)  # what a reader would attend to by itself
            own = (_project(layer, y, [row], len(step.rows)) for layer, y, row in both)
            a, b = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in own)
            return a, b, b

        pairs = [
            (
                tap,
                {row: (how, tuple(triple[:2] for triple in its)) for row, (how, its) in rows.items()},
                {row: tuple(step.rows[v][0] for *_, v in its) for row, (_, its) in rows.items()},
            )
            for tap, rows in watched
        ]
        sums = {
            (how, its): terms(how, [part(pair) for pair in its], step, self.site)
            for how, its in dict.fromkeys(recipe for _, rows, _ in pairs for recipe in rows.values())
        }
        grid, queries = self.site.grid(*step.grid), x.shape[1]
        if grid[0] * grid[1] != queries:
            raise ValueError(f"{self.site.name}: {queries} pixels are not the {grid[0]}x{grid[1]} of its level")
        size = max(1, CHUNK // (len(sums) * k[0, :, :, :, 0].numel()))
        for first in range(0, queries, size):
            chunk = slice(first, first + size)
            p = {recipe: reduce(add, (term.p(chunk) for term in each)) for recipe, each in sums.items()}
            for tap, rows, values in pairs:
                tap.see(Sight(self.site, step, grid, first, {row: p[recipe] for row, recipe in rows.items()}, values))


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

    Without a `step` in `cross_attention_kwargs` the UNet computes exactly what it did before, but for masks of tokens.
    """
    there = found(unet)
    for site, module in there.items():
        if not isinstance(module.processor, RoutedAttention):
            module.set_processor(RoutedAttention(site))
    return tuple(there)
