"""Fusion stated as data: which noise predictions a method makes, and which of them denoises which latent."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeAlias

from masafusion_lab import InputError
from masafusion_lab.choices import Checked

HALVES = ("null", "text")
"""The two halves of classifier-free guidance, (3)."""
Row: TypeAlias = tuple[str, str]
"""A branch, and a half of guidance."""

NO_REGION = "this method acts inside a region: give mask=FILE or box=x0,y0,x1,y1"
NO_HINT = "this method follows a drawn condition: give sketch=FILE, canny=FILE or auto, or pose=FILE"
FOLLOWED = {
    "target": 'a target prompt: give target="a red cat"',
    "instruction": 'an instruction: give instruction="make the cat red"',
}
"""What a person is told who did not give a prompt that a method follows."""


@dataclass(frozen=True)
class Span:
    """The integers start <= i < stop (stop None: no end); a window of steps or of layers."""

    start: int = 0
    stop: int | None = None

    def __contains__(self, i: object) -> bool:
        return isinstance(i, int) and self.start <= i and (self.stop is None or i < self.stop)

    @classmethod
    def part(cls, window: float | Sequence[float], steps: int) -> Span | None:
        """The window [a, b), or [0, b) of b alone, in fractions of so many steps; None if a = b.

        Raises InputError unless 0 <= a <= b <= 1.
        """
        a, b = window if isinstance(window, Sequence) else (0, window)
        if not 0 <= a <= b <= 1:
            raise InputError(f"the window [{a:g},{b:g}] must be [a,b], fractions of the steps with 0 <= a <= b <= 1")
        return cls(int(a * steps), int(b * steps)) if a < b else None

    @classmethod
    def last(cls, part: float, steps: int, key: str = "strength") -> Span:
        """The last `part` of so many steps, to the end. Raises InputError, naming the setting, if that is no step."""
        n = int(steps * part) if math.isfinite(part) else 0
        if not 1 <= n <= steps:
            raise InputError(f"method.{key}={part:g}: is {n} of {steps} steps, must be 1 to all of them")
        return cls(steps - n)

    def __str__(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}"


@dataclass(frozen=True)
class Take(Checked):
    """Whose Q, K and V a branch's self-attention uses (None: its own), in which steps, layers and halves of guidance.

    What is read is what the other branch computed itself, before its own Take: rules never chain. Null reads null,
    text reads text, image b reads image b. Layers are `Site.depth`: self-attention layers in running order.
    `keys`: K, V as they are read; side by side with the branch's own (union); or those inside A for pixels inside A and
    those outside for pixels outside (masked), or so by `Given.seen`, once it knows (seen). `from_text`: both halves
    read the other's text half.
    """

    q: str | None = None
    k: str | None = None
    v: str | None = None
    steps: Container[int] = Span()
    layers: Container[int] = Span()
    halves: tuple[str, ...] = HALVES
    keys: Literal["plain", "union", "masked", "seen"] = "plain"
    from_text: bool = False

    @property
    def read(self) -> set[str]:
        """The branches that are read."""
        return {name for name in (self.q, self.k, self.v) if name is not None}


@dataclass(frozen=True)
class Words:
    """Cross-attention that follows another branch's, word by word, as `Given.words` says (Hertz et al. 2022)."""

    of: str
    steps: Container[int] = Span()
    layers: Container[int] = Span()
    halves: tuple[str, ...] = ("text",)
    from_text: ClassVar[bool] = False

    @property
    def read(self) -> set[str]:
        """The branch that is followed."""
        return {self.of}


@dataclass(frozen=True)
class Hint:
    """When, in which halves of guidance and how strongly the adapter's features are added."""

    steps: Container[int] = Span()
    halves: tuple[str, ...] = HALVES
    scale: float = 1.0

    @classmethod
    def first(cls, until: float, steps: int, *, on_null: bool = True, scale: float = 1.0) -> Hint | None:
        """On in the first fraction `until` of so many steps, rounded up, null half included or not; None if it is 0."""
        Span.part(until, steps)  # raises for what is no fraction
        stop = steps - int((1 - until) * steps)  # as T2I-Adapter's sampler counts
        return cls(Span(0, stop), HALVES if on_null else ("text",), scale) if stop else None


@dataclass(frozen=True)
class Branch:
    """One noise prediction: on latent `x`, under prompt `prompt`, guided away from null prompt `null` by `w` of (3).

    `null` names a prompt of `Given` or is "tuned": the record's optimised embedding of the step, where there is one.
    `w`: its guidance, if not the loop's. `feature`: the branch whose residual features it takes, as V, of the blocks
    before the listed self-attention layers. `extra`: what of `Given.extra` the UNet sees beside the latent.
    """

    x: str
    prompt: str
    hint: Hint | None = None
    null: str = "empty"
    take: Take = Take()
    words: Words | None = None
    feature: Take = Take()
    w: float | None = None
    extra: str | None = None

    @property
    def rules(self) -> dict[str, Take | Words]:
        """Its rules that read another branch, by what their layers are."""
        rules = {"self-attention": self.take, "cross-attention": self.words, "residual": self.feature}
        return {kind: rule for kind, rule in rules.items() if rule is not None and rule.read}

    @property
    def read(self) -> set[str]:
        """The branches that its rules read."""
        return {name for rule in self.rules.values() for name in rule.read}

    def guidance(self, w: float) -> float:
        """Its w of (3) in a loop of guidance w."""
        return w if self.w is None else self.w

    def halves(self, w: float) -> tuple[str, ...]:
        """The halves of guidance that it needs in a loop of guidance w: at 1 the text alone."""
        return HALVES if self.guidance(w) != 1 else HALVES[1:]


@dataclass(frozen=True)
class Masked:
    """eps of branch `inside` where A = 1 and of branch `outside` where A = 0; `inside` everywhere in other steps.

    `optional`: without a region `inside` everywhere; else that is an error. `region`: which of `Given.regions` is A;
    None: its mask.
    """

    inside: str
    outside: str
    steps: Container[int] = Span()
    optional: bool = False
    region: str | None = None


@dataclass(frozen=True)
class Weighted:
    """The sum of branches' eps, each times its weight, or its weight at each step: guidance by several conditions."""

    weights: Mapping[str, float | Sequence[float]]


Noise: TypeAlias = str | Masked | Weighted
"""What denoises a latent: a branch, two by mask, or a weighted sum."""


@dataclass(frozen=True)
class Sde:
    """Stochastic steps of a latent: `eta` of their noise is new, 0 none (DDIM), 1 as in DDPM and Euler ancestral.

    That noise is fresh, or, with `like`, what takes the latent of that branch, which is replayed, from its state to its
    next one: the noise maps of cycle-SDE and of edit-friendly inversion. In other steps than `steps` none is added.
    """

    eta: float = 1.0
    like: str | None = None
    steps: Container[int] = Span()


def needs(branches: Mapping[str, Branch], used: Iterable[str], i: int, w: float) -> dict[Row, frozenset[Row]]:
    """Of each row of the used branches at step i of a loop of guidance w, it and all that it reads, directly or not."""

    def closure(row: Row, known: frozenset[Row] = frozenset()) -> frozenset[Row]:
        (name, half), known = row, known | {row}
        for rule in branches[name].rules.values():
            for other in rule.read if i in rule.steps and half in rule.halves else ():
                if (read := (other, "text" if rule.from_text else half)) not in known:
                    known = closure(read, known)
        return known

    wanted = {(name, half) for name in used for half in branches[name].halves(w)}
    return {row: closure(row) for row in ordered(wanted, branches)}


def ordered(rows: Container[Row], branches: Iterable[str]) -> tuple[Row, ...]:
    """Rows in the order in which they are computed: the null halves, then the text halves, by branch."""
    branches = tuple(branches)
    return tuple((name, half) for half in HALVES for name in branches if (name, half) in rows)


@dataclass(frozen=True)
class Plan:
    """A method: its branches, and for each latent that is denoised the rule that denoises it.

    `sde`: the latents whose steps are stochastic; `masked`: whether it needs a region, also beside its rules; `run`:
    the steps that are run; `before`: the UNet rows an image that are asked beside the loop.
    """

    branches: Mapping[str, Branch]
    noise: Mapping[str, Noise]
    sde: Mapping[str, Sde] = field(default_factory=dict)
    masked: bool = False
    run: Span = Span()
    before: int = 0

    def used(self, i: int) -> Iterator[str]:
        """The branches whose eps step i uses."""
        for rule in self.noise.values():
            yield from denoisers(rule, i)
        yield from (sde.like for sde in self.sde.values() if sde.like is not None and i in sde.steps)

    def rows(self, i: int, w: float = 0.0) -> tuple[Row, ...]:
        """The rows that step i of a loop of guidance w needs, in order: those used, and those that these read."""
        return ordered(frozenset[Row]().union(*needs(self.branches, self.used(i), i, w).values()), self.branches)

    def cost(self, steps: int, w: float = 0.0) -> int:
        """The UNet rows an image of so many steps in a loop of guidance w."""
        return self.before + sum(len(self.rows(i, w)) for i in range(steps) if i in self.run)

    def at(self, i: int) -> dict[str, Branch]:
        """Only the branches that step i needs, in the plan's order."""
        needed = {name for name, _ in self.rows(i)}
        return {name: branch for name, branch in self.branches.items() if name in needed}

    def everywhere(self) -> Plan:
        """The plan for a batch without a region: `inside` alone where the region is optional."""
        inside = {x: r.inside for x, r in self.noise.items() if isinstance(r, Masked) and r.optional}
        return replace(self, noise={**self.noise, **inside}) if inside else self

    def moves(self, i: int) -> dict[str, tuple[str, Noise]]:
        """The latents that step i makes: name -> name of the one it is made from, and what denoises it."""
        return {name: (name, rule) for name, rule in self.noise.items()}

    def check(
        self, *, steps: int, layers: int, latents: Container[str], prompts: Container[str], masked: bool, hinted: bool
    ) -> None:
        """Raise InputError for what is not there, or a rule that touches no step or no layer of this model.

        `masked` and `hinted`: whether there is a region, and a condition for the adapter.
        """
        by_mask = any(isinstance(rule, Masked) and not rule.optional for rule in self.noise.values())
        by_mask = by_mask or any(branch.take.keys == "masked" for branch in self.branches.values())
        lacks = [NO_REGION] if not masked and (self.masked or by_mask) else []
        lacks += [NO_HINT] if not hinted and any(branch.hint for branch in self.branches.values()) else []
        if lacks:
            raise InputError("; and ".join(lacks))
        for name, branch in self.branches.items():
            if branch.x not in latents:
                raise InputError(f"branch {name!r} denoises latent {branch.x!r}, which has no start")
            for prompt in (branch.prompt, branch.null):
                if prompt in FOLLOWED and prompt not in prompts:
                    raise InputError(f"this method follows {FOLLOWED[prompt]}")
                if prompt not in prompts and prompt != "tuned":
                    raise InputError(f"branch {name!r} wants prompt {prompt!r}, which is not given")
            for kind, rule in branch.rules.items():
                if missing := rule.read - set(self.branches):
                    raise InputError(f"branch {name!r} reads {', '.join(sorted(missing))}, no branch of the plan")
                if not any(i in rule.steps for i in range(steps) if i in self.run):
                    raise InputError(f"branch {name!r}: the window {rule.steps} holds none of the {steps} steps")
                if not any(d in rule.layers for d in range(layers)):
                    raise InputError(f"branch {name!r}: {rule.layers} holds none of the {layers} {kind} layers")
        for latent, noise in self.noise.items():
            for name in denoisers(noise):
                if name not in self.branches or self.branches[name].x != latent:
                    raise InputError(f"latent {latent!r} is denoised by {name!r}, no branch on that latent")


def denoisers(rule: Noise, i: int | None = None) -> tuple[str, ...]:
    """The branches that a rule uses, in step i or in any."""
    if isinstance(rule, str):
        return (rule,)
    if isinstance(rule, Weighted):
        return tuple(rule.weights)
    return (rule.inside, rule.outside) if i is None or i in rule.steps else (rule.inside,)
