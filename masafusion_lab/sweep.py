"""A sweep from its experiment to its findings: points × cases, whose common rows are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from masafusion_lab import InputError, config, survey
from masafusion_lab.data.case import Case
from masafusion_lab.data.digests import check_inputs
from masafusion_lab.forecast import Forecast, forecast
from masafusion_lab.inversion import Track, silent
from masafusion_lab.lab import Lab, build
from masafusion_lab.landscape import columns, objective
from masafusion_lab.launch import launch
from masafusion_lab.metrics import measure
from masafusion_lab.once import Once
from masafusion_lab.protocol import of_sweep
from masafusion_lab.runner import Runner
from masafusion_lab.runs import case_folder, write_text
from masafusion_lab.scoring import Scorer, pair
from masafusion_lab.search import search
from masafusion_lab.surveypage import Findings, publish


def sweep(
    experiment: config.Experiment,
    cases: Sequence[Case],
    folder: Path,
    *,
    lab: Lab | None = None,
    track: Track = silent,
    loggers: Sequence[Any] = (),
    told: Callable[[Forecast], None] = lambda forecast: None,
) -> Findings:
    """Run the points of `experiment.axes` on the cases, but those that are done in the folder; publish what is found.

    `told` hears what is planned before it runs; `lab`: that of the experiment, where it is built already. Any launcher
    but "here" wants the cases to be those that the experiment names. Raises InputError for axes and points that cannot
    be, for an axis that changes nothing, and, without `force`, for results of other pictures or prompts in the folder.
    """
    surveyed, goals = survey.read(experiment, cases, Path(folder)), objective(experiment.sweep.objective, cases)
    ask = Once()
    for case in cases:
        for place in case_folder(surveyed.folder / "cases", case.id).glob("*/"):
            check_inputs(case, place, force=experiment.force, ask=ask)
    if experiment.sweep.retry:
        survey.forgive(surveyed)
    runner = Runner(surveyed, lab or build(experiment, track=track), track=track)
    scorer = measured(experiment, cases, goals, runner.lab.model.device)
    found = forecast(surveyed, runner, experiment.sweep.rows)
    told(found)
    if experiment.sweep.kind == "search":
        surveyed = search(experiment, surveyed, runner, scorer)
    elif experiment.launch.by == "here":
        for case, points in surveyed.items():
            runner.run(case, points)
    else:
        if not (surveyed.folder / "config.yaml").exists():
            write_text(surveyed.folder / "config.yaml", config.to_yaml(experiment))
        runner.lab.model.rest()
        items = len(surveyed.items())
        launch("sweep", surveyed.folder, experiment.launch, experiment.model.device, items=items, track=track)
    return publish(surveyed, found, scorer, loggers)


def measured(
    experiment: config.Experiment, cases: Sequence[Case], goals: Sequence[str], device: torch.device | str
) -> Scorer:
    """What takes a sweep's measures. Raises InputError where one that the sweep is asked to go by has no value."""
    built_in = experiment.model.path == "picturebook" or all(case.drawn is not None for case in cases)
    protocol = of_sweep(columns(goals, cases), goals, built_in=built_in)
    scorer = Scorer.of(protocol, experiment.bench.encoders, device)
    if experiment.sweep.objective or experiment.sweep.kind == "search":
        for goal in goals:
            if why := measure(goal, pair(cases[0], cases[0].image, experiment.region), scorer.networks)[1]:
                raise InputError(f"sweep.objective={goal}: has no value on case {cases[0].id!r}: {why}")
    return scorer
