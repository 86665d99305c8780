"""What a person looks at: the strip of an edit's pictures, and report.html beside them, static, with no network."""

from __future__ import annotations

import difflib
import json
import math
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image, ImageDraw, ImageFont

from masafusion_lab.runs import write_text

if TYPE_CHECKING:
    from torch import Tensor

INK, SOFT, LINE, PAPER, MARK = "#1f2328", "#59636e", "#d5d9de", "#ffffff", "#c62828"
"""Colours: of text, of what is said beside, of lines, of the ground, and of what is marked: best, edited."""
NAMES = {"source": "source", "t2i": "intermediate", "target": "target"}
"""What latents are called where people read."""


def picture(pixels: Tensor) -> Image.Image:
    """The picture, RGB or grey, of pixels (3 or 1, H, W) in [0, 1]."""
    array = (pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def strip(panels: Mapping[str, Image.Image], *, lowest: int = 256, highest: int = 512) -> Image.Image:
    """The panels side by side on white, each under its name, of one height between `lowest` and `highest` pixels."""
    width, height = next(iter(panels.values())).size
    scale = min(highest, max(height, -(-lowest // height) * height)) / height
    width, height = round(width * scale), round(height * scale)
    margin, size = height // 16, max(14, height // 20)
    top = margin + 2 * size
    sheet = Image.new("RGB", (margin + len(panels) * (width + margin), top + height + margin), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    for k, (name, panel) in enumerate(panels.items()):
        x = margin + k * (width + margin)
        draw.text((x, top - size // 2), name, fill=INK, font=font, anchor="ls")
        sheet.paste(panel.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (x, top))
        draw.rectangle((x - 1, top - 1, x + width, top + height), outline=LINE)
    return sheet


def report(folder: Path, result: Mapping[str, Any] | None = None) -> Path:
    """Write report.html beside the pictures of an edit, from what is said in `result` or in its result.json."""
    folder = Path(folder)
    if result is None:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    before, after = difference(result["prompts"]["source"], result["prompts"]["target"])
    pictures = [name for name in result["files"] if name.endswith(".png") and not name.startswith("strip")]
    run = next((its for its in (folder, folder.parent) if (its / "config.yaml").is_file()), folder)  # of several, one
    text = page(
        "report.html",
        result=result,
        before=before,
        after=after,
        pictures=[name for name in pictures if name != "target_original_size.png"],
        total=sum(result["seconds"].values()),
        again=shlex.join(["masafusion", "edit", "--config", str(run / "config.yaml"), f"out={run}-again"]),
    )
    path = folder / "report.html"
    write_text(path, text)
    return path


def difference(source: str, target: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both prompts in pieces, each with whether it is in this prompt alone."""
    a, b = source.split(), target.split()
    before, after = [], []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        before += [(" ".join(a[i:j]), tag != "equal")] if j > i else []
        after += [(" ".join(b[k:m]), tag != "equal")] if m > k else []
    return before, after


def decibels(value: Any) -> str:
    """A PSNR in words; JSON has no infinity."""
    return "identical" if float(value) == math.inf else f"{float(value):.2f} dB"


def page(name: str, **what: Any) -> str:
    """A page of templates/; no text that it is given becomes markup."""
    return pages().get_template(name).render(what)


@cache
def pages() -> jinja2.Environment:
    """The templates, in which no text becomes markup."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("masafusion_lab"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters["decibels"] = decibels
    return found
