"""One computation at a time, first come, first served: who waits, how far it is, and how it is called off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from masafusion_lab import InputError, interrupt
from masafusion_lab.web.notices import noticed

ROOM = 20
"""Computations that may wait."""


@dataclass
class Job:
    """A computation that waits, runs or is done: its `future`; what is under way, how far that is, and warnings."""

    owner: str
    future: Future[Any] = field(default_factory=Future)
    stop: threading.Event = field(default_factory=threading.Event)
    what: str = ""
    done: int = 0
    total: int = 0
    began: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def tell(self, what: str, done: int, total: int) -> None:
        """Say that so many steps of what is under way are done."""
        if what != self.what:
            self.began = time.monotonic()
        self.what, self.done, self.total = what, done, total

    def track(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        """Hand on the items, telling how far they are; a `Track` (see inversion.py)."""
        total = len(items) if isinstance(items, Sized) else 0
        self.tell(what, 0, total)
        for done, item in enumerate(items, 1):
            yield item
            self.tell(what, done, total)

    @property
    def left(self) -> float | None:
        """Seconds until what is under way is done, at the pace so far; None before its first step is."""
        return (time.monotonic() - self.began) / self.done * (self.total - self.done) if self.done else None


class Desk:
    """Does what it is given one by one, in a thread of its own; of each owner one thing at a time."""

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._pool, self._lock, self._jobs = ThreadPoolExecutor(1, "desk"), threading.Lock(), list[Job]()

    def submit(self, owner: str, work: Callable[[Job], Any]) -> Job:
        """Take something to do. Raises InputError if too much waits, or something of this owner does."""
        with self._lock:
            self._jobs = [job for job in self._jobs if not job.future.done()]
            if any(job.owner == owner for job in self._jobs):
                raise InputError("your last run is not done: wait for it, or cancel it")
            if len(self._jobs) >= self.room:
                raise InputError(f"{len(self._jobs)} runs wait already: try again when some are done")
            job = Job(owner)
            job.future = self._pool.submit(_do, job, work)
            self._jobs.append(job)
            return job

    def of(self, owner: str) -> Job | None:
        """What this owner has waiting or running."""
        return next((job for job in self._jobs if job.owner == owner and not job.future.done()), None)

    def before(self, job: Job) -> list[Job]:
        """What will be done before a job, or is being done."""
        jobs = [each for each in self._jobs if not each.future.done()]
        return jobs[: jobs.index(job)] if job in jobs else []

    def cancel(self, owner: str) -> bool:
        """Call off what this owner has waiting or running, which ends within a step; whether there was any."""
        job = self.of(owner)
        if job is not None:
            job.stop.set()
            job.future.cancel()
        return job is not None

    def close(self) -> None:
        """Call everything off, and wait for it to end."""
        for job in self._jobs:
            job.stop.set()
        self._pool.shutdown(cancel_futures=True)


def _do(job: Job, work: Callable[[Job], Any]) -> Any:
    with interrupt.heeding(job.stop), noticed(job.warnings):
        interrupt.check()
        return work(job)
