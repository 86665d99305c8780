"""Scenes as plain data, and the sampling of them: a pure function of (split, index)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from masafusion_lab import InputError
from masafusion_lab.picturebook.things import shape

SPLITS = ("train", "validation", "test")
KINDS = ("horse", "cat", "rabbit", "bird", "house", "tree", "car", "flower", "mushroom", "balloon", "ball", "cup")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
PATTERNS = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("meadow", "beach", "snow", "desert", "forest", "city")
POSES = {
    "horse": ("standing", "running"),
    "cat": ("sitting", "lying"),
    "rabbit": ("sitting", "jumping"),
    "bird": ("perched", "flying"),
}
ALL_POSES = ("", "standing", "running", "sitting", "lying", "jumping", "perched", "flying")
HELD_BACK = frozenset(
    (kind, colour, background)
    for k, kind in enumerate(KINDS)
    for c, colour in enumerate(COLOURS)
    for b, background in enumerate(BACKGROUNDS)
    if (k + 2 * c + 4 * b) % 11 == 0
)  # 1 in 11; every pair of kind, colour and background is still seen in training
SIZES = {1: (0.45, 0.66), 2: (0.36, 0.48), 3: (0.32, 0.39)}
GROUND = (0.74, 0.93)  # where feet may stand
Box = tuple[float, float, float, float]  # left, top, right, bottom, as parts of the side
T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One thing: what a caption may tell (kind, colour, pattern, pose), where it is, and what no caption tells.

    size: 100 units of its shape as a part of the picture's side; x: its middle; y: its lowest point.
    Untold: flip (faces left), tilt (degrees), hue (degrees), value (a factor less 1), phase (of the pattern, 0 to 1).
    """

    kind: str
    colour: str
    pattern: str = "plain"
    pose: str = ""
    size: float = 0.5
    x: float = 0.5
    y: float = 0.85
    flip: bool = False
    tilt: float = 0.0
    hue: float = 0.0
    value: float = 0.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        for what, value, allowed in (("kind", self.kind, KINDS), ("colour", self.colour, COLOURS),
                                     ("pattern", self.pattern, PATTERNS),
                                     (f"pose of a {self.kind}", self.pose, POSES.get(self.kind, ("",)))):  # fmt: skip
            _one_of(what, value, allowed)

    @property
    def airborne(self) -> bool:
        """Whether it hangs in the sky."""
        return self.kind == "balloon" or self.pose == "flying"

    @property
    def box(self) -> Box:
        """Left, top, right, bottom as parts of the picture's side, without the tilt."""
        return extent(self.kind, self.pose, self.size, self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """A picture's description; untold: light (-1 cool to 1 warm), horizon (part of the height), seed (textures)."""

    background: str
    things: tuple[Thing, ...]
    light: float = 0.0
    horizon: float = 0.56
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("background", self.background, BACKGROUNDS)

    @property
    def unseen(self) -> bool:
        """Whether it holds a combination that training never shows."""
        return any((t.kind, t.colour, self.background) in HELD_BACK for t in self.things)


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{what}: {value!r} is not one of {', '.join(repr(a) for a in allowed)}")


class Dice:
    """A numpy generator seeded by words: the same numbers on every machine, never shared between two sets of words."""

    def __init__(self, *words: object) -> None:
        digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))

    def u(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self.u() * len(items))]

    def integer(self, below: int) -> int:
        """An integer in [0, below)."""
        return int(self.u() * below)


def dice(split: str, index: int, purpose: str) -> Dice:
    """The dice of a case; raises InputError for an unknown split or a negative index."""
    _one_of("split", split, SPLITS)
    if index < 0:
        raise InputError(f"index: {index} is negative; cases are counted from 0")
    return Dice("picturebook", split, purpose, index)


def check(scene: Scene) -> None:
    """Raises InputError when a thing does not fit into the picture or hides another."""
    if not 1 <= len(scene.things) <= 3:
        raise InputError(f"things: {len(scene.things)} in a scene; 1 to 3 fit")
    for t in scene.things:
        if min(t.box) < 0 or max(t.box) > 1:
            box = ", ".join(f"{v:.2f}" for v in t.box)
            raise InputError(f"{t.kind}: its box ({box}) leaves the picture (0 to 1); make it smaller or move it")
    for k, t in enumerate(scene.things):
        for other in scene.things[:k]:
            if overlap(t, other) > 0.35:
                raise InputError(f"{t.kind}: it hides the {other.kind}; move one of them or make it smaller")


def extent(kind: str, pose: str, size: float, x: float, y: float) -> Box:
    """The box of a thing of this shape, size and place."""
    left, top, right, bottom = shape(kind, pose).box
    w, h = (right - left) * size / 100, (bottom - top) * size / 100
    return x - w / 2, y - h, x + w / 2, y


def shared(a: Box, b: Box) -> float:
    """The part of the smaller box that both boxes share."""
    (l0, t0, r0, b0), (l1, t1, r1, b1) = a, b
    both = max(0.0, min(r0, r1) - max(l0, l1)) * max(0.0, min(b0, b1) - max(t0, t1))
    return both / min((r0 - l0) * (b0 - t0), (r1 - l1) * (b1 - t1))


def overlap(a: Thing, b: Thing) -> float:
    """The part of the smaller thing's box that both boxes share."""
    return shared(a.box, b.box)


def thing(d: Dice, kind: str, colour: str, *, size: float, pattern: str | None = None) -> Thing:
    """A thing with sampled pattern, pose and untold details, not yet placed."""
    pattern = pattern or ("plain" if d.u() < 0.46 else d.pick(PATTERNS[1:]))
    pose = d.pick(POSES.get(kind, ("",)))
    return Thing(kind, colour, pattern, pose, size=size, flip=d.u() < 0.5, tilt=d.u(-4, 4),
                 hue=d.u(-5, 5), value=d.u(-0.05, 0.05), phase=d.u())  # fmt: skip


def _limit(t: Thing, size: float) -> float:
    """The size, kept to 0.92 of the picture's width and 0.8 of its height."""
    left, top, right, bottom = extent(t.kind, t.pose, size, t.x, t.y)
    return size * min(1.0, 0.92 / (right - left), 0.80 / (bottom - top))


def fitted(t: Thing, **changes: Any) -> Thing:
    """The thing with these changes and its size kept to 0.92 of the picture's width and 0.8 of its height."""
    t = replace(t, **changes)
    return replace(t, size=_limit(t, t.size))


def placed(d: Dice, things: Sequence[Thing]) -> tuple[Thing, ...]:
    """The things at sampled places: feet on the ground, wings in the sky, apart; empty where no place was found."""
    for attempt in range(400):
        shrink = 1 - 0.15 * max(0, attempt - 100) / 300
        at, boxes = [], list[Box]()
        for t in things:
            size = _limit(t, t.size * shrink)
            left, top, right, bottom = extent(t.kind, t.pose, size, t.x, t.y)
            w, h = right - left, bottom - top
            x = d.u(w / 2 + 0.03, 0.97 - w / 2)
            sky, ground = (h + 0.04, max(h + 0.05, 0.68)), (max(GROUND[0], h + 0.03), max(GROUND[1], h + 0.04))
            y = d.u(*(sky if t.airborne else ground))
            at.append((size, x, y))
            boxes.append(extent(t.kind, t.pose, size, x, y))
        if all(shared(a, b) < 0.04 for k, a in enumerate(boxes) for b in boxes[:k]):
            return tuple(replace(t, size=size, x=x, y=y) for t, (size, x, y) in zip(things, at, strict=True))
    return ()


def scene(split: str, index: int, *, things: int | None = None, unseen: bool | None = None) -> Scene:
    """The scene of a split and index, with `things` of them (1 to 3; None: any).

    unseen (test only): True holds a HELD_BACK combination, False holds none, None leaves it to chance; train and
    validation never hold one.
    """
    if unseen and split != "test":
        raise InputError(f"unseen: only the test split holds combinations back, not {split!r}")
    if things not in (None, 1, 2, 3):
        raise InputError(f"things: {things} is not 1, 2 or 3")
    d = dice(split, index, f"scene {things} {unseen}")
    return sample(d, things=things, unseen=unseen if split == "test" else False)


def sample(d: Dice, *, things: int | None = None, unseen: bool | None = None) -> Scene:
    """The scene that the dice give; options as of `scene`."""
    while True:
        u = d.u()
        n = things or (1 if u < 0.5 else 2 if u < 0.85 else 3)
        background, kinds, colours = d.pick(BACKGROUNDS), [*KINDS, *POSES], list(COLOURS)  # animals: half of all
        low, high = SIZES[n]
        out = []
        for _ in range(n):
            kind, colour = d.pick(kinds), d.pick(colours)
            kinds = [other for other in kinds if other != kind]
            colours.remove(colour)
            out.append(thing(d, kind, colour, size=d.u(low, high)))
        candidate = Scene(background, tuple(out), d.u(-1, 1), d.u(0.52, 0.60), d.integer(2**31))
        if (unseen is None or candidate.unseen == unseen) and (there := placed(d, out)):
            return replace(candidate, things=there)
