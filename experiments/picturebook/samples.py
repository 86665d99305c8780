"""What the model makes of test prompts, as a sheet: `python -m experiments.picturebook.samples [FILE]`."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from textwrap import fill

from PIL import Image, ImageDraw, ImageFont

from experiments.picturebook.painted import Bench, told
from masafusion_lab.report import picture
from masafusion_lab.runs import write_picture

ROWS, COLUMNS, SIDE, TEXT = 3, 4, 192, 50


def main(argv: list[str] | None = None) -> None:
    """Paint and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    usual = Path("examples/samples.png")
    parser.add_argument("file", type=Path, nargs="?", default=usual, help=f"where to (default: {usual})")
    out = parser.parse_args(argv).file
    sheet = Image.new("RGB", (COLUMNS * SIDE, ROWS * (SIDE + TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    items, made = next(Bench().painted(islice(told(), ROWS * COLUMNS)))
    for k, (item, pixels) in enumerate(zip(items, made, strict=True)):
        x, y = k % COLUMNS * SIDE, k // COLUMNS * (SIDE + TEXT)
        sheet.paste(picture(pixels).resize((SIDE - 6, SIDE - 6), Image.Resampling.LANCZOS), (x + 3, y + 3))
        draw.multiline_text((x + 4, y + SIDE), fill(item.prompt, 30), fill="#1f2328", font=font)
    write_picture(out, sheet)


if __name__ == "__main__":
    main()
