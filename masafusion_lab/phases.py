"""The phases of an experiment: invert fills the store, edit reads it and leaves one folder a case."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from masafusion_lab import InputError, __version__, interrupt
from masafusion_lab.callbacks import Attend, Job, Mirror, Results
from masafusion_lab.data.case import Case
from masafusion_lab.data.prepared import Prepared
from masafusion_lab.editor import Clock, Editor, Item, followed, out_of_memory, precisely
from masafusion_lab.inversion import Ddim, Direct, EditFriendly, Inversion, Npi, Track
from masafusion_lab.lab import Lab, build, facts, record_facts, settings, sha256
from masafusion_lab.lockstep import check
from masafusion_lab.model import StableDiffusion
from masafusion_lab.null_text import NullText
from masafusion_lab.runs import case_folder, is_done
from masafusion_lab.sites import self_layers
from masafusion_lab.trainer import make, undisturbed
from masafusion_lab.words import ids

__all__ = ["INVERSIONS", "Lab", "build", "edit", "invert"]

log = logging.getLogger(__name__)

INVERSIONS: dict[str, type] = {"direct": Direct, "ddim": Ddim, "null_text": NullText, "npi": Npi,
                               "edit_friendly": EditFriendly}  # fmt: skip
"""Name, as in `inversion.name=...`, to class."""


@dataclass
class Pending:
    """A picture that waits to be inverted, with what its record depends on, and the cases that start from it.

    `place`: the first of theirs.
    """

    place: int
    pixels: Tensor
    facts: Mapping[str, Any]
    cases: list[Case]


def invert(
    lab: Lab,
    cases: Iterable[Case],
    *,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[L.Callback] = (),
    places: Iterable[int] | None = None,
    lost: Callable[[Case, InputError], None] | None = None,
) -> Iterator[tuple[Case, Inversion, bool]]:
    """The record of each case, and whether it was in the store; the others are inverted, equal sizes together.

    Null-text inversion that was cut short goes on where it was, to the same bits. `places`: of the cases in what is
    logged, if not 0, 1, 2 ... `lost` is told of a case whose picture or prompt cannot be used, which is left out.
    Raises NotFinite, and InputError, without `lost` for such a case too.
    """
    waiting: dict[torch.Size, dict[str, Pending]] = {}
    for place, case in zip(count() if places is None else places, cases, strict=False):
        interrupt.check()
        try:
            pixels = lab.prepare(case).pixels
            depends = record_facts(lab, pixels, case.source)
            if (record := lab.store.get(key := lab.store.key(depends))) is None:
                lab.model.embed([case.source])  # raises for words that the model does not know
        except InputError as error:
            if lost is None:
                raise
            lost(case, error)
            continue
        if record is not None:
            log.info("%s: its inversion was found in the store, not inverted again", case.id)
            yield case, record, True
            continue
        batch = waiting.setdefault(pixels.shape, {})
        batch.setdefault(key, Pending(place, pixels, depends, [])).cases.append(case)
        if len(batch) == lab.batch:
            yield from _invert(lab, waiting.pop(pixels.shape), loggers, callbacks)
    for batch in waiting.values():
        yield from _invert(lab, batch, loggers, callbacks)


def _invert(
    lab: Lab, batch: Mapping[str, Pending], loggers: Sequence[Any], callbacks: Sequence[L.Callback]
) -> Iterator[tuple[Case, Inversion, bool]]:
    """Invert a batch, by key, but what another process has just inverted."""
    with ExitStack() as claims:
        for key in sorted(batch):  # in one order everywhere, or two processes could wait for each other
            claims.enter_context(lab.store.claim(key))
        found = {key: record for key in batch if (record := lab.store.get(key)) is not None}
        made, clock = {}, Clock(lab.model.device)
        if missing := {key: pending for key, pending in batch.items() if key not in found}:
            for key, record in _records(lab, missing, loggers, callbacks):
                lab.store.put(key, record, missing[key].facts)
                made[key] = record
            clock.lap("invert")
            for logger in loggers:
                spent = {"invert/seconds": clock.seconds["invert"] / len(made)}
                logger.log_metrics(spent, step=min(pending.place for pending in missing.values()))
    for key, pending in batch.items():
        for case in pending.cases:
            yield case, (found | made)[key], key in found


def _records(
    lab: Lab, batch: Mapping[str, Pending], loggers: Sequence[Any], callbacks: Sequence[L.Callback]
) -> Iterator[tuple[str, Inversion]]:
    """Key and record of each of a batch of pictures; one by one if memory does not suffice for all at once."""
    try:
        record = _record(lab, batch, loggers, callbacks)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        record = None
    if record is not None:
        yield from zip(batch, record.split(), strict=True)
    elif len(batch) == 1:
        raise InputError(
            "out of memory while inverting one picture: take a smaller size=, model.dtype=float16 or bfloat16, "
            "model.offload=model, or of null_text inversion.checkpointing=true"
        )
    else:
        log.warning("out of memory inverting %d pictures at once: one by one; batch=1 spares the attempt", len(batch))
        for key, pending in batch.items():
            yield from _records(lab, {key: pending}, loggers, callbacks)


def _record(
    lab: Lab, batch: Mapping[str, Pending], loggers: Sequence[Any], callbacks: Sequence[L.Callback]
) -> Inversion:
    """The record, on the CPU, of a batch of pictures of one size."""
    model, schedule, inversion, track = lab.model, lab.schedule, lab.inversion, _checked(lab.track)
    what = f"inverting {', '.join(pending.cases[0].id for pending in batch.values())}"
    pixels = torch.stack([pending.pixels for pending in batch.values()])
    x0 = precisely(model, what, lambda: model.encode(pixels))
    text, empty = model.embed([p.cases[0].source for p in batch.values()]), model.embed([""] * len(batch))
    if isinstance(inversion, NullText):  # which sees to its own precision
        unfinished = lab.store.key({"batch": list(batch)})
        with lab.store.claim(unfinished):  # or a prune may take it for abandoned
            record = inversion.invert(
                model,
                x0,
                text,
                empty,
                schedule,
                track=track,
                folder=lab.store.progress(unfinished),
                trainer=lab.trainer,
                loggers=loggers,
                callbacks=callbacks,
                check=interrupt.check,
                place=min(pending.place for pending in batch.values()),
            )
    else:
        record = precisely(model, what, lambda: inversion.invert(model, x0, text, empty, schedule, track=track))
    return Inversion(record.states.cpu(), None if record.null is None else record.null.cpu())


def _checked(track: Track) -> Track:
    """The same, but that a signal is heeded after each item."""

    def checked(items: Iterable[Any], what: str) -> Iterator[Any]:
        for item in track(items, what):
            yield item
            interrupt.check()

    return checked


def job(lab: Lab, case: Case, folder: Path, place: int = 0, callbacks: Sequence[L.Callback] = ()) -> Job:
    """Check a case against model, method and what shall be watched, without denoising anything. Raises InputError."""
    interrupt.check()
    prepared, model = lab.prepare(case), lab.model
    height, width = prepared.pixels.shape[-2:]
    model.check_size(height, width)
    told = {"target": case.target, "instruction": followed(model, lab.method, case.instruction)}
    for prompt in (case.source, *told.values()):
        if lost := model.cut(prompt):
            log.warning("%s: the text encoder reads %d tokens; not read: %r", case.id, model.length, lost)
    if lab.method.needs.inversion and not case.source:
        log.warning('%s: is kept under an empty prompt; say what it shows, source="a cat in the snow"', case.id)
    item = as_item(case, prepared, Inversion(torch.empty(0)))
    editor = Editor(model, lab.method, lab.schedule)
    given = editor.given([item], None)  # raises for words, hints and adapters
    try:
        given = lab.method.prepare(model, given, lab.schedule)
        said = given.prompts.keys() - {name for name, text in told.items() if not text}
        plan = lab.method.plan(model.sites, len(lab.schedule))
        if not given.hint and any(branch.prompt == "target" for branch in plan.branches.values()):
            told_apart(model, case)
        latents = {branch.x for branch in plan.branches.values()}
        layers = self_layers(model.sites)
        check(plan, given, steps=len(lab.schedule), layers=layers, latents=latents, prompts=said)
        for watching in callbacks:
            if isinstance(watching, Attend):
                watching.check(editor, item, lab.batch)
    except InputError as error:
        raise InputError(f"{case.id}: {error}") from None
    record = record_facts(lab, prepared.pixels, case.source)
    depends = {
        "record": record,
        "case": case.id,
        **told,
        "mask": None if prepared.mask is None else sha256(prepared.mask),
        "hints": {kind: sha256(hint) for kind, hint in prepared.hints.items()},
        "adapters": model.digest(sorted(prepared.hints)),
        "method": settings(lab.method),
        "seed": lab.seed,
        "trainer": dict(lab.trainer),
        "version": __version__,
    }
    kin = (width, height, *sorted(prepared.hints), prepared.mask is None)
    return Job(case, folder, lab.store.key(depends), lab.store.key(record), kin, prepared.original, place)


def told_apart(model: StableDiffusion, case: Case) -> None:
    """Raise InputError for prompts whose difference the text encoder does not read; warn of equal ones."""
    if case.source == case.target:
        log.warning("%s: source and target are the same prompt; no words say what to edit", case.id)
    elif ids(model.tokenizer, case.source, model.length) == ids(model.tokenizer, case.target, model.length):
        raise InputError(
            f"source and target are the same in the {model.length - 2} tokens that the text encoder reads, so nothing "
            "would be edited; shorten the prompts, or put what changes first"
        )


def edit(
    lab: Lab,
    cases: Sequence[Case],
    folder: Path,
    *,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[L.Callback] = (),
    whole: Callable[[Path], bool] = lambda folder: True,
) -> list[Path]:
    """Edit the cases that are not done yet, each written when its batch is; the folders of all of them.

    One case goes into `folder` itself, several each into one of their own inside it. `whole` may find that a case is
    not done because what `callbacks` write into its folder is not there. All are checked before the first is inverted.
    Raises InputError and NotFinite.
    """
    if twice := [id for id, times in Counter(case.id for case in cases).items() if times > 1]:
        raise InputError(f"case {twice[0]!r} is there twice: every case needs an id of its own")
    folder = Path(folder)
    folders = [folder if len(cases) == 1 else case_folder(folder, case.id) for case in cases]
    jobs = [job(lab, case, its, place, callbacks) for place, (case, its) in enumerate(zip(cases, folders, strict=True))]

    def done(job: Job) -> bool:
        return is_done(job.folder, job.key) and whole(job.folder)

    left = {job.case.id: job for job in jobs if not done(job)}
    if len(left) < len(jobs):
        log.info("%d of %d cases are done already, under the same configuration", len(jobs) - len(left), len(jobs))
    clock, found = Clock(lab.model.device), {}
    waiting, places = [job.case for job in left.values()], [job.place for job in left.values()]
    for case, _, hit in invert(lab, waiting, loggers=loggers, callbacks=callbacks, places=places):
        found[case.id] = hit
    clock.lap("invert")
    results = Results(left, facts(lab), found, clock.seconds["invert"] / max(1, list(found.values()).count(False)))
    options = {"inference_mode": False, "enable_progress_bar": False} | dict(lab.trainer)
    editor = Editor(lab.model, lab.method, lab.schedule, seed=lab.seed, track=lab.track)
    if left:
        with undisturbed(interrupt.check):
            trainer = make(lab.model.device, options, loggers=loggers, callbacks=[results, Mirror(left), *callbacks])
            trainer.predict(editor, Batches(lab, list(left.values())), return_predictions=False)
    if lost := [job for job in jobs if not done(job)]:
        raise InputError(f"the trainer left out {len(lost)} of {len(jobs)} cases: lift its limit in trainer.*")
    return [job.folder for job in jobs]


def as_item(case: Case, prepared: Prepared, record: Inversion) -> Item:
    """What the editor is given of a case."""
    return Item(
        case.id, case.source, case.target, prepared.pixels, record, prepared.mask, prepared.hints, case.instruction
    )


class Batches:
    """Batches of cases of a kind, read when they are needed."""

    def __init__(self, lab: Lab, jobs: Sequence[Job]) -> None:
        kin: dict[Any, list[Job]] = {}
        for job in jobs:
            kin.setdefault(job.kin, []).append(job)
        self.lab = lab
        self.batches = [its[i : i + lab.batch] for its in kin.values() for i in range(0, len(its), lab.batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Item]]:
        for batch in self.batches:
            yield [self.item(job) for job in batch]

    def item(self, job: Job) -> Item:
        """What the edit of a case reads. Raises InputError if its record was deleted in the meantime."""
        ask = self.lab.ask
        if (record := ask(self.lab.store.get, job.record)) is None:
            raise InputError(f"{job.case.id}: its inversion has gone from the store in the meantime; run again")
        return ask(as_item, job.case, self.lab.prepare(job.case), record)
