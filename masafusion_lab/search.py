"""A search of points by Optuna: what is asked for at once runs as a chunk, and what it gave is told to the study."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from masafusion_lab import InputError, axes, config, survey
from masafusion_lab.axes import Axis
from masafusion_lab.landscape import Record, scores
from masafusion_lab.metrics import MEASURES
from masafusion_lab.runner import Runner
from masafusion_lab.scoring import Scorer
from masafusion_lab.survey import Point, Survey

log = logging.getLogger(__name__)

AT_ONCE = 8
"""Points that are asked for together, and share their rows."""


def search(experiment: config.Experiment, surveyed: Survey, runner: Runner, scorer: Scorer) -> Survey:
    """Run points where the study looks next until `sweep.points` are finished; the survey of those that were made.

    With `sweep.halvings` by successive halving (Jamieson and Talwalkar 2016) whose resource is denoising steps: of the
    points that are asked for together, the better half is run again in twice as many. It goes on where it was. Raises
    InputError without Optuna, and for a study of another sweep.
    """
    try:
        from optuna.trial import TrialState
    except ImportError:
        raise InputError("sweep.kind=search: Optuna is not installed; pip install 'masafusion-lab[sweep]'") from None
    spanned = axes.read(experiment.axes)
    goals = scorer.protocol.ranked
    study = opened(experiment, surveyed.folder, spanned, goals)

    def ran(points: Sequence[Point]) -> list[dict[str, Any]]:
        now = replace(surveyed, points=points)
        for case, chunk in now.items():
            runner.run(case, chunk)
        return now.records(scorer)

    while (left := experiment.sweep.points - len(finished(study))) > 0:
        trials = [study.ask() for _ in range(min(AT_ONCE, left))]
        asked = survey.points(experiment, [{axis.key: suggested(trial, axis) for axis in spanned} for trial in trials])
        for trial, point in zip(trials, asked, strict=True):
            trial.set_user_attr("point", dict(point.values))
        points = list({point.name: point for point in asked}.values())
        for halving in range(experiment.sweep.halvings, 0, -1):
            records = ran([survey.shortened(point, experiment.steps >> halving) for point in points])
            points = better_half(points, records, goals)
        records = ran(points)
        for trial, point in zip(trials, asked, strict=True):
            its = [record for record in records if record["point"] == point.name]
            if not its:
                study.tell(trial, state=TrialState.PRUNED)
            elif any(record["error"] or goal not in record for record in its for goal in goals):
                trial.set_user_attr("failed", True)
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, [float(np.mean([record[goal] for record in its])) for goal in goals])
        log.info("search: %d of %d points", len(finished(study)), experiment.sweep.points)
    values = [trial.user_attrs["point"] for trial in study.trials if "point" in trial.user_attrs]
    made = {point.name: point for point in survey.points(experiment, values)}
    whole = replace(surveyed, points=list(made.values()))
    there = {record["point"] for record in whole.records(scorer) if record["error"] != survey.NOT_RUN}
    return replace(whole, points=[point for point in whole.points if point.name in there])


def better_half(points: Sequence[Point], records: Sequence[Record], goals: Sequence[str]) -> list[Point]:
    """The better half of the points by their records in fewer steps, and those that failed, to fail on record."""
    _, score = scores(records, goals)
    good = score.mean(0)
    order = [n for n in np.argsort(-good, kind="stable") if not np.isnan(good[n])]
    kept = {*order[: (len(order) + 1) // 2], *np.flatnonzero(np.isnan(good))}
    return [point for n, point in enumerate(points) if n in kept]


def finished(study: Any) -> list[Any]:
    """The trials that ended, well, given up or in failure, and were not left in the middle."""
    ended = ("COMPLETE", "PRUNED")
    return [trial for trial in study.trials if trial.state.name in ended or "failed" in trial.user_attrs]


def opened(experiment: config.Experiment, folder: Path, spanned: Sequence[Axis], goals: Sequence[str]) -> Any:
    """The study, new or as it was left; points that a run of this folder left in the middle are asked for anew."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = Path(experiment.sweep.study or folder / "study.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name="sweep",
            load_if_exists=True,
            directions=["maximize" if MEASURES[goal].higher_is_better else "minimize" for goal in goals],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no journal of a study ({error}); take another sweep.study= or out=") from None
    of = {"axes": dict(experiment.axes), "goals": list(goals)}
    if (there := study.user_attrs.get("of", of)) != of:
        raise InputError(f"{path}: is the study of another sweep ({there}); take another sweep.study= or out=")
    study.set_user_attr("of", of)
    if not experiment.sweep.study:
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
    study.sampler = optuna.samplers.TPESampler(seed=experiment.seed + len(study.trials))  # else it begins anew
    return study


def suggested(trial: Any, axis: Axis) -> str:
    """Where the study looks along an axis."""
    if axis.values:
        return trial.suggest_categorical(axis.key, axis.values)
    if axis.whole:
        return str(trial.suggest_int(axis.key, int(axis.low), int(axis.high)))
    return f"{trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log):.6g}"
