"""No edit: the inverted picture's record, step by step, for those who watch its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from masafusion_lab.fusion import Branch, Plan
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


@dataclass(frozen=True)
class Replay(Method):
    """Ask the UNet about every state of the record, under the source prompt; the target is the source."""

    guidance: float = 1.0
    """w of (3); away from 1 the null half is asked too, and nothing else comes of it."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """The source branch alone."""
        return Plan({"S": Branch("source", "source", null="tuned")}, {"source": "S"})

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan, record = self.plan(model.sites, len(schedule)), {"source": source.states}
        return Course(plan, {}, given, record, self.guidance, after=lambda state: {"target": state.x["source"]})
