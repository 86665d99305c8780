"""A sweep's results as pictures: heat maps, contact sheets, trade-off, importance, parallel coordinates."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from masafusion_lab import fonts
from masafusion_lab.landscape import Record, importance, pareto
from masafusion_lab.look import panel, styled
from masafusion_lab.metrics import MEASURES
from masafusion_lab.report import INK, LINE, MARK, PAPER, SOFT

RANGES = 12
"""Of the values of a coordinate that are too many to be shown one by one."""


def short(name: str) -> str:
    """A coordinate's name without what tables have in common: fusion_steps.start, not method.fusion_steps.start."""
    return name.removeprefix("method.").removeprefix("inversion.")


def shown_over(points: Sequence[Record], dimensions: Sequence[str]) -> list[str]:
    """The coordinates that a map is drawn over: a window's ends, or else the first two of many values."""
    starts = [name for name in dimensions if name.endswith(".start") and f"{name[:-6]}.stop" in dimensions]
    if starts:
        return [starts[0], f"{starts[0][:-6]}.stop"]
    return sorted(dimensions, key=lambda name: -len({point[name] for point in points}))[:2]


def grid(points: Sequence[Record], over: Sequence[str]) -> tuple[list[list[Any]], Callable[[Record], tuple[int, ...]]]:
    """The values of two coordinates (rows, columns; of one: a row alone), and the place of a point among them.

    Of points at random, each with a row and a column of its own, numbers are in RANGES, named by where they begin.
    """
    names = list(over) if len(over) == 2 else ["", *over]
    values = [sorted({point[name] for point in points}, key=_order) if name else [""] for name in names]
    if len(values[0]) * len(values[1]) > max(RANGES**2, 4 * len(points)):
        values = [its if isinstance(its[-1], str) else its[:: math.ceil(len(its) / RANGES)] for its in values]

    def place(point: Record) -> tuple[int, ...]:
        of = zip(names, values, strict=True)
        return tuple(bisect(its, _order(point[name]), key=_order) - 1 if name else 0 for name, its in of)

    return values, place


def _order(value: Any) -> tuple[bool, Any]:
    """What values are sorted by: numbers, then words."""
    return isinstance(value, str), value


def written(value: Any) -> str:
    """A value on an axis."""
    return value if isinstance(value, str) else f"{value:g}"


@styled
def heat_map(points: Sequence[Record], over: Sequence[str], measure: str, recommended: str) -> Figure:
    """A measure over two coordinates, the mean where they leave several points; over one coordinate it is a line.

    The best is framed, and the point that is recommended is framed by dashes.
    """
    known = MEASURES[measure]
    figure, axes = panel(5.6, 4.6 if len(over) == 2 else 3.2)
    values, place = grid(points, over)
    total, count = np.zeros([len(its) for its in values]), np.zeros([len(its) for its in values])
    for point in points:
        total[place(point)] += point[measure]
        count[place(point)] += 1
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    best = np.unravel_index((np.nanargmax if known.higher_is_better else np.nanargmin)(mean), mean.shape)
    marks = [(best, "-")] + [(place(point), ":") for point in points if point["point"] == recommended]
    columns = [written(value) for value in values[1]]
    if len(over) == 1:
        axes.plot(columns, mean[0], color=INK, marker="o", markersize=4)
        for at, style in marks:
            axes.plot(
                columns[at[1]], mean[at], "o" if style == "-" else "s", color=MARK, markersize=11, fillstyle="none"
            )
        axes.set_ylabel(known.title)
        axes.grid(axis="y", color=LINE)
    else:
        image = axes.imshow(
            np.ma.masked_invalid(mean), "viridis" if known.higher_is_better else "viridis_r", aspect="auto"
        )
        better = "higher" if known.higher_is_better else "lower"
        figure.colorbar(image, ax=axes, label=f"{known.title}; {better} is better")
        if mean.size <= 150:
            _numbers(axes, mean, known.digits if mean.size <= 60 or known.digits > 2 else 1, image)
        for at, style in marks:
            frame = Rectangle(
                (at[1] - 0.5, at[0] - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=2.5, linestyle=style
            )
            axes.add_patch(frame)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(values[0])), [written(value) for value in values[0]])
        axes.set_ylabel(short(over[0]))
    axes.set_xlabel(short(over[-1]))
    return figure


def _numbers(axes: Any, mean: np.ndarray, digits: int, image: Any) -> None:
    """The numbers in the cells, dark on light and light on dark."""
    for (row, column), value in np.ndenumerate(mean):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = INK if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else PAPER
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=6, color=colour)


@styled
def trade_off(points: Sequence[Record], names: Sequence[str], best: str) -> Figure:
    """One measure against another, with the Pareto front; the point `best` is ringed."""
    figure, axes = panel(5.6, 4.2)
    x, y = ([point[name] for point in points] for name in names)
    signs = [1 if MEASURES[name].higher_is_better else -1 for name in names]
    front = pareto([signs[0] * value for value in x], [signs[1] * value for value in y])
    axes.scatter(x, y, s=22, color=SOFT, alpha=0.7, linewidths=0, label="points")
    axes.plot([x[n] for n in front], [y[n] for n in front], color=INK, marker="o", markersize=5, label="Pareto front")
    for n, point in enumerate(points):
        if point["point"] == best:
            axes.plot(
                x[n], y[n], "o", color=MARK, markersize=12, fillstyle="none", markeredgewidth=2, label="recommended"
            )
    axes.set_xlabel(MEASURES[names[0]].title)
    axes.set_ylabel(MEASURES[names[1]].title)
    axes.grid(color=LINE, linewidth=0.6)
    axes.legend()
    return figure


@styled
def importances(points: Sequence[Record], dimensions: Sequence[str], measures: Sequence[str]) -> Figure:
    """How much of each measure's variance each coordinate explains alone."""
    figure, axes = panel(5.6, 1.2 + 0.28 * len(dimensions) * len(measures))
    shades = [INK, SOFT, "#a3abb3", "#d0d5da"]
    height = 0.8 / len(measures)
    for m, measure in enumerate(measures):
        parts = importance(points, dimensions, measure)
        at = [k + m * height for k in range(len(dimensions))]
        axes.barh(
            at, [parts[name] for name in dimensions], height * 0.9, color=shades[m % 4], label=MEASURES[measure].title
        )
    axes.set_yticks([k + 0.4 - height / 2 for k in range(len(dimensions))], [short(name) for name in dimensions])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("part of the variance that it explains alone")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


@styled
def parallel(
    points: Sequence[Record], dimensions: Sequence[str], measures: Sequence[str], goodness: Mapping[str, float]
) -> Figure:
    """Every point as a line through its coordinates and measures, the darker the better."""
    names = [*dimensions, *measures]
    figure, axes = panel(max(5.6, 1.2 * len(names)), 3.6)
    levels, ticks = [], []
    for name in names:
        its = [point[name] for point in points]
        if any(isinstance(value, str) for value in its):
            order = sorted(set(map(str, its)))
            its = [order.index(str(value)) for value in its]
            ticks.append((order[0], order[-1]))
        else:
            ticks.append((f"{min(its):.4g}", f"{max(its):.4g}"))
        low, high = min(its), max(its)
        levels.append([(value - low) / (high - low) if high > low else 0.5 for value in its])
    for n in sorted(range(len(points)), key=lambda n: goodness.get(points[n]["point"], 0.0)):
        good = goodness.get(points[n]["point"], 0.0)
        axes.plot(range(len(names)), [level[n] for level in levels], color=_shade(good), linewidth=1 + good, alpha=0.8)
    for k, (low, high) in enumerate(ticks):
        axes.vlines(k, 0, 1, color=LINE, zorder=0)
        axes.text(k, -0.03, low, ha="center", va="top", fontsize=8, color=SOFT)
        axes.text(k, 1.03, high, ha="center", va="bottom", fontsize=8, color=SOFT)
    axes.set_xticks(range(len(names)), [short(name) for name in names], rotation=20, ha="right")
    axes.tick_params(axis="x", pad=14, length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure


def _shade(good: float) -> tuple[float, float, float]:
    """From the colour of lines to that of what is best."""
    low, high = ([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in (LINE, MARK))
    red, green, blue = (a + good**2 * (b - a) for a, b in zip(low, high, strict=True))
    return red, green, blue


def contact_sheet(
    records: Sequence[Record], folder: Path, over: Sequence[str], source: Image.Image, best: str, side: int = 112
) -> Image.Image:
    """Figure 12: the pictures of a case over two coordinates, the best framed, beside the source."""
    values, place = grid(records, over)
    pictures: dict[tuple[int, ...], Record] = {}
    for record in records:
        if record["picture"] and (place(record) not in pictures or record["point"] == best):
            pictures[place(record)] = record
    side = min(side, math.isqrt(4 * 10**7 // (len(values[0]) * len(values[1]))))  # that it can be opened again
    width = round(side * source.width / source.height)
    gap = 6
    left, top = 84 + width + 4 * gap, 44
    wide, high = left + len(values[1]) * (width + gap) + gap, top + max(1, len(values[0])) * (side + gap) + gap
    note = fonts.named(fonts.unwritable("".join(written(value) for line in values for value in line)))
    sheet = Image.new("RGB", (wide, high + 20 * bool(note)), PAPER)
    draw = ImageDraw.Draw(sheet)
    sheet.paste(source.convert("RGB").resize((width, side), Image.Resampling.LANCZOS), (gap, top))
    labels = [
        ((gap, top - 6), "source", INK, "ls"),
        ((left, 14), short(over[-1]), SOFT, "ls"),
        ((gap, high + 8), note, SOFT, "ls"),
    ]
    for column, value in enumerate(values[1]):
        labels.append(((left + column * (width + gap) + width // 2, top - 6), written(value), INK, "ms"))
    if len(over) == 2:
        labels.append(((left - 2 * gap, 14), short(over[0]), SOFT, "rs"))
        for row, value in enumerate(values[0]):
            labels.append(((left - 2 * gap, top + row * (side + gap) + side // 2), written(value), INK, "rm"))
    for at, text, fill, anchor in labels:
        fonts.write(draw, at, text, 13, fill=fill, anchor=anchor)
    for (row, column), record in pictures.items():
        x, y = left + column * (width + gap), top + row * (side + gap)
        with Image.open(folder / record["picture"]) as picture:
            sheet.paste(picture.convert("RGB").resize((width, side), Image.Resampling.LANCZOS), (x, y))
        if record["point"] == best:
            draw.rectangle((x - 3, y - 3, x + width + 2, y + side + 2), outline=MARK, width=3)
    return sheet
