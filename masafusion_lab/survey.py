"""What a sweep is of: points × cases, in a folder.

FOLDER/cases/CASE/POINT/   target.png, result.json and scores.json of a point on a case, or error.json
FOLDER/plan.json           what was found before the first point ran: which axes matter, rows, speed
FOLDER/results.parquet, *.png, report.html   made anew from them at the end
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masafusion_lab import InputError, axes, config
from masafusion_lab.data.case import Case
from masafusion_lab.keys import suggest
from masafusion_lab.runs import case_folder, read_json
from masafusion_lab.sources import listed

if TYPE_CHECKING:
    from masafusion_lab.scoring import Scorer

TOGETHER = 128
"""Points that share their rows at most: their latents are in memory together, and are lost together."""


NOT_RUN = "was not run"
"""Error of a point that has neither a result nor a failure."""


@dataclass(frozen=True)
class Point:
    """A point: the value of each axis as it is written, and the experiment that it is."""

    values: Mapping[str, str]
    experiment: config.Experiment

    @property
    def name(self) -> str:
        """The values in a word."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())


@dataclass(frozen=True)
class Survey:
    """Points × cases, in a folder."""

    folder: Path
    points: Sequence[Point]
    cases: Sequence[Case]

    def place(self, case: Case, point: Point) -> Path:
        """The folder of a point on a case."""
        return case_folder(case_folder(self.folder / "cases", case.id), point.name)

    def chunks(self) -> list[list[Point]]:
        """The points that share their rows: of as many steps and one size, TOGETHER at most; always the same."""
        kin: dict[Any, list[Point]] = {}
        for point in self.points:
            kin.setdefault((point.experiment.steps, point.experiment.size), []).append(point)
        return [its[k : k + TOGETHER] for its in kin.values() for k in range(0, len(its), TOGETHER)]

    def records(self, scorer: Scorer) -> list[dict[str, Any]]:
        """Of each point on each case: case, values, measures and picture, relative to the folder; or error.

        A measure that has no value is not there; `missing` says why.
        """
        from masafusion_lab.results import damage

        found = []
        for case, point in itertools.product(self.cases, self.points):
            folder = self.place(case, point)
            result, error = read_json(folder / "result.json"), read_json(folder / "error.json").get("error", "")
            if result and (error := (damage(folder) or "").replace(f"{folder}{os.sep}", "")):
                result = {}
            values, missing = scorer.score(case, folder) if result else ({}, {})
            found.append(
                {
                    "case": case.id,
                    "point": point.name,
                    **axes.coordinates(point.values),
                    **{name: value for name, value in values.items() if name not in missing},
                    "picture": str((folder / "target.png").relative_to(self.folder)) if result else "",
                    "missing": "\n".join(f"{name}: {why}" for name, why in missing.items()),
                    "error": "" if result else error or NOT_RUN,
                }
            )
        return found

    def items(self) -> list[tuple[Case, list[Point]]]:
        """What is run by itself, and by one process at a time."""
        return list(itertools.product(self.cases, self.chunks()))


def read(experiment: config.Experiment, cases: Sequence[Case], folder: Path) -> Survey:
    """The survey of an experiment. Raises InputError as `plan`."""
    return Survey(folder, plan(experiment), cases)


def problems(experiment: config.Experiment) -> list[str]:
    """What is wrong with the axes, points and settings of a sweep, a line each."""
    try:
        plan(experiment)
    except InputError as error:
        return str(error).split("\n  ")
    return []


def plan(experiment: config.Experiment) -> list[Point]:
    """The points of an experiment. Raises InputError with what is wrong with its axes, points and settings."""
    how, measures, wrong = experiment.sweep, listed("masafusion_lab.metrics", "MEASURES"), list[str]()
    if how.rows != "auto" and not (how.rows.isascii() and how.rows.isdecimal() and int(how.rows)):
        wrong.append(f"sweep.rows={how.rows}: must be auto, or a whole number from 1")
    if how.halvings and (how.kind != "search" or not 0 < how.halvings <= 3 or not experiment.steps >> how.halvings):
        wrong.append(f"sweep.halvings={how.halvings}: must be 0, or of sweep.kind=search 1 to 3, and leave a step")
    if how.kind == "search" and experiment.launch.by != "here":
        wrong.append(
            f"launch.by={experiment.launch.by}: a search runs in its own process; "
            "start several with one sweep.study=FILE, each with its own out="
        )
    if how.halvings and "steps" in experiment.axes:
        wrong.append(f"sweep.halvings={how.halvings}: makes runs of fewer steps; leave axes.steps out")
    for name in filter(None, map(str.strip, how.objective.split(","))):
        if name not in measures:
            said = f"{name} is not one of {', '.join(measures)}{suggest(name, measures)}"
            wrong.append(f"sweep.objective={how.objective}: {said}")
    try:
        found = points(experiment, axes.points(axes.read(experiment.axes), how, experiment.seed))
    except InputError as error:
        wrong += str(error).split("\n  ")
    if wrong:
        raise InputError("\n  ".join(wrong))
    return found


def points(experiment: config.Experiment, spanned: Sequence[Mapping[str, str]]) -> list[Point]:
    """The points of an experiment where its axes have these values. Raises InputError naming those that cannot be."""
    base = replace(experiment, axes={}, sweep=axes.Sweep())
    found, own, wrong = [], list[str](), dict[str, None]()
    try:
        config.load(base=base)
    except InputError as error:
        own = config.problems(error)  # which are told of the experiment itself
    for values in spanned:
        try:
            found.append(Point(values, config.load(words=[f"{k}={v}" for k, v in values.items()], base=base)))
        except InputError as error:
            wrong |= dict.fromkeys(f"axes.{problem}" for problem in config.problems(error) if problem not in own)
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise InputError("\n  ".join([*list(wrong)[:8], *more]))
    return found


def shortened(point: Point, steps: int) -> Point:
    """A point in fewer steps, its windows of steps in proportion."""
    usual, method = point.experiment.steps, dict(point.experiment.method)
    for key, value in method.items():
        if key.endswith("_steps"):
            begin = value[0] * steps // usual
            method[key] = (begin, max(begin + 1, round(value[1] * steps / usual)))
    its = replace(point.experiment, steps=steps, method=method)
    return Point({**point.values, "steps": str(steps)}, its)


def forgive(survey: Survey) -> None:
    """Forget what failed, so that it is tried again."""
    for path in survey.folder.glob("cases/*/*/error.json"):
        path.unlink()
