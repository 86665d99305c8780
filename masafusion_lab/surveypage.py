"""What a person sees of a sweep: results.parquet, pictures and report.html in its folder, and the same in W&B."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from masafusion_lab import look, plots
from masafusion_lab.data.pictures import open_picture
from masafusion_lab.forecast import Forecast
from masafusion_lab.landscape import (
    Recommendation,
    Record,
    dimensions,
    known,
    means,
    recommend,
    scaled,
    scores,
)
from masafusion_lab.metrics import MEASURES
from masafusion_lab.report import page
from masafusion_lab.runs import write_parquet, write_picture, write_text
from masafusion_lab.scoring import Scorer
from masafusion_lab.survey import Survey
from masafusion_lab.tracking import log_pictures, log_table

log = logging.getLogger(__name__)

SHEETS = 8
"""Cases of which a contact sheet is drawn."""
LISTED = 500
"""Points that the page lists."""


@dataclass(frozen=True)
class Findings:
    """What a sweep has found: `failures` are the records of points that failed; `points`: means over the cases.

    `unknown`: the goals that no point has a value of, and why.
    """

    records: Sequence[Record]
    points: Sequence[Record]
    failures: Sequence[Record]
    goals: Sequence[str]
    best: Recommendation | None
    unknown: Mapping[str, str]

    @property
    def lost(self) -> str:
        """How much failed, with an example; "" if nothing did."""
        if not self.failures:
            return ""
        first = self.failures[0]
        return (
            f"{len(self.failures)} of {len(self.records)} points failed, as {first['point']} on {first['case']}: "
            f"{first['error']}; the rest is done, and sweep.retry=true tries those again"
        )


def publish(survey: Survey, found: Forecast, scorer: Scorer, loggers: Sequence[Any] = ()) -> Findings:
    """Write what a sweep has found into its folder, and tell the loggers; the best is by what the scorer ranks."""
    records, goals = survey.records(scorer), scorer.protocol.ranked
    write_parquet(survey.folder / "results.parquet", records)
    failures = [record for record in records if record["error"]]
    points = means(records)
    unknown = {goal: unvalued(records, goal) for goal in goals if points and goal not in known(records)}
    for goal, why in unknown.items():
        log.warning("%s has no value, so nothing is recommended (sweep.objective= names another): %s", goal, why)
    findings = Findings(records, points, failures, goals, recommend(records, goals) if points else None, unknown)
    for path in (*survey.folder.glob("*.png"), *survey.folder.glob("report.html")):
        path.unlink()  # of fewer points than there are now
    if points:
        for name, figure in figures(findings):
            look.save(figure, survey.folder / f"{name}.png")
        for n, sheet in sheets(survey, findings):
            write_picture(survey.folder / f"sheet-{n}.png", sheet)
    write_page(survey, found, findings)
    tell(survey, findings, loggers)
    return findings


def unvalued(records: Sequence[Record], measure: str) -> str:
    """Why the first record that lacks a measure does."""
    said = (line.partition(": ") for record in records for line in record["missing"].splitlines())
    return next((why for name, _, why in said if name == measure), "")


def figures(findings: Findings) -> Iterator[tuple[str, Figure]]:
    """The plots by name."""
    records, goals = findings.records, findings.goals
    points = [scaled(point) for point in findings.points]
    across, measured = dimensions(points), known(points)
    if not across or not measured:
        return
    best = findings.best.point if findings.best else ""
    for measure in measured:
        having = [point for point in points if measure in point]
        yield f"map-{measure}", plots.heat_map(having, plots.shown_over(having, across), measure, best)
    yield "importance", plots.importances(points, across, measured)
    if whole := [point for point in points if all(goal in point for goal in goals)]:
        if len(goals) == 2:
            yield "trade-off", plots.trade_off(whole, goals, best)
        names, score = scores(records, goals)
        goodness = dict(zip(names, np.nan_to_num(score).mean(0), strict=True))
        yield "parallel", plots.parallel(whole, across, goals, goodness)


def sheets(survey: Survey, findings: Findings) -> Iterator[tuple[int, Image.Image]]:
    """The contact sheets of the first cases, but those of which all points failed, each with its case's number."""
    across = dimensions(findings.points)
    for n, case in enumerate(survey.cases[:SHEETS] if across else ()):
        its = [record for record in findings.records if record["case"] == case.id]
        if not any(record["picture"] for record in its):
            continue
        best = findings.best.by_case.get(case.id, "") if findings.best else ""
        over = plots.shown_over(its, across)
        yield n, plots.contact_sheet(its, survey.folder, over, open_picture(case.image), best)


def write_page(survey: Survey, found: Forecast, findings: Findings) -> None:
    """Write report.html, static, with no network."""
    best, there = findings.best, {path.name for path in survey.folder.glob("*.png")}
    words = next((point.values for point in survey.points if best and point.name == best.point), {})
    config = ["--config", str(survey.folder / "config.yaml")]
    again = shlex.join(["masafusion", "edit", *config, *(f"{key}={value}" for key, value in words.items()), "out="])
    rivals = [f"{point} ({100 * part:.0f} %)" for point, part in best.share.items()] if best else []
    listed = sorted(findings.records, key=lambda record: record["error"] == "")[:LISTED]
    sheets = [(case.id, f"sheet-{n}.png") for n, case in enumerate(survey.cases)]
    text = page(
        "sweep.html",
        survey=survey,
        forecast=found,
        findings=findings,
        measures={name: MEASURES[name] for name in known(findings.records)},
        coordinates=dimensions(findings.points),
        maps=[name for name in (f"map-{measure}.png" for measure in MEASURES) if name in there],
        plots=[name for name in ("trade-off.png", "importance.png", "parallel.png") if name in there],
        sheets=[(id, name) for id, name in sheets if name in there],
        listed=[scaled(record) for record in listed],
        rivals=rivals[:5],
        again=again,
    )
    write_text(survey.folder / "report.html", text)


def tell(survey: Survey, findings: Findings, loggers: Sequence[Any]) -> None:
    """Tell the loggers: a table with a line and a picture for every point, the plots, and the best point's measures."""
    if not loggers:
        return
    columns = dict.fromkeys(name for record in findings.records for name in record)
    lines = [{name: record.get(name) for name in columns} for record in findings.records]
    for line in lines:
        place = line["picture"]
        line["picture"] = opened(survey.folder / str(place)) if place and len(lines) <= LISTED else None
    pictures = {path.stem: opened(path) for path in sorted(survey.folder.glob("*.png"))}
    for logger in loggers:
        log_table(logger, "sweep/points", lines, step=0)
        for name, picture in pictures.items():
            log_pictures(logger, f"sweep/{name}", {name: picture}, step=0, of=survey.folder.name)
        if best := findings.best:
            point = next(point for point in findings.points if point["point"] == best.point)
            logger.log_metrics({f"sweep/best/{name}": point[name] for name in known([point])}, step=0)


def opened(path: Path) -> Image.Image:
    """A picture, read and closed."""
    with Image.open(path) as picture:
        return picture.copy()
