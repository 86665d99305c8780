"""Editing along noise maps: the target's steps add what leads the source from state to state beside its prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Plan, Sde, Span
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


@dataclass(frozen=True)
class NoiseMaps(Method):
    """Edit-friendly DDPM editing (Huberman-Spiegelglas et al. 2024), for inversion.name=edit_friendly.

    The defaults are the numbers of PIE-Bench's script; the authors take steps=100, start=0.36, source_guidance=3.5,
    guidance=15. Between 0 and 1 eta is DDIM's, whose square their code lacks. With another inversion and eta=0 it is
    direct inversion whose offsets are added to the target too.
    """

    guidance: float = 7.5
    """w of (3), for the target."""
    source_guidance: float = 1.0
    """w of the source's predictions, by which its noise maps are found."""
    start: float = 0.24
    """The first part of the schedule, which is left out: 12 of 50 steps."""
    eta: float = 1.0
    """How stochastic the steps are: 1, DDPM's; 0, DDIM's."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """The source, which is replayed, and the target; the last step adds no noise map, as published."""
        if not (0 <= self.start < 1 and 0 <= self.eta <= 1):
            raise InputError(f"method.start={self.start:g}, eta={self.eta:g}: must be in [0, 1) and [0, 1]")
        return Plan(
            {"S": Branch("source", "source", w=self.source_guidance), "T": Branch("target", "target")},
            {"target": "T"},
            sde={"target": Sde(self.eta, like="S", steps=Span(0, steps - 1) if self.eta else Span())},
            run=Span(int(steps * self.start)),
        )

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan = self.plan(model.sites, len(schedule))
        start = {"target": source.states[plan.run.start]}
        return Course(plan, start, given, {"source": source.states}, self.guidance)
