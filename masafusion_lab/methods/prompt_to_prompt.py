"""Prompt-to-Prompt: attention to words, and self-attention, follow the source's (Hertz et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from masafusion_lab import InputError, words
from masafusion_lab.fusion import Branch, Plan, Span, Take, Words
from masafusion_lab.given import Follow, Given
from masafusion_lab.lockstep import Course, State
from masafusion_lab.methods.protocol import Method, Source
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site
from masafusion_lab.wordmaps import CELLS, WordMaps, first_maps


@dataclass(frozen=True)
class PromptToPrompt(Method):
    """Settings as in its notebook for real pictures; resolutions as on latents of 64 x 64, on others in proportion."""

    guidance: float = 7.5
    """w of (3)."""
    edit: Literal["refine", "replace"] = "refine"
    """Which attention follows the source's: that to words that both prompts have, or to all, word for word."""
    cross_window: tuple[float, float] = (0.0, 0.8)
    """Part [a, b) of the steps in which attention to words follows; [0,0]: in none."""
    cross_words: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The same for single words of the target, as method.cross_words.dog=[0,0.4]."""
    self_window: tuple[float, float] = (0.0, 0.5)
    """Part [a, b) of the steps in which self-attention follows; [0,0]: in none."""
    self_resolution: int = 32
    """Side of the largest maps of which self-attention follows, of 64."""
    reweight: dict[str, float] = field(default_factory=dict)
    """Factor of the attention to single words of the target while it follows, as method.reweight.red=2."""
    null: Literal["tuned", "empty"] = "tuned"
    """Null embedding: the inversion's optimised one, where there is one, or that of ""."""
    as_published: bool = False
    """Whether to align as the published code: a shorter target's padding follows words of the source, and what follows
    a replaced word is not shifted if the words differ in their number of tokens."""
    blend_source: tuple[str, ...] = ()
    """Words of the source where the target may differ from it (local blend), with blend_target; none: everywhere."""
    blend_target: tuple[str, ...] = ()
    """Words of the target where it may differ from the source."""
    blend_without: tuple[str, ...] = ()
    """Words of the target, and of the source if it has them, where it may not."""
    blend_start: float = 0.2
    """Fraction of the first steps without local blend."""
    blend_threshold: float = 0.3
    """Attention to those words, of its maximum, from which a pixel is theirs."""
    blend_resolution: int = 16
    """Side of the maps in which that is looked up, of 64."""
    blend_maps: Literal["used", "own"] = "used"
    """Which maps of the target: those that it used, after they followed the source's, as the published code does, or
    those that it would have had alone."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """Source and target for a model with these attention layers, in `steps` steps."""
        take, follow = Take(), None
        if span := Span.part(self.self_window, steps):
            fine = {site.depth for site in sites if not site.cross and 2**site.level * self.self_resolution >= CELLS}
            take = Take("S", "S", None, span, fine, ("text",))
        if spans := [s for w in (self.cross_window, *self.cross_words.values()) if (s := Span.part(w, steps + 1))]:
            follow = Words("S", Span(min(s.start for s in spans), max(s.stop or 0 for s in spans)))
        elif self.reweight:
            raise InputError("method.reweight: attention to words follows in no step; widen method.cross_window")
        if self.blends:
            follow = Words("S")  # in every step: its maps are looked at
            first_maps(sites, self.blend_resolution, "method.blend_resolution")
        target = Branch("target", "target", null=self.null, take=take, words=follow)
        return Plan({"S": Branch("source", "source"), "T": target}, {"target": "T"})

    @property
    def blends(self) -> bool:
        """Whether there is a local blend. Raises InputError for a part of one, and for one that does nothing."""
        on = bool(self.blend_source or self.blend_target)
        changed = [f.name for f in fields(self) if f.name.startswith("blend_") and getattr(self, f.name) != f.default]
        if (on and not (self.blend_source and self.blend_target)) or (changed and not on):
            raise InputError(f"method.{changed[0]}: local blend wants both method.blend_source and method.blend_target")
        for key in ("blend_start", "blend_threshold"):
            if not 0 <= (value := getattr(self, key)) < 1:
                raise InputError(f"method.{key}={value:g}: must be in [0, 1)")
        return on

    def prepare(self, model: StableDiffusion, given: Given, schedule: Schedule) -> Given:
        """The batch with how the target's attention follows. Raises InputError for words that are not there."""
        n, steps, tokenizer = model.length, len(schedule), model.tokenizer
        aligned = words.refinement if self.edit == "refine" else words.replacement
        self.blend(model, given, steps)  # raises for its words
        made = []
        for source, target in zip(given.typed("source"), given.typed("target"), strict=True):
            M, new = aligned(tokenizer, source, target, n, as_published=self.as_published)
            on, factor = torch.zeros(steps + 1, n), torch.ones(n)
            for word, window in {"": self.cross_window, **self.cross_words}.items():
                at = words.places(tokenizer, target, word, n) if word else list(range(n))
                span = Span.part(window, steps + 1) or Span(0, 0)
                on[:, at] = 0
                on[span.start : span.stop, at] = 1
            for word, c in self.reweight.items():
                factor[words.places(tokenizer, target, word, n)] = c
            follows = on[:steps] * factor
            made.append((M * follows[:, None], new * follows + 1 - on[:steps]))
        theirs, own = (torch.stack(y, 1).to(given.text("target")) for y in zip(*made, strict=True))
        return replace(given, words=Follow(theirs, own))

    def blend(self, model: StableDiffusion, given: Given, steps: int) -> LocalBlend | None:
        """Its local blend of a batch, if there is one. Raises InputError for words that are not there."""
        if not self.blends:
            return None

        def marks(side: str, wanted: Sequence[str], strict: bool = True) -> Tensor:
            return words.marks(model.tokenizer, given.typed(side), wanted, model.length, strict=strict).to(model.device)

        on = torch.stack([marks("source", self.blend_source), marks("target", self.blend_target)])
        off = torch.stack([marks("source", self.blend_without, strict=False), marks("target", self.blend_without)])
        seen = WordMaps(self.blend_resolution, own=self.blend_maps == "own")
        return LocalBlend(seen, on, off, int(self.blend_start * steps), self.blend_threshold)

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        blend = self.blend(model, given, len(schedule))
        return Course(
            self.plan(model.sites, len(schedule)),
            {"target": source.states[0]},
            self.prepare(model, given, schedule),
            {"source": source.states},
            self.guidance,
            blend,
            [blend.seen] if blend else [],
        )


@dataclass(frozen=True)
class LocalBlend:
    """Puts the source back where the words are not looked at: asked after each step.

    `on`, `off` (2, B, n): 1 at the tokens of the words where the target may and may not differ, of source and target.
    """

    seen: WordMaps
    on: Tensor
    off: Tensor
    start: int
    threshold: float

    def __call__(self, state: State) -> dict[str, Tensor]:
        """The target with the source in the pixels of neither prompt's words."""
        if state.i <= self.start:
            return {}
        source, target = state.x["source"], state.x["target"]
        height, width = target.shape[-2:]

        def pixels(marks: Tensor, reach: int) -> Tensor:
            """Where either prompt's words are looked at, (B, 1, h, w), and as many cells around it."""
            looks = F.max_pool2d(self.seen.at(marks), 2 * reach + 1, 1, reach)
            looks = F.interpolate(looks, (height, width))
            return (looks > self.threshold * looks.amax((-2, -1), keepdim=True)).any(0)[:, None]

        return {"target": torch.where(pixels(self.on, 1) & ~pixels(self.off, 0), target, source)}
