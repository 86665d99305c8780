"""Courses that share rows: each ends as alone, and every row is computed once."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Hint, Plan, Take
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course, Script, calls
from masafusion_lab.methods import MaSaFusion, Plain
from masafusion_lab.shared import KNOWN, is_shareable, share

WINDOWS = list(combinations(range(0, 51, 5), 2))


def world(steps, side=4, seed=0, words=3):
    """A picture's record, region, prompts, hint and noise, of random numbers."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, 1, side, side)
    mask[..., 1 : side // 2 + 1] = 1
    prompts = {name: torch.randn(1, words, 4, generator=g) for name in ("source", "target", "empty")}
    given = Given(prompts, mask, (torch.randn(1, 2, side, side, generator=g),))
    source = SimpleNamespace(states=torch.randn(steps + 1, 1, 4, side, side, generator=g), null=None)
    return given, source, torch.randn(1, 4, side, side, generator=g)


def courses(methods, steps, *, sites=(), world=world):
    given, source, x = world(steps)
    model, schedule = SimpleNamespace(sites=sites), range(steps)
    return [method.course(model, given, source, x, schedule=schedule) for method in methods]


@pytest.mark.parametrize(("of", "by_hand", "alone"), [("target", 3140, 19250), ("both", 4130, 15950)])
def test_the_windows_of_figure_12_cost_no_more_than_by_hand(of, by_hand, alone):
    """And a little less: a window's last step leaves out what the intermediate image would go on with."""
    every = courses([MaSaFusion(fusion_steps=window, fusion_of=of) for window in WINDOWS], 50)
    assert len(every) == 55
    together = share(every, steps=50, layers=7)
    assert by_hand - 40 < sum(together.rows()) <= by_hand
    assert sum(together.rows(16)) <= 1.02 * by_hand  # what is read by rows of several calls is computed in each
    assert alone - 210 < sum(sum(share([one], steps=50, layers=7).rows()) for one in every) <= alone


METHODS = [
    MaSaFusion(),
    MaSaFusion(fusion_steps=(1, 3)),
    MaSaFusion(fusion_steps=(1, 4), fusion_of="both"),
    MaSaFusion(fusion_steps=(0, 2), fusion_of="both"),
    MaSaFusion(preserve_steps=(0, 2)),
    MaSaFusion(preserve_layers="0:3", preserve="kv"),
    MaSaFusion(edit_layers="decoder", edit_steps=(2, 4)),
    MaSaFusion(guidance=3.0),
    MaSaFusion(guidance=1.0),
    MaSaFusion(hint_scale=0.5),
    MaSaFusion(hint_until=0.5, hint_on_null=False),
    MaSaFusion(cfg_pairing="cond_only", qk_from="preserve"),
    MaSaFusion(edit_null="tuned", source_null="empty"),
    MaSaFusion(init_target="gauss", share_noise=False),
    MaSaFusion(fusion_steps=(0, 3)),
    Plain(),
    Plain(guidance=2.0, null="empty"),
]


@pytest.fixture
def work(tiny):
    """The methods' courses on one small picture, in four steps: some with a tuned null, one in another region."""
    g = torch.Generator().manual_seed(1)
    given, source, x = world(4, side=8, words=24)
    prompts = {
        name: tiny.embed([text]) for name, text in {"source": "a cat", "target": "a red dog", "empty": ""}.items()
    }
    given = replace(
        given,
        prompts=prompts,
        hint=tiny.hint("sketch", torch.rand(1, 1, 32, 32, generator=g)),
        null=0.1 * torch.randn(4, 1, 24, 32, generator=g),
    )
    schedule = tiny.schedule(4)
    every = [method.course(tiny, given, source, x, schedule=schedule) for method in METHODS]
    elsewhere = replace(given, mask=given.mask.flip(-1), null=None)
    every.append(MaSaFusion().course(tiny, elsewhere, source, x, schedule=schedule))
    layers = sum(not site.cross for site in tiny.sites)
    return SimpleNamespace(model=tiny, schedule=schedule, courses=every, layers=layers)


@pytest.mark.parametrize("most", [None, 5])
def test_every_course_ends_as_it_does_alone(work, most):
    together = share(work.courses, steps=4, layers=work.layers, wanted=("target", "t2i"))
    *_, end = together.course.run(work.model, schedule=work.schedule, most=most)
    assert end.rows == sum(together.rows(most)) >= sum(together.rows())
    for course, names in zip(work.courses, together.ends, strict=True):
        *_, alone = course.run(work.model, schedule=work.schedule)
        for latent, name in names.items():
            torch.testing.assert_close(end.x[name], alone.x[latent], rtol=1e-3, atol=2e-3)


def test_of_one_course_alone_the_bytes_are_its_own(work):
    for course in work.courses[:2]:
        alone = share([course], steps=4, layers=work.layers, wanted=("target", "t2i"))
        *_, a = alone.course.run(work.model, schedule=work.schedule)
        *_, b = course.run(work.model, schedule=work.schedule)
        assert torch.equal(a.x[alone.ends[0]["target"]], b.x["target"])


def test_equal_courses_cost_one_and_what_is_not_wanted_nothing(work):
    once = share(work.courses[:1], steps=4, layers=work.layers)
    assert share([work.courses[0]] * 3, steps=4, layers=work.layers).rows() == once.rows()
    assert once.rows() == [10, 10, 10, 8]  # at the last step nothing follows from the intermediate image's outside
    assert share(work.courses[:1], steps=4, layers=work.layers, wanted=("t2i",)).rows() == [6, 6, 6, 6]


def test_the_source_is_shared_whatever_else_differs(work):
    seeds = [replace(work.courses[0], x={name: x + k for name, x in work.courses[0].x.items()}) for k in range(3)]
    assert share(seeds, steps=4, layers=work.layers).rows() == [26, 26, 26, 20]


def test_a_denoising_goes_on_from_a_state_it_was_left_at(work):
    together = share(work.courses[:4], steps=4, layers=work.layers)
    states = list(together.course.run(work.model, schedule=work.schedule))
    rest = replace(together.course, x=states[1].x)
    *_, end = rest.run(work.model, schedule=work.schedule, start=2)
    for its in together.ends:
        assert torch.equal(end.x[its["target"]], states[-1].x[its["target"]])


def test_rows_are_split_with_what_they_read():
    read = {"S": Branch("source", "source")} | {
        f"T{k}": Branch("target", "target", take=Take("S", "S", "S")) for k in range(4)
    }
    plan = Script([read], [{f"t{k}": ("target", f"T{k}") for k in range(4)}])
    parts = calls(plan, 0, 7.5, most=3)
    assert all(len(part) <= 3 and {("S", half) for _, half in part} <= {*part} for part in parts)
    assert {row for part in parts for row in part} == {*calls(plan, 0)[0]}
    assert [len(part) for part in calls(plan, 0, most=1)] == [2] * 8


def test_a_plan_that_says_what_is_not_understood_runs_apart(monkeypatch):
    (course,) = courses([MaSaFusion()], 2)
    assert is_shareable(course)
    monkeypatch.setitem(KNOWN, Hint, "steps halves")
    assert is_shareable(course)  # its scale is the default
    (scaled,) = courses([MaSaFusion(hint_scale=0.5)], 2)
    assert not is_shareable(scaled)


def test_what_cannot_be_shared_is_said():
    given, source, x = world(2)
    other = MaSaFusion().course(SimpleNamespace(sites=()), replace(given, hint=(x,)), source, x, schedule=range(2))
    (one,) = courses([MaSaFusion()], 2)
    with pytest.raises(InputError, match="different hints"):
        share([one, other], steps=2, layers=7)
    pair = {"A": Branch("x", "target", take=Take("B")), "B": Branch("x", "target", take=Take("A"))}
    with pytest.raises(InputError, match="read one another"):
        share([Course(Plan(pair, {"x": "A"}), {"x": x}, given)], steps=2, layers=7)
    with pytest.raises(InputError, match="none of the 2 steps"):
        share(courses([MaSaFusion(edit_steps=(5, 9))], 2), steps=2, layers=7)
