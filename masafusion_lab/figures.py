"""Figures of a case's attention, to be read in print: words over pictures, self-attention, interference."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from masafusion_lab.maps import SPECIALS, Attention
from masafusion_lab.report import INK, NAMES
from masafusion_lab.report import picture as as_picture
from masafusion_lab.runs import write_picture

RED = "#c62828"
COLOURS = {"source": "#0072b2", "t2i": "#e69f00", "target": "#009e73"}
"""Of curves, told apart by colour-blind readers too (Okabe and Ito)."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 200,
}
WIDTH, MOST = 7.2, 10
"""Inches of a figure, and word maps side by side in it at most."""


def figures(attention: Attention, pictures: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """All figures of a case by name; `pictures` by latent: "source", "t2i", "target"."""
    made = {"words": words(attention, pictures), "self_attention": self_attention(attention, pictures)}
    return made | ({"interference": interference(attention)} if "mask" in attention.tensors else {})


def draw(folder: Path, pictures: Mapping[str, Image.Image], attention: Attention) -> dict[str, Image.Image]:
    """Write the figures of a case into its folder."""
    drawn = figures(attention, pictures)
    for name, figure in drawn.items():
        write_picture(folder / f"attention_{name}.png", figure)
    return drawn


def words(attention: Attention, pictures: Mapping[str, Image.Image]) -> Image.Image:
    """The word maps over the pictures, as in the paper's Figure 10, with the specials."""
    maps = {x: attention.words(x).all() for x in pictures}
    longest = max(map(len, maps.values()))
    lines = -(-longest // MOST)
    columns = -(-longest // lines)
    with rc_context(STYLE):
        sheet = Sheet(len(maps) * lines, columns + 1, next(iter(pictures.values())), foot=0.7)
        for top, (x, of) in enumerate(maps.items()):
            sheet.put(top * lines, 0, pictures[x], NAMES.get(x, x), weight="bold", fontsize=7)
            prompt = attention.facts["prompts"][attention.facts["branches"][attention.branch(x)]["text"]]
            edited = {prompt["words"][k][0] for k in prompt["edited"]}
            for k, (word, heat) in enumerate(of.items()):
                title = f"⟨{word}⟩" if word in SPECIALS else word
                title += f"\n{100 * float(heat.values.max()) / attention.steps:.2g} %"
                place = top * lines + k // columns, 1 + k % columns
                sheet.put(*place, heat.overlay(pictures[x]), title, color=RED if word in edited else INK)
        axes = sheet.figure.add_axes((0.1, 0.52 / sheet.height, 0.8, 0.08 / sheet.height))
        bar = sheet.figure.colorbar(ScalarMappable(Normalize(0, 1), "inferno"), axes, orientation="horizontal")
        bar.set_label(
            "cross-attention, from the lowest (0) to the highest (1) of each map; under a word the highest share of a "
            "pixel's\nattention that it has; in red the words that the edit changes"
        )
        return _drawn(sheet.figure)


def self_attention(attention: Attention, pictures: Mapping[str, Image.Image]) -> Image.Image:
    """What the region, and a pixel inside and one outside, attend to, by picture; and principal components."""
    mask = attention.tensors.get("mask")
    points = _points(mask)
    with rc_context(STYLE):
        sheet = Sheet(len(pictures), 2 + (mask is not None) + len(points), next(iter(pictures.values())), foot=0.3)
        for row, (x, picture) in enumerate(pictures.items()):
            maps = attention.pixels(x)
            sheet.put(row, 0, picture, NAMES.get(x, x), mask, weight="bold")
            if mask is not None:
                sheet.put(row, 1, maps.region(mask).overlay(picture), "what the region\nattends to", mask)
            for column, (name, place) in enumerate(points.items(), 1 + (mask is not None)):
                title = f"what {name}\nattends to"
                left, top, w, h = sheet.put(row, column, maps.pixel(*place).overlay(picture), title, mask)
                for colour, size, width in (("white", 8, 2), ("#00b8d4", 7, 1)):
                    sheet.axes.plot(left + place[0] * w, top + place[1] * h, "+", color=colour, ms=size, mew=width)
            parts = as_picture(maps.components()).resize(picture.size, Image.Resampling.BICUBIC)
            sheet.put(row, sheet.columns - 1, parts, "its principal\ncomponents")
        sheet.figure.text(0.5, 0.1 / sheet.height, nearness(attention), ha="center", fontsize=8)
        return _drawn(sheet.figure)


class Sheet:
    """Titled pictures of one size in a grid, on one pair of axes that are measured in inches from the top left."""

    def __init__(self, rows: int, columns: int, picture: Image.Image, *, foot: float) -> None:
        self.columns, self.gap, self.head = columns, 0.06, 0.34
        self.w = (WIDTH - self.gap) / columns - self.gap
        self.h = self.w * picture.height / picture.width
        self.height = rows * (self.head + self.h + self.gap) + foot
        self.figure = Figure((WIDTH, self.height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(self.height, 0))
        self.axes.axis("off")

    def put(
        self, row: int, column: int, picture: Image.Image, title: str, mask: torch.Tensor | None = None, **style: Any
    ) -> tuple[float, float, float, float]:
        """Add a picture, with the border of a region in it; left, top, width and height of its place."""
        left, top = self.gap + column * (self.w + self.gap), self.head + row * (self.head + self.h + self.gap)
        where = (left, left + self.w, top + self.h, top)
        self.axes.imshow(picture, extent=where, aspect="auto")
        self.axes.text(left + self.w / 2, top - 0.04, title, ha="center", va="bottom", **{"fontsize": 8, **style})
        if mask is not None and 0 < float(mask.mean()) < 1:
            edge = F.interpolate(mask[None, None].float(), (picture.height, picture.width))[0, 0].numpy()
            self.axes.contour(edge, levels=[0.5], extent=where, origin="upper", colors="white", linewidths=0.8)
        return left, top, self.w, self.h


def nearness(attention: Attention) -> str:
    """How far the self-attention of the other pictures is from the target's own, inside the region, in words."""
    target = attention.branch("target") if "target" in attention.facts["latents"] else ""
    said = []
    for x, its in attention.facts["latents"].items():
        pair = f"{its['inside']}:{target}"
        if any(name.startswith(f"distance/{pair}/") for name in attention.tensors):
            apart = float(attention.curves("distance", pair)[..., 0].nanmean())
            said.append(f"{NAMES.get(x, x)} {apart:.3f}")
    return f"distance from the target's own self-attention inside the region, 0 to 1: {', '.join(said)}" if said else ""


def interference(attention: Attention) -> Image.Image:
    """Attention across the border of the region by step and by layer, words beyond it, and distances to the target."""
    facts, mask = attention.facts, attention.tensors["mask"].float()
    target, share = facts["latents"]["target"], float(mask.mean())
    flow = attention.interference()
    with rc_context(STYLE):
        figure = Figure((WIDTH, 5.0), layout="constrained")
        ((by_step, by_layer), (spill, distance)) = figure.subplots(2, 2)
        names = (f"inside → outside ({target['inside']})", f"outside → inside ({target['outside']})")
        for k, (name, colour, chance) in enumerate(zip(names, ("#0072b2", "#d55e00"), (1 - share, share), strict=True)):
            _curve(by_step, flow[..., k].nanmean(0), name, colour)
            by_step.axhline(chance, color=colour, lw=0.8, ls=":", label="if attention were even" if k else None)
            by_layer.bar(np.arange(len(flow)) + 0.4 * k - 0.2, flow[..., k].nanmean(1), 0.4, color=colour, label=name)
        _labelled(by_step, "target: attention across the border of A", "share of attention mass")
        by_layer.set(xlabel="self-attention layer, in running order", ylim=(0, 1), xticks=range(len(flow)))
        _labelled(by_layer, "the same by layer", "share of attention mass", x=None)
        for x, its in facts["latents"].items():
            mass = _curves(attention, "spill", its["inside"])
            if mass is not None and float(mass.nansum()) > 0:
                mass = mass.nansum(0)
                _curve(spill, mass[:, 1] / mass.sum(-1), NAMES.get(x, x), COLOURS.get(x, INK))
            apart = _curves(attention, "distance", f"{its['inside']}:{target['inside']}")
            if apart is not None:
                _curve(distance, apart[..., 0].nanmean(0), NAMES.get(x, x), COLOURS.get(x, INK))
        spill.axhline(1 - share, color=INK, lw=0.8, ls=":", label="if attention were even")
        _labelled(spill, "the edited words: cross-attention outside A", "share of the words' mass")
        _labelled(distance, "distance to the target's own self-attention in A", "total variation")
        return _drawn(figure)


def _curves(attention: Attention, kind: str, name: str) -> torch.Tensor | None:
    """(layers, T, 2), or None where nothing was recorded."""
    there = any(key.startswith(f"{kind}/{name}/") for key in attention.tensors)
    return attention.curves(kind, name) if there else None


def _curve(axes: Any, values: torch.Tensor, label: str, colour: str) -> None:
    """One curve over the steps that were seen."""
    seen = ~values.isnan()
    axes.plot(torch.arange(len(values))[seen], values[seen], color=colour, label=label, marker="o", ms=2.5, lw=1.3)


def _labelled(axes: Any, title: str, y: str, x: str | None = "step, from noise to picture") -> None:
    axes.set(title=title, ylabel=y, ylim=(0, 1), **({} if x is None else {"xlabel": x}))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=INK)


def _points(mask: torch.Tensor | None) -> dict[str, tuple[float, float]]:
    """The pixels farthest from the border of the region, inside and outside, as parts of width and height."""
    if mask is None:
        return {"the middle": (0.5, 0.5)}
    import cv2

    found = {}
    for name, side in (("a pixel in it", mask > 0), ("one outside", mask <= 0)):
        depth = cv2.distanceTransform(np.pad(side.numpy().astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        if depth.max() > 0:
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            found[name] = ((float(x) + 0.5) / mask.shape[1], (float(y) + 0.5) / mask.shape[0])
    return found


def _drawn(figure: Figure) -> Image.Image:
    """The figure as a picture."""
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    with Image.open(data) as picture:
        return picture.convert("RGB")
