"""Drawn pictures on disk and batches of them: batch k of a part is a pure function of (seed, k)."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masafusion_lab.picturebook.captions import WORDINGS, caption
from masafusion_lab.picturebook.draw import coverage, draw
from masafusion_lab.picturebook.scene import Scene, scene
from masafusion_lab.picturebook.sketch import canny, posemap, sketch

log = logging.getLogger(__name__)
SIZE = 128


def _canny(described: Scene, size: int) -> np.ndarray:
    return canny(draw(described, size))


def _things(described: Scene, size: int) -> np.ndarray:
    covered = [coverage(described, k, size) for k in range(len(described.things))]
    return (255 * np.maximum.reduce(covered)).round().astype(np.uint8)


KINDS: dict[str, Callable[[Scene, int], np.ndarray]] = {
    "picture": draw,
    "sketch": sketch,
    "canny": _canny,
    "pose": posemap,
    "things": _things,
}
"""What can be drawn of a scene, uint8 (size, size[, 3]); "things": where they are."""


@dataclass(frozen=True)
class Album:
    """The first `count` pictures of a split, drawn once, uint8 (count, size, size[, 3]), and all their captions."""

    folder: Path
    split: str = "train"
    count: int = 50_000
    size: int = SIZE
    kind: str = "picture"

    @cached_property
    def pictures(self) -> np.ndarray:
        """The pictures, mapped from disk; drawn on all cores where they are missing."""
        path = self.folder / f"{self.split}-{self.count}-{self.kind}-{self.size}.npy"
        if not path.exists():
            log.info("drawing %d pictures of %s: %s, %d", self.count, self.split, self.kind, self.size)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            shape = (self.count, *KINDS[self.kind](self.scene(0), self.size).shape)
            np.lib.format.open_memmap(part, "w+", np.uint8, shape).flush()
            ranges = [range(s, min(s + 250, self.count)) for s in range(0, self.count, 250)]
            with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
                list(pool.map(partial(_draw, self, part), ranges))
            part.replace(path)
        return np.load(path, mmap_mode="r")

    @cached_property
    def captions(self) -> list[list[str]]:
        """Every wording of every picture."""
        path = self.folder / f"{self.split}-{self.count}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            told = [[caption(s, w) for w in range(WORDINGS)] for s in map(self.scene, range(self.count))]
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(told))
            part.replace(path)
        return json.loads(path.read_text())

    def scene(self, index: int) -> Scene:
        """The scene of a picture."""
        return scene(self.split, index)


def _draw(album: Album, path: Path, indices: range) -> None:
    out = np.load(path, mmap_mode="r+")
    for i in indices:
        out[i] = KINDS[album.kind](album.scene(i), album.size)


def pixels(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


class Batches(torch.utils.data.IterableDataset[Any]):
    """`count` batches from number `start` on; `make` takes the batch's own generator."""

    def __init__(self, make: Callable[[np.random.Generator], Any], seed: int, start: int, count: int) -> None:
        self.make, self.seed, self.start, self.count = make, seed, start, count

    def __len__(self) -> int:
        """The number of batches."""
        return self.count

    def __iter__(self) -> Iterator[Any]:
        """Each batch, drawn from (seed, its number); several workers take turns."""
        worker = torch.utils.data.get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for k in range(self.start + first, self.start + self.count, every):
            yield self.make(np.random.default_rng((self.seed, k)))
