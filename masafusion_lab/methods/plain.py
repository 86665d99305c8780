"""The two reference points of every comparison: editing without fusion, and no editing at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from masafusion_lab.fusion import Branch, Plan
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


@dataclass(frozen=True)
class Plain(Method):
    """Denoise x_T^S under the target prompt, nothing fused: plain inversion editing."""

    guidance: float = 7.5
    """w of (3)."""
    null: Literal["tuned", "empty"] = "tuned"
    """Null embedding: tuned (the record's, where it has one) or empty."""

    prompt = "target"

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """One branch."""
        return Plan({"T": Branch("target", self.prompt, null=self.null)}, {"target": "T"})

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan = self.plan(model.sites, len(schedule))
        return Course(plan, {"target": source.states[0]}, given, w=self.guidance)


@dataclass(frozen=True)
class Reconstruction(Plain):
    """Denoise x_T^S under the source prompt: how well the inversion holds without being overwritten."""

    prompt = "source"
