"""A case: one edit to make, as data; its pictures are opened when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from PIL.Image import Image

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture, or in fractions of its sides when none is above 1."""

Picture: TypeAlias = Path | Image


@dataclass(frozen=True)
class Case:
    """One edit to make, of `image` under the prompt `source` to what the prompt `target` says."""

    id: str
    image: Picture
    source: str
    target: str
    instruction: str = ""
    """The edit in words, for methods that follow instructions."""
    mask: Picture | Box | None = None
    """The region A in which the edit takes place: white, or a box; None is left to the method."""
    hints: Mapping[str, Picture] = field(default_factory=dict)
    """By kind (sketch, canny, pose): what the result should look like."""
    truth: Picture | None = None
    """The picture that a perfect edit gives, where it is known."""
    turn: int = 1
    session: str | None = None
    """The dialogue that this is turn `turn` of: its image is the result of the turn before."""
