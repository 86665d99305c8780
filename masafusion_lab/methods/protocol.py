"""What a method is given and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from masafusion_lab.attention import Tap
from masafusion_lab.fusion import Given
from masafusion_lab.lockstep import Course, State
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule


class Source(Protocol):
    """The record of the inverted source: `states` (T + 1, B, C, h, w), and `null` (T, B, n, d) if it was optimised."""

    states: Tensor
    null: Tensor | None


class Method(Protocol):
    """Edits a batch: yields every state of the denoising; the last one's `x["target"]` is the edited x_0."""

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
        """Edit; x (B, C, h, w) is the case's Gaussian noise."""
        ...


@runtime_checkable
class Shareable(Protocol):
    """A method whose call is one `lockstep` and no more, which it also gives as data: a sweep can share its rows."""

    def course(self, model: StableDiffusion, given: Given, source: Source, x: Tensor, *, schedule: Schedule) -> Course:
        """What its call gives `lockstep`."""
        ...
