"""GLIDE's way of filling a region (Nichol et al. 2022): the rest of the picture is known at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Plan
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course, State
from masafusion_lab.methods.protocol import Method, Needs, Source, inside, picture
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


@dataclass(frozen=True)
class Glide(Method):
    """GLIDE's rule on latents: with any model, or with a network that was trained to fill regions."""

    backend: Literal["x0_replace", "inpaint", "glide"] = "x0_replace"
    """x0_replace: the predicted x_0 is replaced by the picture's outside; inpaint: a UNet that sees region and picture
    beside the latent; glide: the published pixel-space networks, which are not supported."""
    guidance: float = 5.0
    """w of (3)."""
    background: Literal["none", "paste"] = "paste"
    """What becomes of the decoded picture outside the region: it is left, or the source's pixels are put there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend == "glide":
            raise InputError(
                "method.backend=glide: the published GLIDE networks are not supported (pixel-space networks of another "
                "architecture, in two stages, on no package registry); take x0_replace or inpaint"
            )

    @property
    def needs(self) -> Needs:
        """No inversion."""
        network = "inpaint" if self.backend == "inpaint" else ""
        return Needs(inversion=False, network=network, paste=self.background == "paste")

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """One branch, and a region."""
        branch = Branch("target", "target", extra="known" if self.backend == "inpaint" else None)
        return Plan({"T": branch}, {"target": "T"}, masked=True)

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        A = inside(given)
        after = None
        if self.backend == "inpaint":
            given = replace(given, extra={"known": torch.cat([A, picture(model, given, grey=A)], 1)})
        else:
            x0, a = picture(model, given), schedule.level(0)
            n = (x - a**0.5 * x0) / (1 - a) ** 0.5  # eps to x_0: DDIM's steps leave it as it is

            def after(state: State) -> Mapping[str, Tensor]:
                outside = x0 if state.i == len(schedule) else schedule.diffuse(x0, n, state.i)
                return {"target": A * state.x["target"] + (1 - A) * outside}

        return Course(self.plan(model.sites, len(schedule)), {"target": x}, given, w=self.guidance, after=after)
