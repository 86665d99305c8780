"""The six backgrounds: a sky, a ground and the marks of a texture, all from the scene's seed and horizon alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import skia

from masafusion_lab.picturebook.palette import RGB, lit, mix
from masafusion_lab.picturebook.scene import Dice, Scene

PALETTE: dict[
    str, tuple[RGB, RGB, RGB, RGB]
] = {  # sky above, sky at the horizon, ground at the horizon, ground in front
    "meadow": ((132, 196, 236), (216, 238, 240), (178, 214, 112), (138, 190, 86)),
    "beach": ((120, 200, 232), (226, 244, 240), (244, 224, 178), (232, 202, 148)),
    "snow": ((178, 200, 222), (222, 232, 240), (232, 239, 247), (200, 214, 233)),
    "desert": ((238, 176, 140), (252, 224, 184), (226, 160, 118), (202, 130, 98)),
    "forest": ((70, 118, 104), (134, 172, 136), (134, 128, 84), (106, 98, 66)),
    "city": ((44, 46, 98), (112, 92, 144), (126, 120, 146), (96, 92, 122)),
}


class Brush:
    """A canvas in units of the picture's side that fills and strokes with flat colours under the scene's light."""

    def __init__(self, pixels: np.ndarray, light: float = 0.0) -> None:
        self.surface = skia.Surface(pixels, skia.kBGRA_8888_ColorType, skia.kPremul_AlphaType)
        self.canvas = self.surface.getCanvas()
        self.canvas.scale(pixels.shape[1], pixels.shape[0])
        self.light = light

    def paint(self, colour: RGB, alpha: float = 1.0, width: float = 0.0) -> skia.Paint:
        """A flat paint; with a width it strokes."""
        r, g, b = (round(v) for v in lit(colour, self.light))
        paint = skia.Paint(AntiAlias=True, Color=skia.Color(r, g, b, round(255 * alpha)))
        if width:
            paint.setStyle(skia.Paint.kStroke_Style)
            paint.setStrokeWidth(width)
            paint.setStrokeCap(skia.Paint.kRound_Cap)
            paint.setStrokeJoin(skia.Paint.kRound_Join)
        return paint

    def oval(self, x: float, y: float, rx: float, ry: float, colour: RGB, alpha: float = 1.0) -> None:
        """A filled ellipse around (x, y)."""
        self.canvas.drawOval(skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry), self.paint(colour, alpha))

    def box(self, left: float, top: float, right: float, bottom: float, colour: RGB, alpha: float = 1.0) -> None:
        """A filled rectangle."""
        self.canvas.drawRect(skia.Rect.MakeLTRB(left, top, right, bottom), self.paint(colour, alpha))

    def line(self, points: list[tuple[float, float]], colour: RGB, width: float, alpha: float = 1.0) -> None:
        """A round-ended line through the points."""
        path = skia.Path()
        path.addPoly([skia.Point(*p) for p in points], False)
        self.canvas.drawPath(path, self.paint(colour, alpha, width))

    def polygon(self, points: list[tuple[float, float]], colour: RGB) -> None:
        """A filled polygon."""
        path = skia.Path()
        path.addPoly([skia.Point(*p) for p in points], True)
        self.canvas.drawPath(path, self.paint(colour))

    def hill(self, points: list[tuple[float, float]], colour: RGB) -> None:
        """Everything below a line through the points."""
        self.polygon([*points, (1.1, 1.1), (-0.1, 1.1)], colour)


def ridge(y: float, height: float, waves: float, phase: float, n: int = 32) -> list[tuple[float, float]]:
    """A wavy line from edge to edge."""
    return [(k / n, y - height * math.sin(math.tau * (waves * k / n + phase))) for k in range(n + 1)]


def _clouds(b: Brush, d: Dice, h: float, alpha: float = 0.85) -> None:
    for k in range(2 + d.integer(2)):
        x, y, s = (k + d.u(0.1, 0.9)) / 3, d.u(0.06, h - 0.22), d.u(0.05, 0.085)
        for dx, dy, r in ((-1.1, 0.2, 0.7), (0, -0.15, 1.0), (1.1, 0.15, 0.8)):
            b.oval(x + dx * s, y + dy * s, r * s * 1.1, r * s * 0.75, (255, 255, 255), alpha)


def _meadow(b: Brush, d: Dice, h: float) -> None:
    _clouds(b, d, h)
    b.hill(ridge(h - 0.01, 0.035, d.u(0.9, 1.5), d.u()), (158, 204, 146))
    b.hill(ridge(h + 0.05, 0.02, d.u(0.7, 1.2), d.u()), (168, 208, 106))
    b.hill(ridge(h + 0.20, 0.02, d.u(0.6, 1.1), d.u()), (150, 198, 92))
    for k in range(26):
        x, y = (k + d.u()) / 26, d.u(h + 0.10, 0.98)
        s = 0.018 + 0.03 * (y - h)
        b.line([(x - s * 0.6, y - s), (x, y), (x + s * 0.5, y - s * 1.1)], (96, 156, 66), 0.009)
    for _ in range(9):
        x, y = d.u(), d.u(h + 0.12, 0.98)
        b.oval(x, y, 0.013, 0.011, d.pick(((255, 250, 240), (255, 214, 226), (255, 240, 150))))


def _beach(b: Brush, d: Dice, h: float) -> None:
    _clouds(b, d, h)
    b.box(0, h - 0.06, 1, h + 0.10, (72, 168, 196))
    b.box(0, h - 0.06, 1, h - 0.02, (56, 146, 184))
    for _ in range(9):
        x, y, w = d.u(), d.u(h - 0.03, h + 0.05), d.u(0.04, 0.09)
        b.line([(x, y), (x + w, y)], (176, 224, 230), 0.009)
    phase, waves = d.u(), d.u(1.0, 1.8)
    b.hill(ridge(h + 0.075, 0.014, waves, phase), (250, 250, 244))
    b.hill(ridge(h + 0.10, 0.014, waves, phase), (243, 222, 174))
    for _ in range(8):
        x, y, w = d.u(-0.1, 0.95), d.u(h + 0.16, 0.97), d.u(0.10, 0.2)
        b.line([(x, y), (x + w / 2, y - 0.012), (x + w, y)], (214, 182, 128), 0.009, 0.8)
    for _ in range(14):
        b.oval(d.u(), d.u(h + 0.15, 0.98), 0.009, 0.007, d.pick(((206, 168, 116), (255, 246, 226), (238, 160, 140))))


def _snow(b: Brush, d: Dice, h: float) -> None:
    b.hill(ridge(h - 0.10, 0.06, d.u(1.2, 1.8), d.u()), (196, 212, 230))
    for k in range(7):
        x, s = (k + d.u(0.1, 0.9)) / 7, d.u(0.09, 0.17)
        for dy, w in ((0.0, 0.36), (0.35, 0.27)):
            top = h + 0.02 - s * (1 if dy else 0.75)
            b.polygon([(x, top), (x + w * s, top + 0.7 * s), (x - w * s, top + 0.7 * s)], (112, 146, 160))
    b.hill(ridge(h + 0.02, 0.02, d.u(0.8, 1.4), d.u()), (230, 238, 246))
    b.hill(ridge(h + 0.19, 0.024, d.u(0.6, 1.1), d.u()), (214, 225, 240))
    for _ in range(7):
        x, y, w = d.u(-0.1, 0.95), d.u(h + 0.1, 0.97), d.u(0.10, 0.22)
        b.line([(x, y), (x + w / 2, y + 0.012), (x + w, y)], (186, 203, 226), 0.010)
    for k in range(34):
        r = d.u(0.006, 0.0115)
        b.oval((k + d.u()) / 34, d.u(0.02, 0.98), r, r, (255, 255, 255))


def _desert(b: Brush, d: Dice, h: float) -> None:
    b.oval(d.u(0.12, 0.88), d.u(0.12, h - 0.22), 0.075, 0.075, (255, 240, 208))
    b.hill(ridge(h - 0.05, 0.05, d.u(0.9, 1.4), d.u()), (226, 170, 138))
    for _ in range(3):
        x, s, y = d.u(0.05, 0.95), d.u(0.11, 0.17), h + 0.05
        arms = ((0.4, 0.35, 0.75), (-0.35, 0.5, 0.8))
        cactus = [
            [(x, y), (x, y - s)],
            *([(x, y - s * e), (x + s * a, y - s * e), (x + s * a, y - s * f)] for a, e, f in arms),
        ]
        for points in cactus:
            b.line(points, (124, 136, 96), s * 0.2)
    b.hill(ridge(h + 0.05, 0.022, d.u(0.8, 1.3), d.u()), (222, 158, 120))
    b.hill(ridge(h + 0.20, 0.028, d.u(0.6, 1.0), d.u()), (208, 140, 106))
    for _ in range(12):
        x, y, w = d.u(-0.1, 0.95), d.u(h + 0.10, 0.98), d.u(0.10, 0.2)
        b.line([(x, y), (x + w / 2, y - 0.014), (x + w, y)], (180, 112, 86), 0.009)


def _forest(b: Brush, d: Dice, h: float) -> None:
    for k in range(11):  # far trunks, then near ones
        x, w = (k + d.u(0.1, 0.9)) / 11, d.u(0.02, 0.032)
        b.box(x - w / 2, 0, x + w / 2, h + 0.05, (92, 128, 106))
    for k in range(5):
        x, w = (k + d.u(0.15, 0.85)) / 5, d.u(0.045, 0.07)
        b.box(x - w / 2, 0, x + w / 2, h + 0.09, (78, 72, 62))
        b.box(x - w / 2, 0, x - w / 5, h + 0.09, (104, 94, 76))
    for k in range(9):
        r = d.u(0.08, 0.12)
        b.oval((k + d.u()) / 9, d.u(-0.02, 0.05), r, r * 0.75, d.pick(((48, 96, 76), (60, 112, 82), (78, 130, 88))))
    b.hill(ridge(h + 0.06, 0.018, d.u(0.9, 1.5), d.u()), (98, 124, 74))
    b.hill(ridge(h + 0.12, 0.02, d.u(0.7, 1.2), d.u()), (132, 124, 82))
    for _ in range(30):
        x, y = d.u(), d.u(h + 0.16, 0.99)
        b.oval(x, y, 0.015, 0.009, d.pick(((168, 128, 72), (98, 92, 56), (152, 150, 88), (176, 108, 62))))


def _city(b: Brush, d: Dice, h: float) -> None:
    b.oval(d.u(0.12, 0.88), d.u(0.10, 0.2), 0.055, 0.055, (252, 244, 214))
    for k in range(24):
        r = d.u(0.005, 0.009)
        b.oval((k + d.u()) / 24, d.u(0.02, h - 0.2), r, r, (250, 246, 220), 0.9)
    x = -0.03
    while x < 1:
        w, top, tone = d.u(0.10, 0.17), h - d.u(0.10, 0.30), d.u(0, 1)
        b.box(x, top, x + w - 0.008, h + 0.08, mix((62, 58, 104), (86, 78, 126), tone))
        n = 2 if w < 0.14 else 3
        for row in range(int((h + 0.02 - top) / 0.062)):
            for col in range(n):
                if d.u() < 0.62:
                    left, up = x + (w - 0.008) * (col + 0.5) / n - 0.013, top + 0.022 + 0.062 * row
                    b.box(
                        left, up, left + 0.026, up + 0.034, d.pick(((252, 220, 130), (255, 236, 170), (186, 190, 220)))
                    )
        x += w
    b.box(0, h + 0.06, 1, 1.1, (118, 112, 140))
    b.box(0, h + 0.06, 1, h + 0.085, (150, 144, 168))
    for row in range(5):  # paving
        y = h + 0.085 + (0.97 - h) * ((row + 1) / 5.5) ** 1.4
        b.line([(-0.1, y), (1.1, y)], (98, 93, 122), 0.008)
        for k in range(4):
            x = (k + d.u(0.2, 0.8)) / 4
            b.line([(x, y), (x + 0.02, y + 0.04 + 0.02 * row)], (98, 93, 122), 0.008)


_MARKS: dict[str, Callable[[Brush, Dice, float], None]] = {
    "meadow": _meadow, "beach": _beach, "snow": _snow, "desert": _desert, "forest": _forest, "city": _city,
}  # fmt: skip


def marks(brush: Brush, scene: Scene) -> None:
    """The background's hills, trees, waves and specks, with any brush."""
    _MARKS[scene.background](brush, Dice("texture", scene.background, scene.seed), scene.horizon)


def background(scene: Scene, size: int) -> np.ndarray:
    """The scene without its things: uint8 (size, size, 4), BGRA."""
    above, far, near, front = (np.array(lit(c, scene.light)) for c in PALETTE[scene.background])
    y = ((np.arange(size) + 0.5) / size)[:, None]
    sky = above + (far - above) * np.clip(y / scene.horizon, 0, 1)
    ground = near + (front - near) * np.clip((y - scene.horizon) / (1 - scene.horizon), 0, 1)
    pixels = np.full((size, size, 4), 255, np.uint8)
    pixels[:, :, 2::-1] = np.rint(np.where(y < scene.horizon, sky, ground)).astype(np.uint8)[:, None]
    brush = Brush(pixels, scene.light)
    marks(brush, scene)
    grain = Dice("light", scene.seed)
    x, r = (0.25 + grain.u(-0.1, 0.1)), 0.9  # one soft pool of light from the upper left
    for k in range(3):
        brush.oval(x, 0.12, r * (1 - 0.25 * k), r * (1 - 0.25 * k), (255, 250, 225), 0.035)
    return pixels
