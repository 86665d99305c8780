"""Cases from the picture-book world, whose target picture, region and hints are known exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from masafusion_lab import InputError
from masafusion_lab.data.case import HINTS, Case
from masafusion_lab.picturebook.edits import EDITS, Example, edit, session

REGIONS = ("loose", "exact", "boxed")


def _case(example: Example, region: str, hints: Sequence[str]) -> Case:
    if region not in REGIONS:
        raise InputError(f"region: {region!r} is not one of {', '.join(REGIONS)}")
    if strange := set(hints) - set(HINTS):
        raise InputError(f"hints: {strange.pop()!r} is not one of {', '.join(HINTS)}")
    mask: np.ndarray = getattr(example, region)
    return Case(
        id=example.id,
        image=Image.fromarray(example.source_picture),
        source=example.source_prompt,
        target=example.target_prompt,
        instruction=example.instruction,
        mask=Image.fromarray(mask.astype(np.uint8) * 255),
        hints={kind: Image.fromarray(getattr(example, kind)) for kind in hints},
        truth=Image.fromarray(example.target_picture),
        turn=example.turn,
        session=example.session,
        kind=example.kind,
        drawn=example,
    )


def _indices(which: int | Iterable[int]) -> Iterable[int]:
    return range(which) if isinstance(which, int) else which


def cases(
    split: str,
    which: int | Iterable[int],
    *,
    kinds: Sequence[str] = EDITS,
    size: int = 128,
    region: str = "loose",
    hints: Sequence[str] = ("sketch",),
) -> Iterator[Case]:
    """The edits of these indices (a number: the first ones), the kinds taken in turn.

    region: "loose" (as a person would paint it), "exact" (the pixels that differ) or "boxed"; sides of `size` pixels;
    hints: of sketch, canny and pose (blank where the target has no animal).
    """
    for index in _indices(which):
        yield _case(edit(split, index, kinds[index % len(kinds)], size), region, hints)


def sessions(
    split: str,
    which: int | Iterable[int],
    *,
    turns: int = 3,
    size: int = 128,
    region: str = "loose",
    hints: Sequence[str] = ("sketch",),
) -> Iterator[Case]:
    """The turns of these sessions one after the other: the truth of one is the image of the next."""
    for index in _indices(which):
        yield from (_case(example, region, hints) for example in session(split, index, turns, size))
