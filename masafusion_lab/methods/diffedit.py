"""DiffEdit and SDE-DiffEdit: denoising in a region of their own, with the source's latents outside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from masafusion_lab import contrast
from masafusion_lab.fusion import Branch, Plan, Sde, Span
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course, State, fresh
from masafusion_lab.methods.protocol import Method, Needs, Source, inside, picture
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Differing(Method):
    """What both share: the region, and the guidance."""

    guidance: float = 7.5
    """w of (3); where the region is looked for it cancels."""
    mask: Literal["own", "given"] = "own"
    """Where to edit: where the two prompts' predictions differ, or in the given region."""
    maps: int = 10
    """Noises under which the predictions are compared, for mask=own."""
    map_strength: float = 0.5
    """How far the picture is noised for that, as a part of the schedule."""
    threshold: float = 3.0
    """A cell is inside if its difference is above half of this, times the picture's mean."""

    def looking(self, steps: int) -> int:
        """The UNet rows an image by which the region is found. Raises InputError for settings that cannot be."""
        if self.mask == "given":
            return 0
        contrast.state(self.maps, self.map_strength, steps)
        return contrast.rows(self.maps)

    def region(self, model: StableDiffusion, given: Given, x0: Tensor, schedule: Schedule) -> Tensor:
        """A (B, 1, h, w)."""
        if self.mask == "given":
            log.info("method.mask=given: maps, map_strength and threshold do not matter")
            return inside(given)
        how: Any = {"maps": self.maps, "strength": self.map_strength, "threshold": self.threshold}
        return contrast.region(model, given, x0, schedule=schedule, **how)


@dataclass(frozen=True)
class DiffEdit(Differing):
    """DiffEdit from the inverted picture (Couairon et al. 2023); the defaults are those of diffusers' pipeline.

    That pipeline also inverts under guidance, as inversion.inverse_guidance=7.5 does.
    """

    strength: float = 0.8
    """The last part of the schedule that is run, from the source's state there."""
    negative: Literal["source", "empty"] = "source"
    """The prompt to guide away from."""
    lag: bool = True
    """Whether the source outside is a state noisier than the result inside, as in the published code, or as noisy."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """One branch."""
        branch, run = Branch("target", "target", null=self.negative), Span.last(self.strength, steps)
        return Plan({"T": branch}, {"target": "T"}, masked=self.mask == "given", run=run, before=self.looking(steps))

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan, x0 = self.plan(model.sites, len(schedule)), picture(model, given)
        region = cache(lambda: self.region(model, given, x0, schedule))

        def after(state: State) -> Mapping[str, Tensor]:
            outside = source.states[state.i - self.lag]
            return {"target": region() * state.x["target"] + (1 - region()) * outside}

        return Course(plan, {"target": source.states[plan.run.start]}, given, w=self.guidance, after=after)


@dataclass(frozen=True)
class SdeDiffEdit(Differing):
    """DiffEdit along the very noise by which the source goes from state to state, cycle-SDE (Nie et al. 2024).

    The source is noised step by step, with no network, and the picture is taken for state T - 1, as published.
    """

    needs: ClassVar[Needs] = Needs(inversion=False)
    strength: float = 0.7
    """The part of the schedule that the picture is noised by, and that is run."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """The source, which is replayed, and the target, whose steps add the source's noise."""
        return Plan(
            {"S": Branch("source", "source"), "T": Branch("target", "target")},
            {"target": "T"},
            sde={"target": Sde(1.0, like="S")},
            masked=self.mask == "given",
            run=Span(max(Span.last(self.strength, steps).start - 1, 0), steps - 1),
            before=self.looking(steps),
        )

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        x0 = picture(model, given)
        region = cache(lambda: self.region(model, given, x0, schedule))
        chain, begin = [x0], self.plan(model.sites, len(schedule)).run.start
        for i in range(len(schedule) - 2, begin - 1, -1):
            chain.append(schedule.renoise(chain[-1], fresh(given, f"chain {i}"), i))
        states = torch.stack([*[chain[-1]] * begin, *chain[::-1], x0])

        def after(state: State) -> Mapping[str, Tensor]:
            return {"target": region() * state.x["target"] + (1 - region()) * states[state.i]}

        plan, start = self.plan(model.sites, len(schedule)), {"target": states[begin]}
        return Course(plan, start, given, {"source": states}, self.guidance, after)
