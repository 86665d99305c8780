"""A contact sheet of edits by kind, to be looked at: `python -m masafusion_lab.picturebook.sheet [--out sheet.png]`."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from masafusion_lab import InputError
from masafusion_lab.picturebook.edits import EDITS, Example, edit
from masafusion_lab.picturebook.scene import SPLITS

COLUMNS = ("source", "target", "region: exact, loose", "sketch", "canny", "pose")
PAPER, TEXT, ACCENT, GAP = (250, 248, 243), (52, 46, 66), (206, 70, 60), 8
log = logging.getLogger(__name__)


def region(example: Example) -> np.ndarray:
    """The exact region red over the greyed source, the loose one pink: uint8 (size, size, 3)."""
    grey = np.repeat(example.source_picture.mean(axis=2, keepdims=True), 3, axis=2) * 0.5 + 110
    for mask, colour in ((example.loose, (255, 170, 190)), (example.exact, (220, 40, 60))):
        grey[mask] = 0.45 * grey[mask] + 0.55 * np.array(colour)
    return grey.astype(np.uint8)


def sheet(split: str = "test", size: int = 128, first: int = 0, each: int = 1) -> Image.Image:
    """`each` edits of every kind, one a row, with prompts and instruction beneath."""
    if each < 1:
        raise InputError(f"each: {each} edits of a kind; at least 1")
    side = max(size, 128)
    font, bold = ImageFont.load_default(12), ImageFont.load_default(14)
    step, head, wide = side + 62, 30, GAP + len(COLUMNS) * (side + GAP)
    page = Image.new("RGB", (wide, head + len(EDITS) * each * step), PAPER)
    pen = ImageDraw.Draw(page)
    for c, title in enumerate(COLUMNS):
        pen.text((GAP + c * (side + GAP), 8), title, TEXT, bold)
    for row in range(len(EDITS) * each):
        e, top = edit(split, first + row % each, EDITS[row // each], size), head + row * step
        for c, tile in enumerate((e.source_picture, e.target_picture, region(e), e.sketch, e.canny, e.pose)):
            picture = Image.fromarray(tile).convert("RGB")
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (GAP + c * (side + GAP), top))
        pen.text((GAP, top + side + 3), f"{e.kind}: {e.instruction}", ACCENT, bold)
        pen.text((GAP, top + side + 21), f"source: {e.source_prompt}", TEXT, font)
        pen.text((GAP, top + side + 37), f"target: {e.target_prompt}", TEXT, font)
    return page


def milliseconds(split: str, size: int, n: int = 160) -> dict[str, float]:
    """Milliseconds of one case: finding its scenes, drawing both pictures, and each hint."""
    spent = dict.fromkeys(("scenes", "pictures", "regions", "sketch", "canny", "pose"), 0.0)
    for index in range(n):
        clock = [time.perf_counter()]
        e = edit(split, index, size=size)
        for names in ((), ("source_picture", "target_picture"), ("exact", "loose"), ("sketch",), ("canny",), ("pose",)):
            for name in names:
                getattr(e, name)
            clock.append(time.perf_counter())
        for k, what in enumerate(spent):
            spent[what] += (clock[k + 1] - clock[k]) * 1e3 / n
    return spent


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m masafusion_lab.picturebook.sheet", description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--first", type=int, default=0, help="index of the first case of each kind")
    parser.add_argument("--each", type=int, default=1, help="cases of a kind")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    parser.add_argument("--time", action="store_true", help="measure the drawing and write no sheet")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.time:
            spent = milliseconds(args.split, args.size)
            for what, ms in {**spent, "a whole case": sum(spent.values())}.items():
                log.info("%-14s %6.2f ms", what, ms)
            return
        sheet(args.split, args.size, args.first, args.each).save(args.out)
        log.info("%s", args.out)
    except (InputError, OSError, ValueError) as error:  # a suffix of no kind of picture
        parser.error(str(error))


if __name__ == "__main__":
    main()
