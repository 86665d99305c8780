"""Figures of the paper as small benchmarks: cases in rows, settings in columns, and a table of what they reach.

Every script of this kind takes the same: [--count N] [--out FOLDER] [KEY=VALUE ...], keys as of masafusion bench, such
as model.path=CompVis/stable-diffusion-v1-4 bench.data=magicbrush bench.root=FOLDER bench.hint=sketch pidinet=FILE. What
is there is not made again.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure as Canvas
from PIL import Image, ImageChops, ImageFilter

from experiments.commandline import in_one_line
from masafusion_lab import bench, config, interrupt, protocol, tables
from masafusion_lab.data import sets
from masafusion_lab.data.case import Case
from masafusion_lab.data.pictures import open_hint, open_mask, open_picture
from masafusion_lab.look import save, styled
from masafusion_lab.progress import bar
from masafusion_lab.runs import write_parquet, write_text
from masafusion_lab.scoring import Scorer

SIDE = 1.15
"""Inches of a picture's side."""
SHOWN = 40
"""Cases that are drawn; the table is of all."""


@dataclass(frozen=True)
class Figure:
    """What a figure shows: `variants` (title -> keys, as typed), of edits of these kinds, with these keys in all.

    `panels`: title -> variant and which of its pictures (target, intermediate, reconstruction), if not the target of
    each; `lead`: what stands before them.
    """

    name: str
    variants: Mapping[str, str]
    kinds: Sequence[str] = ()
    words: Sequence[str] = ("inversion.name=direct",)
    panels: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    lead: Sequence[str] = ("source", "target", "sketch")
    turns: str = "single"
    count: int = 8


def main(doc: str | None, figure: Figure, argv: Sequence[str] | None = None) -> bench.Benchmark:
    """Run a figure's benchmark, print its table, and draw it: FOLDER/NAME.png, .pdf and table.md."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    unit = "sessions" if figure.turns == "multi" else "edits"
    parser.add_argument(
        "--count",
        type=int,
        default=figure.count,
        help=f"{unit} of the picture-book world, or of a set; {SHOWN} are drawn",
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / figure.name, help="where it is kept")
    parser.add_argument("words", nargs="*", help="key=value settings, such as steps=20 or model.path=FOLDER")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    with in_one_line(parser), interrupt.handled():
        made = read(figure, given.out, given.count, given.words)
        bench.edit(made, track=bar)
        scorer = Scorer.of(made.protocol, next(iter(made.rows.values())).bench.encoders)
        records = bench.score(made, scorer, track=bar)
    found = tables.tables(records, made.protocol)
    write_parquet(made.folder / "results.parquet", records)
    write_text(made.folder / "table.md", tables.as_markdown(found))
    tables.show(found)
    print(draw(made, figure))
    return made


def read(figure: Figure, out: Path, count: int, words: Sequence[str]) -> bench.Benchmark:
    """The benchmark of a figure; of a set of sessions, where each turn is edited by itself, the first `count` turns."""
    named, multi = any(word.startswith("bench.data=") for word in words), figure.turns == "multi"
    alone, sessions = 0 if multi else count, count if multi or named else 0
    usual = [f"out={out}", f"bench.count={alone}", f"bench.sessions={sessions}", *figure.words]
    if figure.kinds and not named:
        usual.append(f"bench.kinds={','.join(figure.kinds)}")
    rows = {title: config.load(words=[*usual, *shlex.split(text), *words]) for title, text in figure.variants.items()}
    base = next(iter(rows.values()))
    cases = sets.cases(base.bench, out, Path(base.pidinet) if base.pidinet else None)
    cases = cases if multi else cases[: base.bench.count]
    return bench.Benchmark(out, rows, cases, (figure.turns,), protocol.of(base.bench))


@styled
def draw(made: bench.Benchmark, figure: Figure) -> Path:
    """Draw the pictures of a figure's first cases, SHOWN at most, a row each, at 200 dots an inch and as PDF."""
    panels = figure.panels or {row: (row, "target") for row in made.rows}
    cases, titles = made.cases[:SHOWN], [*(LEADS[name] for name in figure.lead), *panels]
    canvas = Canvas(figsize=((SIDE + 0.05) * len(titles), (SIDE + 0.3) * len(cases) + 0.35))
    grid = canvas.subplots(len(cases), len(titles), squeeze=False)
    canvas.subplots_adjust(0.005, 0.3 / canvas.get_figheight(), 0.995, 1 - 0.3 / canvas.get_figheight(), 0.03, 0.25)
    for n, case in enumerate(cases):
        pictures = [lead(case, name) for name in figure.lead]
        pictures += [result(made, row, case, picture) for row, picture in panels.values()]
        for panel, title, picture in zip(grid[n], titles, pictures, strict=True):
            panel.set_axis_off()
            if n == 0:
                panel.set_title("\n".join(textwrap.wrap(title, 18)), fontsize=7)
            if isinstance(picture, str):
                panel.text(0.5, 0.5, "\n".join(textwrap.wrap(picture, 22)), fontsize=4, ha="center", va="center")
            else:
                panel.imshow(picture, cmap="gray", vmin=0, vmax=255)
        said = f"{case.source} → {case.target}" if case.target else case.instruction
        said = textwrap.shorten(said, 40 * len(titles), placeholder=" …")
        grid[n][0].text(0, -0.03, said, fontsize=6, va="top", transform=grid[n][0].transAxes)
    path = made.folder / f"{figure.name}.png"
    save(canvas, path.with_suffix(".pdf"), path)
    return path


LEADS = {"source": "source, with A", "target": "true target", "sketch": "sketch"}


def lead(case: Case, name: str) -> Image.Image | str:
    """A picture that is given: the source with the border of its region, the true target, the condition."""
    if name == "source":
        image = open_picture(case.image)
        return image if case.mask is None or isinstance(case.mask, tuple) else outlined(image, open_mask(case.mask))
    if name == "target":
        return "not known" if case.truth is None else open_picture(case.truth)
    return open_hint(next(iter(case.hints.values()))) if case.hints else "none"


def outlined(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the border of a region drawn on it, as thick as a 64th of its side."""
    width = max(3, min(image.size) // 64 * 2 + 1)
    inside = mask.resize(image.size, Image.Resampling.NEAREST).point(lambda level: 255 * (level > 127))
    border = ImageChops.subtract(inside.filter(ImageFilter.MaxFilter(width)), inside)
    return Image.composite(Image.new("RGB", image.size, "#ff2d8a"), image, border)


def result(made: bench.Benchmark, row: str, case: Case, name: str) -> Image.Image | str:
    """A picture that a variant made of a case, or why there is none."""
    place = made.place(row, made.settings[0], case)
    if why := bench.error_of(place, made.rows[row]):
        return why
    with Image.open(place / f"{name}.png") as picture:
        return picture.convert("RGB")
