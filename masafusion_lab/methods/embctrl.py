"""EmbCtrl, Algorithm 4: the source prompt's embeddings with those of the changed words in place, (12)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from masafusion_lab import words
from masafusion_lab.fusion import Branch, Plan
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course, State
from masafusion_lab.methods.protocol import Method, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbCtrl(Method):
    """Settings of Algorithm 4, for edits that keep shapes; made for null-text inversion."""

    guidance: float = 7.5
    """w of (3)."""
    null: Literal["tuned", "empty"] = "tuned"
    """Null embedding: the inversion's optimised one, where there is one, or that of ""."""
    align: Literal["lcs", "positional"] = "lcs"
    """Which tokens are unchanged: as many as both prompts have in order, or, of prompts equally long, those that are
    equal at the same place, as (12) has it."""
    eos_pad: Literal["source", "target"] = "source"
    """Whose embeddings the end of the prompt and the padding have."""
    offset_on_target: bool = False
    """Whether the target, too, is corrected in each step by what direct inversion corrects the source by."""

    def prepare(self, model: StableDiffusion, given: Given, schedule: Schedule) -> Given:
        """The batch with (12) as its target prompts. Raises InputError for prompts that have no places in common."""
        n, tokenizer, maps = model.length, model.tokenizer, []
        for source, target in zip(given.typed("source"), given.typed("target"), strict=True):
            M, new = words.refinement(tokenizer, source, target, n, by_place=self.align == "positional")
            if self.eos_pad == "target":
                end = len(words.ids(tokenizer, target, n)) - 1
                M[:, end:], new[end:] = 0, 1
            maps.append((M, new))
        M, new = (torch.stack(y).to(given.text("target")) for y in zip(*maps, strict=True))
        mixed = M.mT @ given.text("source") + new[..., None] * given.text("target")  # (12)
        return replace(given, prompts={**given.prompts, "target": mixed})

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """One branch; with `offset_on_target` one more, the step that the inverted source would take."""
        target = Branch("target", "target", null=self.null)
        if not self.offset_on_target:
            return Plan({"T": target}, {"target": "T"})
        again = Branch("again", "source", null=self.null)
        return Plan({"S": again, "T": target}, {"again": "S", "target": "T"})

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        if source.null is None and not self.offset_on_target:
            log.warning("nothing ties EmbCtrl's target to the source but x_T; take inversion.name=null_text or npi")
        known, start = source.states, {"target": source.states[0]}

        def after(state: State) -> dict[str, Tensor]:
            again = known[state.i]
            return {"again": again, "target": state.x["target"] + again - state.x["again"]}

        if self.offset_on_target:
            start["again"] = known[0]
        plan, given = self.plan(model.sites, len(schedule)), self.prepare(model, given, schedule)
        return Course(plan, start, given, w=self.guidance, after=after if self.offset_on_target else None)
