"""Runs points of a sweep: those of a chunk share their rows, and what is done is never done again."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from masafusion_lab import InputError, interrupt, phases
from masafusion_lab.callbacks import Job
from masafusion_lab.data.case import Case
from masafusion_lab.editor import Editor, out_of_memory, pasted, precisely
from masafusion_lab.given import Given
from masafusion_lab.inversion import Inversion, Track, silent
from masafusion_lab.lab import Lab, build
from masafusion_lab.lockstep import Course, State
from masafusion_lab.once import Ask, Once
from masafusion_lab.results import begin_case, finish_case, stays_done
from masafusion_lab.runs import read_json, replacing, write_json, write_picture
from masafusion_lab.shared import Shared, is_shareable, share
from masafusion_lab.survey import Point, Survey

log = logging.getLogger(__name__)

SAVED_EVERY = 10.0
"""Seconds between two records of how far a chunk is."""


@dataclass
class Work:
    """A point on a case: its lab and what is to be done; once it is ready, what its method is called with."""

    point: Point
    lab: Lab
    job: Job
    call: tuple[Given, Inversion, Tensor] | None = None
    course: Course | None = None
    """Its denoising as data, if it may share rows."""

    @property
    def is_settled(self) -> bool:
        """Whether its result is there, whole, or on record that it failed; a damaged result goes, with a warning."""
        failed = read_json(self.job.folder / "error.json").get("key") == self.job.key
        return failed or stays_done(self.job.folder, self.job.key)

    def states(self) -> Iterator[State]:
        """Its denoising by itself."""
        assert self.call is not None
        return self.lab.method(self.lab.model, *self.call, schedule=self.lab.schedule)

    def picture(self, target: Tensor) -> Tensor:
        """The picture (3, H, W), on the CPU, that its x_0 (1, C, h, w) becomes."""
        assert self.call is not None
        return pasted(self.lab.method, self.call[0], self.lab.model.decode(target).cpu())[0]


class Runner:
    """Runs the points of a survey with one model. `rows`: of the UNet at once, at most."""

    def __init__(self, survey: Survey, lab: Lab, *, rows: int | None = None, track: Track = silent) -> None:
        self.survey, self.lab, self.rows, self.track = survey, lab, rows, track
        self.ask: Ask = Once()
        self.layers = sum(not site.cross for site in lab.model.sites)
        self.lost: list[tuple[str, Exception]] = []
        """Points that failed, and why."""

    def run(self, case: Case, points: Sequence[Point]) -> None:
        """Run the points of a chunk on a case, but those that are settled. One that fails stops no other.

        What was cut short goes on with the same points, and so ends in the same bytes. Raises InputError for what would
        fail every other point too, such as a full disk.
        """
        self.ask = Once()  # of this case alone, or memory would fill
        works = self.works(case, points)
        left = [work for work in works if not work.is_settled]
        if not works:
            return
        progress = self.progress(works)
        if not left:
            progress.unlink(missing_ok=True)
            return
        cut = under_way(progress)
        works = self.ready([work for work in works if work.job.key in cut] or left)
        together = [work for work in works if work.course is not None]
        for some in [*([together] if together else []), *([work] for work in works if work.course is None)]:
            for work, target in self.targets(some, progress):
                if not work.is_settled:
                    self.write(work, target)
        progress.unlink(missing_ok=True)
        if cut:
            self.run(case, points)  # those that were not under way then

    def works(self, case: Case, points: Sequence[Point]) -> list[Work]:
        """The points on a case, checked; one that cannot be is on record as failed."""
        found = []
        for n, point in enumerate(points):
            folder = self.survey.place(case, point)
            with hushed() if n else nullcontext():
                try:
                    lab = build(point.experiment, model=self.lab.model, ask=self.ask)
                    lab = replace(lab, store=self.lab.store).of(case)
                    found.append(Work(point, lab, phases.job(lab, case, folder)))
                except InputError as error:
                    self.fail(point, folder, "", error)
        return found

    def ready(self, works: Sequence[Work]) -> list[Work]:
        """The points inverted, and what their methods are called with put together; `ask` shares what they share."""
        inverted: set[str] = set()
        found = []
        for work in works:
            lab, job = work.lab, work.job
            try:
                if job.record not in inverted:
                    with hushed():
                        list(phases.invert(replace(lab, track=self.track), [job.case]))
                    inverted.add(job.record)
                item = phases.Batches(lab, [job]).item(job)
                work.call = Editor(lab.model, lab.method, lab.schedule, seed=lab.seed, ask=self.ask).ready([item])
                lab.method.check(*work.call, schedule=lab.schedule)
                course = lab.method.course(lab.model, *work.call, schedule=lab.schedule)
                course.check(steps=len(lab.schedule), layers=self.layers)
                work.course = course if is_shareable(course) else None
                found.append(work)
            except (InputError, ArithmeticError) as error:
                self.fail(work.point, job.folder, job.key, error)
        return found

    def targets(self, works: Sequence[Work], progress: Path) -> list[tuple[Work, Tensor | Exception]]:
        """The x_0 (1, C, h, w) of each point, or why there is none: found by running halves of them apart."""
        what = f"{works[0].job.case.id}: {len(works)} points"
        try:
            found = precisely(self.lab.model, what, lambda: self.denoise(works, progress, what))
            return list(zip(works, found, strict=True))
        except InputError:
            raise
        except Exception as error:
            if out_of_memory(error) and self.rows != 1:
                self.halve()
                return self.targets(works, progress)
            if len(works) == 1:
                return [(works[0], error)]
            log.warning("%s: %s; looking for the point at fault", what, error)
            half = len(works) // 2
            return [*self.targets(works[:half], progress), *self.targets(works[half:], progress)]

    def halve(self) -> None:
        """Compute half as many rows at once from here on, as memory did not suffice."""
        self.rows = max(1, (self.rows or 64) // 2)
        log.warning("out of memory: %d rows at once from here on; sweep.rows=%d spares this", *2 * [self.rows])

    def share(self, works: Sequence[Work]) -> Shared:
        """One course for the points' courses."""
        courses = [work.course for work in works if work.course is not None]
        return share(courses, steps=len(works[0].lab.schedule), layers=self.layers)

    def denoise(self, works: Sequence[Work], progress: Path, what: str) -> list[Tensor]:
        """The x_0 of points that share rows, or of one alone; what was cut short goes on from the last record."""
        lab = works[0].lab
        if works[0].course is None:
            last = deque(heeded(self.track(works[0].states(), what)), 1).pop()
            return [last.x["target"].cpu()]
        shared = self.share(works)
        made_by = json.dumps([[work.job.key for work in works], str(lab.model.dtype), self.rows])
        i, x = begun(progress, made_by) or (0, shared.course.x)
        course = replace(shared.course, x={name: latent.to(lab.model.device) for name, latent in x.items()})
        cost = shared.rows(self.rows)
        rows, saved = iter(self.track(range(sum(cost[i:])), what)), time.monotonic()
        for state in course.run(lab.model, schedule=lab.schedule, start=i, most=self.rows):
            x = state.x
            deque(itertools.islice(rows, cost[state.i - 1]), 0)
            ended = state.i == len(lab.schedule)
            if ended or interrupt.asked() or time.monotonic() - saved > SAVED_EVERY:
                keep(progress, made_by, state, course.replay)
                saved = time.monotonic()
            interrupt.check()
        deque(rows, 0)
        return [x[names["target"]].cpu() for names in shared.ends]

    def progress(self, works: Sequence[Work]) -> Path:
        """Where it is kept how far these are."""
        keys = "".join(work.job.key for work in works)
        return works[0].job.folder.parent / f"{hashlib.sha256(keys.encode()).hexdigest()[:16]}.safetensors"

    def fail(self, point: Point, folder: Path, key: str, error: Exception) -> None:
        """Put it on record that a point failed on a case, and why."""
        log.warning("%s: %s", point.name, error)
        begin_case(folder)
        told = "".join(traceback.format_exception(error))
        write_json(folder / "error.json", {"key": key, "error": f"{type(error).__name__}: {error}", "traceback": told})
        self.lost.append((point.name, error))

    def write(self, work: Work, target: Tensor | Exception) -> None:
        """Write the result of a point, or on record why there is none."""
        lab, job = work.lab, work.job
        try:
            if isinstance(target, Exception):
                raise target
            edited = precisely(lab.model, job.case.id, lambda: work.picture(target))
        except (ArithmeticError, RuntimeError) as error:
            self.fail(work.point, job.folder, job.key, error)
            return
        begin_case(job.folder)
        write_picture(job.folder / "target.png", edited)
        result = {"case": job.case.id, "point": work.point.values, "key": job.key, "inputs": job.inputs}
        finish_case(job.folder, {**result, "changed": lab.changed, "files": ["target.png"]})


def heeded(states: Iterable[State]) -> Iterator[State]:
    """The same, but that a signal is heeded after each."""
    for state in states:
        yield state
        interrupt.check()


def keep(path: Path, made_by: str, state: State, replay: Mapping[str, Tensor]) -> None:
    """Record how far a chunk is."""
    latents = {name: x.cpu().clone() for name, x in state.x.items() if name not in replay}
    with replacing(path) as partial:
        save_file(latents, partial, {"made_by": made_by, "i": str(state.i)})


def begun(path: Path, made_by: str) -> tuple[int, dict[str, Tensor]] | None:
    """The state that a chunk was left at, and its latents; None if there is none, or of something else."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made_by") == made_by:
                return int(file.metadata()["i"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        pass
    return None


def under_way(path: Path) -> list[str]:
    """The keys of the points that were running when a chunk was cut short; none if it was not."""
    try:
        with safe_open(path, "pt") as file:
            return list(json.loads((file.metadata() or {})["made_by"])[0])
    except (OSError, SafetensorError, ValueError, KeyError):
        return []


@contextmanager
def hushed() -> Iterator[None]:
    """Without the notes and warnings on a case that every point would repeat."""
    loggers = [logging.getLogger(f"masafusion_lab.{name}") for name in ("phases", "inverting", "data.pictures", "lab")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
