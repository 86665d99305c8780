"""Fusion stated as data: which noise predictions a method makes, and which of them denoises which latent."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

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


@dataclass(frozen=True)
class Take:
    """Whose Q, K and V a branch's self-attention uses (None: its own), in which steps, layers and halves of guidance.

    What is read is what the other branch computed itself, before its own Take: rules never chain. Null reads null,
    text reads text, image b reads image b. Layers are `Site.depth`: self-attention layers in running order.
    """

    q: str | None = None
    k: str | None = None
    v: str | None = None
    steps: Container[int] = Span()
    layers: Container[int] = Span()
    halves: tuple[str, ...] = HALVES

    @property
    def read(self) -> set[str]:
        """The branches that are read."""
        return {name for name in (self.q, self.k, self.v) if name is not None}


@dataclass(frozen=True)
class Hint:
    """When, in which halves of guidance and how strongly the adapter's features are added."""

    steps: Container[int] = Span()
    halves: tuple[str, ...] = HALVES
    scale: float = 1.0


@dataclass(frozen=True)
class Branch:
    """One noise prediction: on latent `x`, under prompt `prompt`, guided away from null prompt `null` by `w` of (3).

    `null` names a prompt of `Given` or is "tuned": the record's optimised embedding of the step, where there is one.
    Where `w` is None, the caller of the denoising says it.
    """

    x: str
    prompt: str
    hint: Hint | None = None
    null: str = "empty"
    take: Take = Take()
    w: float | None = None

    @property
    def read(self) -> set[str]:
        """The branches that its rules read."""
        return {name for field in fields(self) for name in getattr(getattr(self, field.name), "read", ())}


@dataclass(frozen=True)
class Masked:
    """eps of branch `inside` where A = 1 and of branch `outside` where A = 0; `inside` everywhere in other steps.

    `region`: which of `Given.regions` is A; None: its mask.
    """

    inside: str
    outside: str
    steps: Container[int] = Span()
    region: str | None = None


@dataclass(frozen=True)
class Plan:
    """A method: its branches, and for each latent that is denoised the branch, or two by mask, that denoises it."""

    branches: Mapping[str, Branch]
    noise: Mapping[str, str | Masked]

    def used(self, i: int) -> Iterator[str]:
        """The branches whose eps step i uses."""
        for rule in self.noise.values():
            if isinstance(rule, str):
                yield rule
            else:
                yield rule.inside
                if i in rule.steps:
                    yield rule.outside

    def at(self, i: int) -> dict[str, Branch]:
        """Only the branches that step i needs, in the plan's order: those used, and those that these read."""
        used = set(self.used(i))
        read = {name for b in used if i in self.branches[b].take.steps for name in self.branches[b].take.read}
        return {name: branch for name, branch in self.branches.items() if name in used | read}

    def moves(self, i: int) -> dict[str, tuple[str, str | Masked]]:
        """The latents that step i makes: name -> name of the one it is made from, and what denoises it."""
        return {name: (name, rule) for name, rule in self.noise.items()}

    def check(
        self, *, steps: int, layers: int, latents: Container[str], prompts: Container[str], masked: bool, hinted: bool
    ) -> None:
        """Raise InputError for what is not there, or a rule that touches no step or no layer of this model.

        `masked` and `hinted`: whether there is a region, and a condition for the adapter.
        """
        if not masked and any(isinstance(rule, Masked) for rule in self.noise.values()):
            raise InputError("this method acts inside a region: give mask=FILE or box=x0,y0,x1,y1")
        if not hinted and any(branch.hint for branch in self.branches.values()):
            raise InputError("this method follows a drawn condition: give sketch=FILE (or canny=, pose=)")
        for name, branch in self.branches.items():
            take = branch.take
            if branch.x not in latents:
                raise InputError(f"branch {name!r} denoises latent {branch.x!r}, which has no start")
            for prompt in (branch.prompt, branch.null):
                if prompt not in prompts and prompt != "tuned":
                    raise InputError(f"branch {name!r} wants prompt {prompt!r}, which is not given")
            if missing := take.read - set(self.branches):
                raise InputError(f"branch {name!r} reads {', '.join(sorted(missing))}, no branch of the plan")
            if take.read and not any(i in take.steps for i in range(steps)):
                raise InputError(f"branch {name!r}: the window {take.steps} holds none of the {steps} steps")
            if take.read and not any(d in take.layers for d in range(layers)):
                raise InputError(f"branch {name!r}: {take.layers} holds none of the {layers} self-attention layers")
        for latent, rule in self.noise.items():
            for name in [rule] if isinstance(rule, str) else [rule.inside, rule.outside]:
                if name not in self.branches or self.branches[name].x != latent:
                    raise InputError(f"latent {latent!r} is denoised by {name!r}, no branch on that latent")


@dataclass(frozen=True)
class Script:
    """A plan written out: of each step its branches, and the latents that it makes, as `Plan.at` and `Plan.moves`."""

    branches: Sequence[Mapping[str, Branch]]
    made: Sequence[Mapping[str, tuple[str, str | Masked]]]

    def at(self, i: int) -> Mapping[str, Branch]:
        """The branches of step i."""
        return self.branches[i]

    def moves(self, i: int) -> Mapping[str, tuple[str, str | Masked]]:
        """The latents that step i makes."""
        return self.made[i]

    def check(self, **facts: object) -> None:
        """The plans that it was written from were checked."""


@dataclass(frozen=True)
class Given:
    """What a batch of B cases gives a method.

    `prompts`: name -> (B, n, d), or (T, B, n, d) where it changes with the step, with "source", "target" and "empty";
    `mask`: A at latent resolution, (B, 1, h, w) in [0, 1]; `hint`: the adapter's features, one (B, c, h, w) a level;
    `null`: (T, B, n, d), the record's embeddings; `regions`: further masks by name.
    """

    prompts: Mapping[str, Tensor]
    mask: Tensor | None = None
    hint: tuple[Tensor, ...] | None = None
    null: Tensor | None = field(default=None)
    regions: Mapping[str, Tensor] = field(default_factory=dict)

    def prompt(self, name: str, i: int) -> Tensor:
        """The embeddings (B, n, d) called `name` at step i; "tuned" is the record's, or "empty" if it has none."""
        if name == "tuned":
            return self.prompts["empty"] if self.null is None else self.null[i]
        prompt = self.prompts[name]
        return prompt[i] if prompt.ndim == 4 else prompt

    def region(self, name: str | None) -> Tensor | None:
        """The mask called `name`; of None the mask."""
        return self.mask if name is None else self.regions[name]
