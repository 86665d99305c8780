"""MaSaFusion, Algorithm 1: intermediate image and target, in lockstep with the replayed source, (9) and (10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import HALVES, NO_REGION, Branch, Hint, Masked, Plan, Span, Take
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Needs, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site, layers


@dataclass(frozen=True)
class MaSaFusion(Method):
    """Settings of Algorithm 1; the defaults are the paper's, or the most literal reading where it is silent."""

    guidance: float = 7.5
    """w of (3), for source, intermediate and target."""
    preserve: Literal["qkv", "kv", "qk"] = "qkv"
    """Which of the source's Q, K, V the predictions outside A read, (9)."""
    preserve_layers: str = "all"
    """Self-attention layers of that reading: all, decoder, a range a:b, or a list such as 3,4,9, in running order."""
    preserve_steps: tuple[int, int] = (0, 1000)
    """Steps [a, b) of that reading."""
    edit_layers: str = "all"
    """Layers in which the target inside A reads the intermediate image's Q and K, (10)."""
    edit_steps: tuple[int, int] = (0, 1000)
    """Steps [a, b) of that reading."""
    fusion_steps: tuple[int, int] = (0, 1000)
    """Steps [a, b) of (9) and (10) as a whole, as in Figure 12; in the others the plain prediction under C^T."""
    fusion_of: Literal["target", "both"] = "target"
    """Whether that window is of the target alone, (10), or of the intermediate image too, (9)."""
    qk_from: Literal["edit", "preserve"] = "edit"
    """Whose Q, K of the intermediate image (10) reads: its prediction inside A or outside."""
    cfg_pairing: Literal["matched", "cond_only"] = "matched"
    """Whether both halves of guidance read (null from null, text from text) or only the text half does."""
    source_null: Literal["tuned", "empty"] = "tuned"
    """Null embedding of the source rows: the inversion's optimised one, where there is one, or that of ""."""
    preserve_null: Literal["empty", "tuned"] = "empty"
    """Null embedding of the predictions outside A."""
    edit_null: Literal["empty", "tuned"] = "empty"
    """Null embedding of the predictions inside A."""
    hint_scale: float = 1.0
    """Strength of the adapter's features."""
    hint_until: float = 1.0
    """Fraction of the first steps in which the adapter is on; 0 needs no drawn condition."""
    hint_on_null: bool = True
    """Whether the null half of guidance sees the adapter."""
    hint_on_preserve: bool = True
    """Whether the predictions outside A see the adapter, as (9) and (10) write it."""
    hint_on_source: bool = False
    """Whether the source rows see the adapter."""
    init_t2i: Literal["gauss", "source", "mixed"] = "gauss"
    """x_T of the intermediate image: x, x_T^S, or x inside A and x_T^S outside (line 4, Figure 4)."""
    init_target: Literal["mixed", "source", "gauss"] = "mixed"
    """x_T of the target (line 7)."""
    share_noise: bool = True
    """Whether lines 4 and 7 use the same Gaussian x; if not, the target starts from its mirror image."""
    background: Literal["none", "paste"] = "none"
    """What becomes of the decoded picture outside A: it is left (Remark 2), or the source's pixels are put there."""

    @property
    def needs(self) -> Needs:
        """An inversion."""
        return Needs(paste=self.background == "paste")

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """The branches of Algorithm 1 for a model with these attention layers, in `steps` steps."""
        on = Hint.first(self.hint_until, steps, on_null=self.hint_on_null, scale=self.hint_scale)
        outside = on if self.hint_on_preserve else None
        halves = HALVES if self.cfg_pairing == "matched" else ("text",)
        q, k, v = ("S" if letter in self.preserve else None for letter in "qkv")
        keep = Take(q, k, v, Span(*self.preserve_steps), layers(self.preserve_layers, sites), halves)
        read = f"I_{'in' if self.qk_from == 'edit' else 'out'}"
        window = Span(*self.fusion_steps)
        both = Span(max(self.edit_steps[0], window.start), min(self.edit_steps[1], self.fusion_steps[1]))
        edit = Take(read, read, None, both, layers(self.edit_layers, sites), halves)
        return Plan(
            {
                "S": Branch("source", "source", on if self.hint_on_source else None, self.source_null),
                "I_out": Branch("t2i", "source", outside, self.preserve_null, keep),  # eps-bar of (9)
                "I_in": Branch("t2i", "target", on, self.edit_null),  # eps of (9)
                "T_out": Branch("target", "source", outside, self.preserve_null, keep),  # eps-bar of (10)
                "T_in": Branch("target", "target", on, self.edit_null, edit),  # eps-hat of (10)
            },
            {
                "t2i": Masked("I_in", "I_out", window if self.fusion_of == "both" else Span()),
                "target": Masked("T_in", "T_out", window),
            },
        )

    def start(self, source: Tensor, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """x_T of both latents from x_T^S, the Gaussian x and A (lines 4 and 7)."""
        other = x if self.share_noise else x.flip(-1)

        def init(how: str, x: Tensor) -> Tensor:
            return {"gauss": x, "source": source, "mixed": torch.where(mask > 0, x, source)}[how]

        return {"t2i": init(self.init_t2i, x), "target": init(self.init_target, other)}

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; its states hold "t2i", the intermediate image, beside "target"; see `Method`."""
        if given.mask is None:
            raise InputError(NO_REGION)
        plan, start = self.plan(model.sites, len(schedule)), self.start(source.states[0], x, given.mask)
        return Course(plan, start, given, {"source": source.states}, self.guidance)
