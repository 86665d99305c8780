"""Searches: they end after so many points, go on where they were, and do not mix."""

import sys

import pytest

from masafusion_lab import InputError, config, phases, surveypage
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


def test_the_study_of_another_sweep_is_refused(run):
    run(*AXES)
    with pytest.raises(InputError, match="study of another sweep"):
        run("axes.method.guidance=uniform(1,3)", *AXES[2:])


def test_without_optuna_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna.trial", None)
    with pytest.raises(InputError, match=r"masafusion-lab\[sweep\]"):
        run(*AXES)
