"""Fusion stated as data: which noise predictions a method makes, and which of them denoises which latent."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor

from masafusion_lab import InputError

HALVES = ("null", "text")
"""The two halves of classifier-free guidance, (3)."""


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


@dataclass(frozen=True)
class Take:
    """Whose Q, K and V a branch's self-attention uses (None: its own), in which steps, layers and halves of guidance.

    What is read is what the other branch computed itself, before its own Take: rules never chain. Null reads null,
    text reads text, image b reads image b. Layers are `Site.depth`: self-attention layers in running order.
    `keys`: K, V as they are read; side by side with the branch's own (union); or those inside A for pixels inside A and
    those outside for pixels outside (masked). `from_text`: both halves read the other's text half.
    """

    q: str | None = None
    k: str | None = None
    v: str | None = None
    steps: Container[int] = Span()
    layers: Container[int] = Span()
    halves: tuple[str, ...] = HALVES
    keys: Literal["plain", "union", "masked"] = "plain"
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
        """On in the first fraction `until` of so many steps, null half included or not; None if that is no step."""
        stop = round(until * steps)
        return cls(Span(0, stop), HALVES if on_null else ("text",), scale) if stop else None


@dataclass(frozen=True)
class Branch:
    """One noise prediction: on latent `x`, under prompt `prompt`, guided away from null prompt `null`.

    `null` names a prompt of `Given` or is "tuned": the record's optimised embedding of the step, where there is one.
    `feature`: the branch whose residual features it takes, as V, of the blocks before the listed self-attention layers.
    """

    x: str
    prompt: str
    hint: Hint | None = None
    null: str = "empty"
    take: Take = Take()
    words: Words | None = None
    feature: Take = Take()

    @property
    def rules(self) -> dict[str, Take | Words]:
        """Its rules that read another branch, by what their layers are."""
        rules = {"self-attention": self.take, "cross-attention": self.words, "residual": self.feature}
        return {kind: rule for kind, rule in rules.items() if rule is not None and rule.read}


@dataclass(frozen=True)
class Masked:
    """eps of branch `inside` where A = 1 and of branch `outside` where A = 0; `inside` everywhere in other steps.

    `optional`: without a region `inside` everywhere; else that is an error.
    """

    inside: str
    outside: str
    steps: Container[int] = Span()
    optional: bool = False


@dataclass(frozen=True)
class Faded:
    """A share of branch `first`'s eps, share[i] at step i, and the rest of branch `second`'s."""

    first: str
    second: str
    share: tuple[float, ...]


Noise: TypeAlias = str | Masked | Faded
"""What denoises a latent: a branch, or two by mask or by share."""


@dataclass(frozen=True)
class Plan:
    """A method: its branches, and for each latent that is denoised the branch, or the two, that denoise it."""

    branches: Mapping[str, Branch]
    noise: Mapping[str, Noise]

    def used(self, i: int) -> Iterator[str]:
        """The branches whose eps step i uses."""
        for rule in self.noise.values():
            yield from _denoisers(rule)[: 1 if isinstance(rule, Masked) and i not in rule.steps else 2]

    def rows(self, i: int, halves: Sequence[str] = HALVES) -> tuple[tuple[str, str], ...]:
        """The (branch, half) that step i needs, in the plan's order: those used, and those that these read."""
        used = set(self.used(i))
        need = {(name, half) for name in used for half in halves}
        for rule in (rule for name in used for rule in self.branches[name].rules.values() if i in rule.steps):
            on = [half for half in halves if half in rule.halves]
            need |= {(name, "text" if rule.from_text else half) for name in rule.read for half in on}
        return tuple((name, half) for half in halves for name in self.branches if (name, half) in need)

    def at(self, i: int) -> dict[str, Branch]:
        """Only the branches that step i needs, in the plan's order."""
        needed = {name for name, _ in self.rows(i)}
        return {name: branch for name, branch in self.branches.items() if name in needed}

    def everywhere(self) -> Plan:
        """The plan for a batch without a region: `inside` alone where the region is optional."""
        inside = {x: r.inside for x, r in self.noise.items() if isinstance(r, Masked) and r.optional}
        return replace(self, noise={**self.noise, **inside}) if inside else self

    def check(
        self, *, steps: int, layers: int, latents: Container[str], prompts: Container[str], masked: bool, hinted: bool
    ) -> None:
        """Raise InputError for what is not there, or a rule that touches no step or no layer of this model.

        `masked` and `hinted`: whether there is a region, and a condition for the adapter.
        """
        by_mask = any(isinstance(rule, Masked) and not rule.optional for rule in self.noise.values())
        if not masked and (by_mask or any(branch.take.keys == "masked" for branch in self.branches.values())):
            raise InputError("this method acts inside a region: give mask=FILE or box=x0,y0,x1,y1")
        if not hinted and any(branch.hint for branch in self.branches.values()):
            raise InputError("this method follows a drawn condition: give sketch=FILE (or canny=, pose=)")
        for name, branch in self.branches.items():
            if branch.x not in latents:
                raise InputError(f"branch {name!r} denoises latent {branch.x!r}, which has no start")
            for prompt in (branch.prompt, branch.null):
                if prompt not in prompts and prompt != "tuned":
                    raise InputError(f"branch {name!r} wants prompt {prompt!r}, which is not given")
            for kind, rule in branch.rules.items():
                if missing := rule.read - set(self.branches):
                    raise InputError(f"branch {name!r} reads {', '.join(sorted(missing))}, no branch of the plan")
                if not any(i in rule.steps for i in range(steps)):
                    raise InputError(f"branch {name!r}: the window {rule.steps} holds none of the {steps} steps")
                if not any(d in rule.layers for d in range(layers)):
                    raise InputError(f"branch {name!r}: {rule.layers} holds none of the {layers} {kind} layers")
        for latent, noise in self.noise.items():
            for name in _denoisers(noise):
                if name not in self.branches or self.branches[name].x != latent:
                    raise InputError(f"latent {latent!r} is denoised by {name!r}, no branch on that latent")


def _denoisers(rule: Noise) -> tuple[str, ...]:
    """The branches that a rule names, the one that is always used first."""
    if isinstance(rule, str):
        return (rule,)
    return (rule.inside, rule.outside) if isinstance(rule, Masked) else (rule.first, rule.second)


@dataclass(frozen=True)
class Follow:
    """How a branch's attention to words follows another's: P_other theirs[i] + P_own diag(own[i]) at step i.

    `theirs` (T, B, n, n), from the other prompt's tokens to the own one's; `own` (T, B, n).
    """

    theirs: Tensor
    own: Tensor


@dataclass(frozen=True)
class Given:
    """What a batch of B cases gives a method.

    `prompts`: name -> (B, n, d), with "source", "target" and "empty"; `mask`: A at latent resolution, (B, 1, h, w) in
    [0, 1]; `hint`: the adapter's features, one (B, c, h, w) a level; `null`: (T, B, n, d), the record's embeddings;
    `texts`: "source" and "target" as they were typed, B each; `words`: what `Branch.words` follows by.
    """

    prompts: Mapping[str, Tensor]
    mask: Tensor | None = None
    hint: tuple[Tensor, ...] | None = None
    null: Tensor | None = None
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    words: Follow | None = None

    def prompt(self, name: str, i: int) -> Tensor:
        """The embeddings (B, n, d) called `name` at step i; "tuned" is the record's, or "empty" if it has none."""
        if name == "tuned":
            return self.prompts["empty"] if self.null is None else self.null[i]
        return self.prompts[name]
