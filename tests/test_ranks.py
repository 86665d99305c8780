"""Ranks, intervals and marks against independent arithmetic and against what is known of the draws."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from masafusion_lab.ranks import interval, ranks, resampled, standing

NAN = torch.nan


def values(*rows):
    """(R, 1, N)"""
    return torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in rows])[:, None]


def test_ranks_equal_scipys_with_ties_averaged_in_the_direction_of_each_column():
    means = torch.tensor([[0.1, 0.9], [0.2, 0.9], [0.1, 0.5], [0.3, 0.7]])
    found = ranks(means, [False, True])
    assert found[:, 0].tolist() == rankdata(means[:, 0].numpy()).tolist() == [1.5, 3, 1.5, 4]
    assert found[:, 1].tolist() == rankdata(-means[:, 1].numpy()).tolist() == [1.5, 1.5, 4, 3]


def test_the_ranks_of_ten_rows_sum_to_55_in_every_column():
    means = torch.randint(4, (10, 5), generator=torch.Generator().manual_seed(0)).double()
    assert ranks(means, [True, False, True, False, True]).sum(0).tolist() == [55.0] * 5


def test_a_row_without_a_value_has_no_rank_and_takes_none_from_the_others():
    found = ranks(torch.tensor([[3.0], [NAN], [1.0]]), [False])
    assert found[[0, 2], 0].tolist() == [2, 1]
    assert found[1, 0].isnan()


def test_missing_values_are_left_out_and_counted():
    s = standing(values([1.0, NAN, 3.0], [NAN, NAN, NAN]), [True], "abc")
    assert s.mean[0, 0] == 2
    assert s.count[:, 0].tolist() == [2, 0]
    assert s.mean[1, 0].isnan()
    assert s.average[1].isnan()
    assert not s.worse.any()


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    x = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s = standing(values(x), [True], range(400))
    half = (s.high - s.low)[0, 0].item() / 2
    assert half == pytest.approx(1.96 * x.std().item() / 20, rel=0.1)
    assert s.low[0, 0] < s.mean[0, 0] < s.high[0, 0]


def test_a_small_difference_in_every_case_is_significant_though_the_intervals_overlap():
    x = torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s = standing(values(x, x - 0.05, x + 0.5 * x.flip(0).sin() - 0.01), [True], range(60))
    assert s.high[1, 0] > s.low[0, 0]
    assert s.worse[:, 0].tolist() == [False, True, False]
    lower_is_better = standing(values(x, x - 0.05), [False], range(60))
    assert lower_is_better.worse[:, 0].tolist() == [True, False]


def test_cases_said_thrice_in_one_group_make_no_interval_narrower():
    x = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    alone = standing(values(x), [True], range(50))
    thrice = standing(values(x.repeat(3)), [True], [*range(50)] * 3)
    pretended = standing(values(x.repeat(3)), [True], range(150))
    width = [(s.high - s.low).item() for s in (alone, thrice, pretended)]
    assert width[1] == pytest.approx(width[0], rel=0.1)
    assert width[2] < 0.7 * width[0]


def test_of_a_single_group_there_is_no_interval_and_nothing_is_clearly_worse():
    s = standing(values([1.0, 2.0], [3.0, 4.0]), [True], ["one", "one"])
    assert s.low.isnan().all()
    assert s.average_low.isnan().all()
    assert not s.worse.any()
    assert s.average.tolist() == [2, 1]


def test_the_average_rank_is_over_the_ranked_columns_that_a_row_has():
    v = torch.tensor([[1.0, 5.0, NAN], [2.0, 4.0, 9.0]]).double()[..., None].expand(2, 3, 4)
    s = standing(v, [True, True, True], range(4), ranked=[0, 2])
    assert s.average.tolist() == [2.0, 1.0]
    assert s.average_low.tolist() == s.average_high.tolist() == [2.0, 1.0]


def test_the_same_seed_draws_the_same_and_every_draw_has_as_many_groups():
    a, b = resampled("aabc", 30, 5), resampled("aabc", 30, 5)
    assert torch.equal(a, b)
    assert torch.equal(a[:, 0], a[:, 1])
    assert (a[:, 1:].sum(1) == 3).all()


def test_the_middle_part_is_numpys():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    low, high = interval(x, 0.8)
    np.testing.assert_allclose([low.numpy(), high.numpy()], np.quantile(x.numpy(), [0.1, 0.9], axis=0))
