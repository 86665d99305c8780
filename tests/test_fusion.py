"""Fusion as data: windows, which branches a step needs, and plans that cannot work."""

import pytest
import torch

from masafusion_lab import InputError
from masafusion_lab.fusion import Branch, Hint, Masked, Plan, Sde, Span, Take, Weighted, Words
from masafusion_lab.lockstep import mix

S, T = Branch("source", "source"), Branch("target", "target", take=Take(None, "S", "S", Span(2, 4)))
KEEP = Branch("target", "source")


def test_a_span_is_half_open():
    assert [i for i in range(6) if i in Span(2, 4)] == [2, 3]
    assert 10**6 in Span(3)
    assert "2" not in Span()


def test_a_step_needs_only_what_it_uses_and_what_that_reads():
    plan = Plan({"S": S, "T": T, "keep": KEEP}, {"target": Masked("T", "keep", Span(3))})
    assert [list(plan.at(i)) for i in range(5)] == [["T"], ["T"], ["S", "T"], ["S", "T", "keep"], ["T", "keep"]]


def test_of_a_branch_that_is_only_read_there_are_only_the_halves_that_are_read():
    follow = Branch("target", "target", words=Words("S", Span(1)), take=Take("S", steps=Span(3), from_text=True))
    plan = Plan({"S": S, "T": follow}, {"target": "T"})
    own = (("T", "null"), ("T", "text"))
    assert [plan.rows(i) for i in (0, 1, 3)] == [own, *2 * [(own[0], ("S", "text"), own[1])]]
    assert plan.rows(1, 1.0) == (("S", "text"), ("T", "text"))


def test_what_is_read_is_computed_whatever_guidance_its_branch_has():
    plan = Plan(
        {"S": Branch("source", "source", w=1), "T": Branch("target", "target", take=Take("S"))}, {"target": "T"}
    )
    assert plan.rows(0, 7.5) == (("S", "null"), ("T", "null"), ("S", "text"), ("T", "text"))


def test_without_a_region_what_is_optional_about_it_is_left_out():
    plan = Plan({"S": S, "T": T, "keep": KEEP}, {"target": Masked("T", "keep", optional=True)})
    assert plan.everywhere().noise == {"target": "T"}
    fixed = Plan(plan.branches, {"target": Masked("T", "keep")})
    assert fixed.everywhere() == fixed
    usual = {"steps": 5, "layers": 5, "latents": {"source", "target"}, "prompts": {"source", "target", "empty"}}
    plan.check(**usual, masked=False, hinted=False)
    with pytest.raises(InputError, match="acts inside a region"):
        fixed.check(**usual, masked=False, hinted=False)


def test_a_window_is_a_part_of_the_steps():
    assert Span.part((0.08, 1), 50) == Span(4, 50)
    assert Span.part(0.8, 51) == Span(0, 40)
    assert Span.part((0.5, 0.5), 50) is None
    assert Span.part(1, 4) == Span(0, 4)
    for wrong in ((0.5, 0.2), (-0.1, 1), (0, 1.5), float("nan")):
        with pytest.raises(InputError, match="fractions of the steps"):
            Span.part(wrong, 50)


def test_the_adapter_is_on_in_a_first_part_of_the_steps():
    assert Hint.first(0.5, 4, scale=2.0) == Hint(Span(0, 2), scale=2.0)
    assert Hint.first(1, 4, on_null=False).halves == ("text",)
    assert Hint.first(0, 4) is None


def test_weights_may_change_with_the_step():
    eps = {"a": torch.tensor(4.0), "b": torch.tensor(8.0)}
    assert [float(mix(eps, Weighted({"a": (1.0, 0.5, 0.0), "b": (0.0, 0.5, 1.0)}), None, i)) for i in range(3)] == [
        4,
        6,
        8,
    ]


def test_a_leader_of_stochastic_steps_is_needed_while_it_leads():
    T = Branch("target", "target")
    plan = Plan({"S": S, "T": T}, {"target": "T"}, sde={"target": Sde(1.0, "S", Span(0, 2))})
    assert [list(plan.at(i)) for i in range(4)] == [["S", "T"], ["S", "T"], ["T"], ["T"]]


def test_a_region_may_be_needed_beside_the_rules():
    plan = Plan({"T": KEEP}, {"target": "T"}, masked=True)
    facts = {"steps": 2, "layers": 5, "latents": {"target"}, "prompts": {"source", "empty"}, "hinted": False}
    plan.check(masked=True, **facts)
    with pytest.raises(InputError, match="mask=FILE"):
        plan.check(masked=False, **facts)


@pytest.mark.parametrize(
    ("branches", "noise", "words"),
    [
        ({"T": T}, {"target": "T"}, "reads S, no branch"),
        ({"T": Branch("elsewhere", "target")}, {"elsewhere": "T"}, "has no start"),
        ({"T": Branch("target", "story")}, {"target": "T"}, "wants prompt 'story'"),
        ({"S": S, "T": T}, {"target": "S"}, "denoised by 'S'"),
        ({"S": S, "T": Branch("target", "target", take=Take("S", steps=Span(50)))}, {"target": "T"}, "none of the 10"),
        ({"S": S, "T": Branch("target", "target", take=Take("S", layers={7}))}, {"target": "T"}, "none of the 5"),
        ({"T": Branch("target", "target", words=Words("S"))}, {"target": "T"}, "reads S, no branch"),
        ({"S": S, "T": Branch("target", "target", words=Words("S", Span(9, 9)))}, {"target": "T"}, "none of the 10"),
        ({"S": S, "T": Branch("target", "target", feature=Take(v="S", layers={5}))}, {"target": "T"}, "5 residual"),
        ({"T": Branch("target", "target")}, {"target": Weighted({"T": 1.0, "S": 0.0})}, "denoised by 'S'"),
        ({"T": Branch("target", "instruction")}, {"target": "T"}, 'follows an instruction: give instruction="'),
        ({"S": S, "T": Branch("target", "target")}, {"target": Weighted({"T": 2, "S": -1})}, "denoised by 'S'"),
    ],
)
def test_a_plan_that_cannot_work_says_why(branches, noise, words):
    with pytest.raises(InputError, match=words):
        Plan(branches, noise).check(
            steps=10,
            layers=5,
            latents={"source", "target"},
            prompts={"source", "target", "empty"},
            masked=True,
            hinted=True,
        )


def test_eps_is_chosen_pixel_by_pixel_and_hard_where_the_region_is_hard():
    eps = {"in": torch.full((1, 4, 1, 3), 2.0), "out": torch.full((1, 4, 1, 3), float("inf"))}
    mask = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 1, 3)
    assert mix(eps, Masked("in", "out"), mask, 0)[0, 0, 0].tolist() == [2, 2, float("inf")]
    assert torch.equal(mix(eps, Masked("in", "out", Span(3)), mask, 0), eps["in"])
    eps["out"] = torch.zeros(1, 4, 1, 3)
    assert mix(eps, Masked("in", "out"), mask / 2, 0)[0, 0, 0].tolist() == [1, 1, 0]


def test_a_weighted_sum_is_guidance_by_two_conditions():
    full, image, none = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    weights = Weighted({"none": 1 - 1.5, "image": 1.5 - 7.5, "full": 7.5})
    mixed = mix({"full": full, "image": image, "none": none}, weights, None, 0)
    torch.testing.assert_close(mixed, none + 7.5 * (full - image) + 1.5 * (image - none))


def test_mixing_by_mask_commutes_with_the_step(tiny):
    schedule, g = tiny.schedule(10), torch.Generator().manual_seed(0)
    x, a, b = torch.randn(3, 1, 4, 8, 8, generator=g)
    mask = (torch.rand(1, 1, 8, 8, generator=g) > 0.5).float()
    mixed = schedule.denoise(x, mix({"a": a, "b": b}, Masked("a", "b"), mask, 4), 4)
    assert torch.equal(mixed, torch.where(mask == 1, schedule.denoise(x, a, 4), schedule.denoise(x, b, 4)))
