"""Hints for adapters: a scene's sketch and pose map, a picture's canny map; white or coloured lines on black."""

from __future__ import annotations

import cv2
import numpy as np
import skia

from masafusion_lab import InputError
from masafusion_lab.picturebook.backgrounds import Brush, marks
from masafusion_lab.picturebook.draw import matrix, order, parts
from masafusion_lab.picturebook.palette import RGB
from masafusion_lab.picturebook.scene import Scene, check
from masafusion_lab.picturebook.things import shape

LINE = 0.014  # the width of a thing's outline, as a part of the picture's side
BLACK: RGB = (0, 0, 0)
WHITE: RGB = (255, 255, 255)
LIMB_COLOUR: dict[str, RGB] = {
    "body": (255, 70, 70), "head": (255, 210, 60), "foreleg": (80, 220, 90), "hindleg": (70, 140, 255),
    "tail": (200, 90, 255), "ear": (255, 150, 40), "wing": (70, 230, 230),
}  # fmt: skip
Points = list[tuple[float, float]]


class Outliner(Brush):
    """A brush that leaves the outlines of what is large and hides what lies behind it."""

    def outline(self, path: skia.Path, width: float = LINE * 0.8) -> None:
        """The path's outline over a black inside."""
        self.canvas.drawPath(path, self.paint(BLACK))
        self.canvas.drawPath(path, self.paint(WHITE, 1.0, width))

    def oval(self, x: float, y: float, rx: float, ry: float, colour: RGB, alpha: float = 1.0) -> None:
        """Sun, moon and crowns; no clouds, no specks."""
        if min(rx, ry) > 0.05 and alpha == 1:
            path = skia.Path()
            path.addOval(skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry))
            self.outline(path)

    def box(self, left: float, top: float, right: float, bottom: float, colour: RGB, alpha: float = 1.0) -> None:
        """Houses, trunks, the sea; no windows."""
        if min(right - left, bottom - top) > 0.04:
            path = skia.Path()
            path.addRect(skia.Rect.MakeLTRB(left or -0.1, top or -0.1, right + (right == 1) * 0.1, bottom))
            self.outline(path)

    def polygon(self, points: Points, colour: RGB) -> None:
        """Hills and pines."""
        path = skia.Path()
        path.addPoly([skia.Point(*p) for p in points], True)
        self.outline(path)

    def hill(self, points: Points, colour: RGB) -> None:
        """A ridge, its line drawn past both edges."""
        self.polygon([(-0.1, points[0][1]), *points, (1.1, points[-1][1]), (1.1, 1.1), (-0.1, 1.1)], colour)

    def line(self, points: Points, colour: RGB, width: float, alpha: float = 1.0) -> None:
        """Thick lines only: a cactus."""
        if width > 0.02:
            for tone, w in ((WHITE, width + 2 * LINE * 0.4), (BLACK, width - 2 * LINE * 0.4)):
                Brush.line(self, points, tone, w)


def _canvas(size: int) -> np.ndarray:
    if size < 8:
        raise InputError(f"size: {size} pixels; at least 8")
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[:, :, 3] = 255
    return pixels


def sketch(scene: Scene, size: int = 128, *, background: bool = True) -> np.ndarray:
    """Clean outlines of the things, and of the background unless declined: uint8 (size, size), white on black."""
    check(scene)
    pixels = _canvas(size)
    brush = Outliner(pixels)
    if background:
        marks(brush, scene)
    for k in order(scene):
        for part, path in parts(scene.things[k]):
            bounds = path.getBounds()
            if part.outlined or max(bounds.width(), bounds.height()) > 0.06:
                brush.outline(path, LINE)
            elif part.role == "ink" and part.path.isOval():  # an eye
                brush.canvas.drawPath(path, brush.paint(WHITE))
    return pixels[:, :, 0].copy()


def canny(picture: np.ndarray) -> np.ndarray:
    """OpenCV's Canny edges of an RGB picture (100, 200): uint8 (H, W), 0 or 255."""
    return cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 100, 200)


def posemap(scene: Scene, size: int = 128) -> np.ndarray:
    """The animals' skeletons, one colour a limb: uint8 (size, size, 3); black where there is no animal."""
    check(scene)
    pixels = _canvas(size)
    brush = Brush(pixels)
    for k in order(scene):
        t = scene.things[k]
        m, width = matrix(t), 0.022 + 0.02 * t.size
        for bone in shape(t.kind, t.pose).bones:
            at = [m.mapXY(x, y) for x, y in bone.joints]
            joints = [(float(p.x()), float(p.y())) for p in at]
            brush.line(joints, LIMB_COLOUR[bone.limb], width)
            for x, y in joints:
                brush.oval(x, y, width * 0.75, width * 0.75, WHITE)
                brush.oval(x, y, width * 0.5, width * 0.5, LIMB_COLOUR[bone.limb])
    return np.ascontiguousarray(pixels[:, :, 2::-1])
