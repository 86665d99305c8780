"""Points of a sweep: what they share is computed once, and each is the edit that it is alone."""

import random

import pytest
import torch

from masafusion_lab import config, keys, phases, survey
from masafusion_lab.methods import METHODS
from masafusion_lab.once import Once
from masafusion_lab.runner import Runner
from tests.edits import case

TEXTS = {"suffix": ("", " in snow", " on grass")}
"""Values of settings that are free texts."""


def choices(key):
    """Some values of a setting, as they are written."""
    if found := TEXTS.get(key.name.rpartition(".")[2], key.choices):
        return found
    if key.type is float and key.default and key.name.endswith("guidance"):
        return f"{key.default}", f"{key.default / 2}"
    return ()


def drawn_points(name, experiment, source):
    """The usual point of a method and three that differ from it in two settings at random."""
    free = {key.name: values for key in keys.tables()[f"method.name={name}"] if (values := choices(key))}
    free |= {"seed": ("0", "1"), "region.feather": ("0", "1"), "dilate": ("0", "1")}
    some = [{key: source.choice(free[key]) for key in source.sample(sorted(free), 2)} for _ in range(3)]
    spanned = [{}, *some, *({f"method.{key}": v} for key, of in TEXTS.items() if f"method.{key}" in free for v in of)]
    found = []
    for values in spanned:
        try:
            found += survey.points(experiment, [values])
        except config.InputError:  # two settings that exclude each other
            continue
    return found


@pytest.mark.parametrize("name", METHODS)
def test_points_of_every_method_end_together_as_they_do_alone(name, tiny_networks, tmp_path):
    usual = f"model.path={tiny_networks} model.device=cpu store={tmp_path}/store size=48x32 steps=2 method.name={name}"
    experiment = config.load(words=usual.split())
    lab = phases.build(experiment)
    cat = case(instruction="a red dog")
    points = drawn_points(name, experiment, random.Random(name))

    def ends(points):
        runner = Runner(survey.Survey(tmp_path / "out", points, [cat]), lab, rows=8)
        works = runner.ready(runner.works(cat, points))
        shared = [work for work in works if work.course is not None]
        apart = [[work] for work in works if work.course is None]
        return {
            work.point.name: x
            for some in [shared, *apart] if some
            for work, x in runner.targets(some, tmp_path / "progress.safetensors")
        }  # fmt: skip

    together = ends(points)
    assert len(together) >= 2
    for point in points:
        for written, alone in ends([point]).items():
            torch.testing.assert_close(together[written], alone, atol=1e-4, rtol=1e-4, msg=written)


def test_equal_questions_are_asked_once_and_others_are_not():
    asked = []

    def double(x, *, times=2):
        asked.append(x)
        return times * x

    once = Once()
    for x in (torch.ones(2), torch.ones(2), torch.ones(2, 1), torch.ones(2).double(), 1, 1.0, [1, (2,)], [1, (2,)]):
        once(double, x)
    once(double, 1, times=3)
    assert [getattr(x, "shape", x) for x in asked] == [(2,), (2, 1), (2,), 1, 1.0, [1, (2,)], 1]
