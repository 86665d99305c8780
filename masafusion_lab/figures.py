"""Figures of a case's attention, to be read in print: words over pictures, self-attention, interference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from masafusion_lab.heat import components
from masafusion_lab.look import OF, SERIES, WIDTH, drawn, styled
from masafusion_lab.maps import Attention
from masafusion_lab.report import INK, MARK, NAMES
from masafusion_lab.report import picture as as_picture
from masafusion_lab.runs import write_picture
from masafusion_lab.taps import region

MOST = 10
"""Word maps side by side at most."""


def figures(attention: Attention, pictures: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """All figures of a case by name; `pictures` by latent: "source", "t2i", "target"."""
    made = {"words": words(attention, pictures), "self_attention": self_attention(attention, pictures)}
    return made | ({"interference": interference(attention)} if "mask" in attention.tensors else {})


def draw(folder: Path, pictures: Mapping[str, Image.Image], attention: Attention) -> dict[str, Image.Image]:
    """Write the figures of a case into its folder."""
    made = figures(attention, pictures)
    for name, figure in made.items():
        write_picture(folder / f"attention_{name}.png", figure)
    return made


@styled
def words(attention: Attention, pictures: Mapping[str, Image.Image]) -> Image.Image:
    """The word maps over the pictures, as in the paper's Figure 10, with the specials."""
    maps = {x: attention.words(x) for x in pictures}
    heats = {x: of.all() for x, of in maps.items()}
    longest = max(map(len, heats.values()))
    lines = -(-longest // MOST)
    columns = -(-longest // lines)
    sheet = Sheet(len(heats) * lines, columns + 1, next(iter(pictures.values())), foot=0.7)
    for top, (x, of) in enumerate(heats.items()):
        sheet.put(top * lines, 0, pictures[x], NAMES.get(x, x), weight="bold", fontsize=6.5)
        prompt = attention.facts["prompts"][attention.facts["branches"][attention.branch(x)]["text"]]
        edited = {prompt["words"][k][0] for k in prompt["edited"]}
        for k, (word, heat) in enumerate(of.items()):
            title = f"{word}\n{100 * float(heat.values.max()) / maps[x].steps:.3g} %"
            place = top * lines + k // columns, 1 + k % columns
            colour, size = MARK if word in edited else INK, max(5, min(8, 120 * sheet.w / len(word)))
            sheet.put(*place, heat.overlay(pictures[x]), title, color=colour, fontsize=size)
    sheet.bar(
        "cross-attention, from the lowest (0) to the highest (1) of each map; under a word the highest share of a "
        "pixel's\nattention that it has; in red the words that the edit changes"
    )
    return drawn(sheet.figure)


@styled
def self_attention(attention: Attention, pictures: Mapping[str, Image.Image]) -> Image.Image:
    """What the region, and a pixel inside and one outside, attend to, by picture; and principal components."""
    pictures = {x: picture for x, picture in pictures.items() if attention.seen("pixels", attention.branch(x))}
    mask = attention.tensors.get("mask")
    points = _points(mask)
    sheet = Sheet(len(pictures), 2 + (mask is not None) + len(points), next(iter(pictures.values())), foot=0.85)
    all_maps = [attention.pixels(x) for x in pictures]
    for row, (x, maps, parts) in enumerate(zip(pictures, all_maps, components(all_maps), strict=True)):
        picture = pictures[x]
        sheet.put(row, 0, picture, NAMES.get(x, x), mask, weight="bold")
        asked = {} if mask is None else {"the region": maps.region(mask)}
        asked |= {name: maps.pixel(x0, y0) for name, (x0, y0) in points.items()}
        for column, (name, heat) in enumerate(asked.items(), 1):
            title = f"what {name} attends to\nup to {float(heat.values.max()):.1f} times the mean"
            left, top, w, h = sheet.put(row, column, heat.overlay(picture), title, mask, fontsize=7)
            if place := points.get(name):
                for colour, size, width in (("white", 8, 2), ("#00b8d4", 7, 1)):
                    sheet.axes.plot(left + place[0] * w, top + place[1] * h, "+", color=colour, ms=size, mew=width)
        colours = as_picture(parts).resize(picture.size, Image.Resampling.BICUBIC)
        title = "principal components of all,\nfirst three as red, green, blue"
        sheet.put(row, sheet.columns - 1, colours, title, fontsize=6.5)
    sheet.bar("self-attention, from the lowest (0) to the highest (1) of each map\n" + nearness(attention))
    return drawn(sheet.figure)


class Sheet:
    """Titled pictures of one size in a grid, on one pair of axes that are measured in inches from the top left."""

    def __init__(self, rows: int, columns: int, picture: Image.Image, *, foot: float) -> None:
        self.columns, self.gap, self.head, self.foot = columns, 0.06, 0.34, foot
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
        self.axes.text(left + self.w / 2, top - 0.04, title, ha="center", va="bottom", **style)
        if mask is not None and 0 < float(mask.mean()) < 1:
            edge = F.interpolate(mask[None, None].float(), (picture.height, picture.width))[0, 0].numpy()
            for colour, width in (("black", 1.6), ("white", 0.8)):  # seen on snow too
                self.axes.contour(edge, levels=[0.5], extent=where, origin="upper", colors=colour, linewidths=width)
        return left, top, self.w, self.h

    def bar(self, label: str) -> None:
        """Add the colour bar of all maps at the foot, with what it means."""
        axes = self.figure.add_axes((0.1, 1 - (self.height - self.foot + 0.16) / self.height, 0.8, 0.08 / self.height))
        bar = self.figure.colorbar(ScalarMappable(Normalize(0, 1), "inferno"), axes, orientation="horizontal")
        bar.set_label(label)


def nearness(attention: Attention) -> str:
    """How far the self-attention of the other pictures is from the target's own, inside the region, in words."""
    target = attention.branch("target") if "target" in attention.facts["latents"] else ""
    said = []
    for x, its in attention.facts["latents"].items():
        pair = f"{its['inside']}:{target}"
        if attention.seen("distance", pair):
            apart = float(attention.curves("distance", pair)[..., 0].nanmean())
            said.append(f"{NAMES.get(x, x)} {apart:.3f}")
    where = " inside the region" if "mask" in attention.tensors else ""
    return f"distance from the target's own self-attention{where}, 0 to 1: {', '.join(said)}" if said else ""


@styled
def interference(attention: Attention) -> Image.Image:
    """What is read across the border of the region by step and by layer, words beyond it, distances to the target."""
    latents, main = attention.facts["latents"], attention.main
    its, mask = latents[main], attention.tensors["mask"][None, None]
    mixed, flow = (attention.interference(main, kind) for kind in ("mixed", "flow"))
    figure = Figure((WIDTH, 5.0), layout="constrained")
    ((by_step, by_layer), (spill, distance)) = figure.subplots(2, 2)
    levels = [layer["level"] for layer in attention.facts["layers"]["self"]]
    sizes = [[-(-side // 2**level) for side in attention.facts["grid"]] for level in levels]
    inside = np.array([float(region(mask, (h, w)).mean()) for h, w in sizes])
    depths = np.array(attention.depths("flow", its["inside"]))
    sides = (("inside", "outside", "kept", 1 - inside), ("outside", "inside", "new", inside))
    for k, (here, there, what, even) in enumerate(sides):
        _curve(by_step, mixed[..., k].nanmean(0), f"{here} ({its[here]}): of what is {what}", SERIES[k])
        _curve(by_step, flow[..., k].nanmean(0), f"{here}: from {there}", SERIES[k], dashed=True)
        at = depths + 0.4 * k - 0.2
        by_layer.bar(at, flow[..., k].nanmean(1), 0.38, color=SERIES[k], label=f"{here}: from {there}")
        by_layer.plot(at, even[depths], "_", color=INK, ms=6, label="if attention were even" if k else None)
    _labelled(by_step, f"{NAMES.get(main, main)}: what pixels in- and outside A read across", "share of attention mass")
    _labelled(by_layer, "the same by place alone, by layer", "share of attention mass", "layer, in running order")
    for x, of in latents.items():
        mass = _curves(attention, "spill", of["inside"])
        if mass is not None and float(mass.nansum()) > 0:
            mass = mass.nansum(0)
            _curve(spill, mass[:, 1] / mass.sum(-1), f"{NAMES.get(x, x)} ({of['inside']})", OF.get(x, INK))
            if of["inside"] != of["outside"] and x == main:
                used = attention.spilled(x).nanmean(0)
                _curve(spill, used, f"{NAMES.get(x, x)}, as it is used", OF.get(x, INK), dashed=True)
        apart = _curves(attention, "distance", f"{of['inside']}:{its['inside']}")
        if apart is not None:
            _curve(distance, apart[..., 0].nanmean(0), NAMES.get(x, x), OF.get(x, INK))
    spill.axhline(1 - float(mask.mean()), color=INK, lw=0.8, ls=":", label="if attention were even")
    _labelled(spill, "the edited words: cross-attention outside A", "share of the words' mass")
    _labelled(distance, "distance to the target's own self-attention in A", "total variation, 0 to 1")
    return drawn(figure)


def _curves(attention: Attention, kind: str, name: str) -> torch.Tensor | None:
    """(layers, T, 2), or None where nothing was recorded."""
    return attention.curves(kind, name) if attention.seen(kind, name) else None


def _curve(axes: Any, values: torch.Tensor, label: str, colour: str, *, dashed: bool = False) -> None:
    """One curve over the steps that were seen."""
    at = (~values.isnan()).nonzero().flatten()
    line, width, size = ("--o", 0.9, 1.5) if dashed else ("-o", 1.3, 2.5)
    axes.plot(at, values[at], line, color=colour, label=label, ms=size, lw=width)


def _labelled(axes: Any, title: str, y: str, x: str = "step, from noise to picture") -> None:
    axes.set(title=title, xlabel=x, ylabel=y, ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none")  # it may lie over bars
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
