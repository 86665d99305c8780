"""Blended Latent Diffusion: the picture, noised anew, is put back outside the region after every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Plan, Span
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course, State, fresh
from masafusion_lab.methods.protocol import Method, Needs, Source, inside, picture
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


@dataclass(frozen=True)
class Blended(Method):
    """Avrahami et al. 2023; the defaults are those of their code for Stable Diffusion."""

    guidance: float = 7.5
    """w of (3)."""
    start: float = 0.25
    """The first part of the schedule, which is left out."""
    init: Literal["gauss", "source"] = "gauss"
    """Where it begins: pure noise, or the picture noised by it."""
    lag: bool = True
    """Whether the picture outside is a state noisier than the result inside, as in the published code, or as noisy."""
    shrink: int = 0
    """Larger regions, of 1, 2, ... rings of cells more, that it begins in, the largest first: for thin regions."""
    background: Literal["none", "paste"] = "none"
    """What becomes of the decoded picture outside the region: it is left, or the source's pixels are put there."""

    @property
    def needs(self) -> Needs:
        """No inversion."""
        return Needs(inversion=False, paste=self.background == "paste")

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """One branch, and a region."""
        if not (0 <= self.start < 1 and self.shrink >= 0):
            raise InputError(f"method.start={self.start:g}, shrink={self.shrink}: must be in [0, 1) and at least 0")
        run = Span(int(steps * self.start))
        if ((n := steps - run.start) - 1) // self.each(n) < self.shrink:
            raise InputError(f"method.shrink={self.shrink}: none of {n} steps is left for the region itself; take less")
        return Plan({"T": Branch("target", "target")}, {"target": "T"}, masked=True, run=run)

    def each(self, n: int) -> int:
        """In how many steps, of n, each of the regions is the one, as published: the last may never come up."""
        return n // (self.shrink + 1) + 1

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        plan, T = self.plan(model.sites, len(schedule)), len(schedule)
        x0, mask, start = picture(model, given), inside(given), plan.run.start
        masks = [F.max_pool2d(mask, 2 * k + 1, 1, k) for k in range(self.shrink, 0, -1)] + [mask]
        each = self.each(T - start)

        def after(state: State) -> Mapping[str, Tensor]:
            A, level = masks[(min(state.i, T - 1) - start) // each], state.i - self.lag  # of the step that follows
            outside = x0 if level == T else schedule.diffuse(x0, fresh(given, f"outside {state.i}"), level)
            return {"target": A * state.x["target"] + (1 - A) * outside}

        begin = x if self.init == "gauss" else schedule.diffuse(x0, x, start)
        return Course(plan, {"target": begin}, given, w=self.guidance, after=after)
