"""What a table of several methods says and how sure it is: means, ranks, bootstrap intervals, significance.

A value that is missing or not finite is left out of its column's mean and counted; a difference of two rows is over the
cases that both have. A row without any value in a column has no rank there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Standing:
    """What R rows reach in M columns, float64 (R, M), NaN where there is nothing.

    `mean`, with its interval `low` to `high`; `count` of cases with a value; `rank`, 1 the best, ties averaged;
    `worse`: whether the row is worse than the column's best by more than chance. `average` (R,) over the columns
    that a row has, with its interval.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    count: Tensor
    rank: Tensor
    worse: Tensor
    average: Tensor
    average_low: Tensor
    average_high: Tensor


def standing(
    values: Tensor,
    higher: Sequence[bool],
    groups: Sequence[object],
    *,
    ranked: Sequence[int] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Standing:
    """How rows stand by their values (R, M, N) in N cases; `higher`: of each column whether larger is better.

    Intervals are by a paired bootstrap: cases are drawn anew, the same for all rows, and those of one group (the turns
    of a session) together; of a single group there are none, and nothing is clearly worse. The average rank is over the
    columns `ranked` (None: all).
    """
    values = values.double()
    chosen = list(range(len(higher))) if ranked is None else list(ranked)
    weights = resampled(groups, draws, seed)  # (D, N)
    drawn = _means(values, weights)  # (D, R, M)
    mean = _means(values, torch.ones(1, values.shape[2], dtype=torch.float64))[0]
    rank = ranks(mean, higher)
    low, high = interval(drawn)
    average_low, average_high = interval(ranks(drawn, higher)[..., chosen].nanmean(-1))
    return Standing(
        mean, low, high, values.isfinite().sum(-1), rank, _worse(values, mean, higher, weights),
        rank[:, chosen].nanmean(-1), average_low, average_high,
    )  # fmt: skip


def ranks(means: Tensor, higher: Sequence[bool]) -> Tensor:
    """The ranks of rows (..., R, M) by column, 1 the best; equal means share the average of their ranks."""
    sign = torch.tensor([-1.0 if up else 1.0 for up in higher], dtype=means.dtype)
    cost = means * sign
    mine, other = cost.unsqueeze(-2), cost.unsqueeze(-3)  # (..., R, 1, M), (..., 1, R, M)
    rank = (other < mine).sum(-2) + ((other == mine).sum(-2) + 1) / 2
    return torch.where(means.isfinite(), rank.to(means.dtype), torch.nan)


def resampled(groups: Sequence[object], draws: int, seed: int) -> Tensor:
    """How often each case is drawn, (draws, N): as many groups as there are, with replacement, all cases of each."""
    known = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([known[group] for group in groups], dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    if len(known) < 2:  # which tells nothing of how they vary
        return torch.zeros(1, len(groups), dtype=torch.float64)
    picked = torch.randint(len(known), (draws, len(known)), generator=generator)
    times = torch.zeros(draws, len(known), dtype=torch.float64)
    times.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))
    return times[:, index]


def interval(drawn: Tensor, level: float = LEVEL) -> tuple[Tensor, Tensor]:
    """The middle part of what was drawn, over the first dimension."""
    tail = (1 - level) / 2
    low, high = drawn.nanquantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype), dim=0)
    return low, high


def _means(values: Tensor, weights: Tensor) -> Tensor:
    """Means (D, R, M) of the finite ones of values (R, M, N) under weights (D, N)."""
    there = values.isfinite().double()
    total = torch.einsum("dn,rmn->drm", weights, values.nan_to_num(0, 0, 0))
    return total / torch.einsum("dn,rmn->drm", weights, there)


def _worse(values: Tensor, mean: Tensor, higher: Sequence[bool], weights: Tensor) -> Tensor:
    """Whether a row's difference to its column's best row, over the cases of both, keeps its sign in the interval."""
    worse = torch.zeros_like(mean, dtype=torch.bool)
    for m, up in enumerate(higher):
        sign = -1 if up else 1
        best = int((sign * mean[:, m]).nan_to_num(torch.inf).argmin())
        behind = sign * (values[:, m] - values[best, m])  # (R, N), above 0 where the row is worse
        low, _ = interval(_means(behind[:, None], weights)[..., 0])
        worse[:, m] = low > 0
    return worse
