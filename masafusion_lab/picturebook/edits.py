"""Edits with ground truth: both scenes and pictures, prompts, instruction, region and hints; and sessions of edits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np

from masafusion_lab import InputError
from masafusion_lab.picturebook import sketch as hints
from masafusion_lab.picturebook.captions import caption
from masafusion_lab.picturebook.changes import EDITS, change
from masafusion_lab.picturebook.draw import coverage, draw
from masafusion_lab.picturebook.scene import Dice, Scene, Thing, dice, fitted, sample

__all__ = ["ATTRIBUTE", "EDITS", "Example", "edit", "session"]

ATTRIBUTE = {"add": "kind", "replace": "kind", "remove": "kind", "recolour": "colour", "pattern": "pattern",
             "pose": "pose", "move": "place", "background": "background"}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One edit with all that is known of it; pictures and maps of `size` pixels a side are drawn when first asked for.

    attribute: what a judge should look at (kind, colour, pattern, pose, place, background) on `after`, or that
    `before` is gone where `after` is None; both are None for the background.
    """

    id: str
    kind: str
    source: Scene
    target: Scene
    before: Thing | None
    after: Thing | None
    instruction: str
    wording: int
    size: int = 128
    turn: int = 1
    session: str | None = None

    @property
    def attribute(self) -> str:
        """What the edit changes."""
        return ATTRIBUTE[self.kind]

    @property
    def source_prompt(self) -> str:
        """The source's caption."""
        return caption(self.source, self.wording)

    @property
    def target_prompt(self) -> str:
        """The target's caption, in the same wording."""
        return caption(self.target, self.wording)

    @cached_property
    def source_picture(self) -> np.ndarray:
        """uint8 (size, size, 3)."""
        return draw(self.source, self.size)

    @cached_property
    def target_picture(self) -> np.ndarray:
        """uint8 (size, size, 3)."""
        return draw(self.target, self.size)

    @cached_property
    def exact(self) -> np.ndarray:
        """The region A: bool (size, size), the pixels that differ."""
        return np.any(self.source_picture != self.target_picture, axis=2)

    @cached_property
    def loose(self) -> np.ndarray:
        """The region as a person would paint it, bool (size, size): the exact one and a margin, closed."""
        inside, margin = self.exact, 0.04
        if self.kind == "background":
            things = [coverage(self.source, k, self.size) for k in range(len(self.source.things))]
            inside, margin = inside | (np.max(things, axis=0) == 0), 0.015
        pad = max(1, round(self.size * margin))
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pad + 1, 2 * pad + 1))
        painted = cv2.morphologyEx(np.pad(inside.astype(np.uint8), pad), cv2.MORPH_CLOSE, disc)
        return cv2.dilate(painted, disc)[pad:-pad, pad:-pad].astype(bool)

    @cached_property
    def boxed(self) -> np.ndarray:
        """The region as boxes around its pieces, bool (size, size)."""
        out = np.zeros_like(self.exact)
        for left, top, w, h, _ in cv2.connectedComponentsWithStats(self.loose.astype(np.uint8))[2][1:]:
            out[top : top + h, left : left + w] = True
        return out

    @cached_property
    def sketch(self) -> np.ndarray:
        """The target's sketch: uint8 (size, size), white on black."""
        return hints.sketch(self.target, self.size)

    @cached_property
    def source_sketch(self) -> np.ndarray:
        """The source's sketch: uint8 (size, size), white on black."""
        return hints.sketch(self.source, self.size)

    @cached_property
    def canny(self) -> np.ndarray:
        """The target picture's edges: uint8 (size, size), white on black."""
        return hints.canny(self.target_picture)

    @cached_property
    def pose(self) -> np.ndarray:
        """The target's animals as skeletons: uint8 (size, size, 3)."""
        return hints.posemap(self.target, self.size)


def _start(kind: str, d: Dice, unseen: bool | None) -> Scene:
    """A source scene that suits the kind."""
    if kind == "add":  # one thing is left out, so that its place is free
        whole = sample(d, things=2 + (d.u() < 0.4), unseen=unseen)
        return replace(whole, things=whole.things[:-1])
    if kind == "remove":
        return sample(d, things=2 + (d.u() < 0.4), unseen=unseen)
    if kind != "move":
        return sample(d, unseen=unseen)
    alone = sample(d, things=1, unseen=unseen)
    t = fitted(alone.things[0], size=d.u(0.45, 0.52))
    half = (t.box[2] - t.box[0]) / 2 + 0.03
    x = d.u(half, half + 0.3 * (0.5 - half))
    return replace(alone, things=(replace(t, x=x if d.u() < 0.5 else 1 - x),))


def edit(split: str, index: int, kind: str | None = None, size: int = 128) -> Example:
    """The edit of a split and index; kind None takes the eight kinds in turn. Raises InputError for what is unknown."""
    kind = kind or EDITS[index % len(EDITS)]
    d = dice(split, index, f"edit {kind}")
    unseen = None if split == "test" else False
    while True:
        source = _start(kind, d, unseen)
        if made := change(source, kind, d, unseen=unseen):
            wording = 3 if kind == "move" else d.pick((0, 2) if kind in ("add", "remove", "pose") else (0, 1, 2))
            return Example(f"{split}-{index:05d}-{kind}", kind, source, made.target, made.before, made.after,
                           made.instruction, wording, size)  # fmt: skip


def session(split: str, index: int, turns: int = 3, size: int = 128) -> list[Example]:
    """Up to three edits in a row: the target of one is the source of the next, and the wording stays."""
    if not 1 <= turns <= 3:
        raise InputError(f"turns: {turns} is not 1, 2 or 3")
    d, key = dice(split, index, "session"), f"{split}-session-{index:05d}"
    unseen = None if split == "test" else False
    wording, kinds = d.pick((0, 2)), [kind for kind in EDITS if kind != "move"]
    scene, out = sample(d, things=1 + (d.u() < 0.6), unseen=unseen), list[Example]()
    while len(out) < turns:
        kind = d.pick([k for k in kinds if k not in {e.kind for e in out}])
        if made := change(scene, kind, d, unseen=unseen):
            turn = len(out) + 1
            out.append(Example(f"{key}-{turn}-{kind}", kind, scene, made.target, made.before, made.after,
                               made.instruction, wording, size, turn, key))  # fmt: skip
            scene = made.target
    return out
