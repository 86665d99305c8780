"""The one look of all figures: sizes, fonts and colours that can be read in print, and how a figure is kept."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from masafusion_lab.fonts import legible
from masafusion_lab.report import INK, LINE, PAPER
from masafusion_lab.runs import replacing

WIDTH = 7.2
"""Inches of a figure over the whole width of a page."""
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
"""Of curves and marks, told apart by colour-blind readers too (Okabe and Ito)."""
OF = {"source": "#0072b2", "t2i": "#e69f00", "target": "#009e73"}
"""Of latents."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=SERIES),
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "figure.facecolor": PAPER,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # "$" in a prompt is a dollar
}


styled = rc_context(STYLE)
"""Decorates what draws: in this style, and matplotlib's settings are as they were afterwards."""


def panel(width: float = WIDTH, height: float = 4.2) -> tuple[Figure, Any]:
    """A figure in inches with one pair of axes."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


@styled
def save(figure: Figure, *paths: Path) -> None:
    """Write a figure, each file in the format of its name; as PNG the same bytes whenever it is the same."""
    legible(figure)
    for path in paths:
        with replacing(path) as partial:
            figure.savefig(partial, metadata={"Software": None} if path.suffix == ".png" else None)


@styled
def drawn(figure: Figure) -> Image.Image:
    """The figure as a picture."""
    legible(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    with Image.open(data) as picture:
        return picture.convert("RGB")
