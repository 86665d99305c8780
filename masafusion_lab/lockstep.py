"""The one denoising loop: every branch of a step is rows of one UNet batch, (3), and the mask acts on eps."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.attention import Step, Tap
from masafusion_lab.fusion import Branch, Masked, Noise, Plan, Row, Sde, Span, Weighted, denoisers, needs, ordered
from masafusion_lab.given import Given, fits
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import self_layers


@dataclass(frozen=True)
class State:
    """The latents (B, C, h, w) by name at state i; i = T is the end. `rows` counts UNet rows used so far."""

    i: int
    x: Mapping[str, Tensor]
    rows: int = 0


@dataclass(frozen=True)
class Script:
    """A plan written out: of each step its branches, and the latents that it makes, as `Plan.at` and `Plan.moves`."""

    branches: Sequence[Mapping[str, Branch]]
    made: Sequence[Mapping[str, tuple[str, Noise]]]
    sde: Mapping[str, Sde] = field(default_factory=dict)
    run: ClassVar[Span] = Span()
    before: ClassVar[int] = 0

    def at(self, i: int) -> Mapping[str, Branch]:
        """The branches of step i."""
        return self.branches[i]

    def moves(self, i: int) -> Mapping[str, tuple[str, Noise]]:
        """The latents that step i makes."""
        return self.made[i]

    def used(self, i: int) -> Iterator[str]:
        """The branches whose eps step i uses."""
        for _, rule in self.made[i].values():
            yield from denoisers(rule, i)

    def everywhere(self) -> Script:
        """It is written for the regions there are."""
        return self

    def check(self, **facts: object) -> None:
        """The plans that it was written from were checked."""


After: TypeAlias = Callable[[State], Mapping[str, Tensor]]
"""Asked about every new state; the latents that it gives take the place of the state's own."""


@dataclass(frozen=True)
class Course:
    """A denoising as data: what `lockstep` is given. Points of a sweep are courses, which may share their rows.

    `schedule`: of as many steps, in place of the one it is run with.
    """

    plan: Plan | Script
    x: Mapping[str, Tensor]
    given: Given
    replay: Mapping[str, Tensor] = field(default_factory=dict)
    w: float = 7.5
    after: After | None = None
    taps: Sequence[Tap] = ()
    schedule: Schedule | None = None

    def check(self, *, steps: int, layers: int) -> None:
        """Raise InputError for a plan that a model of so many self-attention layers cannot follow in so many steps.

        And for latents, records and a batch that do not fit one another.
        """
        shape = next((latent.shape[-4:] for latent in (*self.x.values(), *self.replay.values())), None)
        for name, latent in self.x.items():
            fits(f"latent {name!r}", latent, shape or ())
        for name, states in self.replay.items():
            fits(f"the record of latent {name!r}", states, (steps + 1, *(shape or ())))
        if shape is not None:
            self.given.check(steps, shape)
        check(self.plan, self.given, steps=steps, layers=layers, latents={*self.x, *self.replay})

    def run(
        self, model: StableDiffusion, *, schedule: Schedule, taps: Sequence[Tap] = (), **options: Any
    ) -> Iterator[State]:
        """Its `lockstep`, which more taps may watch."""
        how: dict[str, Any] = {"replay": self.replay, "w": self.w, "after": self.after, **options}
        schedule, taps = self.schedule or schedule, (*taps, *self.taps)
        return lockstep(model, self.plan, self.x, self.given, schedule=schedule, taps=taps, **how)


class NotFinite(ArithmeticError):
    """A prediction holds NaN or infinity."""


@torch.no_grad()
def lockstep(
    model: StableDiffusion,
    plan: Plan | Script,
    x: Mapping[str, Tensor],
    given: Given,
    *,
    schedule: Schedule,
    replay: Mapping[str, Tensor] | None = None,
    w: float = 7.5,
    start: int = 0,
    taps: Sequence[Tap] = (),
    after: After | None = None,
    most: int | None = None,
) -> Iterator[State]:
    """Denoise the latents `x` together from state `start`, by the plan; yield every state after the first.

    `replay`: name -> (T + 1, B, C, h, w), latents that are read from a record instead of being denoised.
    `most`: rows that one call of the UNet may have at most, if the step needs no more for one of them. Raises
    InputError for a plan that this model and batch cannot follow, NotFinite where a step's eps is not finite.
    """
    replay, x, rows = replay or {}, dict(x), plan.before
    Course(plan, x, given, replay).check(steps=len(schedule), layers=self_layers(model.sites))
    if given.mask is None:
        plan = plan.everywhere()
    for i in (i for i in range(start, len(schedule)) if i in plan.run):
        x |= {name: states[i] for name, states in replay.items()}
        of_step = calls(plan, i, w, most)
        eps = predict(model, plan.at(i), x, given, i, schedule=schedule, w=w, taps=taps, calls=of_step)
        rows += sum(map(len, of_step))
        made: dict[str, Tensor] = {}
        for name, (before, rule) in plan.moves(i).items():
            region = given.region(rule.region if isinstance(rule, Masked) else None)
            e, sde = mix(eps, rule, region, i), plan.sde.get(name)
            made[name] = schedule.denoise(x[before], e, i, sde.eta if sde else 0.0)
            if sde and i in sde.steps:
                if sde.like is None:
                    made[name] = made[name] + schedule.sigma(i, sde.eta) * fresh(given, f"{name} {i}")
                else:
                    like = plan.at(i)[sde.like].x
                    like_made = schedule.denoise(x[like], eps[sde.like], i, sde.eta)
                    made[name] = made[name] + replay[like][i + 1] - like_made
            if not made[name].isfinite().all():
                raise NotFinite(f"latent {name!r} is not finite after step {i} of {len(schedule)}")
        x |= made
        state = State(i + 1, x | {name: states[i + 1] for name, states in replay.items()}, rows)
        if after is not None:
            changed = after(state)
            x |= changed
            state = replace(state, x={**state.x, **changed})
        yield state


def check(
    plan: Plan | Script,
    given: Given,
    *,
    steps: int,
    layers: int,
    latents: Container[str],
    prompts: Container[str] | None = None,
) -> None:
    """Raise InputError for a plan that a model of so many self-attention layers and a batch cannot follow in `steps`.

    `latents`: those that have a start; `prompts`: those that say something, if not all that are given.
    """
    if not any(i in plan.run for i in range(steps)):
        raise InputError(f"this method runs none of {steps} step{'s' * (steps > 1)}; take more")
    plan.check(
        steps=steps,
        layers=layers,
        latents=latents,
        prompts=given.prompts.keys() if prompts is None else prompts,
        masked=given.mask is not None,
        hinted=given.hint is not None,
    )


def fresh(given: Given, purpose: str) -> Tensor:
    """Gaussian noise (B, C, h, w) for a purpose, each case's own. Raises InputError where there is no source of it."""
    if given.noise is None:
        raise InputError(f"noise for {purpose!r} is wanted, and no source of noise is given: Given(noise=...)")
    return given.noise(purpose)


def mix(eps: Mapping[str, Tensor], rule: Noise, mask: Tensor | None, i: int) -> Tensor:
    """The eps that denoises a latent at step i: one, a sum, or two by mask, pixel by pixel as (9), (10), (14)."""
    if isinstance(rule, str):
        return eps[rule]
    if isinstance(rule, Weighted):
        weights = {name: v if isinstance(v, float | int) else v[i] for name, v in rule.weights.items()}
        return torch.stack([weight * eps[name] for name, weight in weights.items()]).sum(0)
    if i not in rule.steps or mask is None:
        return eps[rule.inside]
    inside, outside = eps[rule.inside], eps[rule.outside]
    soft = mask * inside + (1 - mask) * outside
    return torch.where(mask == 1, inside, torch.where(mask == 0, outside, soft))


def predict(
    model: StableDiffusion,
    branches: Mapping[str, Branch],
    x: Mapping[str, Tensor],
    given: Given,
    i: int,
    *,
    schedule: Schedule,
    w: float = 7.5,
    taps: Sequence[Tap] = (),
    calls: Sequence[tuple[Row, ...]] = (),
) -> dict[str, Tensor]:
    """The guided eps (B, C, h, w) of each branch at step i, in one UNet call of rows x B, or in several.

    `calls`: the rows of each call, if not all of all branches in one; there is an eps of the branches whose rows are
    all there.
    """
    by_row: dict[Row, Tensor] = {}
    for rows in calls or [tuple(needs(branches, branches, i, w))]:
        latents = torch.cat([x[branches[name].x] for name, _ in rows])
        beside = [given.extra[name] for b, _ in rows if (name := branches[b].extra) is not None]
        if len(beside) not in (0, len(rows)):
            raise InputError(
                f"of {', '.join(branches)} some have extra channels and some none: one UNet cannot take both"
            )
        text = torch.cat([given.prompt(getattr(branches[b], "prompt" if h == "text" else "null"), i) for b, h in rows])
        hints = [hint if (hint := branches[b].hint) and i in hint.steps and h in hint.halves else None for b, h in rows]
        features = None
        if any(hints) and given.hint is not None:
            features = [torch.cat([h.scale * f if h else torch.zeros_like(f) for h in hints]) for f in given.hint]
        grid = (latents.shape[-2], latents.shape[-1])
        step, extra = Step(i, rows, branches, taps, grid, given), torch.cat(beside) if beside else None
        out = model.eps(latents, i, schedule, text, hint=features, step=step, extra=extra)
        by_row |= {row: e for row, e in zip(rows, out.unflatten(0, (len(rows), -1)), strict=True) if row not in by_row}
    eps = {}
    for b, branch in branches.items():
        if all((b, half) in by_row for half in branch.halves(w)):
            eps[b] = by_row[b, "text"]
            if len(branch.halves(w)) > 1:
                eps[b] = by_row[b, "null"] + branch.guidance(w) * (eps[b] - by_row[b, "null"])  # (3)
    return eps


def calls(plan: Plan | Script, i: int, w: float = 7.5, most: int | None = None) -> list[tuple[Row, ...]]:
    """The rows of each UNet call of step i: all in one, or in several of at most `most`, each with what its rows read.

    A row that is read is computed in each call that reads it; a call has more than `most` where one row reads so many.
    """
    branches = plan.at(i)
    reads = needs(branches, plan.used(i), i, w)
    rows = ordered(frozenset[Row]().union(*reads.values()), branches)
    if most is None or len(rows) <= most:
        return [rows]
    order = {row: r for r, row in enumerate(rows)}
    found: list[set[Row]] = []
    done: set[Row] = set()
    for row in sorted(reads, key=lambda row: (len(reads[row]) == 1, row[1], sorted(reads[row] - {row}), order[row])):
        if row not in done:  # readers first, those of the same rows together
            if not found or len(found[-1] | reads[row]) > most:
                found.append(set())
            found[-1] |= reads[row]
            done |= reads[row]
    return [ordered(call, branches) for call in found]
