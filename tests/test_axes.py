"""Axes as a person writes them, and the points that they span; what cannot be is said before anything runs."""

import pytest

from masafusion_lab import InputError, axes, config
from masafusion_lab.axes import Sweep


def spanned(written, how=None, seed=0):
    return axes.points(axes.read(written), how or Sweep(), seed)


def test_a_grid_is_every_combination_a_list_goes_in_step():
    grid = spanned({"seed": "1,2", "method.guidance": "3, 7.5"})
    assert [tuple(point.values()) for point in grid] == [("1", "3"), ("1", "7.5"), ("2", "3"), ("2", "7.5")]
    assert spanned({"seed": "1,2", "dilate": "0,3"}, Sweep("list"))[1] == {"seed": "2", "dilate": "3"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[0,10], [10,20]", ["[0,10]", "[10,20]"]),
        ("range(1,9,4)", ["1", "5", "9"]),
        ("range(0,0.3,0.1)", ["0", "0.1", "0.2", "0.3"]),
        ("windows(0,10,5)", ["[0,5]", "[0,10]", "[5,10]"]),
        ("kv, qkv, kv", ["kv", "qkv"]),
    ],
)
def test_values_are_listed_or_ranged(text, values):
    assert [point["method.x"] for point in spanned({"method.x": text})] == values


def test_the_windows_of_a_grid_of_five_are_55():
    assert len(spanned({"method.fusion_steps": "windows(0,50,5)"})) == 55


def test_random_points_are_within_their_ranges_and_the_same_for_a_seed():
    how = Sweep("random", points=30)
    written = {"method.guidance": "loguniform(1,100)", "seed": "integers(0,3)", "method.preserve": "kv,qkv"}
    drawn = spanned(written, how)
    assert drawn == spanned(written, how) != spanned(written, how, 1)
    assert all(1 <= float(p["method.guidance"]) <= 100 and p["seed"] in "0123" for p in drawn)
    assert {p["method.preserve"] for p in drawn} == {"kv", "qkv"}


@pytest.mark.parametrize(
    ("written", "how", "said"),
    [
        (
            {"method.a": "range(1,1000,1)", "method.b": "range(1,1000,1)"},
            Sweep(),
            "1000000 points .* sweep.most=1000000",
        ),
        ({"model.path": "a,b"}, Sweep(), r"axes.model.path=a,b: a sweep varies method"),
        ({"seed": "windows(5,0,1)"}, Sweep(), "must have a < b"),
        ({"seed": "range(0,5)"}, Sweep(), "must be a list, range"),
        ({"seed": "range(0,nan,1)"}, Sweep(), "must be finite"),
        ({"seed": "range(0,1e12,1)"}, Sweep(), "more than a million"),
        ({"seed": "windows(0,1e6,1)"}, Sweep(), "more than a million"),  # of 500,000,500,000 windows
        ({"seed": "windows(0,3,5)"}, Sweep(), "must have a step of b - a at most"),
        ({"seed": "uniform(0,a)"}, Sweep(), "must be numbers"),
        ({"seed": " , "}, Sweep(), "has no values"),
        ({"seed": "uniform(0,5)"}, Sweep(), "sweep.kind=random"),
        ({"seed": "1,2", "dilate": "1"}, Sweep("list"), r"different lengths \(seed 2, dilate 1\)"),
        ({"seed": "1,2"}, Sweep("random", points=0), "at least 1"),
        ({}, Sweep(), "nothing is varied"),
    ],
)
def test_what_cannot_be_spanned_is_said(written, how, said):
    with pytest.raises(InputError, match=said):
        axes.points(axes.read(written), how)


def test_a_point_lies_where_its_values_say_a_window_by_both_its_ends():
    values = {"method.fusion_steps": "[5, 20]", "seed": "3", "method.preserve": "kv"}
    assert axes.coordinates({"method.cross_window": "[0,0.4]"}) == {
        "method.cross_window.start": 0,
        "method.cross_window.stop": 0.4,
    }
    assert axes.coordinates(values) == {
        "method.fusion_steps.start": 5,
        "method.fusion_steps.stop": 20,
        "seed": 3.0,
        "method.preserve": "kv",
    }


def test_axes_are_verbatim_from_words_and_files_to_the_saved_configuration(tmp_path):
    first = config.load(words=["axes.method.fusion_steps=windows(0,50,5)", "axes.seed=1,2", "sweep.kind=list"])
    (tmp_path / "a.yaml").write_text(config.to_yaml(first))
    assert config.load([tmp_path / "a.yaml"]) == first
    (tmp_path / "b.yaml").write_text("axes:\n  method.fusion_steps: ['[0,5]', '[5, 10]']\n  seed: [1, 2]\n")
    written = config.load([tmp_path / "b.yaml"]).axes
    assert [axis.values for axis in axes.read(written)] == [("[0,5]", "[5, 10]"), ("1", "2")]


def test_an_experiment_differs_from_another_in_what_is_said():
    base = config.load(words=["steps=20", "method.guidance=3", "inversion.prompt=empty"])
    other = config.load(words=["method.preserve=kv", "seed=4"], base=base)
    assert (other.steps, other.seed, other.inversion["prompt"]) == (20, 4, "empty")
    assert (other.method["guidance"], other.method["preserve"], base.method["preserve"]) == (3.0, "kv", "qkv")
    plain = config.load(words=["method.name=plain"], base=base)
    assert plain.method == {"name": "plain", "guidance": 7.5, "null": "tuned"}
