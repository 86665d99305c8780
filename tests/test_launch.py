"""Several workers: the same results as one process, whoever dies; what is not installed is said."""

import os
import signal
import sys
import threading
import time
from functools import partial

import pytest

from experiments.scale import makespan
from masafusion_lab import InputError, config, launch, phases, request
from masafusion_lab.axes import Launch
from masafusion_lab.launch import Worker, claimed, workers
from masafusion_lab.runs import write_text
from masafusion_lab.sweep import sweep
from tests.edits import drawn
from tests.test_sweep import pictures


@pytest.fixture
def experiment(tmp_path, tiny_root):
    """A sweep over two cases of a manifest, in a folder of a given name."""
    for n, shift in enumerate((0, 4)):
        drawn(shift=shift).save(tmp_path / f"{n}.png")
        drawn("L", shift, fill=255).save(tmp_path / f"mask{n}.png")
        drawn("L", shift, outline=255).save(tmp_path / f"sketch{n}.png")
    lines = [f"{n},{n}.png,mask{n}.png,sketch{n}.png,a cat on grass,a red dog" for n in (0, 1)]
    (tmp_path / "cases.csv").write_text("\n".join(["id,image,mask,sketch,source,target", *lines]))

    def experiment(*words):
        usual = f"model.path={tiny_root} model.device=cpu store={tmp_path}/store cases={tmp_path}/cases.csv size=48x32"
        return config.load(words=[*usual.split(), "steps=3", "axes.seed=0,1", "sweep.rows=8", *words])

    return experiment


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
    assert makespan(rows, 3, 64, loading=5) == 5 + 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_workers_of_which_one_is_killed_end_in_the_bytes_of_one_process(experiment, tmp_path):
    one = experiment()
    sweep(one, request.cases_of(one), tmp_path / "one")
    two = experiment("launch.by=local", "launch.workers=2")

    def kill():
        for _ in range(3000):
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                try:
                    with open(f"/proc/{pid}/cmdline", "rb") as file:
                        told = file.read()
                except OSError:
                    continue
                if (
                    b"masafusion_lab.launch" in told
                    and str(tmp_path).encode() in told
                    and list((tmp_path / "two").glob("claims/*"))
                ):
                    os.kill(int(pid), signal.SIGKILL)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    found = sweep(two, request.cases_of(two), tmp_path / "two")
    thread.join()
    assert not found.failures
    assert pictures(tmp_path / "two") == pictures(tmp_path / "one")
    assert (tmp_path / "two/results.parquet").read_bytes() == (tmp_path / "one/results.parquet").read_bytes()


def test_a_worker_of_this_process_does_all_that_is_left(experiment, tmp_path):
    asked = experiment()
    sweep(asked, request.cases_of(asked)[:1], tmp_path / "out")
    write_text(tmp_path / "out/config.yaml", config.to_yaml(asked))
    Worker("sweep", str(tmp_path / "out"), "cpu", 1)()
    assert len(pictures(tmp_path / "out")) == 4


def test_inversions_are_items_too(experiment, tmp_path):
    asked = experiment()
    write_text(tmp_path / "out/config.yaml", config.to_yaml(asked))
    Worker("invert", str(tmp_path / "out"), "cpu", 1)()
    lab = phases.build(asked)
    assert all(found for _, _, found in phases.invert(lab, request.cases_of(asked)))


def test_what_no_worker_does_is_missed(experiment, tmp_path, monkeypatch):
    monkeypatch.setitem(launch.LAUNCHERS, "local", lambda *args: None)
    asked = experiment("launch.by=local")
    found = sweep(asked, request.cases_of(asked), tmp_path / "out")
    assert "4 of 4 points failed" in found.lost
    assert "was not run" in found.lost


@pytest.mark.parametrize(("by", "module"), [("ray", "ray"), ("submitit", "submitit")])
def test_a_launcher_that_is_not_installed_says_what_to_install(by, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'masafusion-lab\[{by}\]'"):
        launch.LAUNCHERS[by]([Worker("sweep", str(tmp_path), "cpu", 1)], Launch(by), tmp_path)


@pytest.mark.slow
def test_ray_runs_the_workers(experiment, tmp_path):
    pytest.importorskip("ray")
    asked = experiment("launch.by=ray", "launch.workers=2")
    assert not sweep(asked, request.cases_of(asked), tmp_path / "out").failures


@pytest.mark.slow
def test_submitit_runs_the_workers(experiment, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit, "AutoExecutor", partial(submitit.AutoExecutor, cluster="local"))
    asked = experiment("launch.by=submitit", "launch.workers=2")
    assert not sweep(asked, request.cases_of(asked), tmp_path / "out").failures
