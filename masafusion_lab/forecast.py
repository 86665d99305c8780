"""What is found before a sweep runs: that every axis changes the picture, and what the sweep costs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from masafusion_lab import InputError, config
from masafusion_lab.data.case import Case
from masafusion_lab.editor import Clock, out_of_memory
from masafusion_lab.memory import held, total
from masafusion_lab.runner import Runner, Work, heeded
from masafusion_lab.runs import read_json, write_json
from masafusion_lab.survey import Point, Survey

log = logging.getLogger(__name__)


MOST = {"cpu": 16, "": 64}
"""Rows at once by kind of device: a CPU gains nothing by more; in fewer, rows that others read are computed again."""


@dataclass(frozen=True)
class Proof:
    """That an axis is alive: of two points that differ in it alone, the latents at a state, and by how much at most."""

    axis: str
    values: tuple[str, str]
    case: str
    state: int
    difference: float


@dataclass(frozen=True)
class Forecast:
    """What a sweep will cost. `alone`: rows point by point; `shared`: rows as they are run; `seconds`: of all cases."""

    points: int
    cases: int
    alone: int
    shared: int
    rows: int
    seconds: float
    proofs: tuple[Proof, ...]

    @property
    def said(self) -> str:
        """What a person is told before it runs."""
        times = f"{self.alone / self.shared:.1f} times fewer" if self.shared else "none"
        return (
            f"{self.points} points on {self.cases} case{'s' * (self.cases > 1)}; UNet rows a case: {self.alone:,} one "
            f"by one, {self.shared:,} shared ({times}), {self.rows} at once; about {duration(self.seconds)}"
        )


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def forecast(survey: Survey, runner: Runner, rows: str) -> Forecast:
    """Prove the axes alive, count rows on the first case, and measure speed; kept in plan.json, and found there again.

    Sets the runner's rows. Raises InputError for a point that cannot be run, and for an axis that changes nothing.
    """
    path, names = survey.folder / "plan.json", [*(p.name for p in survey.points), *(case.id for case in survey.cases)]
    made_of, settings = [*names, rows], json.loads(json.dumps({**runner.lab.changed, "batch": None}))
    kept = read_json(path)
    if kept.get("made_of") == made_of and kept.get("settings", settings) == settings:
        runner.rows = kept["rows"]
        proofs = tuple(Proof(**{**proof, "values": tuple(proof["values"])}) for proof in kept["proofs"])
        return Forecast(**{field.name: kept[field.name] for field in fields(Forecast)} | {"proofs": proofs})
    case = survey.cases[0]
    chunks = [runner.ready(runner.works(case, chunk)) for chunk in survey.chunks()]
    if runner.lost:
        said = [f"{name}: {error}" for name, error in runner.lost[:8]]
        raise InputError("\n  ".join([f"{len(runner.lost)} points cannot be run on case {case.id!r}:", *said]))
    proofs = tuple(alive(survey, runner, case))
    runner.rows = usual_rows(runner, chunks[0][0]) if rows == "auto" else int(rows)
    a_row = speed(runner, chunks[0][0])
    alone = shared = 0
    for works in chunks:
        each = [count(runner, [work]) for work in works]
        together = [work for work in works if work.course is not None]
        alone += sum(each)
        shared += count(runner, together) if together else 0
        shared += sum(n for n, work in zip(each, works, strict=True) if work.course is None)
    seconds = shared * a_row * len(survey.cases)
    found = Forecast(len(survey.points), len(survey.cases), alone, shared, runner.rows, seconds, proofs)
    write_json(path, {**asdict(found), "made_of": made_of, "settings": settings})
    return found


def count(runner: Runner, works: Sequence[Work]) -> int:
    """UNet rows of points together; of one that cannot share them, as its plan says."""
    if works[0].course is not None:
        return sum(runner.share(works).rows(runner.rows))
    method, sites, steps = works[0].lab.method, works[0].lab.model.sites, len(works[0].lab.schedule)
    return method.plan(sites, steps).cost(steps, getattr(method, "guidance", 0.0))


def alive(survey: Survey, runner: Runner, case: Case) -> Iterator[Proof]:
    """A proof for each axis of several values. Raises InputError for one that changes nothing on this case."""
    base = survey.points[0]
    for axis in base.values:
        values = list(dict.fromkeys(point.values[axis] for point in survey.points))
        others = dict.fromkeys(values[n] for n in (-1, len(values) // 2, 1 - len(values)) if len(values) > 1)
        tried: list[str] = []
        for value in (value for value in others if value != base.values[axis]):
            its = {**base.values, axis: value}
            try:
                other = Point(its, config.load(words=[f"{k}={text}" for k, text in its.items()], base=base.experiment))
            except InputError:
                continue
            works = runner.ready(runner.works(case, [base, other]))
            if len(works) < 2:  # of a list no point need lie between two, or could
                continue
            if found := _parting(*works):
                log.info("axes.%s changes the picture: at state %d by up to %.3g", axis, *found)
                yield Proof(axis, (base.values[axis], value), case.id, *found)
                break
            tried.append(value)
        else:
            if tried:
                raise InputError(
                    f"axes.{axis}: changes nothing on case {case.id!r}: the latents of {base.values[axis]} and of "
                    f"{', '.join(tried)} are equal to the end, bit by bit; the rest of the settings may switch it off"
                )


def _parting(a: Work, b: Work) -> tuple[int, float] | None:
    """The state at which two points first differ, and by how much at most; None if they never do.

    Of points with equal latents the pictures are compared, which a method may still paste together differently.
    """
    for one, other in zip(heeded(a.states()), b.states(), strict=False):
        x, y = one.x["target"], other.x["target"]
        if x.shape != y.shape:
            return one.i, math.inf
        if not torch.equal(x, y):
            return one.i, float((x - y).abs().max())
    difference = float((a.picture(x) - b.picture(y)).abs().max())
    return (one.i, difference) if difference else None


def usual_rows(runner: Runner, work: Work) -> int:
    """Rows at once: a power of two, whose calls hold a quarter of the device's memory at most.

    So a run that was cut short, or is made again beside others, computes the same rows together, to the same bits.
    """
    device = runner.lab.model.device
    a_row = held(_call(runner, work, 1))
    fit = min(MOST.get(device.type, MOST[""]), total(device) / 4 / a_row)
    return 1 << max(int(fit), 1).bit_length() - 1


def speed(runner: Runner, work: Work) -> float:
    """Seconds that a row takes, of the runner's rows at once: the better of two calls.

    Halves these rows if memory does not suffice for them.
    """
    assert runner.rows
    call, seconds = _call(runner, work, runner.rows), []
    try:
        for _ in range(2):
            clock = Clock(runner.lab.model.device)
            with torch.no_grad():
                call()
            clock.lap("call")
            seconds.append(clock.seconds["call"])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or runner.rows == 1:
            raise
        runner.halve()
        return speed(runner, work)
    return min(seconds) / runner.rows


def _call(runner: Runner, work: Work, n: int) -> Callable[[], Tensor]:
    """A UNet call of n rows of a point's size."""
    assert work.call is not None
    model, schedule = runner.lab.model, work.lab.schedule
    x, text = work.call[-1].expand(n, -1, -1, -1), model.embed([""]).expand(n, -1, -1)
    return lambda: model.eps(x, 0, schedule, text)
