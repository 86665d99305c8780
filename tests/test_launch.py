"""Several workers: the same results as one process, whoever dies; what is not installed is said."""

import sys
from functools import partial

import pytest

from experiments.scale import makespan
from masafusion_lab import InputError, config, launch, phases, request
from masafusion_lab.axes import Launch
from masafusion_lab.launch import Worker, claimed, settled, workers
from masafusion_lab.runs import write_text
from masafusion_lab.sweep import sweep
from tests.test_sweep import pictures


def test_a_claim_is_one_process_s_and_nobody_s_after_it(tmp_path):
    with claimed(tmp_path / "a.lock") as mine:
        assert mine
        with claimed(tmp_path / "a.lock") as theirs:
            assert not theirs
    with claimed(tmp_path / "a.lock") as mine:
        assert mine


def test_workers_share_devices_and_cores(tmp_path):
    them = workers("sweep", tmp_path, Launch("local", workers=3), "cpu")
    assert [worker.device for worker in them] == ["cpu"] * 3
    assert {worker.threads for worker in them} == {1}
    assert len(workers("sweep", tmp_path, Launch("local"), "cpu")) == 1


def test_what_many_devices_take_is_reckoned_by_who_is_free():
    rows = {"plain": 1.0, "masafusion": 2.0}
    assert makespan(rows, 3, 1, loading=5) == 5 + 9
    assert makespan(rows, 3, 2, loading=5) == 5 + 5
    assert makespan({"plain": 1.0, "masafusion": 4.0}, 1, 2, loading=5) == 5 + 4
    assert makespan({"a": 1.0, "b": 1.0, "c": 4.0}, 1, 2, loading=5) == 5 + 5  # in the rows' order
    assert makespan(rows, 3, 64, loading=5) == 5 + 2


def test_a_worker_of_this_process_does_all_that_is_left(two_cases, tmp_path):
    asked = two_cases()
    sweep(asked, request.cases_of(asked)[:1], tmp_path / "out")
    write_text(tmp_path / "out/config.yaml", config.to_yaml(asked))
    Worker("sweep", str(tmp_path / "out"), "cpu", 1)()
    assert len(pictures(tmp_path / "out")) == 4


def test_what_a_worker_died_of_keeps_no_other_item_from_being_run(tmp_path, monkeypatch):
    ran = []

    def item(name):
        ran.append(name)
        if ran == ["a"]:
            raise MemoryError("as if killed")

    monkeypatch.setitem(launch.TASKS, "sweep", lambda *_: [(name, partial(item, name)) for name in "abc"])
    with pytest.raises(MemoryError):
        Worker("sweep", str(tmp_path), "cpu", 1)()
    Worker("sweep", str(tmp_path), "cpu", 1)()
    assert ran == ["a", "b", "c", "a"]


def test_inversions_are_items_too(two_cases, tmp_path):
    asked = two_cases()
    write_text(tmp_path / "out/config.yaml", config.to_yaml(asked))
    Worker("invert", str(tmp_path / "out"), "cpu", 1)()
    lab = phases.build(asked)
    assert all(found for _, _, found in phases.invert(lab, request.cases_of(asked)))


def test_what_no_worker_does_is_missed(two_cases, tmp_path, monkeypatch):
    monkeypatch.setitem(launch.LAUNCHERS, "local", lambda *args: (_ for _ in ()))
    asked = two_cases("launch.by=local")
    found = sweep(asked, request.cases_of(asked), tmp_path / "out")
    assert "4 of 4 points failed" in found.lost
    assert "was not run" in found.lost


def test_the_bar_moves_with_every_item_that_a_worker_settles(tmp_path, monkeypatch):
    def one_by_one(them, how, folder):
        for name in "abc":
            yield
            (settled(folder) / name).touch()
            yield

    def track(items, what):
        for item in items:
            yield item
            seen.append(len(list(settled(tmp_path).iterdir())))

    monkeypatch.setitem(launch.LAUNCHERS, "local", one_by_one)
    for _ in range(2):
        seen = []
        launch.launch("sweep", tmp_path, Launch("local"), "cpu", items=3, track=track)
        assert seen == [1, 2, 3]


@pytest.mark.parametrize(("by", "module"), [("ray", "ray"), ("submitit", "submitit")])
def test_a_launcher_that_is_not_installed_says_what_to_install(by, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'masafusion-lab\[{by}\]'"):
        next(launch.LAUNCHERS[by]([Worker("sweep", str(tmp_path), "cpu", 1)], Launch(by), tmp_path))
