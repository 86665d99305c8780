"""Plug-and-Play: the target reads Q, K and a residual feature of the source (Tumanyan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Plan, Span, Take, Weighted
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site, layers


@dataclass(frozen=True)
class PlugAndPlay(Method):
    """Settings of pnp-diffusers, or of the original code."""

    guidance: float = 7.5
    """w of (3); the original takes 10 for real pictures."""
    variant: Literal["diffusers", "original"] = "diffusers"
    """diffusers: the negative prompt takes the place of "", and the source's one row feeds both halves of guidance;
    original: null reads null, the negative prompt fades in, and windows hold one step more."""
    qk_until: float = 0.5
    """Fraction of the first steps in which Q and K are the source's."""
    qk_layers: str = "8/16:"
    """Self-attention layers of that: from SD's layer 8 of 16 on; all, decoder, a range a:b, or a list such as 3,4,9."""
    feature_until: float = 0.8
    """Fraction of the first steps in which the residual feature is the source's."""
    feature_layers: str = "8/16"
    """The residual blocks of that, by the self-attention layers that follow them."""
    source_prompt: Literal["empty", "source"] = "empty"
    """Prompt of the source rows; published with inversion.prompt=empty, and never under guidance."""
    negative: str = ""
    """Negative prompt; none: "", in the original the source prompt, as its configuration for pictures has it."""
    negative_fade: float = 1.0
    """Of the original: the share of "" beside the negative prompt in the first step, which falls to 0 in the last."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """Source and target for a model with these attention layers, in `steps` steps."""
        original = self.variant == "original"
        if not original and self.negative_fade != type(self).negative_fade:
            raise InputError("method.negative_fade does nothing in method.variant=diffusers; take it away")

        def take(q: str | None, v: str | None, until: float, where: str) -> Take:
            span = Span.part(until, steps)
            if span is None:
                return Take()
            when = Span(0, (span.stop or 0) + original)
            return Take(q, q, v, when, layers(where, sites), from_text=not original)

        def reading(source: str) -> dict[str, Any]:
            qk = take(source, None, self.qk_until, self.qk_layers)
            return {"take": qk, "feature": take(None, source, self.feature_until, self.feature_layers)}

        S = Branch("source", self.source_prompt)
        if not original:
            null = "negative" if self.negative else "empty"
            return Plan({"S": S, "T": Branch("target", "target", null=null, **reading("S"))}, {"target": "T"})
        w, unsaid = self.guidance, "S" if self.source_prompt == "empty" else "S_empty"  # which the null rows read
        share = [self.negative_fade * (steps - 1 - i) / max(1, steps - 1) for i in range(steps)]
        rows = {  # a row each, since (3) is under two null prompts
            "S": replace(S, w=1),
            unsaid: Branch("source", "empty", w=1),
            "T": Branch("target", "target", w=1, **reading("S")),
            "T_empty": Branch("target", "empty", w=1, **reading(unsaid)),
            "T_negative": Branch("target", "negative", w=1, **reading(unsaid)),
        }
        against = {"T_empty": [(1 - w) * a for a in share], "T_negative": [(1 - w) * (1 - a) for a in share]}
        return Plan(rows, {"target": Weighted({"T": w, **against})})

    def prepare(self, model: StableDiffusion, given: Given, schedule: Schedule) -> Given:
        """The batch with the embeddings of the negative prompt."""
        source = given.text("source")
        negative = model.embed([self.negative]).expand_as(source) if self.negative else source
        return replace(given, prompts={**given.prompts, "negative": negative})

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan, given = self.plan(model.sites, len(schedule)), self.prepare(model, given, schedule)
        return Course(plan, {"target": source.states[0]}, given, {"source": source.states}, self.guidance)
