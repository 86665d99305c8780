"""What the T2I-Adapter alone makes of target prompt and drawn condition (Mou et al. 2023): no source, no fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from masafusion_lab.fusion import Branch, Hint, Plan
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Needs, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


@dataclass(frozen=True)
class T2IOnly(Method):
    """Generate from Gaussian noise along the drawn condition, Figure 14's last column."""

    needs: ClassVar[Needs] = Needs(inversion=False)
    guidance: float = 7.5
    """w of (3)."""
    hint_scale: float = 1.0
    """Strength of the adapter's features."""
    hint_until: float = 1.0
    """Fraction of the first steps in which the adapter is on; 0 needs no drawn condition."""
    hint_on_null: bool = True
    """Whether the null half of guidance sees the adapter."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """Its one branch."""
        hint = Hint.first(self.hint_until, steps, on_null=self.hint_on_null, scale=self.hint_scale)
        return Plan({"T": Branch("target", "target", hint)}, {"target": "T"})

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        return Course(self.plan(model.sites, len(schedule)), {"target": x}, given, w=self.guidance)
