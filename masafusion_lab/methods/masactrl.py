"""MasaCtrl: the target reads K and V of the source in the finer decoder layers (Cao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from masafusion_lab.fusion import Branch, Hint, Plan, Span, Take
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Denoising, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site, layers


@dataclass(frozen=True)
class MasaCtrl(Denoising):
    """Mutual self-attention, as published along a drawn condition; hint_until=0 is MasaCtrl without an adapter."""

    guidance: float = 7.5
    """w of (3), for source and target."""
    variant: Literal["plain", "union", "masked"] = "plain"
    """The source's K and V alone, beside the target's own, or by region: inside A from inside, outside from outside."""
    mutual_window: tuple[float, float] = (0.08, 1.0)
    """Part [a, b) of the steps with mutual attention; from step 4 of 50."""
    mutual_layers: str = "10/16:"
    """Its self-attention layers: from SD's layer 10 of 16 on; all, decoder, a range a:b, or a list such as 3,4,9."""
    source_prompt: Literal["empty", "source"] = "empty"
    """Prompt of the source rows; under "" guidance cannot move a real picture."""
    null: Literal["empty", "tuned"] = "empty"
    """Null embedding of source and target: that of "", or the inversion's optimised one where there is one."""
    hint_scale: float = 1.0
    """Strength of the adapter's features."""
    hint_until: float = 1.0
    """Fraction of the first steps in which the target rows see the adapter; 0 needs no drawn condition."""
    hint_on_null: bool = True
    """Whether the target's null half of guidance sees the adapter."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """Source and target for a model with these attention layers, in `steps` steps."""
        hint = Hint.first(self.hint_until, steps, on_null=self.hint_on_null, scale=self.hint_scale)
        take = Take(
            None,
            "S",
            "S",
            Span.part(self.mutual_window, steps) or Span(0, 0),
            layers(self.mutual_layers, sites),
            keys=self.variant,
        )
        return Plan(
            {
                "S": Branch("source", self.source_prompt, null=self.null),
                "T": Branch("target", "target", hint, self.null, take),
            },
            {"target": "T"},
        )

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Denoising`."""
        plan = self.plan(model.sites, len(schedule))
        return Course(plan, {"target": source.states[0]}, given, {"source": source.states}, self.guidance)
