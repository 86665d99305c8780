"""The one denoising loop: every branch of a step is rows of one UNet batch, (3), and the mask acts on eps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from masafusion_lab.attention import Step, Tap
from masafusion_lab.fusion import HALVES, Branch, Given, Masked, Plan
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
    plan.check(
        steps=len(schedule),
        layers=sum(not site.cross for site in model.sites),
        latents={*x, *replay},
        prompts=given.prompts.keys(),
        masked=given.mask is not None,
        hinted=given.hint is not None,
    )
    for i in range(start, len(schedule)):
        x |= {name: states[i] for name, states in replay.items()}
        branches = plan.at(i)
        eps = predict(model, branches, x, given, i, schedule=schedule, w=w, taps=taps)
        rows += len(branches) * (len(HALVES) if w != 1 else 1)
        for name, rule in plan.noise.items():
            x[name] = schedule.denoise(x[name], mix(eps, rule, given.mask, i), i)
            if not x[name].isfinite().all():
                raise NotFinite(f"latent {name!r} is not finite after step {i} of {len(schedule)}")
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
) -> dict[str, Tensor]:
    """The guided eps (B, C, h, w) of each branch at step i, all in one UNet call of branches x halves x B rows."""
    rows = tuple((name, half) for half in HALVES if half == "text" or w != 1 for name in branches)
    latents = torch.cat([x[branches[name].x] for name, _ in rows])
    text = torch.cat([given.prompt(getattr(branches[b], "prompt" if h == "text" else "null"), i) for b, h in rows])
    hinted = [(hint := branches[b].hint) is not None and i in hint.steps and h in hint.halves for b, h in rows]
    features = None
    if any(hinted) and given.hint is not None:
        features = [torch.cat([f if on else torch.zeros_like(f) for on in hinted]) for f in given.hint]
    step = Step(i, rows, branches, taps, (latents.shape[-2], latents.shape[-1]))
    eps = model.eps(latents, i, schedule, text, hint=features, step=step).unflatten(0, (len(rows), -1))
    by_row = dict(zip(rows, eps, strict=True))
    if w == 1:
        return {name: by_row[name, "text"] for name in branches}
    return {b: by_row[b, "null"] + w * (by_row[b, "text"] - by_row[b, "null"]) for b in branches}  # (3)
