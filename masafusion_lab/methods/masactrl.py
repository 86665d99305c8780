"""MasaCtrl: the target reads K and V of the source in the finer decoder layers (Cao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from masafusion_lab import InputError, words
from masafusion_lab.fusion import Branch, Hint, Plan, Span, Take
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course, State
from masafusion_lab.methods.protocol import Method, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site, layers
from masafusion_lab.wordmaps import WordMaps, first_maps


@dataclass(frozen=True)
class MasaCtrl(Method):
    """Mutual self-attention, as published along a drawn condition; hint_until=0 is MasaCtrl without an adapter."""

    guidance: float = 7.5
    """w of (3), for source and target."""
    variant: Literal["plain", "union", "masked", "auto"] = "plain"
    """The source's K and V alone, beside the target's own, or by region: inside A from inside, outside from outside;
    auto: the same with regions of its own, in each step where source and target attend to words."""
    mutual_window: tuple[float, float] = (0.08, 1.0)
    """Part [a, b) of the steps with mutual attention; from step 4 of 50."""
    mutual_layers: str = "10/16:"
    """Its self-attention layers: from SD's layer 10 of 16 on; all, decoder, a range a:b, or a list such as 3,4,9."""
    source_prompt: Literal["empty", "source"] = "empty"
    """Prompt of the source rows; under "" guidance cannot move a real picture. As published, inversion.prompt=empty."""
    null: Literal["empty", "tuned"] = "empty"
    """Null embedding of source and target: that of "", or the inversion's optimised one where there is one."""
    hint_scale: float = 1.0
    """Strength of the adapter's features."""
    hint_until: float = 1.0
    """Fraction of the first steps in which the target rows see the adapter; 0 needs no drawn condition."""
    hint_on_null: bool = True
    """Whether the target's null half of guidance sees the adapter."""
    auto_source: tuple[str, ...] = ()
    """Of variant=auto: words of the source for what is inside; with source_prompt=source."""
    auto_target: tuple[str, ...] = ()
    """Words of the target for the same."""
    auto_threshold: float = 0.1
    """Attention to those words, between its least and its most, from which a pixel is inside."""
    auto_resolution: int = 16
    """Side of the maps in which that is looked up, of 64."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """Source and target for a model with these attention layers, in `steps` steps."""
        hint = Hint.first(self.hint_until, steps, on_null=self.hint_on_null, scale=self.hint_scale)
        when, where = Span.part(self.mutual_window, steps) or Span(0, 0), layers(self.mutual_layers, sites)
        take = Take(None, "S", "S", when, where, keys="seen" if self.variant == "auto" else self.variant)
        if self.auto:
            looked = first_maps(sites, self.auto_resolution, "method.auto_resolution")
            if all(site.cross or site.depth not in where for site in sites[looked:]):
                raise InputError(f"method.mutual_layers={self.mutual_layers}: all before the first look at words")
        return Plan(
            {
                "S": Branch("source", self.source_prompt, null=self.null),
                "T": Branch("target", "target", hint, self.null, take),
            },
            {"target": "T"},
        )

    @property
    def auto(self) -> bool:
        """Whether it finds regions of its own. Raises InputError for settings of that which cannot be."""
        on = self.variant == "auto"
        changed = [f.name for f in fields(self) if f.name.startswith("auto_") and getattr(self, f.name) != f.default]
        if changed and not on:
            raise InputError(f"method.{changed[0]}: does nothing in method.variant={self.variant}; take auto")
        if on and not (self.auto_source and self.auto_target and self.source_prompt == "source"):
            raise InputError(
                "method.variant=auto wants words of both prompts: give method.auto_source=cat method.auto_target=dog "
                "method.source_prompt=source"
            )
        return on

    def prepare(self, model: StableDiffusion, given: Given, schedule: Schedule) -> Given:
        """The batch. Raises InputError for words that are not there."""
        if self.auto:
            self.marks(model, given)
        return given

    def marks(self, model: StableDiffusion, given: Given) -> Tensor:
        """1 at the tokens of the words, (2, B, n), of source and target."""
        wanted = {"source": self.auto_source, "target": self.auto_target}
        of_each = (words.marks(model.tokenizer, given.typed(side), its, model.length) for side, its in wanted.items())
        return torch.stack(list(of_each)).to(model.device)

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan = self.plan(model.sites, len(schedule))
        start, record = {"target": source.states[0]}, {"source": source.states}
        if not self.auto:
            return Course(plan, start, given, record, self.guidance)
        maps, marks = WordMaps(self.auto_resolution), self.marks(model, given)

        def seen() -> Tensor | None:
            if maps.added is None:
                return None
            p = maps.at(marks)
            low, high = p.amin((-2, -1), keepdim=True), p.amax((-2, -1), keepdim=True)
            return (p - low >= self.auto_threshold * (high - low)).float()

        def after(state: State) -> dict[str, Tensor]:
            maps.added = None  # each step looks anew
            return {}

        return Course(plan, start, replace(given, seen=seen), record, self.guidance, after, [maps])
