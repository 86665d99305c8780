"""A case: one edit to make, as data; its pictures are opened when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from PIL.Image import Image

if TYPE_CHECKING:
    from masafusion_lab.picturebook.edits import Example

HINTS = ("sketch", "canny", "pose")
"""The kinds of hint that a case may carry; of each a model may have an adapter."""
Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture, or in fractions of its sides when none is above 1."""


@dataclass(frozen=True)
class Made:
    """A picture that is made whenever it is read: decoded, drawn, or found in a file of another kind."""

    name: str
    make: Callable[[], Image]


Picture: TypeAlias = Path | Image | Made


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
    scored: Picture | None = None
    """The region outside of which the result is scored, where that is not `mask`."""
    hints: Mapping[str, Picture] = field(default_factory=dict)
    """By kind (sketch, canny, pose): what the result should look like."""
    truth: Picture | None = None
    """The picture that a perfect edit gives, where it is known."""
    turn: int = 1
    session: str | None = None
    """The dialogue that this is turn `turn` of: its image is the result of the turn before."""
    kind: str = ""
    """What sort of edit it is, where the set says so."""
    caption: str | None = None
    """What the edit brings in, in words (MagicBrush's local description; "" where it only removes)."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the method for this case alone, as they are written: method.blend_source, say, to "cat"."""
    drawn: Example | None = None
    """The edit of the picture-book world that this is, in which a judge knows what to look for."""
