"""What happens whenever a batch of cases has been edited: their folders are written, then the loggers are told."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masafusion_lab.attention import Tap
from masafusion_lab.data.case import Case
from masafusion_lab.editor import Edited, Item
from masafusion_lab.maps import Attention
from masafusion_lab.report import NAMES, picture, report, strip
from masafusion_lab.results import begin_case, finish_case, is_done
from masafusion_lab.runs import write_picture
from masafusion_lab.tracking import log_curves, log_pictures, log_table
from masafusion_lab.watch import Watch, Watching


@dataclass(frozen=True)
class Job:
    """A case that was found fit to be edited, and where its result goes.

    `key`: of its result; `record`: of its inversion in the store; `kin`: what cases of one batch share (size, kinds of
    hint, whether there is a mask); `original`: width and height before it was resized; `place`: its number among the
    cases of its run; `inputs`: see `digests.inputs`.
    """

    case: Case
    folder: Path
    key: str
    record: str
    kin: tuple[Any, ...]
    original: tuple[int, int]
    place: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)


class Results(L.Callback):
    """Writes each case's folder the moment its batch is done: pictures, report.html, and last result.json.

    `facts` are what all results say; `found`: case id -> whether its inversion was in the store; `seconds` gives those
    of a record by its key, None where they are not known.
    """

    def __init__(
        self,
        jobs: Mapping[str, Job],
        facts: Mapping[str, Any],
        found: Mapping[str, bool],
        seconds: Callable[[str], float | None],
    ) -> None:
        self.jobs, self.facts, self.found, self.seconds = jobs, facts, found, seconds

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Sequence[Item], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the batch's cases."""
        for item, edited in zip(batch, outputs, strict=True):
            self.write(self.jobs[item.id], item, edited)

    def write(self, job: Job, item: Item, edited: Edited) -> None:
        """Write one case, but one that is there, whole, which another callback has had edited again to see more.

        Raises InputError if the disk is full; result.json is then not there.
        """
        if is_done(job.folder, job.key):
            return
        panels = shown(item, edited)
        pictures = {**panels, "strip": strip(panels)}
        if job.original != pictures["target"].size:
            pictures["target_original_size"] = pictures["target"].resize(job.original, Image.Resampling.LANCZOS)
        begin_case(job.folder)
        for name, image in pictures.items():
            write_picture(job.folder / f"{name}.png", image)
        inverting = self.seconds(job.record)
        result = {
            "case": item.id,
            "key": job.key,
            "prompts": {"source": item.source, "target": item.target, "instruction": job.case.instruction},
            "inputs": job.inputs,
            **self.facts,
            "dtype": edited.dtype,
            "size": pictures["source"].size,
            "original_size": job.original,
            "rows": edited.rows,
            "seconds": {"invert": 0.0 if self.found[item.id] else inverting or 0.0, **edited.seconds},
            "from_store": self.found[item.id],
            "inversion_seconds": inverting,
            "reconstruction_psnr": edited.psnr["reconstruction"],
            "roundtrip_psnr": edited.psnr["roundtrip"],
            "peak_memory_gb": peak_memory_gb(),
            "files": [*(f"{name}.png" for name in pictures), "report.html"],
        }
        report(job.folder, result)
        finish_case(job.folder, result)


class Mirror(L.Callback):
    """Tells the loggers of each case that was edited: PSNRs, seconds and pictures, at the step that is its place."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.jobs = jobs

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Sequence[Item], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the batch's cases."""
        for item, edited in zip(batch, outputs, strict=True):
            facts = {f"edit/{name}_psnr": value for name, value in edited.psnr.items() if math.isfinite(value)}
            facts |= {f"edit/seconds/{phase}": spent for phase, spent in edited.seconds.items()}
            panels, place = shown(item, edited) if trainer.loggers else {}, self.jobs[item.id].place
            for logger in trainer.loggers:
                logger.log_metrics(facts | {"edit/rows": edited.rows}, step=place)
                log_pictures(logger, "edit/pictures", panels, step=place, of=item.id)


class Attend(L.Callback):
    """Watches the attention of every `every`-th case while it is edited; its figures go into its folder and to loggers.

    `keep` writes what was seen of a case, given its folder and its pictures by latent, and gives the figures to log.
    """

    def __init__(
        self,
        watch: Watch,
        every: int = 1,
        keep: Callable[[Path, Mapping[str, Image.Image], Attention], Mapping[str, Image.Image]] | None = None,
    ) -> None:
        self.watch, self.every, self.keep = watch, every, keep
        self.chosen, self.seen = set[str](), dict[str, tuple[Watching, int]]()
        self.jobs: Mapping[str, Job] = {}

    def check(self, editor: Any, item: Item, batch: int) -> None:
        """Raise InputError if of `batch` such cases nothing would be seen, or more than memory allows."""
        self.watch.begin(editor, [item], times=batch)

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        """Have the editor watched."""
        (self.jobs,) = (callback.jobs for callback in trainer.callbacks if isinstance(callback, Results))

        def begin(batch: Sequence[Item]) -> Sequence[Tap]:
            if not any(item.id in self.chosen for item in batch):
                return ()
            watching = self.watch.begin(module, batch)
            self.seen |= {item.id: (watching, b) for b, item in enumerate(batch)}
            return watching.taps

        module.watch = begin

    def on_predict_batch_start(
        self, trainer: Any, module: Any, batch: Sequence[Item], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Choose cases."""
        self.chosen = {item.id for item in batch if self.jobs[item.id].place % self.every == 0}

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Sequence[Item], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep and log what was seen."""
        from masafusion_lab.figures import draw

        for item, edited in zip(batch, outputs, strict=True):
            if item.id not in self.chosen:
                continue
            job, (watching, b) = self.jobs[item.id], self.seen[item.id]
            attention, panels = watching.of(b), shown(item, edited)
            attention = replace(attention, facts={**attention.facts, "key": job.key})
            pictures = {x: panels[name] for x, name in NAMES.items() if x in attention.facts["latents"]}
            drawn = (self.keep or draw)(job.folder, pictures, attention)
            for logger in trainer.loggers if drawn else ():
                for name, figure in drawn.items():  # W&B wants the pictures of a panel to be of one size
                    log_pictures(logger, f"attention/{name}", {name: figure}, step=job.place, of=item.id)
                log_table(logger, "attention/words", word_table(attention, pictures), step=job.place)
                if "mask" in attention.tensors:
                    log_curves(logger, "attention/interference", *interference_curves(attention), step=job.place)
        self.seen = {}


def word_table(attention: Attention, pictures: Mapping[str, Image.Image]) -> list[dict[str, Any]]:
    """A row a word and branch: its map over the branch's picture, its highest share, and how much lies outside A."""
    mask, rows = attention.tensors.get("mask"), []
    for name, branch in attention.facts["branches"].items():
        if branch["x"] not in pictures:
            continue
        maps = attention.words(name)
        for word, heat in maps.all().items():
            outside = None if mask is None else float((heat.values * (1 - mask)).sum() / heat.values.sum())
            rows.append(
                {
                    "case": attention.facts["case"],
                    "branch": name,
                    "word": word,
                    "map": heat.overlay(pictures[branch["x"]]),
                    "highest share": float(heat.values.max()) / maps.steps,
                    "share outside A": outside,
                }
            )
    return rows


def interference_curves(attention: Attention) -> tuple[list[int], dict[str, list[float]]]:
    """The steps that were looked at, and by name the shares that pixels in- and outside A read across."""
    names = {"mixed": ("inside: of what is kept", "outside: of what is new"),
             "flow": ("inside: from outside", "outside: from inside")}  # fmt: skip
    seen = {kind: attention.interference(attention.main, kind).nanmean(0) for kind in names}
    steps = (~seen["flow"][:, 0].isnan()).nonzero().flatten().tolist()
    return steps, {name: seen[kind][steps, k].tolist() for kind, its in names.items() for k, name in enumerate(its)}


class Told(L.Callback):
    """Tells whoever waits for a fit how far it is: what is under way, steps done, steps in all."""

    def __init__(self, tell: Callable[[str, int, int], None]) -> None:
        self.tell = tell

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell."""
        self.tell("null-text inversion", batch_idx + 1, int(trainer.num_training_batches))


def shown(item: Item, edited: Edited) -> dict[str, Image.Image]:
    """The pictures of a case by name, as they were used and made: source, mask, hints, results."""
    height, width = item.pixels.shape[-2:]
    panels: dict[str, Tensor] = {"source": item.pixels}
    if item.mask is not None:
        panels["mask"] = F.interpolate(item.mask[None].float(), (height, width))[0]
    panels |= item.hints
    panels |= {
        name: edited.pictures[name] for name in ("reconstruction", "intermediate", "target") if name in edited.pictures
    }
    return {name: picture(tensor) for name, tensor in panels.items()}


def peak_memory_gb() -> float | None:
    """The most memory that this process has held so far, on the GPU if there is one; None where it cannot be known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**10 if sys.platform != "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
