"""Drawing: a scene becomes pixels, anti-aliased, the same bytes everywhere (no fonts, filters or GPU)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import skia

from masafusion_lab import InputError
from masafusion_lab.picturebook import palette
from masafusion_lab.picturebook.backgrounds import Brush, background
from masafusion_lab.picturebook.scene import Scene, Thing, check
from masafusion_lab.picturebook.things import Part, shape


def matrix(t: Thing) -> skia.Matrix:
    """From the units of the thing's shape to the picture's side."""
    left, top, right, bottom = shape(t.kind, t.pose).box
    s = t.size / 100
    m = skia.Matrix.Translate(t.x, t.y)
    m.preScale(-s if t.flip else s, s)
    m.preTranslate(-(left + right) / 2, -bottom)
    m.preRotate(t.tilt, (left + right) / 2, (top + 3 * bottom) / 4)
    return m


def order(scene: Scene) -> list[int]:
    """The things from back to front."""
    return sorted(range(len(scene.things)), key=lambda k: (not scene.things[k].airborne, scene.things[k].y, k))


def parts(t: Thing) -> Iterator[tuple[Part, skia.Path]]:
    """Each part of the thing with its path in the picture, back to front."""
    m = matrix(t)
    for part in shape(t.kind, t.pose).parts:
        path = skia.Path()
        part.path.transform(m, path)
        yield part, path


def width(t: Thing) -> float:
    """The outline's width."""
    return 0.009 + 0.016 * t.size


def _ornament(b: Brush, t: Thing, colour: palette.RGB) -> None:
    """The pattern over the whole of the thing's box: the clip is set already."""
    left, top, right, bottom = t.box
    step = max(0.050, 0.105 * t.size)  # a stripe: at least 6 pixels of 128
    left, top, right, bottom = left - 2 * step, top - 2 * step, right + 2 * step, bottom + 2 * step
    cx, cy = t.x + step * (2 * t.phase - 1), (t.box[1] + t.box[3]) / 2 + step * (((3 * t.phase) % 1) - 0.5)
    columns = range(math.floor((left - cx) / step), math.ceil((right - cx) / step) + 1)
    rows = range(math.floor((top - cy) / step), math.ceil((bottom - cy) / step) + 1)
    path = skia.Path()
    if t.pattern == "striped":
        lean = 0.22 * (bottom - top) * (-1 if t.flip else 1)
        for k in columns:
            if k % 2 == 0:
                x = cx + k * step
                path.addPoly([skia.Point(x + lean, top), skia.Point(x + lean + step * 0.92, top),
                              skia.Point(x - lean + step * 0.92, bottom), skia.Point(x - lean, bottom)],
                             True)  # fmt: skip
    elif t.pattern == "dotted":
        pitch = step * 1.15
        for j in rows:
            for k in columns:
                if (k + j) % 2 == 0:
                    path.addCircle(cx + k * pitch, cy + j * pitch, step * 0.46)
    else:
        for j in rows:
            for k in columns:
                if (k + j) % 2 == 0:
                    path.addRect(skia.Rect.MakeXYWH(cx + k * step, cy + j * step, step, step))
    b.canvas.drawPath(path, b.paint(colour))


def _shade(b: Brush, path: skia.Path, t: Thing) -> None:
    """The side away from the light, and the rim towards it: the clip is the path."""
    bounds = path.getBounds()
    reach = min(bounds.width(), bounds.height())
    for shift, colour, alpha in ((0.17, palette.INK, 0.20), (-0.07, (255, 252, 235), 0.30)):
        inverse = skia.Path(path)
        inverse.offset(-shift * reach * 0.8, -shift * reach)
        inverse.setFillType(skia.PathFillType.kInverseWinding)
        b.canvas.drawPath(inverse, b.paint(colour, alpha))


def colour_of(t: Thing, role: str) -> palette.RGB:
    """The flat colour of a part, without light."""
    if role not in ("main", "dark"):
        return palette.PART[role]
    main = palette.shifted(palette.COLOUR[t.colour], t.hue, t.value)
    return main if role == "main" else palette.dark(main)


def _thing(b: Brush, t: Thing) -> None:
    ink = palette.outline(colour_of(t, "main"))
    for part, path in parts(t):
        if part.outlined:
            b.canvas.drawPath(path, b.paint(ink, 1.0, 2 * width(t)))
    for part, path in parts(t):
        main = colour_of(t, part.role)
        if part.outlined:
            b.canvas.drawPath(path, b.paint(ink, 1.0, 1.1 * width(t)))
        b.canvas.drawPath(path, b.paint(main))
        if part.outlined:
            b.canvas.save()
            b.canvas.clipPath(path, True)
            if part.role == "main" and t.pattern != "plain":
                _ornament(b, t, palette.ornament(t.colour, main))
            _shade(b, path, t)
            b.canvas.restore()


def _shadow(b: Brush, t: Thing) -> None:
    """The soft shadow on the ground under a thing; in the sky it has none."""
    if t.airborne:
        return
    left, _, right, bottom = t.box
    half = (right - left) / 2
    for k in range(3):
        b.oval(t.x + 0.05 * half, bottom - 0.004, half * (1.0 - 0.16 * k), 0.030 * (1.1 - 0.25 * k), (40, 36, 70), 0.13)


def draw(scene: Scene, size: int = 128) -> np.ndarray:
    """The picture: uint8 (size, size, 3), RGB; raises InputError for a scene that does not fit."""
    if size < 8:
        raise InputError(f"size: {size} pixels; at least 8")
    check(scene)
    pixels = background(scene, size)
    brush = Brush(pixels, scene.light)
    for k in order(scene):
        _shadow(brush, scene.things[k])
        _thing(brush, scene.things[k])
    return np.ascontiguousarray(pixels[:, :, 2::-1])


def coverage(scene: Scene, k: int, size: int = 128, *, shadow: bool = False) -> np.ndarray:
    """How much of each pixel thing k covers, hidden or not: float32 (size, size) in [0, 1], shadow if asked."""
    pixels = np.zeros((size, size, 4), np.uint8)
    brush, t = Brush(pixels), scene.things[k]
    white = (255.0, 255.0, 255.0)
    if shadow:
        _shadow(brush, t)
        pixels[pixels[:, :, 3] > 0] = 255
    for part, path in parts(t):
        if part.outlined:
            brush.canvas.drawPath(path, brush.paint(white, 1.0, 2 * width(t)))
        brush.canvas.drawPath(path, brush.paint(white))
    return pixels[:, :, 3].astype(np.float32) / 255
