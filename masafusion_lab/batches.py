"""What an edit reads of its cases: batches of a kind, made of the store's records when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from masafusion_lab import InputError
from masafusion_lab.callbacks import Job
from masafusion_lab.data.case import Case
from masafusion_lab.data.prepared import Prepared
from masafusion_lab.editor import Item
from masafusion_lab.inversion import Inversion
from masafusion_lab.lab import Lab


def as_item(case: Case, prepared: Prepared, record: Inversion) -> Item:
    """What the editor is given of a case."""
    return Item(
        case.id,
        case.source,
        case.target,
        prepared.pixels,
        record,
        prepared.mask,
        prepared.hints,
        case.instruction,
        prepared.shown,
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
