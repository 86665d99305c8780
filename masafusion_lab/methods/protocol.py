"""What a method is given and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.attention import Tap
from masafusion_lab.choices import Checked
from masafusion_lab.fusion import NO_REGION, Plan
from masafusion_lab.given import Given, fits
from masafusion_lab.lockstep import Course, State
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site


class Source(Protocol):
    """The record of the inverted source: `states` (T + 1, B, C, h, w), and `null` (T, B, n, d) if it was optimised."""

    states: Tensor
    null: Tensor | None


@dataclass(frozen=True)
class Needs:
    """What a method needs beside prompts and region, and what is done with its result.

    `inversion`: whether it reads the record's states; `network`: the kind of UNet, see `network.NETWORKS`;
    `instruction`: whether it follows one, and `suffix` what is appended to that, None for what the network was trained
    with; `paste`: whether the picture's own pixels are put back outside the region.
    """

    inversion: bool = True
    network: str = ""
    instruction: bool = False
    suffix: str | None = ""
    paste: bool = False


def picture(model: StableDiffusion, given: Given, *, grey: Tensor | None = None) -> Tensor:
    """The latents x_0 (B, C, h, w) of the pictures to edit, in mid grey inside a region `grey` (B, 1, h, w).

    Raises InputError where they are not given.
    """
    if given.pixels is None:
        raise InputError("this method reads the picture itself: Given(pixels=...)")
    if grey is None:
        return model.encode(given.pixels)
    grey = F.interpolate(grey, given.pixels.shape[-2:])
    return model.encode(grey * 0.5 + (1 - grey) * given.pixels)


def inside(given: Given) -> Tensor:
    """A (B, 1, h, w). Raises InputError where it is not given."""
    if given.mask is None:
        raise InputError(NO_REGION)
    return given.mask


class Method(Checked):
    """Edits a batch. Its call is one `lockstep`, which it gives as data: a sweep can share its rows with others.

    `plan` and `prepare` raise InputError for what cannot be; every case is checked by them before any is computed.
    A setting that is none of its choices is one when the method is made.
    """

    @property
    def needs(self) -> Needs:
        """What it needs beside prompts and region."""
        return Needs()

    def prepare(self, model: StableDiffusion, given: Given, schedule: Schedule) -> Given:
        """The batch with what the method adds to it."""
        return given

    def plan(self, sites: Sequence[Site], steps: int) -> Plan:
        """Its branches, for a model with these attention layers, in `steps` steps."""
        raise NotImplementedError

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """What its call gives `lockstep`; x (B, C, h, w) is the case's Gaussian noise."""
        raise NotImplementedError

    def check(self, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> None:
        """Raise InputError for a record or a batch of other steps, sizes or pictures than x (B, C, h, w) has."""
        given.check(len(schedule), x.shape)
        if self.needs.inversion:
            fits("the record's states", source.states, (len(schedule) + 1, *x.shape))

    def __call__(
        self,
        model: StableDiffusion,
        given: Given,
        source: Source,
        x: Tensor,
        *,
        schedule: Schedule,
        taps: Sequence[Tap] = (),
    ) -> Iterator[State]:
        """Yield the states of the denoising, T at most; the last one's `x["target"]` is the edited x_0.

        Raises InputError for what does not fit together; see `check`.
        """
        self.check(given, source, x, schedule=schedule)
        yield from self.course(model, given, source, x, schedule=schedule).run(model, schedule=schedule, taps=taps)
