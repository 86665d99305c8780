"""Inversion of a real picture: its record, DDIM inversion (5), guided resimulation (4), and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.choices import Checked
from masafusion_lab.fusion import Branch, Plan
from masafusion_lab.given import Given, fits
from masafusion_lab.lockstep import NotFinite, lockstep
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule

Track: TypeAlias = Callable[[Iterable[Any], str], Iterable[Any]]
"""May show progress while it hands on an iterable; the words say what is under way."""


def silent(items: Iterable[Any], what: str) -> Iterable[Any]:
    """Show nothing."""
    return items


@dataclass
class Inversion:
    """The record of B inverted pictures, all that an edit needs of them.

    `states` (T + 1, B, C, h, w), float32: what the source branch reads at state i, x_T first. `null` (T, B, n, d): the
    null embedding of each step, where the inversion chose one, or None. `spent`: seconds of processes before this one,
    which were cut short.
    """

    states: Tensor
    null: Tensor | None = None
    spent: float = 0.0

    def split(self) -> list[Inversion]:
        """The records of its pictures, one by one."""
        return [
            Inversion(self.states[:, b : b + 1], None if self.null is None else self.null[:, b : b + 1])
            for b in range(self.states.shape[1])
        ]

    @classmethod
    def stack(cls, records: Sequence[Inversion]) -> Inversion:
        """The record of a batch; either all of its pictures have optimised null embeddings or none has.

        Raises InputError for others, and for records of other steps or sizes than the first.
        """
        for record in records:
            fits("a record's states", record.states[:, 0], records[0].states[:, 0].shape)
        nulls = [record.null for record in records if record.null is not None]
        if nulls and len(nulls) != len(records):
            raise InputError("records with and without null embeddings cannot be one batch: invert them alike")
        return cls(torch.cat([r.states for r in records], 1), torch.cat(nulls, 1) if nulls else None)


@torch.no_grad()
def invert(
    model: StableDiffusion,
    x0: Tensor,
    text: Tensor,
    schedule: Schedule,
    *,
    w: float = 1.0,
    null: Tensor | None = None,
    track: Track = silent,
) -> Tensor:
    """DDIM inversion: states (T + 1, B, C, h, w) from x_0 (B, C, h, w) up to x_T, under text (B, n, d).

    The UNet is asked at step i's timestep about the state i + 1 that is left (Mokady et al. 2023, section 3.2). Away
    from w = 1 each picture costs a second row, under `null` (B, n, d). Raises NotFinite naming the step.
    """
    states = [x0.float()]
    for i in track(range(len(schedule) - 1, -1, -1), "DDIM inversion"):
        x = states[-1]
        eps = model.eps(x, i, schedule, text, level=i + 1)
        if w != 1:
            if null is None:
                raise InputError(f"inversion under guidance {w:g} needs a null embedding; only 1 does without")
            eps = w * eps + (1 - w) * model.eps(x, i, schedule, null, level=i + 1)  # (3)
        states.append(schedule.noise(x, eps, i))  # (5)
        if not states[-1].isfinite().all():
            raise NotFinite(f"DDIM inversion is not finite at step {i} of {len(schedule)}")
    return torch.stack(states[::-1])


def retrace(
    model: StableDiffusion,
    x_T: Tensor,
    text: Tensor,
    null: Tensor,
    schedule: Schedule,
    *,
    w: float = 7.5,
    track: Track = silent,
) -> Tensor:
    """Guided resimulation: states (T + 1, B, C, h, w) from x_T (B, C, h, w) down to a reconstruction of x_0.

    `null` is (B, n, d), or (T, B, n, d) with an embedding for each step. Raises NotFinite naming the step.
    """
    plan = Plan({"S": Branch("source", "source", null="tuned")}, {"source": "S"})
    given = Given({"source": text}, null=null if null.ndim == 4 else null.expand(len(schedule), *null.shape))
    steps = lockstep(model, plan, {"source": x_T.float()}, given, schedule=schedule, w=w)
    return torch.stack([x_T.float(), *(next(steps).x["source"] for _ in track(range(len(schedule)), "resimulation"))])


@dataclass(frozen=True)
class Direct(Checked):
    """Direct inversion, Algorithm 3: the inverted states themselves, whose reconstruction error is zero."""

    name: ClassVar[str] = "direct"
    inverse_guidance: float = 1.0
    """w while inverting; away from 1 it costs a second row a step."""
    prompt: Literal["source", "empty"] = "source"
    """The prompt that the picture is inverted under, and by ddim resimulated."""

    def invert(
        self,
        model: StableDiffusion,
        x0: Tensor,
        text: Tensor,
        empty: Tensor,
        schedule: Schedule,
        *,
        track: Track = silent,
    ) -> Inversion:
        """The record of pictures x0 (B, C, h, w) with source and empty embeddings text, empty (B, n, d)."""
        under = text if self.prompt == "source" else empty
        return Inversion(invert(model, x0, under, schedule, w=self.inverse_guidance, null=empty, track=track))


@dataclass(frozen=True)
class Ddim(Direct):
    """Plain DDIM inversion: the source is the guided resimulation from x_T, with the drift that the others cure."""

    name: ClassVar[str] = "ddim"
    guidance: float = 7.5
    """w of the resimulation; the edit should use the same."""

    def invert(
        self,
        model: StableDiffusion,
        x0: Tensor,
        text: Tensor,
        empty: Tensor,
        schedule: Schedule,
        *,
        track: Track = silent,
    ) -> Inversion:
        """The record; see `Direct.invert`."""
        x_T = super().invert(model, x0, text, empty, schedule, track=track).states[0]
        under = text if self.prompt == "source" else empty
        return Inversion(retrace(model, x_T, under, empty, schedule, w=self.guidance, track=track))


@dataclass(frozen=True)
class Npi(Direct):
    """Negative-prompt inversion: the source prompt's own embedding is the null one, so guidance cancels in the source.

    Miyake et al. 2023: what null-text inversion approximates, without optimising. The record is the resimulation.
    """

    name: ClassVar[str] = "npi"
    interpolation: float = 0.0
    """How far the null embedding goes over from the source prompt's to that of "", 1: all the way. Then guidance no
    longer cancels: what it adds to edits comes back, and the drift with it."""
    guidance: float = 7.5
    """w of the resimulation, which matters only with an interpolation; the edit should use the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.interpolation <= 1:
            raise InputError(f"inversion.interpolation={self.interpolation:g}: must be in [0, 1]")

    def invert(
        self,
        model: StableDiffusion,
        x0: Tensor,
        text: Tensor,
        empty: Tensor,
        schedule: Schedule,
        *,
        track: Track = silent,
    ) -> Inversion:
        """The record; see `Direct.invert`."""
        x_T = super().invert(model, x0, text, empty, schedule, track=track).states[0]
        null = slerp(text.float(), empty.float(), self.interpolation) if self.interpolation else text.float()
        w = self.guidance if self.interpolation else 1  # (3) is C_S's eps for every w
        states = retrace(model, x_T, text, null, schedule, w=w, track=track)
        return Inversion(states, null.expand(len(schedule), *null.shape))


def slerp(a: Tensor, b: Tensor, part: float) -> Tensor:
    """What lies `part` of the angle from a to b, (B, ...), a vector a picture; of those in line, a straight mean."""
    x, y = a.flatten(1), b.flatten(1)
    angle = torch.cosine_similarity(x, y).clamp(-1, 1).acos()[:, None]
    of_a, of_b = (torch.where(angle.sin() > 1e-4, (p * angle).sin() / angle.sin(), p) for p in (1 - part, part))
    return (of_a * x + of_b * y).view_as(a)


@dataclass(frozen=True)
class EditFriendly:
    """Edit-friendly inversion: each state is the picture under noise of its own, (1), with no network asked.

    Huberman-Spiegelglas et al. 2024. The noise maps are what leads from state to state beside the network's prediction:
    `method.name=edit_friendly` edits along them. To other methods the record is a source like any other.
    """

    name: ClassVar[str] = "edit_friendly"
    seed: int = 0
    """Of the noise, which is the same for every picture of a size."""

    def invert(
        self,
        model: StableDiffusion,
        x0: Tensor,
        text: Tensor,
        empty: Tensor,
        schedule: Schedule,
        *,
        track: Track = silent,
    ) -> Inversion:
        """The record; see `Direct.invert`."""
        generator = torch.Generator().manual_seed(self.seed)
        x0 = x0.float()
        noise = torch.randn(len(schedule), 1, *x0.shape[1:], generator=generator).to(x0.device)
        return Inversion(torch.stack([*(schedule.diffuse(x0, noise[i], i) for i in range(len(schedule))), x0]))


@dataclass(frozen=True)
class NoInversion:
    """For methods that start from noise: the record is x_0 alone, states (1, B, C, h, w)."""

    name: ClassVar[str] = "none"

    def invert(
        self,
        model: StableDiffusion,
        x0: Tensor,
        text: Tensor,
        empty: Tensor,
        schedule: Schedule,
        *,
        track: Track = silent,
    ) -> Inversion:
        """The record; see `Direct.invert`."""
        return Inversion(x0.float()[None])
