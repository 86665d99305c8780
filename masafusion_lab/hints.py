"""Hints drawn from pictures: edges by Canny, and the region A from two sketches (Remark 3)."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from masafusion_lab import InputError


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Edges, white on black, mode L: T2I-Adapter's condition, with its thresholds of gradient (0 to about 1000).

    Seen at a short side of at most 512 pixels, as there: lines a pixel wide would fade when a large picture is shrunk.
    """
    scale = max(1, min(image.size) / 512)
    width, height = (round(side / scale) for side in image.size)
    bgr = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))[:, :, ::-1]
    edges = Image.fromarray(cv2.Canny(np.ascontiguousarray(bgr), low, high))
    return edges.resize(image.size, Image.Resampling.NEAREST)


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
    radius = min(after.size) // 40 if dilate is None else min(dilate, max(after.size))
    was, now = (np.asarray(picture.convert("L")) > 127 for picture in (before, after))
    moved = (was & ~_grown(now, radius // 4)) | (now & ~_grown(was, radius // 4))
    if not moved.any():
        raise InputError("mask=auto: the two sketches show the same; give mask=FILE")
    region: np.ndarray
    if hull:
        region = _grown(moved, radius).astype(np.uint8)
        region = cv2.fillConvexPoly(region, cv2.convexHull(cv2.findNonZero(region)), 1)
    else:
        border = 4 * radius  # or closing would join what differs to the edge of the picture
        wide = _grown(np.pad(moved, border), radius)
        region = (~_grown(~_grown(wide, 2 * radius), 2 * radius)).astype(np.uint8)
        contours, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        region = cv2.drawContours(region, contours, -1, 1, cv2.FILLED)
        region = region[border : border + after.height, border : border + after.width]
    return Image.fromarray(region * np.uint8(255))


def _grown(lines: np.ndarray, radius: int) -> np.ndarray:
    """The pixels that are at most so far from one that is true; as fast for a large radius as for a small one."""
    if not lines.any():
        return lines
    away: np.ndarray = cv2.distanceTransform((~lines).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return away <= radius
