"""The shapes of the things: a few bold parts each, in a box of 100 units whose ground is y = 100, facing right.

An animal is built of limbs (chains of joints with a radius), so that its skeleton is known.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import skia

Joint = tuple[float, float, float]  # x, y, radius


@dataclass(frozen=True)
class Part:
    """A filled path; `role` says its colour: main (colour and pattern), dark (the same, darker) or a fixed colour."""

    role: str
    path: skia.Path
    outlined: bool = True


@dataclass(frozen=True)
class Bone:
    """A chain of joints of an animal: `limb` is one of LIMBS."""

    limb: str
    joints: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Shape:
    """Parts from back to front, bones, and the box (left, top, right, bottom) that holds them, in units."""

    parts: tuple[Part, ...]
    bones: tuple[Bone, ...]
    box: tuple[float, float, float, float]


LIMBS = ("body", "head", "foreleg", "hindleg", "tail", "ear", "wing")


def _union(paths: Sequence[skia.Path]) -> skia.Path:
    whole = paths[0]
    for path in paths[1:]:
        whole = skia.Op(whole, path, skia.PathOp.kUnion_PathOp)
    return whole


def _ellipse(x: float, y: float, rx: float, ry: float | None = None) -> skia.Path:
    ry = rx if ry is None else ry
    path = skia.Path()
    path.addOval(skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry))
    return path


def _box(left: float, top: float, right: float, bottom: float, r: float = 0.0) -> skia.Path:
    path = skia.Path()
    path.addRoundRect(skia.Rect.MakeLTRB(left, top, right, bottom), r, r)
    return path


def _limb(*joints: Joint) -> skia.Path:
    """A chain of discs and the tapered bars between them."""
    paths = [_ellipse(x, y, r) for x, y, r in joints]
    for (x0, y0, r0), (x1, y1, r1) in itertools.pairwise(joints):
        d = math.hypot(x1 - x0, y1 - y0)
        turn, along = math.acos(max(-1.0, min(1.0, (r0 - r1) / d))), math.atan2(y1 - y0, x1 - x0)
        bar = skia.Path()
        corners = [(x0, y0, r0, turn), (x1, y1, r1, turn), (x1, y1, r1, -turn), (x0, y0, r0, -turn)]
        points = [skia.Point(x + r * math.cos(along + a), y + r * math.sin(along + a)) for x, y, r, a in corners]
        bar.addPoly(points, True)
        paths.append(bar)
    return _union(paths)


def _path(text: str) -> skia.Path:
    """A path from SVG's absolute commands M L Q C Z."""
    path, words, k = skia.Path(), text.split(), 0
    arity = {"M": 2, "L": 2, "Q": 4, "C": 6, "Z": 0}
    while k < len(words):
        n = arity[words[k]]
        v = [float(word) for word in words[k + 1 : k + 1 + n]]
        getattr(path, {"M": "moveTo", "L": "lineTo", "Q": "quadTo", "C": "cubicTo", "Z": "close"}[words[k]])(*v)
        k += 1 + n
    return path


def _animal(
    limbs: Sequence[tuple[str, tuple[Joint, ...]]], before: Sequence[Part] = (), after: Sequence[Part] = ()
) -> tuple[list[Part], list[Bone]]:
    """One silhouette of all limbs; limbs named with a trailing * lie behind it, darker."""
    near = [_limb(*joints) for name, joints in limbs if not name.endswith("*")]
    far = [Part("dark", _limb(*joints)) for name, joints in limbs if name.endswith("*")]
    bones = [Bone(name.rstrip("*"), tuple((x, y) for x, y, _ in joints)) for name, joints in limbs]
    return [*before, *far, Part("main", _union(near)), *after], bones


def _eye(x: float, y: float, r: float = 3.2) -> list[Part]:
    return [Part("ink", _ellipse(x, y, r), False), Part("white", _ellipse(x - r * 0.3, y - r * 0.35, r * 0.38), False)]


def _horse(pose: str) -> tuple[list[Part], list[Bone]]:
    if pose == "running":
        limbs = [
            ("hindleg*", ((30, 56, 11), (22, 76, 6.5), (0, 90, 5))),
            ("foreleg*", ((66, 54, 9), (92, 60, 6.5), (90, 78, 5))),
            ("body", ((26, 50, 16), (64, 46, 15))),
            ("head", ((66, 42, 13), (86, 22, 8.5), (104, 32, 6))),
            ("hindleg", ((22, 54, 13), (4, 70, 7), (-18, 78, 5))),
            ("foreleg", ((70, 52, 10), (96, 56, 6.5), (118, 66, 5))),
        ]
        mane = _path("M 84 8 Q 56 14 52 38 Q 64 40 72 30 Q 78 20 90 16 Z")
        tail = _path("M 14 42 Q -8 22 -32 40 Q -20 40 -24 50 Q -4 40 10 56 Z")
        ear, eye, hooves = _path("M 80 16 L 84 2 L 92 14 Z"), _eye(89, 22), ((-18, 78), (118, 66), (0, 90), (90, 78))
    else:
        limbs = [
            ("hindleg*", ((32, 54, 11), (31, 74, 6), (31, 94, 5))),
            ("foreleg*", ((62, 54, 9), (59, 74, 6), (58, 94, 5))),
            ("body", ((26, 47, 16), (64, 47, 16))),
            ("head", ((66, 42, 13), (80, 17, 8.5), (97, 26, 6))),
            ("hindleg", ((20, 52, 12), (17, 74, 6), (16, 94, 5))),
            ("foreleg", ((72, 53, 10), (74, 74, 6), (74, 94, 5))),
        ]
        mane = _path("M 78 4 Q 52 10 48 36 Q 60 38 66 28 Q 72 16 84 12 Z")
        tail = _path("M 14 38 Q 0 36 -2 56 Q -3 70 2 80 Q 12 66 16 54 Z")
        ear, eye, hooves = _path("M 73 12 L 78 -2 L 86 10 Z"), _eye(83, 17), ((16, 94), (74, 94), (31, 94), (58, 94))
    limbs.append(("tail", ((13, 45, 4), (-4 if pose == "running" else 4, 38 if pose == "running" else 56, 4))))
    feet = [Part("ink", _box(x - 5, y + 0, x + 5, y + 6, 2), False) for x, y in hooves]
    return _animal(limbs, [Part("hair", tail)], [*feet, Part("main", ear), Part("hair", mane), *eye])


def _cat(pose: str) -> tuple[list[Part], list[Bone]]:
    if pose == "lying":
        limbs = [
            ("tail", ((96, 84, 8), (116, 92, 6.5), (98, 95, 5.5), (84, 94, 5))),
            ("body", ((34, 76, 21), (80, 74, 24))),
            ("foreleg", ((34, 88, 9), (8, 94, 6.5))),
            ("hindleg", ((84, 86, 12), (62, 94, 6.5))),
            ("head", ((30, 76, 14), (20, 54, 19))),
        ]
        cx, cy = 20.0, 54.0
    else:
        limbs = [
            ("tail", ((68, 90, 7), (90, 84, 6.5), (94, 62, 5.5), (86, 48, 5))),
            ("body", ((46, 52, 15), (50, 76, 23))),
            ("foreleg", ((36, 64, 8), (36, 94, 6.5))),
            ("foreleg", ((56, 64, 8), (54, 94, 6.5))),
            ("hindleg", ((68, 84, 13), (70, 94, 6.5))),
            ("head", ((46, 44, 14), (46, 26, 19))),
        ]
        cx, cy = 46.0, 26.0
    ears = [
        Part("main", _path(f"M {cx - 18} {cy - 6} L {cx - 16} {cy - 29} L {cx - 2} {cy - 17} Z")),
        Part("main", _path(f"M {cx + 18} {cy - 6} L {cx + 16} {cy - 29} L {cx + 2} {cy - 17} Z")),
    ]
    face = [
        *_eye(cx - 7.5, cy - 1, 3.6),
        *_eye(cx + 7.5, cy - 1, 3.6),
        Part("rose", _path(f"M {cx - 4} {cy + 6} L {cx + 4} {cy + 6} L {cx} {cy + 11} Z"), False),
    ]
    return _animal(limbs, ears, face)


def _rabbit(pose: str) -> tuple[list[Part], list[Bone]]:
    if pose == "jumping":
        limbs = [
            ("ear*", ((80, 22, 6), (62, 6, 7), (46, 0, 6))),
            ("hindleg*", ((26, 58, 11), (2, 66, 6), (-20, 72, 5))),
            ("foreleg*", ((74, 50, 8), (98, 50, 5), (112, 48, 4.5))),
            ("body", ((24, 52, 19), (66, 40, 15))),
            ("head", ((70, 36, 12), (88, 26, 14))),
            ("ear", ((86, 18, 6), (70, -4, 7), (56, -12, 6))),
            ("hindleg", ((22, 60, 13), (0, 80, 7), (-22, 90, 5.5))),
            ("foreleg", ((68, 50, 9), (94, 62, 5.5), (110, 62, 5))),
        ]
        tail, eye, nose = (4, 42), (92, 23), (102, 28)
    else:
        limbs = [
            ("ear*", ((64, 32, 6), (72, 14, 7), (74, 2, 6))),
            ("body", ((34, 74, 24), (54, 60, 16))),
            ("head", ((56, 54, 12), (64, 42, 16))),
            ("ear", ((58, 30, 6), (54, 10, 7), (52, -4, 6))),
            ("foreleg", ((58, 64, 9), (62, 92, 6))),
            ("hindleg", ((34, 86, 13), (52, 93, 6.5))),
        ]
        tail, eye, nose = (10, 84), (69, 39), (80, 45)
    back = [Part("white", _ellipse(*tail, 8.5))]
    return _animal(limbs, back, [*_eye(*eye, 3.4), Part("rose", _ellipse(*nose, 2.6, 2.2), False)])


def _bird(pose: str) -> tuple[list[Part], list[Bone]]:
    if pose == "flying":
        limbs = [
            ("tail", ((22, 58, 9), (-6, 64, 8))),
            ("body", ((30, 56, 15), (62, 52, 17))),
            ("head", ((66, 50, 13), (82, 40, 14))),
        ]
        near, far = "M 28 52 Q 2 20 12 -6 Q 48 2 66 52 Q 46 66 28 52 Z", "M 46 44 Q 50 8 82 -8 Q 88 20 66 48 Z"
        after = [Part("beak", _path("M 93 34 L 112 42 L 93 48 Z")), Part("dark", _path(near)), *_eye(86, 37)]
        parts, bones = _animal(limbs, [Part("dark", _path(far))], after)
        bones.append(Bone("wing", ((48, 54), (30, 28), (14, -2))))
        bones.append(Bone("wing", ((56, 46), (66, 18), (80, -4))))
        return parts, bones
    perched: list[tuple[str, tuple[Joint, ...]]] = [
        ("tail", ((34, 62, 9), (12, 84, 7.5))),
        ("body", ((44, 52, 20), (56, 44, 20))),
        ("head", ((58, 36, 14), (64, 22, 16))),
    ]
    stump = [Part("wood", _path("M 26 78 L 78 78 L 84 100 L 20 100 Z")), Part("cream", _ellipse(52, 78, 26, 5))]
    legs = [Part("beak", _box(x, 66, x + 4, 79), False) for x in (46, 58)]
    wing = Part("dark", _path("M 56 40 Q 66 62 44 68 Q 28 70 20 76 Q 26 44 56 40 Z"))
    after = [Part("beak", _path("M 76 15 L 95 23 L 77 30 Z")), wing, *_eye(68, 19)]
    parts, bones = _animal(perched, [*stump, *legs], after)
    return parts, [*bones, Bone("wing", ((56, 44), (42, 58), (24, 70)))]


def _house() -> list[Part]:
    windows = [Part("glow", _box(x, 58, x + 15, 74, 1)) for x in (19, 66)]
    return [
        Part("dark", _box(68, 8, 80, 40)),
        Part("main", _box(10, 42, 90, 100)),
        Part("dark", _path("M -2 48 L 50 2 L 102 48 Z")),
        Part("wood", _path("M 41 100 L 41 72 Q 50 60 59 72 L 59 100 Z")),
        *windows,
    ]


def _tree() -> list[Part]:
    crown = [_ellipse(50, 26, 26), _ellipse(27, 46, 25), _ellipse(73, 46, 25), _ellipse(50, 50, 25)]
    return [Part("wood", _path("M 42 56 L 58 56 Q 58 86 66 100 L 34 100 Q 42 86 42 56 Z")), Part("main", _union(crown))]


def _car() -> list[Part]:
    body = _union([_box(-10, 56, 112, 88, 10), _path("M 14 58 Q 22 30 36 30 L 66 30 Q 78 30 92 58 Z")])
    glass = [Part("sky", _path("M 24 55 Q 30 38 38 38 L 48 38 L 48 55 Z")),
             Part("sky", _path("M 54 38 L 64 38 Q 72 38 80 55 L 54 55 Z"))]  # fmt: skip
    wheels = [Part(role, _ellipse(x, 86, r), False) for x in (16, 86) for role, r in (("ink", 14), ("cream", 6))]
    return [Part("main", body), *glass, Part("glow", _ellipse(106, 66, 5)), *wheels]


def _flower() -> list[Part]:
    petals = [_ellipse(50 + 21 * math.cos(a), 33 + 21 * math.sin(a), 15) for a in (math.tau * k / 6 for k in range(6))]
    leaves = [Part("leaf", _path("M 50 92 Q 24 90 16 66 Q 44 66 50 92 Z")),
              Part("leaf", _path("M 50 92 Q 76 90 84 66 Q 56 66 50 92 Z"))]  # fmt: skip
    stem = Part("leaf", _box(46, 50, 54, 100, 2))
    return [stem, *leaves, Part("main", _union(petals)), Part("wood", _ellipse(50, 33, 11.5))]


def _mushroom() -> list[Part]:
    stem = Part("cream", _path("M 36 50 Q 40 76 32 96 Q 50 103 68 96 Q 60 76 64 50 Z"))
    return [stem, Part("main", _path("M 2 54 C 2 10 30 0 50 0 C 70 0 98 10 98 54 Q 50 68 2 54 Z"))]


def _balloon() -> list[Part]:
    ropes = [
        Part("ink", _path(f"M {a} 62 L {a + 2.5} 62 L {b + 2} 86 L {b} 86 Z"), False) for a, b in ((34, 41), (64, 57))
    ]
    envelope = _path("M 42 72 C 30 58 14 52 14 32 C 14 -12 86 -12 86 32 C 86 52 70 58 58 72 Z")
    return [*ropes, Part("main", envelope), Part("wood", _box(38, 82, 62, 100, 3))]


def _ball() -> list[Part]:
    return [Part("main", _ellipse(50, 54, 46)), Part("shine", _ellipse(34, 34, 9, 6.5), False)]


def _cup() -> list[Part]:
    ring = skia.Op(_ellipse(84, 52, 22, 24), _ellipse(84, 52, 11, 13), skia.PathOp.kDifference_PathOp)
    mug = _path("M 8 16 L 84 16 L 80 86 Q 78 98 66 98 L 26 98 Q 14 98 12 86 Z")
    return [
        Part("main", ring),
        Part("main", mug),
        Part("dark", _ellipse(46, 16, 38, 9)),
        Part("wood", _ellipse(46, 18, 30, 5.5), False),
    ]


_PLAIN = {"house": _house, "tree": _tree, "car": _car, "flower": _flower, "mushroom": _mushroom,
          "balloon": _balloon, "ball": _ball, "cup": _cup}  # fmt: skip
_ANIMALS = {"horse": _horse, "cat": _cat, "rabbit": _rabbit, "bird": _bird}


@functools.cache
def shape(kind: str, pose: str) -> Shape:
    """The shape of a kind in a pose ("" for what has none)."""
    parts, bones = _ANIMALS[kind](pose) if kind in _ANIMALS else (_PLAIN[kind](), [])
    boxes = [part.path.computeTightBounds() for part in parts]
    box = (min(b.left() for b in boxes), min(b.top() for b in boxes),
           max(b.right() for b in boxes), max(b.bottom() for b in boxes))  # fmt: skip
    return Shape(tuple(parts), tuple(bones), box)
