"""The one denoising loop: every branch of a step is rows of one UNet batch, (3), and the mask acts on eps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from masafusion_lab.attention import Step, Tap
from masafusion_lab.fusion import HALVES, Branch, Given, Masked, Plan, Script
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule


@dataclass(frozen=True)
class State:
    """The latents (B, C, h, w) by name at state i; i = T is the end. `rows` counts UNet rows used so far."""

    i: int
    x: Mapping[str, Tensor]
    rows: int = 0


@dataclass(frozen=True)
class Course:
    """A denoising as data: what `lockstep` is given. Points of a sweep are courses, which may share their rows."""

    plan: Plan | Script
    x: Mapping[str, Tensor]
    given: Given
    replay: Mapping[str, Tensor] = field(default_factory=dict)
    w: float = 7.5

    def check(self, steps: int, layers: int) -> None:
        """Raise InputError for a plan that a model of so many self-attention layers cannot follow in so many steps."""
        self.plan.check(
            steps=steps,
            layers=layers,
            latents={*self.x, *self.replay},
            prompts=self.given.prompts.keys(),
            masked=self.given.mask is not None,
            hinted=self.given.hint is not None,
        )

    def run(self, model: StableDiffusion, *, schedule: Schedule, **options: Any) -> Iterator[State]:
        """Its `lockstep`."""
        return lockstep(
            model, self.plan, self.x, self.given, schedule=schedule, replay=self.replay, w=self.w, **options
        )


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
    after: Callable[[State], Mapping[str, Tensor]] | None = None,
    most: int | None = None,
) -> Iterator[State]:
    """Denoise the latents `x` together from state `start`, by the plan; yield every state after the first.

    `replay`: name -> (T + 1, B, C, h, w), latents that are read from a record instead of being denoised.
    `most`: rows that one call of the UNet may have at most, if the step needs no more for one of them.
    `after`: asked about every new state; the latents that it gives take the place of the state's own. Raises
    InputError for a plan that this model and batch cannot follow, NotFinite where a step's eps is not finite.
    """
    replay, x, rows = replay or {}, dict(x), 0
    Course(plan, x, given, replay).check(len(schedule), sum(not site.cross for site in model.sites))
    for i in range(start, len(schedule)):
        x |= {name: states[i] for name, states in replay.items()}
        branches = plan.at(i)
        eps = predict(model, branches, x, given, i, schedule=schedule, w=w, taps=taps, most=most)
        rows += sum(map(len, calls(branches, i, w, most)))
        made = {}
        for name, (before, rule) in plan.moves(i).items():
            region = given.region(rule.region if isinstance(rule, Masked) else None)
            made[name] = schedule.denoise(x[before], mix(eps, rule, region, i), i)
            if not made[name].isfinite().all():
                raise NotFinite(f"latent {name!r} is not finite after step {i} of {len(schedule)}")
        x |= made
        state = State(i + 1, x | {name: states[i + 1] for name, states in replay.items()}, rows)
        if after is not None:
            changed = after(state)
            x |= changed
            state = replace(state, x={**state.x, **changed})
        yield state


def mix(eps: Mapping[str, Tensor], rule: str | Masked, mask: Tensor | None, i: int) -> Tensor:
    """The eps that denoises a latent at step i: a branch's, or two by mask, pixel by pixel as (9), (10) and (14)."""
    if isinstance(rule, str):
        return eps[rule]
    if i not in rule.steps or mask is None:
        return eps[rule.inside]
    inside, outside = eps[rule.inside], eps[rule.outside]
    soft = mask * inside + (1 - mask) * outside
    return torch.where(mask == 1, inside, torch.where(mask == 0, outside, soft))


Row: TypeAlias = tuple[str, str]
"""A branch and a half of guidance."""


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
    most: int | None = None,
) -> dict[str, Tensor]:
    """The guided eps (B, C, h, w) of each branch at step i, in one UNet call of branches x halves x B rows.

    With `most` there are several calls where the rows are more; a row that is read is computed in each that reads it.
    """
    by_row: dict[Row, Tensor] = {}
    for rows in calls(branches, i, w, most):
        latents = torch.cat([x[branches[name].x] for name, _ in rows])
        text = torch.cat([given.prompt(getattr(branches[b], "prompt" if h == "text" else "null"), i) for b, h in rows])
        scales = [
            hint.scale if (hint := branches[b].hint) and i in hint.steps and h in hint.halves else 0 for b, h in rows
        ]
        features = None
        if any(scales) and given.hint is not None:
            features = [
                torch.cat([f * scale if scale else torch.zeros_like(f) for scale in scales]) for f in given.hint
            ]
        step = Step(i, rows, branches, taps)
        eps = model.eps(latents, i, schedule, text, hint=features, step=step).unflatten(0, (len(rows), -1))
        by_row |= {row: e for row, e in zip(rows, eps, strict=True) if row not in by_row}
    return {
        b: by_row[b, "null"] + v * (by_row[b, "text"] - by_row[b, "null"]) if v != 1 else by_row[b, "text"]  # (3)
        for b, v in ((b, guidance(branch, w)) for b, branch in branches.items())
    }


def guidance(branch: Branch, w: float) -> float:
    """The w of (3) of a branch where the caller says w."""
    return w if branch.w is None else branch.w


def calls(branches: Mapping[str, Branch], i: int, w: float = 7.5, most: int | None = None) -> list[tuple[Row, ...]]:
    """The rows of each UNet call of step i: all in one, or in several of at most `most`, each with what its rows read.

    A call has more than `most` where a single row reads so many.
    """
    wanted = ((b, half) for half in HALVES for b in branches if half == "text" or guidance(branches[b], w) != 1)
    needs = {row: _needs(row, branches, i) for row in wanted}
    read = frozenset().union(*needs.values())
    rows = tuple((b, half) for half in HALVES for b in branches if (b, half) in read)
    if most is None or len(rows) <= most:
        return [rows]
    order = {row: r for r, row in enumerate(rows)}
    found: list[set[Row]] = []
    done: set[Row] = set()
    for row in sorted(needs, key=lambda row: (len(needs[row]) == 1, row[1], sorted(needs[row] - {row}), order[row])):
        if row not in done:  # readers first, those of the same rows together
            if not found or len(found[-1] | needs[row]) > most:
                found.append(set())
            found[-1] |= needs[row]
            done |= needs[row]
    return [tuple(sorted(call, key=order.__getitem__)) for call in found]


def _needs(row: Row, branches: Mapping[str, Branch], i: int, known: frozenset[Row] = frozenset()) -> frozenset[Row]:
    """The row and all that it reads at step i, directly or not."""
    (name, half), known = row, known | {row}
    take = branches[name].take
    for other in take.read if i in take.steps and half in take.halves else ():
        if (other, half) not in known:
            known = _needs((other, half), branches, i, known)
    return known
