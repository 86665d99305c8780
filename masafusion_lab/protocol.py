"""What a benchmark fixes, as data: which rows, which cases, which columns through which networks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from masafusion_lab.choices import Checked


@dataclass
class Bench(Checked):
    """Rows and cases of a benchmark."""

    data: Literal["picturebook", "magicbrush", "piebench", "folder"] = "picturebook"
    """The set of cases; folder: pictures or a manifest of yours."""
    root: str = ""
    """Where the set lies: the unpacked archive, or the folder or manifest."""
    protocol: Literal["", "picturebook", "magicbrush", "piebench"] = ""
    """Which metrics through which networks; empty: those of the set (of a folder magicbrush's)."""
    count: int | None = None
    """Of the cases that stand alone the first so many; null: all."""
    sessions: int | None = None
    """Of the sessions (several turns of editing) the first so many; null: all."""
    kinds: list[str] = field(default_factory=list)
    """Of the cases that stand alone only edits of these kinds, in the set's own words; empty: all."""
    exact: bool = True
    """Whether on the CPU cases are edited one by one, so that no pixel depends on batch=; false: batch= at once."""
    turns: Literal["both", "single", "multi"] = "both"
    """single: every turn starts from the set's picture; multi: from the method's own result of the turn before."""
    hint: Literal["", "sketch", "canny"] = ""
    """Of real sets: the condition drawn from the target picture, as in the paper; a sketch needs pidinet=FILE."""
    rows: dict[str, str] = field(default_factory=dict)
    """By name what is compared: the keys in which a row differs, as bench.rows.plain=method.name=plain."""
    only: list[str] = field(default_factory=list)
    """Of the rows only these; empty: all."""
    encoders: dict[str, str] = field(default_factory=dict)
    """Networks that are not the protocol's, by name (clip, dino, judge): bench.encoders.clip=FOLDER or hub id; lpips is
    alex, vgg or squeeze, whose weights torch.hub keeps (TORCH_HOME)."""


SELECTING = ("rows", "only", "count", "sessions", "kinds", "encoders")
"""Keys that choose among results, each of which stands for itself, and never change one."""

NETWORKS = ("clip", "dino", "judge", "lpips")
"""Names of the networks that measures look through."""

THROUGH = {"clip": "clip", "dino": "dino", "structure": "dino", "lpips": "lpips", "done": "judge"}
"""By the first part of a measure's name the network that it looks through."""

QUICK = {"count": 7, "sessions": 1}
"""Of bench --quick: ten cases of the picture-book world."""


@dataclass(frozen=True)
class Protocol:
    """A table's columns (names in metrics.MEASURES), those that enter the average rank, and what they look through.

    `encoders`: network -> folder, hub id or picturebook/PART; `views`: what a network is shown (encoders.VIEWS). The
    version changes when a value that it prints would.
    """

    name: str
    columns: tuple[str, ...]
    ranked: tuple[str, ...]
    encoders: Mapping[str, str]
    views: Mapping[str, str]
    version: int = 1


FIVE = ("l1", "l2", "clip_i", "dino", "clip_t")
"""Those of MagicBrush, by which the paper ranks."""
SEVEN = ("structure", "psnr", "lpips", "mse", "ssim", "clip_whole", "clip_edited")
"""Those of PIE-Bench."""

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "picturebook",
            (*FIVE, "done", "psnr", "psnr_area", "ssim_area"),
            FIVE,
            {"clip": "picturebook/clip", "dino": "picturebook/dino", "judge": "picturebook/judge"},
            {"clip": "picturebook", "dino": "picturebook", "keys": "picturebook"},
        ),
        Protocol(
            "magicbrush",
            (*FIVE, "clip_t_global", "psnr", "psnr_area"),
            FIVE,
            {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vits16"},
            {"clip": "clip", "dino": "dino", "keys": "structure"},
        ),
        Protocol(
            "piebench",
            (*SEVEN, "structure_unit", "psnr_area", "mse_area", "ssim_area", "clip_cut"),
            SEVEN,
            {"clip": "openai/clip-vit-large-patch14", "dino": "facebook/dino-vitb8", "lpips": "squeeze"},
            {"clip": "clip", "dino": "dino", "keys": "structure"},
            version=2,
        ),
    )
}
"""Name to protocol."""


def lack(bench: Bench) -> str:
    """What its set lacks to be read, as far as the settings tell; "" if nothing."""
    if bench.data == "picturebook":
        endless = None in (bench.count, bench.sessions)
        return endless * "bench.count, bench.sessions: the picture-book world has no end; say how many of each"
    there = bench.root and os.path.exists(bench.root)
    return "" if there else f"bench.root={bench.root}: no such folder; say where the set lies (bench.data={bench.data})"


def of_sweep(columns: Sequence[str], goals: Sequence[str], *, built_in: bool) -> Protocol:
    """That of a sweep: networks of the picture-book world or else MagicBrush's, those through which a column looks."""
    base = PROTOCOLS["picturebook" if built_in else "magicbrush"]
    places = {"judge": "picturebook/judge", "lpips": "squeeze", **base.encoders}
    used = {THROUGH[part] for column in columns if (part := column.split("_")[0]) in THROUGH}
    return Protocol("sweep", tuple(columns), tuple(goals), {n: places[n] for n in sorted(used)}, base.views)


def of(bench: Bench) -> Protocol:
    """The protocol of a benchmark."""
    return PROTOCOLS[bench.protocol or (bench.data if bench.data in PROTOCOLS else "magicbrush")]
