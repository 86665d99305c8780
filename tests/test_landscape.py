"""What a sweep's numbers say: which point is best, by how much of the cases, and which axis matters."""

import math
import random

import numpy as np
import pytest

from masafusion_lab import landscape, plots


def records(**values):
    """Of each point on each case, in order, its measures: (psnr_area, l1) or None where it failed."""
    return [
        {"case": f"case {n}", "point": point, "missing": "", "error": ""}
        | ({} if its is None else {"psnr_area": its[0], "l1": its[1]})
        for n in range(len(next(iter(values.values()))))
        for point, its in ((point, cases[n]) for point, cases in values.items())
    ]


def test_a_point_is_as_good_as_the_part_of_the_others_that_it_beats_over_the_measures():
    found = records(a=[(30, 0.1)], b=[(20, 0.1)], c=[(10, 0.3)], d=[None])
    names, score = landscape.scores(found, ["psnr_area", "l1"])
    assert names == ["a", "b", "c", "d"]
    assert score[0, :3] == pytest.approx([(1 + 0.75) / 2, (0.5 + 0.75) / 2, 0])
    assert math.isnan(score[0, 3])
    assert landscape.scores(records(a=[(30, 0.1)]), ["l1"])[1].item() == 0.5  # there is no other


def test_what_is_recommended_was_made_on_every_case_that_can_be_made_and_says_how_sure_it_is():
    found = records(a=[(9, 0.1), (1, 0.1), None], b=[(5, 0.2), (5, 0.2), None], c=[(99, 0), None, None])
    best = landscape.recommend(found, ["psnr_area"])
    assert best.point == "b"  # c failed on a case on which others did not
    assert best.by_case == {"case 0": "c", "case 1": "b"}
    assert best.share == {"b": pytest.approx(0.75, abs=0.05), "a": pytest.approx(0.25, abs=0.05)}
    assert landscape.recommend(records(a=[None]), ["l1"]) is None


def test_points_at_random_are_shown_by_ranges_and_those_of_a_grid_each_in_its_cell():
    g = random.Random(0)
    points = [{"a": g.random(), "b": g.random(), "c": g.choice("xy")} for _ in range(500)]
    values, place = plots.grid(points, ["a", "b"])  # 500 x 500 pictures are more than any machine holds
    assert [len(its) for its in values] == [12, 12]
    for point in points:
        for name, its, n in zip("ab", values, place(point), strict=True):
            assert [*its, 1][n] <= point[name] < [*its, 1][n + 1]
    assert plots.grid(points, ["c", "a"])[0] == [["x", "y"], sorted(point["a"] for point in points)]
    few, place = plots.grid([{"a": 1.0, "b": "all"}, {"a": 2.0, "b": 7.0}], ["a", "b"])
    assert few == [[1, 2], [7, "all"]]
    assert place({"a": 2.0, "b": "all"}) == (1, 1)


def test_the_front_is_what_no_other_point_beats_in_both():
    assert landscape.pareto([1, 2, 3, 2, 0], [3, 2, 1, 1, 3]) == [0, 1, 2]


def test_an_axis_matters_by_the_variance_that_it_explains_alone():
    points = [{"seed": s, "kind": k, "l1": 2.0 * s + (k == "x")} for s in (0, 1) for k in "xy"]
    parts = landscape.importance([*points, {"seed": 1, "kind": "x"}], ["seed", "kind"], "l1")
    variance = np.var([point["l1"] for point in points])
    assert parts == pytest.approx({"seed": 1 / variance, "kind": 0.25 / variance})
