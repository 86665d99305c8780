"""Searches: they end after so many points, go on where they were, and do not mix."""

import sys
from collections import Counter

import pytest

from masafusion_lab import InputError, config, phases, survey, surveypage
from masafusion_lab.sweep import sweep
from tests.edits import Calls, case

pytest.importorskip("optuna")
AXES = ["axes.method.guidance=loguniform(1.5,12)", "axes.method.preserve=qkv,kv", "sweep.kind=search", "sweep.points=5"]


@pytest.fixture
def run(tmp_path, tiny_root, tiny, monkeypatch):
    monkeypatch.setattr(surveypage, "figures", lambda findings: ())

    def run(*words):
        usual = f"model.path={tiny_root} model.device=cpu store={tmp_path}/store size=48x32 steps=2 sweep.rows=8"
        experiment = config.load(words=[*usual.split(), *words])
        lab = phases.build(experiment, model=tiny)
        return sweep(experiment, [case()], tmp_path / "out", lab=lab)

    return run


def test_a_search_ends_after_its_points_and_goes_on_when_it_may_have_more(run, tiny):
    found = run(*AXES)
    assert 1 < len(found.records) <= 5
    assert not found.failures
    assert all(1.5 <= record["method.guidance"] <= 12 for record in found.records)
    calls = Calls(tiny)
    assert run(*AXES).records == found.records
    assert calls.count == 0
    calls.hook.remove()
    more = run(*AXES[:3], "sweep.points=7")
    assert more.records[: len(found.records)] == found.records
    assert len(more.records) > len(found.records)


def test_a_search_cut_short_asks_again_for_what_was_under_way(run, tiny):
    def die(*_):
        die.calls += 1
        if die.calls == 9:
            raise KeyboardInterrupt

    die.calls = 0
    hook = tiny.unet.register_forward_pre_hook(die)
    with pytest.raises(KeyboardInterrupt):
        run(*AXES)
    hook.remove()
    assert not run(*AXES).failures


HALVED = [AXES[0], AXES[2], "sweep.points=8", "sweep.halvings=2", "steps=4"]


def test_the_better_half_goes_on_in_twice_as_many_steps(run, tiny, tmp_path):
    found = run(*HALVED)
    by_steps = Counter(
        path.parent.name.split("steps-")[-1][0] for path in tmp_path.rglob("out/cases/*/*steps-*/target.png")
    )
    assert by_steps == {"1": 8, "2": 4}
    assert len(found.records) == 2
    assert not found.failures
    calls = Calls(tiny)
    assert run(*HALVED).records == found.records
    calls.hook.remove()
    assert calls.count == 0


def test_halvings_cut_short_lose_nothing_and_run_nothing_twice(run, tiny, tmp_path):
    def results():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("out/cases/*/*/result.json")}

    def die(*_):
        if len(results()) == 8:  # in the second round
            raise KeyboardInterrupt

    hook = tiny.unet.register_forward_pre_hook(die)
    with pytest.raises(KeyboardInterrupt):
        run(*HALVED)
    hook.remove()
    done = results()
    assert len(run(*HALVED).records) == 2
    assert done.items() <= results().items()
    assert len(results()) == 8 + 4 + 2


@pytest.mark.parametrize(("steps", "window"), [(50, (5, 20)), (12, (1, 5)), (6, (0, 2)), (1, (0, 1))])
def test_in_fewer_steps_a_window_is_in_proportion(steps, window):
    experiment = config.load(words=["steps=50", "axes.method.fusion_steps=[5,20]"])
    (point,) = survey.points(experiment, [{"method.fusion_steps": "[5,20]"}])
    short = survey.shortened(point, steps).experiment
    assert (short.steps, short.method["fusion_steps"]) == (steps, window)
    assert short.method["edit_steps"][0] == 0
    assert short.method["edit_steps"][1] >= steps


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep.halvings=4"], "sweep.halvings=4: must be 0, or of sweep.kind=search 1 to 3"),
        (["sweep.halvings=2"], "and leave a step"),
        (["sweep.halvings=1", "sweep.kind=grid"], "of sweep.kind=search"),
        (["sweep.halvings=1", "axes.steps=1,2"], "leave axes.steps out"),
        (["launch.by=local"], "launch.by=local: a search runs in its own process"),
        (["sweep.objective=hit"], "sweep.objective=hit: has no value on case 'cat': no target picture is known"),
        (["sweep.objective=psnr_area,done"], "sweep.objective=done: has no value .*the picture-book world alone"),
        (["sweep.objective=psnr_aera"], "did you mean psnr_area"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_runs(run, words, said, tmp_path):
    with pytest.raises(InputError, match=said):
        run(*AXES, *words)
    assert not list(tmp_path.rglob("target.png"))


def test_the_study_of_another_sweep_is_refused(run):
    run(*AXES)
    with pytest.raises(InputError, match="study of another sweep"):
        run("axes.method.guidance=uniform(1,3)", *AXES[2:])


def test_a_file_that_is_no_study_is_refused(run, tmp_path):
    (tmp_path / "study.log").write_text("prompt,image\na cat,cat.png\n")
    with pytest.raises(InputError, match=r"study\.log: is no journal of a study"):
        run(*AXES, f"sweep.study={tmp_path / 'study.log'}")


def test_without_optuna_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna.trial", None)
    with pytest.raises(InputError, match=r"masafusion-lab\[sweep\]"):
        run(*AXES)
