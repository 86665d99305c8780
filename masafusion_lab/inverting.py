"""The first phase: the store is filled with the inversions of pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from masafusion_lab import InputError, interrupt
from masafusion_lab.data.case import Case
from masafusion_lab.editor import Clock, out_of_memory, precisely
from masafusion_lab.inversion import Inversion, Track
from masafusion_lab.lab import Lab, record_facts
from masafusion_lab.null_text import NullText

log = logging.getLogger(__name__)


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
        made, spent = dict[str, Inversion](), 0.0
        if missing := {key: pending for key, pending in batch.items() if key not in found}:
            for key, record, seconds in _records(lab, missing, loggers, callbacks):
                lab.store.put(key, record, missing[key].facts, seconds)
                made[key], spent = record, spent + seconds
            for logger in loggers:
                place = min(pending.place for pending in missing.values())
                logger.log_metrics({"invert/seconds": spent / len(made)}, step=place)
    for key, pending in batch.items():
        for case in pending.cases:
            yield case, (found | made)[key], key in found


def _records(
    lab: Lab, batch: Mapping[str, Pending], loggers: Sequence[Any], callbacks: Sequence[L.Callback]
) -> Iterator[tuple[str, Inversion, float]]:
    """Key, record and seconds of each of a batch of pictures; one by one if memory does not suffice for all at once."""
    clock = Clock(lab.model.device)
    try:
        record = _record(lab, batch, loggers, callbacks)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        record = None
    if record is not None:
        clock.lap("invert")
        seconds = (clock.seconds["invert"] + record.spent) / len(batch)
        yield from ((key, its, seconds) for key, its in zip(batch, record.split(), strict=True))
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
    return Inversion(record.states.cpu(), None if record.null is None else record.null.cpu(), record.spent)


def _checked(track: Track) -> Track:
    """The same, but that a signal is heeded after each item."""

    def checked(items: Iterable[Any], what: str) -> Iterator[Any]:
        for item in track(items, what):
            yield item
            interrupt.check()

    return checked
