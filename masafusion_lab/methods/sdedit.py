"""SDEdit: the picture, noised part of the way, is denoised under the target prompt (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from masafusion_lab.fusion import Branch, Plan, Span
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Needs, Source, picture
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


@dataclass(frozen=True)
class SDEdit(Method):
    """The settings are those of diffusers' image-to-image pipeline."""

    needs: ClassVar[Needs] = Needs(inversion=False)
    guidance: float = 7.5
    """w of (3)."""
    strength: float = 0.8
    """The last part of the schedule that is run: 1 forgets the picture, near 0 leaves it as it is."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """One branch."""
        return Plan({"T": Branch("target", "target")}, {"target": "T"}, run=Span.last(self.strength, steps))

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan = self.plan(model.sites, len(schedule))
        start = schedule.diffuse(picture(model, given), x, plan.run.start)
        return Course(plan, {"target": start}, given, w=self.guidance)
