"""What watching costs: time and peak memory of one edit with all default taps, over the same edit without."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from experiments.random_sd import SIZES, build
from masafusion_lab import phases
from masafusion_lab.callbacks import peak_memory_gb
from masafusion_lab.request import cases_of, read
from masafusion_lab.watch import Watch

BARS = {"overhead_time": 0.15, "overhead_memory": 0.10}
SHAPES = {"picturebook": "", "sd14": "full", "small": "small"}
"""Of the model whose overhead is measured: the built-in one, or a random one of a size of random_sd.py."""


@contextmanager
def shaped(shape: str) -> Iterator[list[str]]:
    """The key=value words of a model of that shape, which is there meanwhile."""
    if not SHAPES[shape]:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), SIZES[SHAPES[shape]])
        yield [f"model.path={folder}", "size=512", "steps=5"]


def one_edit(words: Sequence[str], watched: bool) -> tuple[float, float]:
    """Seconds of the example's denoising, the processor's where the model runs on it, and peak gigabytes."""
    experiment = read(words, [])
    lab = phases.build(experiment)
    (case,) = cases_of(experiment)
    ((_, record, _),) = phases.invert(lab, [case])
    editor = phases.Editor(lab.model, lab.method, lab.schedule)
    item = phases.as_item(case, lab.prepare(case), record)
    if watched:
        watch = Watch(bins=max(1, min(Watch.bins, len(lab.schedule) // 5)))  # short runs are looked at as often
        editor.watch = lambda batch: watch.begin(editor, batch).taps
    start = time.process_time()
    (edited,) = editor.predict_step([item])
    spent = time.process_time() - start if lab.model.device.type == "cpu" else edited.seconds["denoise"]
    return spent, peak_memory_gb() or 0.0


def overhead(words: Sequence[str], repeats: int) -> dict[str, float]:
    """What watching adds to one edit, each measured in a process of its own, the two by turns; medians."""
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(repeats):
        for watched in found:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[watched].append(pool.submit(one_edit, words, watched).result())
    (seconds, gb), (seconds_watched, gb_watched) = (np.median(found[watched], axis=0) for watched in (False, True))
    return {
        "overhead_time": float(seconds_watched / seconds - 1),
        "overhead_memory": float(gb_watched / gb - 1),
        "seconds": float(seconds),
        "peak_gb": float(gb),
    }
