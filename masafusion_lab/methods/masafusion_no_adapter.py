"""MaSaFusion without intermediate images, Algorithm 5: (13), inside a region (14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from masafusion_lab.fusion import Branch, Masked, Plan, Span, Take
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Needs, Source, inside
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site, layers


@dataclass(frozen=True)
class MaSaFusionNoAdapter(Method):
    """Settings of Algorithm 5; no drawn condition, and no need of a region."""

    guidance: float = 7.5
    """w of (3), for source and target."""
    fuse_steps: tuple[int, int] = (0, 1000)
    """Steps [a, b) of the fusion, Figure 12; in the others the target prompt alone denoises."""
    fuse_layers: str = "all"
    """Self-attention layers in which the target reads the source's K and V, (13): all, decoder, 10/16:, 8:16, 3,4,9."""
    use_mask: bool = True
    """Whether a region, where one is given, keeps the source outside, (14); false: (13) everywhere."""
    source_null: Literal["tuned", "empty"] = "tuned"
    """Null embedding of the source rows: the inversion's optimised one, where there is one, or that of ""."""
    preserve_null: Literal["empty", "tuned"] = "empty"
    """Null embedding of the prediction outside A."""
    edit_null: Literal["empty", "tuned"] = "empty"
    """Null embedding of the prediction under the target prompt."""
    init: Literal["source", "mixed", "gauss"] = "source"
    """x_T of the target: x_T^S (line 5), x inside A and x_T^S outside as in Algorithm 1, or the Gaussian x."""

    background: Literal["none", "paste"] = "none"
    """What becomes of the decoded picture outside a region: it is left, or the source's pixels are put there."""

    @property
    def needs(self) -> Needs:
        """An inversion."""
        return Needs(paste=self.background == "paste")

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """The branches of Algorithm 5 for a model with these attention layers."""
        when = Span(*self.fuse_steps)
        keep = Branch("target", "source", null=self.preserve_null, take=Take("S", "S", "S", when))
        edit = Take(None, "S", "S", when, layers(self.fuse_layers, sites))
        return Plan(
            {
                "S": Branch("source", "source", null=self.source_null),
                **({"T_out": keep} if self.use_mask else {}),  # eps-bar of (9), without the adapter
                "T_in": Branch("target", "target", null=self.edit_null, take=edit),  # (13)
            },
            {"target": Masked("T_in", "T_out", when, optional=True) if self.use_mask else "T_in"},  # (14)
            masked=self.init == "mixed",
        )

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan = self.plan(model.sites, len(schedule))
        x_T = {"source": source.states[0], "gauss": x}
        if self.init == "mixed":
            x_T["mixed"] = torch.where(inside(given) > 0, x, source.states[0])
        return Course(plan, {"target": x_T[self.init]}, given, {"source": source.states}, self.guidance)
