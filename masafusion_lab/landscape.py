"""A sweep's results as numbers: what is measured, which point is best, and how much each axis matters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from masafusion_lab.data.case import Case
from masafusion_lab.metrics import MEASURES
from masafusion_lab.ranks import ranks

Record: TypeAlias = Mapping[str, Any]
"""A point on a case, see `Survey.records`."""


def objective(text: str, cases: Sequence[Case]) -> list[str]:
    """The measures that "done" or "psnr_area,clip_t" names; of "" two that trade off: what is kept, what is edited.

    Whether they are measures is `survey.plan`'s to say.
    """
    if names := [name.strip() for name in text.split(",") if name.strip()]:
        return names
    if any(case.mask is None for case in cases):
        return ["psnr_whole", "clip_t"]
    return ["psnr_area", "changed" if any(case.truth is None for case in cases) else "hit"]


def columns(goals: Sequence[str], cases: Sequence[Case]) -> list[str]:
    """What is measured on these cases: the goals, and all that needs no network but the judge."""
    region, truth = (any(getattr(case, name) is not None for case in cases) for name in ("mask", "truth"))
    usual = {
        "psnr_area": region,
        "hit": region and truth,
        "l1": truth,
        "changed": region,
        "psnr_whole": not region,
        "done": any(case.drawn is not None for case in cases),
    }
    return list(dict.fromkeys([*goals, *(name for name, there in usual.items() if there)]))


def known(records: Sequence[Record]) -> list[str]:
    """The measures that some record has, in the order of MEASURES."""
    return [name for name in MEASURES if any(name in record for record in records)]


def scaled(record: Record) -> dict[str, Any]:
    """The same with its measures as they are shown, so many `times` their values."""
    return {**record, **{name: record[name] * MEASURES[name].times for name in known([record])}}


def dimensions(records: Sequence[Record]) -> list[str]:
    """The coordinates that differ between points."""
    fixed = {"case", "point", "picture", "missing", "error", *MEASURES}
    names = dict.fromkeys(name for record in records for name in record if name not in fixed)
    return [name for name in names if len({record.get(name) for record in records}) > 1]


def scores(records: Sequence[Record], names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The points, and of each case (row) and point how good it is by these measures: their mean rank, 0 to 1.

    Ranks, because measures have no common unit; ties share theirs. NaN where a point failed.
    """
    points, cases = (
        {name: n for n, name in enumerate(dict.fromkeys(record[key] for record in records))}
        for key in ("point", "case")
    )
    values = torch.full((len(cases), len(points), len(names)), math.nan, dtype=torch.float64)
    for record in records:
        its = torch.tensor([record.get(name, math.nan) for name in names], dtype=torch.float64)
        values[cases[record["case"]], points[record["point"]]] = its
    higher = [MEASURES[name].higher_is_better for name in names]
    rank = torch.stack([ranks(case, higher) for case in values])
    others = values.isfinite().sum(1, keepdim=True) - 1
    return list(points), ((others + 1 - rank) / others).where((others > 0) | rank.isnan(), 0.5).mean(-1).numpy()


@dataclass(frozen=True)
class Recommendation:
    """The best point of a set of cases. `by_case`: the best of each; `share`: by point, how often it is the best.

    `share` is over 1000 draws of as many cases, with replacement; of one case it says nothing.
    """

    point: str
    by_case: Mapping[str, str]
    share: Mapping[str, float]


def recommend(records: Sequence[Record], names: Sequence[str]) -> Recommendation | None:
    """Which point to take; None if none was made on every case, but those on which all failed."""
    points, score = scores(records, names)
    made = ~np.isnan(score).all(1)
    cases = list(itertools.compress(dict.fromkeys(record["case"] for record in records), made))
    score = score[made]
    whole = ~np.isnan(score).any(0)
    if not cases or not whole.any():
        return None
    usable = np.where(whole, score, -np.inf)
    by_case = {case: points[int(np.nanargmax(row))] for case, row in zip(cases, score, strict=True)}
    draws = np.random.default_rng(0).integers(len(cases), size=(1000, len(cases)))
    winners = [points[int(usable[draw].mean(0).argmax())] for draw in draws]  # one by one, as all take gigabytes
    share = {point: winners.count(point) / len(winners) for point in sorted(set(winners), key=winners.count)[::-1]}
    return Recommendation(points[int(usable.mean(0).argmax())], by_case, share)


def means(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The points, each with its coordinates and the means of its measures over the cases where it was made."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if not record["error"]:
            found.setdefault(record["point"], []).append(record)
    return [
        {
            **{key: value for key, value in its[0].items() if key not in ("case", "picture", "missing", "error")},
            **{name: float(np.mean([r[name] for r in its if name in r])) for name in known(its)},
        }
        for its in found.values()
    ]


def pareto(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """The points that no other beats in both, more being better, from left to right."""
    front: list[int] = []
    for n in sorted(range(len(x)), key=lambda n: (-x[n], -y[n])):
        if not front or y[n] > y[front[-1]]:
            front.append(n)
    return front[::-1]


def importance(points: Sequence[Record], names: Sequence[str], measure: str) -> dict[str, float]:
    """The part of a measure's variance that each coordinate explains alone (its main effect), 0 to 1.

    Numbers of more than eight values are taken in five groups of equal size.
    """
    points = [point for point in points if measure in point]
    values = np.array([point[measure] for point in points])
    total = values.var()
    found = {}
    for name in names:
        groups = _groups([point[name] for point in points])
        held = [values[groups == group] for group in np.unique(groups)]
        between = sum(len(its) * (its.mean() - values.mean()) ** 2 for its in held) / len(values)
        found[name] = float(between / total) if total > 0 else 0.0
    return found


def _groups(values: Sequence[Any]) -> np.ndarray:
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if len(distinct) > 8 and not any(isinstance(value, str) for value in distinct):
        return np.searchsorted(np.quantile(np.array(values), [0.2, 0.4, 0.6, 0.8]), np.array(values))
    return np.array([distinct.index(value) for value in values])
