"""Colours: those of the things, of their fixed parts, and what light does to them. RGB in 0..255."""

from __future__ import annotations

import colorsys

RGB = tuple[float, float, float]

COLOUR: dict[str, RGB] = {
    "red": (214, 46, 48), "orange": (246, 138, 30), "yellow": (252, 220, 60), "green": (34, 146, 76),
    "blue": (44, 98, 208), "purple": (136, 68, 178), "white": (248, 247, 243), "black": (50, 48, 58),
}  # fmt: skip
PART: dict[str, RGB] = {
    "ink": (40, 34, 48), "white": (252, 251, 247), "cream": (250, 234, 204), "wood": (140, 92, 58),
    "hair": (84, 58, 52), "leaf": (74, 150, 70), "beak": (250, 176, 58), "rose": (236, 130, 140),
    "glow": (255, 236, 150),
    "sky": (196, 228, 244),
    "shine": (255, 255, 255),
}  # fmt: skip
INK: RGB = (44, 34, 54)


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """(1 - t) a + t b."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def lit(c: RGB, light: float) -> RGB:
    """The colour under a cool (-1) to warm (1) light."""
    k = (1 + 0.035 * light, 1.0, 1 - 0.05 * light)
    return (min(255.0, c[0] * k[0]), min(255.0, c[1] * k[1]), min(255.0, c[2] * k[2]))


def shifted(c: RGB, hue: float, value: float) -> RGB:
    """The colour with its hue turned by degrees and its value changed by a factor less 1."""
    h, s, v = colorsys.rgb_to_hsv(c[0] / 255, c[1] / 255, c[2] / 255)
    r, g, b = colorsys.hsv_to_rgb((h + hue / 360) % 1, s, min(1.0, v * (1 + value)))
    return (r * 255, g * 255, b * 255)


def dark(c: RGB) -> RGB:
    """A deeper shade of a colour: roofs, far limbs."""
    return mix(c, INK, 0.34)


def outline(c: RGB) -> RGB:
    """The colour of a colour's outline."""
    return mix(c, (30, 22, 40), 0.72)


def ornament(name: str, c: RGB) -> RGB:
    """The pattern's colour on a thing of this colour: far enough to be seen, near enough to stay that colour."""
    if name == "black":
        return mix(c, (255, 255, 255), 0.42)
    if name in ("white", "yellow"):
        return mix(c, (96, 84, 120), 0.42) if name == "white" else mix(c, (176, 112, 10), 0.55)
    return mix(c, (255, 252, 240), 0.62)
