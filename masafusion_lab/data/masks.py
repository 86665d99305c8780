"""Which part of a picture is meant as the region: what is light, transparent, or of one colour or label."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageOps

from masafusion_lab import InputError

SAMPLE = 500_000
"""Pixels of a picture that are looked at to find what it is."""

SAY = "say which part is meant: region.by=light, dark, alpha (what is transparent), label:1 or colour:#ff0000"
"""The remedy."""
NEAR = 40.0
"""Distance of two colours, of 442, below which they are one."""


def region(image: Image.Image, name: str, by: str = "auto", *, soft: bool = False) -> Image.Image:
    """The region, L, 255 inside, of a picture L, RGB, RGBA or, for a label, I; see `Region.by`.

    auto: what is transparent in a photograph; what is drawn in one colour on nothing; of two values the lighter, of two
    colours the one that is not grey; greys as they are, if black and white prevail and fade smoothly into each other,
    or a `soft` mask is wanted. Raises InputError for anything else, such as a photograph or more than two labels, with
    what was found.
    """
    way, _, value = by.partition(":")
    if way == "auto":
        return _meant(image, name, soft)
    if way in ("alpha", "opaque"):
        if image.mode != "RGBA" or len(set(image.getchannel("A").getextrema())) == 1:
            raise InputError(f"{name}: region.by={by}: nothing of it is transparent; {SAY}")
        alpha = image.getchannel("A")
        return alpha if way == "opaque" else alpha.point(lambda level: 255 - level)
    if way in ("light", "dark"):
        grey = over_black(image).convert("L")
        return grey if way == "light" else grey.point(lambda level: 255 - level)
    if way == "label":
        if np.ptp(_sampled(image), axis=1).max() >= NEAR:
            raise InputError(f"{name}: region.by={by}: has colours, {_told(_sampled(image))}, and no labels; {SAY}")
        found = np.asarray(image if image.mode == "I" else image.convert("L")) == int(value)
    else:
        wanted = np.array([int(value[k : k + 2], 16) for k in (1, 3, 5)], np.float32)
        found = np.linalg.norm(np.asarray(image.convert("RGB"), np.float32) - wanted, axis=-1) < NEAR
    if not found.any():
        raise InputError(f"{name}: region.by={by}: nothing of it is of that value; it has {_told(_sampled(image))}")
    return Image.fromarray(np.where(found, np.uint8(255), np.uint8(0)))


def over_black(image: Image.Image) -> Image.Image:
    """The picture without transparency, over black."""
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image


def _meant(image: Image.Image, name: str, soft: bool) -> Image.Image:
    """The region as a person means it who says nothing of it."""
    if image.mode == "RGBA" and np.ptp(image.getchannel("A").getextrema()) > NEAR:
        alpha = image.getchannel("A")
        if not soft:  # half erased, or painted thinly, is erased or painted
            alpha = ImageOps.autocontrast(alpha)
        opaque = _sampled(image)[np.asarray(_few(alpha)).ravel() > 127]
        if len(opaque) == 0 or np.linalg.norm(opaque - opaque[0], axis=1).max() < NEAR:
            return alpha  # drawn in one colour on nothing
        if _two(opaque) is None and not _is_black_and_white(opaque):
            return alpha.point(lambda level: 255 - level)  # a hole in a photograph
        raise InputError(f"{name}: is transparent in part, and black and white or of two colours elsewhere; {SAY}")
    image = over_black(image).convert("RGB")
    pixels = _sampled(image)
    colours, _ = _counted(pixels)
    if soft and colours.max() > NEAR and (np.ptp(pixels, axis=1) < NEAR).mean() > 0.98:
        return image.convert("L")
    ends = _two(pixels)
    if 2 < len(colours) <= 32 and len(_areas(image).union(map(tuple, ends or ()))) > 2:
        raise InputError(f"{name}: is a map of {len(colours)} labels, {_told(pixels)}; {SAY}")
    if ends is not None and _fades(part := _between(image, *_outside_first(*ends, name))):
        return part
    if len(colours) == 1 or (ends is None and _is_black_and_white(pixels) and _fades(image.convert("L"))):
        return image.convert("L")
    raise InputError(f"{name}: is a photograph, or a drawing in many colours ({_told(pixels)}), and no mask; {SAY}")


def _few(image: Image.Image) -> Image.Image:
    """Of a large picture every so manyth pixel."""
    step = max(1, int((image.width * image.height / SAMPLE) ** 0.5))
    return Image.fromarray(np.asarray(image)[::step, ::step])


def _sampled(image: Image.Image) -> np.ndarray:
    """Its colours (n, 3), float32, of SAMPLE pixels at most."""
    return np.asarray(_few(image.convert("RGB")), np.float32).reshape(-1, 3)


def _counted(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colours (k, 3) that there are, and how often."""
    packed, counts = np.unique(pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32), return_counts=True)
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(np.float32), counts


def _areas(image: Image.Image) -> set[tuple[float, ...]]:
    """The colours that fill areas, a hundredth of the picture each, and are not mere mixtures along a border."""
    whole = np.asarray(_few(image), np.float32)
    block = np.stack([whole[:-1, :-1], whole[1:, :-1], whole[:-1, 1:], whole[1:, 1:]])
    even = block[0][(block == block[0]).all(axis=(0, 3))]
    colours, counts = _counted(even)
    return set(map(tuple, colours[counts >= 0.01 * whole.shape[0] * whole.shape[1]]))


def _two(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The two colours of which nearly all pixels are, or mixtures at a border; None if they are of others."""
    colours, counts = _counted(pixels)
    if len(colours) < 2:
        return None
    first = colours[counts.argmax()]
    apart = np.linalg.norm(colours - first, axis=1)
    others = counts * (apart > NEAR) if (apart > NEAR).any() else counts * (apart > 0)
    second = colours[others.argmax()]
    if np.linalg.norm(second - first) <= NEAR and len(colours) > 2:
        return None
    along = (pixels - first) @ (second - first) / np.square(second - first).sum()
    beside = np.linalg.norm(pixels - first - along.clip(0, 1)[:, None] * (second - first), axis=1)
    mixed, at_ends, away = beside < NEAR, (along < 0.2) | (along > 0.8), np.linalg.norm(pixels - first, axis=1) > NEAR
    few = mixed.mean() > 0.98 and mixed[away | ~mixed].sum() >= 0.9 * (away | ~mixed).sum()
    return (first, second) if few and (at_ends & mixed).mean() > 0.9 else None


def _outside_first(a: np.ndarray, b: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Two colours, the second of which is the region's: the lighter of greys, else the one that is not grey."""
    grey = [np.ptp(colour) < NEAR for colour in (a, b)]
    if not any(grey):
        raise InputError(f"{name}: is of two colours, {_hex(a)} and {_hex(b)}; {SAY}")
    if all(grey):
        return (a, b) if a.sum() < b.sum() else (b, a)
    return (a, b) if grey[0] else (b, a)


def _between(image: Image.Image, outside: np.ndarray, inside: np.ndarray) -> Image.Image:
    """How far each pixel is from the one colour to the other, L."""
    way = inside - outside
    part = (np.asarray(image, np.float32) - outside) @ way / np.square(way).sum()
    return Image.fromarray((part.clip(0, 1) * 255).round().astype(np.uint8))


def _is_black_and_white(pixels: np.ndarray) -> bool:
    """Whether they are greys, half of them black or white, and some of each: a mask with soft borders."""
    light, coloured = pixels.mean(1), (np.ptp(pixels, axis=1) >= NEAR).mean()
    black, white = (light <= 16).mean(), (light >= 239).mean()
    return bool(coloured <= min(0.02, black / 10, white / 10) and black + white >= 0.5 and min(black, white) > 0)


def _fades(image: Image.Image) -> bool:
    """Whether the greys of an L are those of soft borders: in a photograph they differ from those beside them more."""
    grey = np.asarray(_few(image), np.float32)
    within = cv2.erode(((grey > 16) & (grey < 239)).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    slope = np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1)) / 8
    uneven = np.abs(grey - cv2.blur(grey, (3, 3)))[within].sum() > 0.2 * slope[within].sum()
    return not (uneven and within.mean() > 0.01)


def _hex(colour: np.ndarray) -> str:
    return "#" + "".join(f"{int(level):02x}" for level in colour)


def _told(pixels: np.ndarray) -> str:
    """Its most common colours, or values if it is grey, with their shares."""
    colours, counts = _counted(pixels)
    grey = bool((np.ptp(colours, axis=1) == 0).all())
    most = np.argsort(-counts, kind="stable")[:4]
    said = [f"{int(colours[k][0]) if grey else _hex(colours[k])} {counts[k] / len(pixels):.0%}" for k in most]
    return ", ".join(said) + (", …" if len(colours) > len(most) else "")


def is_drawn(image: Image.Image, *, in_colours: bool) -> bool:
    """Whether a picture L or RGB is no photograph, nor a map of depth: drawn on an even ground.

    In greys it is nearly all black or white; `in_colours`, what is drawn has strong ones.
    """
    pixels = _sampled(image)
    colours, counts = _counted(pixels)
    away = np.linalg.norm(pixels - colours[counts.argmax()], axis=1)
    if (away < NEAR / 2).mean() < 0.5:
        return _two(pixels) is not None
    light, strength = pixels.mean(1), np.ptp(pixels, axis=1)
    if in_colours and (away >= NEAR).any():
        drawn = strength[away >= NEAR].mean() >= 80
    else:
        coloured = strength >= NEAR
        drawn = coloured.sum() <= 0.1 * (away >= NEAR).sum() and ((light < 48) | (light > 207)).mean() >= 0.85
    return bool(drawn) or _two(pixels) is not None
