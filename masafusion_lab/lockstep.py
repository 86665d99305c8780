"""The one denoising loop: every branch of a step is rows of one UNet batch, (3), and the mask acts on eps."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.attention import Step, Tap
from masafusion_lab.fusion import HALVES, Branch, Given, Noise, Plan, Weighted
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule


@dataclass(frozen=True)
class State:
    """The latents (B, C, h, w) by name at state i; i = T is the end. `rows` counts UNet rows used so far."""

    i: int
    x: Mapping[str, Tensor]
    rows: int = 0


class NotFinite(ArithmeticError):
    """A prediction holds NaN or infinity."""


@torch.no_grad()
def lockstep(
    model: StableDiffusion,
    plan: Plan,
    x: Mapping[str, Tensor],
    given: Given,
    *,
    schedule: Schedule,
    replay: Mapping[str, Tensor] | None = None,
    w: float = 7.5,
    start: int = 0,
    taps: Sequence[Tap] = (),
    after: Callable[[State], Mapping[str, Tensor]] | None = None,
) -> Iterator[State]:
    """Denoise the latents `x` together from state `start`, by the plan; yield every state after the first.

    `replay`: name -> (T + 1, B, C, h, w), latents that are read from a record instead of being denoised.
    `after`: asked about every new state; the latents that it gives take the place of the state's own. Raises
    InputError for a plan that this model and batch cannot follow, NotFinite where a step's eps is not finite.
    """
    replay, x, rows = replay or {}, dict(x), 0
    check(model, plan, given, schedule, latents={*x, *replay})
    if given.mask is None:
        plan = plan.everywhere()
    for i in range(start, len(schedule)):
        x |= {name: states[i] for name, states in replay.items()}
        needed = plan.rows(i, w)
        eps = predict(model, plan.at(i), x, given, i, schedule=schedule, w=w, taps=taps, rows=needed)
        rows += len(needed)
        for name, rule in plan.noise.items():
            e, sde = mix(eps, rule, given.mask, i), plan.sde.get(name)
            x[name] = schedule.denoise(x[name], e, i, sde.eta if sde else 0.0)
            if sde and i in sde.steps:
                if sde.like is None:
                    x[name] = x[name] + schedule.sigma(i, sde.eta) * fresh(given, f"{name} {i}")
                else:
                    like = plan.branches[sde.like].x
                    x[name] = x[name] + replay[like][i + 1] - schedule.denoise(x[like], eps[sde.like], i, sde.eta)
            if not x[name].isfinite().all():
                raise NotFinite(f"latent {name!r} is not finite after step {i} of {len(schedule)}")
        state = State(i + 1, x | {name: states[i + 1] for name, states in replay.items()}, rows)
        if after is not None:
            changed = after(state)
            x |= changed
            state = replace(state, x={**state.x, **changed})
        yield state


def check(
    model: StableDiffusion,
    plan: Plan,
    given: Given,
    schedule: Schedule,
    *,
    latents: Container[str] | None = None,
    prompts: Container[str] | None = None,
) -> None:
    """Raise InputError for a plan that this model and batch cannot follow.

    `latents`: those that have a start, if not all; `prompts`: those that say something, if not all that are given.
    """
    plan.check(
        steps=len(schedule),
        layers=sum(not site.cross for site in model.sites),
        latents={branch.x for branch in plan.branches.values()} if latents is None else latents,
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
    rows: tuple[tuple[str, str], ...] | None = None,
) -> dict[str, Tensor]:
    """The guided eps (B, C, h, w) of each branch at step i, all in one UNet call of rows x B.

    `rows`: the (branch, half) to compute, if not all; there is an eps of the branches that have all their halves.
    """
    rows = rows or tuple((b, half) for half in HALVES for b, branch in branches.items() if half in branch.halves(w))
    latents = torch.cat([x[branches[name].x] for name, _ in rows])
    beside = [given.extra[name] for b, _ in rows if (name := branches[b].extra) is not None]
    if len(beside) not in (0, len(rows)):
        raise InputError(f"of {', '.join(branches)} some have extra channels and some none: one UNet cannot take both")
    text = torch.cat([given.prompt(getattr(branches[b], "prompt" if h == "text" else "null"), i) for b, h in rows])
    hints = [hint if (hint := branches[b].hint) and i in hint.steps and h in hint.halves else None for b, h in rows]
    features = None
    if any(hints) and given.hint is not None:
        features = [torch.cat([hint.scale * f if hint else torch.zeros_like(f) for hint in hints]) for f in given.hint]
    grid = (latents.shape[-2], latents.shape[-1])
    step, extra = Step(i, rows, branches, taps, grid, given), torch.cat(beside) if beside else None
    eps = model.eps(latents, i, schedule, text, hint=features, step=step, extra=extra).unflatten(0, (len(rows), -1))
    by_row, out = dict(zip(rows, eps, strict=True)), {}
    for b, branch in branches.items():
        if all((b, half) in by_row for half in branch.halves(w)):
            out[b] = by_row[b, "text"]
            if len(branch.halves(w)) > 1:
                out[b] = by_row[b, "null"] + branch.guidance(w) * (out[b] - by_row[b, "null"])  # (3)
    return out
