"""The picture-book world: scenes, edits with ground truth, and the model trained on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from masafusion_lab.picturebook.scene import (
    ALL_POSES,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PATTERNS,
    POSES,
    Scene,
    Thing,
    dice,
    scene,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ALL_POSES", "BACKGROUNDS", "COLOURS", "KINDS", "MODEL", "PATTERNS", "POSES", "Label", "Scene", "Thing",
           "labels", "picture", "scene"]  # fmt: skip

MODEL = Path(__file__).parent / "model"
"""The folder of the shipped model."""


@dataclass(frozen=True)
class Label:
    """A scene as indices into BACKGROUNDS and, per thing, into (KINDS, COLOURS, PATTERNS, ALL_POSES); pose 0: none."""

    background: int
    things: tuple[tuple[int, int, int, int], ...]


def labels(scene: Scene) -> Label:
    """What a judge should find in the scene's picture."""
    return Label(
        BACKGROUNDS.index(scene.background),
        tuple((KINDS.index(t.kind), COLOURS.index(t.colour), PATTERNS.index(t.pattern), ALL_POSES.index(t.pose))
              for t in scene.things),
    )  # fmt: skip


def picture(
    split: str, index: int, size: int = 128, *, things: int | None = None, unseen: bool | None = None
) -> tuple[Scene, str, np.ndarray]:
    """A scene, one wording of its caption, and its picture, uint8 (size, size, 3); options as of `scene`."""
    from masafusion_lab.picturebook.captions import WORDINGS, caption
    from masafusion_lab.picturebook.draw import draw

    described = scene(split, index, things=things, unseen=unseen)
    return described, caption(described, dice(split, index, "wording").integer(WORDINGS)), draw(described, size)
