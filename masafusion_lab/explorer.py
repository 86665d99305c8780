"""The attention explorer: one HTML page that holds all it shows, needs no network and answers to the keyboard."""

from __future__ import annotations

import base64
import io
import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.figures import draw
from masafusion_lab.heat import SPECIALS
from masafusion_lab.maps import Attention
from masafusion_lab.report import NAMES, page
from masafusion_lab.runs import read_json, write_text
from masafusion_lab.watch import Watch

log = logging.getLogger(__name__)

LARGEST = 14_000_000
"""Bytes of a page."""
LONGEST = 512
"""Pixels along a side of its pictures."""


MAPS, PAGE = "maps.safetensors", "attention.html"


def keep(folder: Path, pictures: Mapping[str, Image.Image], attention: Attention) -> dict[str, Image.Image]:
    """Write the figures of a case, its page and its maps into its folder."""
    drawn = draw(folder, pictures, attention)
    write_text(folder / PAGE, explorer(attention, pictures))
    attention.save(folder / MAPS)
    return drawn


def is_kept(folder: Path, watch: Watch) -> bool:
    """Whether a folder holds what was seen of its result under these settings."""
    try:
        facts, result = Attention.load(folder / MAPS).facts, read_json(folder / "result.json")
        its = facts["watch"] == watch.facts and facts.get("key") == result.get("key")
        return its and (folder / PAGE).is_file()
    except (InputError, KeyError):
        return False


@dataclass(frozen=True)
class Detail:
    """How finely maps are shown: cells along their longer side, whether by head, and by part of the run."""

    words: int
    keys: int
    heads: bool = True
    parts: bool = True


DETAILS = (
    Detail(32, 32),
    Detail(32, 16),
    Detail(16, 16),
    Detail(16, 16, heads=False),
    Detail(16, 16, heads=False, parts=False),
    Detail(8, 8, heads=False, parts=False),
)
"""What is tried, until the page is small enough."""


def explorer(attention: Attention, pictures: Mapping[str, Image.Image], *, largest: int = LARGEST) -> str:
    """The page of a case; `pictures` by latent. As fine as fits into so many bytes; warns where nothing fits."""
    for detail in DETAILS:
        facts = _facts(attention, pictures, detail)
        maps, blob = _packed(attention, detail)
        html = page("attention.html", case=attention.facts["case"], facts=facts | {"maps": maps}, blob=blob)
        if (size := len(html.encode())) <= largest:
            return html
    log.warning("%s takes %.1f MB, though it is as coarse as can be; fewer --layers take less", PAGE, size / 1e6)
    return html


def _facts(attention: Attention, pictures: Mapping[str, Image.Image], detail: Detail) -> dict[str, Any]:
    """All that the page says and is not a map."""
    facts, cross = attention.facts, attention.facts["layers"]["cross"]
    finest = max((x.shape[1] for name, x in attention.tensors.items() if name.startswith("pixels/")), default=0)
    mask = attention.tensors.get("mask")
    branches = []
    for name, branch in facts["branches"].items():
        if branch["x"] in pictures:
            prompt = facts["prompts"][branch["text"]]
            words = [
                {"text": word, "places": list(places), "edited": k in prompt["edited"]}
                for k, (word, places) in enumerate(prompt["words"])
            ]
            n = prompt["tokens"]
            specials = [{"text": s, "places": [k]} for s, k in zip(SPECIALS, (0, n - 1, n), strict=True)]
            latent = NAMES.get(branch["x"], branch["x"])
            of = facts["latents"].get(branch["x"], {})
            if of.get("inside") != of.get("outside"):
                latent += ", " + next((f"{side} A" for side, its in of.items() if its == name), "read by others")
            its = {"name": name, "x": branch["x"], "latent": latent}
            branches.append(its | {"prompt": prompt["text"], "words": [specials[0], *words, *specials[1:]]})
    first = next(
        (k for k, b in enumerate(branches) if b["name"] == attention.facts["latents"].get("target", {}).get("inside")),
        0,
    )
    return {
        "case": facts["case"],
        "steps": facts["steps"],
        "grid": facts["grid"],
        "bins": facts["bins"] if detail.parts else [[facts["bins"][0][0], facts["bins"][-1][1]]],
        "branches": branches,
        "first": first,
        "word": next((k for k, word in enumerate(branches[first]["words"]) if word.get("edited")), 1),
        "layers": [layer["name"].replace(".transformer_blocks", "").rsplit(".attn", 1)[0] for layer in cross],
        "pooled": {
            "words": [k for k, layer in enumerate(cross) if not layer["name"].startswith("mid")],
            "pixels": sorted(
                {
                    int(n.split("/")[3])
                    for n, x in attention.tensors.items()
                    if n[:7] == "pixels/" and x.shape[1] == finest
                }
            ),
        },
        "pictures": {x: _uri(picture) for x, picture in pictures.items()},
        "mask": None if mask is None else (mask > 0).int().flatten().tolist(),
        "colours": colormaps["inferno"](np.arange(256), bytes=True)[:, :3].tolist(),
    }


def _packed(attention: Attention, detail: Detail) -> tuple[dict[str, Any], str]:
    """Where each map lies and how large it is, and all of them as base64 of deflated bytes.

    First the scale of every map, float32, little endian; then the maps, a byte a cell: 255 is the scale.
    """
    index: dict[str, Any] = {}
    scales, cells = [], []
    of_scale = of_cell = 0
    for name, maps, queries, seen in _shown(attention, detail):
        flat = maps.flatten(-2)
        scale = flat.amax(-1).clamp(min=1e-12)
        its = {"shape": list(maps.shape), "queries": queries, "seen": seen}
        index[name] = its | {"scale": of_scale, "cell": of_cell}
        scales.append(scale.flatten().numpy().astype("<f4").tobytes())
        cells.append((flat / scale[..., None] * 255).round().byte().numpy().tobytes())
        of_scale, of_cell = of_scale + scale.numel(), of_cell + flat.numel()
    data = zlib.compress(b"".join(scales + cells), 6)
    return {"index": index, "scales": of_scale}, base64.b64encode(data).decode()


def _shown(attention: Attention, detail: Detail) -> Iterator[tuple[str, Tensor, tuple[int, ...], list[float]]]:
    """The maps of a page, "words/BRANCH/DEPTH" (bins, heads, tokens, h, w) and "pixels/BRANCH/DEPTH" (bins, q, h, w).

    With them, of the latter, the height and width that the queries q have; and in how many steps of each bin the branch
    was there and seen.
    """
    for name, x in attention.tensors.items():
        kind, branch, half, depth = (name.split("/") + [""] * 3)[:4]
        if half != "text" or kind not in ("words", "pixels"):
            continue
        maps = x.float() if detail.parts else x.float().sum(0, keepdim=True)
        mass = maps.sum(2 if kind == "words" else (3, 4), keepdim=True)
        seen = [round(steps, 3) for steps in mass.flatten(1).mean(1).tolist()]
        maps = maps / mass.clamp(min=1e-12)  # the share of each token, or of each cell
        if kind == "words":
            maps = maps if detail.heads else maps.mean(1, keepdim=True)
            yield f"words/{branch}/{depth}", _smaller(maps, detail.words, mean=True), (), seen
        else:
            cells = tuple(maps.shape[1:3])
            yield f"pixels/{branch}/{depth}", _smaller(maps.flatten(1, 2), detail.keys, mean=False), cells, seen


def _smaller(maps: Tensor, side: int, *, mean: bool) -> Tensor:
    """Maps (..., h, w) with at most `side` cells along the longer side: means of cells, or sums."""
    f = -(-max(maps.shape[-2:]) // side)
    if f == 1:
        return maps
    options: dict[str, Any] = {"count_include_pad": False} if mean else {"divisor_override": 1}
    return F.avg_pool2d(maps.flatten(0, -3), f, ceil_mode=True, **options).unflatten(0, maps.shape[:-2])


def _uri(picture: Image.Image) -> str:
    """A picture as it stands in a page."""
    small, data = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((LONGEST, LONGEST))
    small.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
