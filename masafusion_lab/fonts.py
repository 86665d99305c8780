"""Labels in any script: a figure's texts in fonts of this machine that have their letters; what none has is named."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.text import Text

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
        families = {letter: family(letter) for letter in written if not letter.isspace()}
        missing = {letter for letter, found in families.items() if not found}
        text.set_text("".join(NO_LETTER if letter in missing else letter for letter in written))
        text.set_fontfamily([USUAL, *sorted({found for found in families.values() if found} - {USUAL})])
        lost |= missing
    if lost:
        said = ", ".join(f"U+{ord(letter):04X} {unicodedata.name(letter, '')}".strip() for letter in sorted(lost)[:6])
        more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
        figure.text(0.005, 0.003, f"no font here has {said}{more}", fontsize=5, va="bottom")


@cache
def family(letter: str) -> str:
    """The font of this machine in which a letter is written, the usual one if it has it; "" if none has."""
    return next((name for name, letters in _fonts() if ord(letter) in letters), "")


def _fonts() -> Iterator[tuple[str, frozenset[int]]]:
    """The fonts by name, the usual one first, with the code points that each has."""
    found = {font.name: font.fname for font in fontManager.ttflist if font.style == "normal"}
    for name in sorted(found, key=lambda name: (name != USUAL, name)):
        yield name, _letters(found[name])


@cache
def _letters(file: str) -> frozenset[int]:
    return frozenset(get_font(file).get_charmap())
