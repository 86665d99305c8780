"""Annotation without a page: drawings as they travel, the region as the model sees it, outlines, and changed tokens."""

from __future__ import annotations

import base64
import difflib
import io
import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from masafusion_lab import InputError, hints
from masafusion_lab.data.case import Case, Picture
from masafusion_lab.data.pictures import LINES, open_hint, open_mask, open_picture
from masafusion_lab.picturebook import MODEL
from masafusion_lab.region import USUAL, Region

log = logging.getLogger(__name__)

SMALL, LARGE = 640, 1024
"""Pixels of the long side that is drawn upon: a smaller picture is magnified, a larger one reduced."""

LARGEST = 8_000_000
"""Characters of a drawing that travels."""

SKETCHER = MODEL / "judge" / "sketcher"
"""The folder of the network that draws a picture-book picture's outlines."""

LAYERS = ("region", "sketch", "pose")
"""What is drawn over a picture; a pose, in openpose's colours, comes from a file."""

PNG = "data:image/png;base64,"
TINTS = {"edited": (235, 94, 40), "grazed": (245, 190, 60)}
"""Of the latent cells of A, and of those among them that the drawing covers by less than half."""


def canvas_size(width: int, height: int) -> tuple[int, int]:
    """The size to draw upon over a picture: its own, a whole multiple of a small one, or a large one reduced."""
    long = max(width, height)
    if long > LARGE:
        return max(1, round(width * LARGE / long)), max(1, round(height * LARGE / long))
    scale = max(1, SMALL // long)
    return width * scale, height * scale


def to_url(image: Image.Image) -> str:
    """The picture as a data: URL, PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return PNG + base64.b64encode(file.getvalue()).decode()


def from_url(url: Any, size: tuple[int, int], *, colours: bool = False) -> Image.Image | None:
    """The drawing on black, mode L or RGB, of a data: URL; None if nothing is drawn, or there is no URL.

    Raises InputError for anything but a PNG of that size.
    """
    if not url:
        return None
    try:
        if not isinstance(url, str) or len(url) > LARGEST or not url.startswith(PNG):
            raise ValueError
        drawing = Image.open(io.BytesIO(base64.b64decode(url.removeprefix(PNG), validate=True)), formats=["PNG"])
        if drawing.size != size:
            raise ValueError
        drawn = open_picture(drawing) if colours else open_mask(drawing, "light")
    except Exception:  # Pillow raises anything for a damaged file
        raise InputError(f"the drawing is not a PNG of {size[0]}x{size[1]}; load the page again") from None
    return drawn if drawn.getbbox() else None


def over(drawing: Image.Image | None, picture: Image.Image) -> Image.Image:
    """A drawing, or nothing, at the size to draw upon over a picture, its lines not blurred by magnification."""
    size = canvas_size(*picture.size)
    if drawing is None:
        return Image.new("L", size)
    if drawing.size not in (picture.size, size):
        sizes = *drawing.size, *picture.size
        log.warning("what is drawn is %dx%d, the picture %dx%d; it is brought to the picture's size", *sizes)
    grows = drawing.width < size[0]
    return drawing.resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def reduced(drawing: Image.Image, picture: Image.Image) -> Image.Image:
    """A sketch as it is kept: at the size of a picture that was magnified to draw upon, each pixel the mean of its."""
    return drawing.reduce(drawing.width // picture.width) if drawing.width > picture.width else drawing


def seen(
    picture: Image.Image,
    region: Image.Image,
    *,
    factor: int,
    multiple: int,
    native: int,
    size: str,
    dilate: int,
    how: Region = USUAL,
) -> tuple[Image.Image, str]:
    """The picture at working size with the latent cells of A tinted, as `TINTS` says, and what to know of them.

    Raises InputError for a region that cannot be used.
    """
    from torch.nn.functional import avg_pool2d

    from masafusion_lab.data.prepared import prepare

    prepared = prepare(
        Case("picture", picture, "", "", mask=region),
        factor=factor,
        multiple=multiple,
        native=native,
        size=size or None,
        dilate=dilate,
        how=how,
    )
    if prepared.mask is None or prepared.mask_full is None:
        raise InputError("nothing is painted: paint the region to edit")
    edited = prepared.mask[0] > 0
    grazed = edited & (avg_pool2d(prepared.mask_full, factor)[0] < 0.5)
    cell = np.ones((factor, factor, 1))
    tint = np.kron(np.where(grazed[..., None], *(np.array(TINTS[name]) / 255 for name in ("grazed", "edited"))), cell)
    weight = 0.55 * np.kron(edited[..., None], cell)
    pixels = (1 - weight) * prepared.pixels.permute(1, 2, 0).numpy() + weight * tint
    height, width = pixels.shape[:2]
    shown = Image.fromarray((pixels * 255).round().astype(np.uint8))
    said = (
        f"{int(edited.sum())} of {edited.numel()} latent cells are edited (A), each {factor}×{factor} pixels of the "
        f"{width}×{height} that the model works at."
    )
    if grazed.any():
        said += (
            f" {int(grazed.sum())} of them are painted by less than half: they are edited as a whole here, and would "
            "be lost if the mask were shrunk by area."
        )
    scale = max(1, SMALL // max(width, height))
    return shown.resize((width * scale, height * scale), Image.Resampling.NEAREST), said


def outlines(picture: Image.Image) -> Image.Image:
    """A picture-book picture's outlines, white on black, mode L, by the trained sketcher."""
    from masafusion_lab.data.prepared import tensor

    lines = _sketcher(SKETCHER)(tensor(picture.convert("RGB"))[None])[0, 0].numpy()
    return Image.fromarray((lines * 255).round().astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)


@cache
def _sketcher(folder: Path) -> Any:
    from masafusion_lab.picturebook.sketcher import Sketcher

    return Sketcher.load(folder)


def _by_pidinet(weights: Path, picture: Image.Image) -> Image.Image:
    from masafusion_lab import pidinet

    return pidinet.sketch(picture, weights)


def ways(pidinet: str) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """How a sketch may be drawn from a picture, by name: those whose weights are there."""
    drawn: dict[str, Callable[[Image.Image], Image.Image]] = {"outlines": outlines} if SKETCHER.is_dir() else {}
    drawn |= {"pidinet": partial(_by_pidinet, Path(pidinet))} if pidinet else {}
    return drawn | {"canny": hints.canny}


def pieces(tokenizer: Any, source: str, target: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both prompts, cut where the tokenizer cuts, each piece with whether its token is in this prompt alone."""
    cuts, ids = [], []
    for prompt in (source, target):
        tokens = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [start for start, _ in tokens.offset_mapping[1:]] + [len(prompt)]
        starts = [0, *ends[:-1]]
        cuts.append([prompt[i:j] for i, j in zip(starts, ends, strict=True)] if tokens.input_ids else [])
        ids.append(tokens.input_ids)
    blocks = difflib.SequenceMatcher(None, ids[0], ids[1], autojunk=False).get_matching_blocks()
    kept = [{b[side] + k for b in blocks for k in range(b.size)} for side in (0, 1)]
    before, after = ([(text, k not in kept[side]) for k, text in enumerate(cuts[side])] for side in (0, 1))
    return before, after


def opened(case: Case, by: str = "auto") -> tuple[Image.Image, dict[str, Image.Image]]:
    """The picture of a case, and what is drawn over it (mask, one hint of lines, pose) at the size to draw upon.

    `by`: how its mask is read, see `Region.by`.
    """
    picture = open_picture(case.image)
    lines = [kind for kind in LINES if kind in case.hints]
    if len(lines) > 1:
        log.warning("of %s the first is shown, and used", " and ".join(lines))
    kinds = [*lines[:1], *(kind for kind in case.hints if kind not in LINES)]
    drawings = {kind: over(open_hint(case.hints[kind], kind), picture) for kind in kinds}
    if isinstance(case.mask, tuple):
        drawings["mask"] = Image.new("L", canvas_size(*picture.size))
        sides = picture.size * 2 if max(case.mask) > 1 else (1, 1) * 2
        corners = [s / side * full for s, side, full in zip(case.mask, sides, drawings["mask"].size * 2, strict=True)]
        ImageDraw.Draw(drawings["mask"]).rectangle(corners, fill=255)
    elif case.mask is not None:
        drawings["mask"] = over(open_mask(case.mask, by), picture)
    return picture, drawings


def read_drawings(sent: Any, picture: Image.Image, kind: str = "sketch") -> dict[str, Image.Image | None]:
    """The drawings, by column, that a page has sent as {LAYER: URL}, see `LAYERS`; none if it sent none.

    `kind`: of hint that the sketch is. Hints come out at the picture's own size, if that was magnified. Raises
    InputError.
    """
    if kind not in LINES:
        raise InputError(f"{kind}: is no hint of lines, which are {', '.join(LINES)}")
    if not isinstance(sent, Mapping) or not {"region", "sketch"} <= set(sent):
        return {}
    size = canvas_size(*picture.size)
    drawn = {layer: from_url(sent[layer], size, colours=layer == "pose") for layer in LAYERS if layer in sent}
    hints = {kind if layer == "sketch" else layer: drawing and reduced(drawing, picture)
             for layer, drawing in drawn.items() if layer != "region"}  # fmt: skip
    return {"mask": drawn["region"]} | hints


def layer_of(column: str) -> str:
    """The layer that a drawing is of, by its column in a manifest."""
    return {"mask": "region", "canny": "sketch"}.get(column, column)


def read_layer(file: Picture, layer: str, by: str = "auto") -> Image.Image:
    """What a file shows of a layer, on black; of lines on white their inverse, with a warning. Raises InputError."""
    return open_mask(file, by) if layer == "region" else open_hint(file, layer)
