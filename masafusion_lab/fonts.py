"""Labels in any script: texts in fonts of this machine that have their letters; what none has is named."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator
from functools import cache
from itertools import groupby

from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from PIL import ImageDraw, ImageFont

USUAL = "DejaVu Sans"
"""The font that matplotlib brings along."""

NO_LETTER = "\N{WHITE SQUARE}"


def legible(figure: Figure) -> None:
    """Choose fonts for every text of a figure; letters that none has become squares, and are named below it."""
    lost: set[str] = set()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        written = text.get_text()
        if written.isascii():
            continue
        missing = unwritable(written)
        shown = "".join(NO_LETTER if letter in missing else letter for letter in written)
        text.set_text(shown)
        text.set_fontfamily([USUAL, *sorted({family(letter) for letter in shown if not letter.isspace()} - {USUAL})])
        lost |= missing
    if lost:
        note = figure.text(0.005, 0.003, named(lost), fontsize=5, va="bottom", wrap=True)
        if isinstance(engine := figure.get_layout_engine(), ConstrainedLayoutEngine):
            height = note.get_window_extent().y1 / figure.bbox.height
            engine.set(rect=(0, height, 1, 1 - height))


def unwritable(text: str) -> set[str]:
    """The letters of a text that no font of this machine has."""
    return {letter for letter in text if not (letter.isascii() or letter.isspace() or family(letter))}


def named(letters: Collection[str]) -> str:
    """What no font here has, six letters by name; "" for none."""
    said = ", ".join(f"U+{ord(letter):04X} {unicodedata.name(letter, '')}".strip() for letter in sorted(letters)[:6])
    more = f" and {len(letters) - 6} more" if len(letters) > 6 else ""
    return f"no font here has {said}{more}" if letters else ""


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, *, fill: str, anchor: str = "ls"
) -> None:
    """Write a text of one line over a picture, as `ImageDraw.text` does, each letter in a font that has it."""
    text = " ".join(text.split())
    if text.isascii():
        draw.text(at, text, fill, ImageFont.load_default(size), anchor)
        return
    missing = unwritable(text)
    shown = "".join(NO_LETTER if letter in missing else letter for letter in text)
    pieces = [(_font(name, size), "".join(letters)) for name, letters in groupby(shown, family)]
    x = at[0] - {"l": 0, "m": 0.5, "r": 1}[anchor[0]] * sum(font.getlength(piece) for font, piece in pieces)
    for font, piece in pieces:
        draw.text((x, at[1]), piece, fill, font, f"l{anchor[1]}")
        x += font.getlength(piece)


@cache
def family(letter: str) -> str:
    """The font of this machine in which a letter is written, the usual one if it has it; "" if none has."""
    return next((name for name, letters in _fonts() if ord(letter) in letters), "")


def _fonts() -> Iterator[tuple[str, frozenset[int]]]:
    """The fonts by name, the usual one first, with the code points that each has."""
    files = _files()
    for name in sorted(files, key=lambda name: (name != USUAL, name)):
        yield name, _letters(files[name])


@cache
def _files() -> dict[str, str]:
    """The upright fonts' files by name, of several weights the regular one; none that has a box for every letter."""
    upright = [font for font in fontManager.ttflist if font.style == "normal" and "Last Resort" not in font.name]
    return {font.name: font.fname for font in sorted(upright, key=_usual)}


def _usual(font: FontEntry) -> tuple[bool, bool]:
    return font.weight in (400, "normal"), font.stretch == "normal"


@cache
def _letters(file: str) -> frozenset[int]:
    try:
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError):  # removed, or damaged, since matplotlib listed it
        return frozenset()


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_files()[name or USUAL], size)
