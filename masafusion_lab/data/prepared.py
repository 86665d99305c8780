"""A case made into the tensors that an edit reads: at its working size, its mask the region A of latent cells."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.data.case import Box, Case, Picture
from masafusion_lab.data.pictures import LARGEST, LINES, named, open_hint, open_mask, open_picture
from masafusion_lab.region import USUAL, Region

log = logging.getLogger(__name__)

LONGEST = 4
"""Working sides are at most this many times one another."""


@dataclass(frozen=True)
class Prepared:
    """A case as tensors, float32, on the CPU: W x H working pixels, latent cells of `factor` pixels.

    `pixels` (3, H, W) in [0, 1]; `mask` A (1, H / factor, W / factor), 1 inside, as the edit uses it; `mask_full`
    (1, H, W), as given; `shown` (1, H, W): the pixels that the edit may change where the others are put back, the mask
    as given or, where it was made to grow or fade, A's cells; `hints`: kind -> (1 or 3, H, W) in [0, 1]; `original`:
    width and height of the picture.
    """

    pixels: Tensor
    mask: Tensor | None
    mask_full: Tensor | None
    hints: Mapping[str, Tensor]
    original: tuple[int, int]
    shown: Tensor | None = None


def prepare(
    case: Case,
    *,
    factor: int,
    multiple: int,
    native: int,
    size: str | None = None,
    dilate: int = 0,
    how: Region = USUAL,
) -> Prepared:
    """Open a case's pictures and bring them to its working size; see `working_size`.

    `how` the mask becomes A, to which `dilate` adds so many rings of cells. Raises InputError naming the picture and
    what is wrong.
    """
    if dilate < 0:
        raise InputError(f"dilate={dilate}: is a number of latent cells, 0 or more")
    image = open_picture(case.image)
    width, height = working_size(*image.size, multiple=multiple, native=native, size=size)
    full = mask = None
    if case.mask is not None:
        full = region(case.mask, image, (width, height), how)
        mask = cells(full, factor, how)
        if dilate:
            mask = F.max_pool2d(mask, 2 * dilate + 1, 1, dilate)
        _check_region(named(case.mask), full, mask, factor, sure=case.truth is not None)
        if how.feather:
            mask = F.avg_pool2d(mask, 2 * how.feather + 1, 1, how.feather, count_include_pad=False)
    return Prepared(
        pixels=tensor(image.resize((width, height), Image.Resampling.LANCZOS)),
        mask=mask,
        mask_full=full,
        hints={kind: _hint(kind, hint, image, (width, height)) for kind, hint in case.hints.items()},
        original=image.size,
        shown=full
        if mask is None or not (dilate or how.feather)
        else F.interpolate(mask[None], scale_factor=factor)[0],
    )


def working_size(width: int, height: int, *, multiple: int, native: int, size: str | None = None) -> tuple[int, int]:
    """Width and height to work at: the short side `native`, the aspect kept, both rounded to multiples.

    `size` "512" is another short side, "768x512" both sides as they are. A side longer than four times the other is
    shortened to that, with a warning. Raises InputError for a size that is no multiple or too large.
    """
    if size and (sides := re.fullmatch(r"(\d{1,6})\s*[xX×]\s*(\d{1,6})", size.strip())):
        result = _checked(int(sides[1]), multiple, size), _checked(int(sides[2]), multiple, size)
    else:
        if size and not re.fullmatch(r"\d{1,6}", size.strip()):
            raise InputError(f"size={size!r}: give the short side, such as {native}, or WIDTHxHEIGHT in pixels")
        short = _checked(int(size), multiple, size) if size else _round(native, multiple)
        ratio = max(width, height) / min(width, height)
        if ratio > LONGEST:
            log.warning("a picture of %dx%d is squeezed to %d:1; crop it to avoid that", width, height, LONGEST)
        long = _round(short * min(ratio, LONGEST), multiple)
        result = (long, short) if width > height else (short, long)
    if result[0] * result[1] > LARGEST:
        raise InputError(f"size={size!r}: {result[0]}x{result[1]} is more than {LARGEST:,} pixels; take a smaller one")
    return result


def _round(side: float, multiple: int) -> int:
    return max(math.floor(side / multiple + 0.5), 1) * multiple


def _checked(side: int, multiple: int, size: str) -> int:
    """The side, if it is a multiple."""
    if side % multiple or side == 0:
        near = sorted({max(side // multiple, 1) * multiple, (side // multiple + 1) * multiple})
        raise InputError(
            f"size={size!r}: {side} is not a multiple of {multiple}, as this model needs; "
            f"take {' or '.join(map(str, near))}"
        )
    return side


def tensor(image: Image.Image) -> Tensor:
    """(1 or 3, H, W), float32, in [0, 1]."""
    levels = np.array(image, np.float32) / 255
    return torch.from_numpy(levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1).copy())


def _hint(kind: str, hint: Picture, image: Image.Image, working: tuple[int, int]) -> Tensor:
    drawn = open_hint(hint, kind)
    _check_aspect(f"{named(hint)}: the {kind}", drawn, image, working)
    shrunk = tensor(drawn.resize(working, Image.Resampling.BILINEAR))
    if kind in LINES and shrunk.max() < 0.5 <= tensor(drawn).max():
        log.warning("%s: lines this thin fade at %dx%d and guide little; draw them thicker", named(hint), *working)
    return shrunk


def cells(full: Tensor, factor: int, how: Region) -> Tensor:
    """A, before it grows or fades: the cells (1, H / factor, W / factor) of a mask (1, H, W)."""
    if how.downsample == "max":
        return F.max_pool2d(full, factor)
    middle = factor // 2
    A = F.avg_pool2d(full, factor) if how.downsample == "area" else full[:, middle::factor, middle::factor]
    return A if how.soft else (A >= 0.5).float()


def region(mask: Picture | Box, image: Image.Image, working: tuple[int, int], how: Region = USUAL) -> Tensor:
    """The mask (1, H, W) of a picture at a size: a pixel is as bright as the brightest that it covers of the mask."""
    if isinstance(mask, tuple):
        drawn_over = _boxed(mask, image)
    else:
        drawn = open_mask(mask, how.by, soft=how.soft)
        _check_aspect(f"{named(mask)}: the mask", drawn, image, working)
        drawn_over = tensor(drawn)
    whole = drawn_over if how.soft else (drawn_over > how.threshold).float()
    return F.adaptive_max_pool2d(whole, (working[1], working[0]))


def _boxed(box: Box, image: Image.Image) -> Tensor:
    """A box as a mask (1, H0, W0) of every pixel of the picture that it touches."""
    x0, y0, x1, y1 = box if max(box) > 1 else (s * side for s, side in zip(box, image.size * 2, strict=True))
    if not (0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height):
        raise InputError(
            f"{named(box)}: is not left,top,right,bottom within the picture of {image.width}x{image.height}"
        )
    region = torch.zeros(1, image.height, image.width)
    region[:, math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = 1
    return region


def _check_aspect(what: str, drawn: Image.Image, image: Image.Image, working: tuple[int, int]) -> None:
    """Raise unless it is drawn over the picture, at whatever scale, or over the picture at its working size."""
    (w, h), (width, height) = drawn.size, image.size
    if drawn.size != working and abs(w - h * width / height) > 1 and abs(h - w * height / width) > 1:
        raise InputError(
            f"{what} of {w}x{h} does not lie over the picture of {width}x{height}; draw it at the picture's size"
        )


def _check_region(name: str, full: Tensor, mask: Tensor, factor: int, sure: bool) -> None:
    """Raise for an empty or full region; warn of one that may not be what was meant, if not `sure` that it is."""
    if not full.any():
        raise InputError(f"{name}: the mask is empty; paint what is to be edited white (above region.threshold)")
    if not mask.any():
        raise InputError(f"{name}: the region has no latent cell; it is thin: take region.downsample=max")
    if mask.min() == 1:
        raise InputError(f"{name}: the mask covers the whole picture; leave it out, or paint what is kept black")
    thick = -F.max_pool2d(-full, factor, 1)
    if not thick.any():
        log.warning(
            "%s: the region is thinner than a latent cell of %d pixels; all cells that it touches are edited",
            name,
            factor,
        )
    edges = torch.cat([full[0, 0], full[0, -1], full[0, :, 0], full[0, :, -1]])
    if edges.min() == 1 and not sure:
        say = "is the mask inverted? Then region.by=dark, or opaque"
        log.warning("%s: white, which is edited, runs all round the picture; %s", name, say)
