"""Pictures, masks and hints as people have them: opened, upright, checked."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps, ImageStat, UnidentifiedImageError

from masafusion_lab import InputError
from masafusion_lab.data import masks
from masafusion_lab.data.case import Box, Made, Picture

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened; of the others that Pillow knows, some run programs."""

LARGEST = 50_000_000
"""Pixels of a picture, beyond which it is not decoded."""

LINES = ("sketch", "canny")
"""Hints that are white lines on black."""


def open_picture(picture: Picture) -> Image.Image:
    """The picture as RGB, upright as its EXIF data say; transparency over white, 16 bits as 8, of several frames one.

    Raises InputError for what is missing, no picture, damaged, or of more than 50 million pixels.
    """
    image = _open(picture)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_mask(picture: Picture, by: str = "auto", *, soft: bool = False) -> Image.Image:
    """The mask as L, 255 inside; `by`, `soft`: see `Region`. Raises as `open_picture` and `masks.region` do."""
    return masks.region(_open(picture, by), named(picture), by, soft=soft)


def open_hint(picture: Picture, kind: str = "sketch") -> Image.Image:
    """The hint: L, white lines on black, for a sketch or canny map; else RGB, over black where it is transparent.

    Black lines on white are inverted, with a warning; a blank hint is warned of. Raises as `open_picture` does, and for
    a photograph; what is `Made`, or grey in memory, was drawn by us or says so.
    """
    image = _open(picture)
    if image.mode == "RGBA":
        grey, alpha = image.convert("L"), image.getchannel("A")
        ink = ImageStat.Stat(grey, alpha).mean[0] if alpha.getbbox() else 255
        paper = "white" if ink < 128 and kind in LINES else "black"
        image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
    known = isinstance(picture, Made) or (isinstance(picture, Image.Image) and picture.mode == "L")
    if not known and not masks.is_drawn(masks.over_black(image), in_colours=kind not in LINES):
        way = "canny=auto, or sketch=auto with pidinet=FILE, draws its outlines" if kind in LINES else "draw on black"
        raise InputError(f"{named(picture)}: is a photograph, or has no even ground, and no {kind}; {way}")
    image = image.convert("L" if kind in LINES else "RGB")
    if kind in LINES and ImageStat.Stat(image).mean[0] > 127.5:
        log.warning("%s: the %s is mostly white, so black lines on white: it is inverted", named(picture), kind)
        image = ImageChops.invert(image)
    if all(low == high for low, high in ImageStat.Stat(image).extrema):
        log.warning("%s: the %s is blank and guides nothing", named(picture), kind)
    return image


def _open(picture: Picture, by: str = "") -> Image.Image:
    """The picture decoded and upright, as L, RGB or RGBA; a mask read `by` label as I, a palette's numbers too."""
    name = named(picture)
    try:
        if isinstance(picture, Made):
            picture = picture.make()
        if isinstance(picture, Image.Image):
            return _decoded(picture, name, by)
        path = Path(picture)
        if path.is_dir():
            raise InputError(f"{name}: is a folder; give the picture in it")
        if not path.is_file():
            raise InputError(f"{name}: {'is no ordinary file' if path.exists() else 'no such file'}; give a picture")
        if path.stat().st_size == 0:
            raise InputError(f"{name}: is empty; copy it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            image = Image.open(path, formats=FORMATS)
        with image:
            return _decoded(image, name, by)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{name}: {_TOO_LARGE}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: is not a picture; give one of {', '.join(FORMATS)}") from None
    except PermissionError:
        raise InputError(f"{name}: may not be read; change its rights") from None
    except Exception as error:  # Pillow raises anything for a damaged file
        raise InputError(f"{name}: is damaged or cut short ({' '.join(str(error).split())}); copy it again") from error


_TOO_LARGE = f"has more than {LARGEST:,} pixels, and is not decoded; make it smaller"


def _decoded(image: Image.Image, name: str, by: str) -> Image.Image:
    if image.width * image.height > LARGEST:
        raise InputError(f"{name}: {image.width}x{image.height} {_TOO_LARGE}")
    if image.width * image.height == 0:
        raise InputError(f"{name}: has no pixels")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photograph with its previews
        log.warning("%s: has %d frames; the first is taken", name, image.n_frames)  # type: ignore[attr-defined]
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if by.startswith("label") and image.mode in ("1", "L", "P", "I", "I;16"):
        return Image.fromarray(np.asarray(image).astype(np.int32))
    if image.mode.startswith("I"):
        levels = np.asarray(image, np.float32).clip(0, 65535)
        shade = 1 if by and levels.max() < 256 else 257  # a mask of labels, in more bits than it needs
        return Image.fromarray((levels / shade).round().astype(np.uint8))
    if image.mode == "F":
        raise InputError(f"{name}: holds floating-point numbers; save it with 8 or 16 bits")
    return image.convert("RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB")


def named(picture: Picture | Box) -> str:
    """A picture, or a box, in what is said of it."""
    if isinstance(picture, Made):
        return picture.name
    if isinstance(picture, Image.Image):
        return f"picture of {picture.width}x{picture.height}"
    return f"box {','.join(f'{side:g}' for side in picture)}" if isinstance(picture, tuple) else str(picture)
