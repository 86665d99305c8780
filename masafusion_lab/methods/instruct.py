"""InstructPix2Pix and HIVE: a UNet that sees the picture beside the latent follows an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Plan, Sde, Weighted
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course
from masafusion_lab.methods.protocol import Method, Needs, Source, picture
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


@dataclass(frozen=True)
class InstructPix2Pix(Method):
    """InstructPix2Pix (Brooks et al. 2023), with its published settings; they are for steps=100.

    As in its code, by k-diffusion, steps are spaced evenly from the last trained timestep to 0, and end at x_0 itself.
    """

    needs: ClassVar[Needs] = Needs(inversion=False, network="instruct", instruction=True)
    guidance: float = 7.5
    """s_T, guidance by the instruction."""
    image_guidance: float = 1.5
    """s_I, guidance by the picture."""
    eta: float = 1.0
    """How stochastic the steps are: 1, the published Euler ancestral ones; 0, Euler's."""

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """Three branches of a row each: under both, under the picture alone, under neither."""
        s_T, s_I = self.guidance, self.image_guidance
        if not 0 <= self.eta <= 1:
            raise InputError(f"method.eta={self.eta:g}: must be in [0, 1]")
        return Plan(
            {
                "both": Branch("target", "instruction", w=1, extra="picture"),
                "image": Branch("target", "empty", w=1, extra="picture"),
                "none": Branch("target", "empty", w=1, extra="nothing"),
            },
            {"target": Weighted({"none": 1 - s_I, "image": s_I - s_T, "both": s_T})},
            sde={"target": Sde(self.eta)} if self.eta else {},
        )

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """The edit as data; see `Method`."""
        latents = picture(model, given) / model.vae.config.scaling_factor  # as it was trained: not scaled
        given = replace(given, extra={"picture": latents, "nothing": torch.zeros_like(latents)})
        own = model.schedule(len(schedule), even=True)
        start = (1 - own.level(0)) ** 0.5 * x  # noise alone, not the state of a picture
        return Course(self.plan(model.sites, len(own)), {"target": start}, given, schedule=own)


@dataclass(frozen=True)
class Hive(InstructPix2Pix):
    """HIVE (Zhang et al. 2023) with a conditional reward: the instruction asks for the best.

    Its networks with a weighted reward run as method.name=instruct_pix2pix, with model.unet=FOLDER.
    """

    suffix: str = ""
    """What is appended to the instruction; empty: what its network was taught, or ", image quality is five out of five"
    as published."""

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """A network of its own."""
        return Needs(inversion=False, network="hive", instruction=True, suffix=self.suffix or None)
