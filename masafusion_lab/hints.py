"""Hints drawn from pictures: edges by Canny, and the region A from two sketches (Remark 3)."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from masafusion_lab import InputError


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Edges, white on black, mode L: T2I-Adapter's condition, with its thresholds of gradient (0 to about 1000)."""
    bgr = np.asarray(image.convert("RGB"))[:, :, ::-1]
    return Image.fromarray(cv2.Canny(np.ascontiguousarray(bgr), low, high))


def region_from_sketches(
    before: Image.Image, after: Image.Image, *, dilate: int | None = None, hull: bool = False
) -> Image.Image:
    """The region A (255 inside, mode L) where two sketches, white on black, of one size differ: Remark 3.

    Lines farther than a quarter of `dilate` from any of the other sketch, grown by `dilate` pixels (None: 1/40 of the
    short side), gaps up to four times that closed, holes filled; or with `hull` their convex hull. Raises InputError.
    """
    if before.size != after.size:
        sizes = " and ".join(f"{w}x{h}" for w, h in (before.size, after.size))
        raise InputError(f"mask=auto: the two sketches are {sizes}; give sketches of one size, or mask=FILE")
    radius = min(after.size) // 40 if dilate is None else dilate
    was, now = ((np.asarray(picture.convert("L")) > 127).astype(np.uint8) for picture in (before, after))
    near = _disc(radius // 4)
    moved = (was > cv2.dilate(now, near)) | (now > cv2.dilate(was, near))
    if not moved.any():
        raise InputError("mask=auto: the two sketches show the same; give mask=FILE")
    region = cv2.dilate(moved.astype(np.uint8), _disc(radius))
    if hull:
        region = cv2.fillConvexPoly(region, cv2.convexHull(cv2.findNonZero(region)), 1)
    else:
        border = 4 * radius  # or closing would join what differs to the edge of the picture
        region = cv2.copyMakeBorder(region, border, border, border, border, cv2.BORDER_CONSTANT)
        region = cv2.morphologyEx(region, cv2.MORPH_CLOSE, _disc(2 * radius))
        contours, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        region = cv2.drawContours(region, contours, -1, 1, cv2.FILLED)
        region = region[border : border + after.height, border : border + after.width]
    return Image.fromarray(region * np.uint8(255))


def _disc(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
