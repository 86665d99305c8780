"""DiffEdit's region: where the predictions under two prompts differ (Couairon et al. 2023, section 3.2)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Span
from masafusion_lab.given import Given
from masafusion_lab.lockstep import NotFinite, fresh, predict
from masafusion_lab.model import StableDiffusion
from masafusion_lab.schedule import Schedule

log = logging.getLogger(__name__)

BRANCHES = {"S": Branch("noised", "source"), "T": Branch("noised", "target")}


def rows(maps: int) -> int:
    """UNet rows an image that so many maps cost."""
    return maps * len(BRANCHES)


def state(maps: int, strength: float, steps: int) -> int:
    """The state, of so many steps, that the picture is noised to. Raises InputError for settings that cannot be."""
    if maps < 1:
        raise InputError(f"method.maps={maps}: must be at least 1")
    return Span.last(strength, steps, "map_strength").start


@torch.no_grad()
def region(
    model: StableDiffusion,
    given: Given,
    x0: Tensor,
    *,
    schedule: Schedule,
    maps: int = 10,
    strength: float = 0.5,
    threshold: float = 3.0,
) -> Tensor:
    """The region A (B, 1, h, w), 0 or 1, in pictures x0 (B, C, h, w) between the prompts source and target.

    The picture is noised `maps` times to `strength` of the schedule; a cell is inside if the two eps differ in it by
    more than half of `threshold` times the picture's mean. Under guidance, as published, both would have the same null
    half and differ w times as much everywhere: the region is the same. Raises InputError for what touches no step,
    NotFinite.
    """
    i, difference = state(maps, strength, len(schedule)), torch.zeros_like(x0)
    for k in range(maps):
        x = {"noised": schedule.diffuse(x0, fresh(given, f"map {k}"), i)}
        eps = predict(model, BRANCHES, x, given, i, schedule=schedule, w=1)
        difference += (eps["T"] - eps["S"]).abs() / maps
    if not difference.isfinite().all():
        raise NotFinite(f"the differences of the predictions are not finite at step {i} of {len(schedule)}")
    cells = difference.mean(1, keepdim=True)
    A = (cells > threshold / 2 * cells.mean((1, 2, 3), keepdim=True)).float()
    if not A.amax((1, 2, 3)).all():
        log.warning(
            "the two prompts differ nowhere above method.threshold=%g: what is kept is the whole picture", threshold
        )
    return A
