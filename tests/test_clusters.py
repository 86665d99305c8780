"""Launchers for real: on this machine, Ray, submitit; a worker is killed, a job preempted, a result lost."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from masafusion_lab import InputError, cli, config, launch, request
from masafusion_lab.runs import write_text
from masafusion_lab.sweep import sweep
from tests.test_sweep import pictures

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def needs(module):
    return pytest.mark.skipif(not find_spec(module), reason=f"pip install 'masafusion-lab[{module}]'")


LAUNCHERS = pytest.mark.parametrize(
    "by", ["local", pytest.param("ray", marks=needs("ray")), pytest.param("submitit", marks=needs("submitit"))]
)


def at_work(folder):
    """The process that has claimed an item of a run folder, if there is one."""
    for place in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            name = os.readlink(place)
        except OSError:
            continue
        if name.startswith(f"{folder}/claims/") and name.endswith(".lock"):
            return int(place.parts[2])
    return None


def watch(folder, act, hit):
    """Act, once, on a worker that is in the middle of an item; its process is put into `hit`."""

    def look():
        while not hit:
            if (pid := at_work(folder)) is not None and at_work(folder) == pid:
                hit.append(pid)
                act(pid)
            time.sleep(0.02)

    threading.Thread(target=look, daemon=True).start()


def begun(folder):
    """The processes that have been workers."""
    lines = "".join(path.read_text() for path in folder.glob("worker-*.log")).splitlines()
    return {line.split("process ")[1].split(":")[0] for line in lines if " begins, process " in line}


@LAUNCHERS
def test_two_workers_of_which_one_is_killed_end_in_the_bytes_of_one_process(two_cases, tmp_path, by):
    one = two_cases()
    sweep(one, request.cases_of(one), tmp_path / "one")
    two, hit = two_cases(f"launch.by={by}", "launch.workers=2"), []
    watch(tmp_path / "two", lambda pid: os.kill(pid, signal.SIGKILL), hit)
    found = sweep(two, request.cases_of(two), tmp_path / "two")
    assert str(hit[0]) in begun(tmp_path / "two")
    assert len(begun(tmp_path / "two")) == 3
    assert not found.failures
    assert pictures(tmp_path / "two") == pictures(tmp_path / "one")
    assert (tmp_path / "two/results.parquet").read_bytes() == (tmp_path / "one/results.parquet").read_bytes()
    assert at_work(tmp_path / "two") is None


def command(folder, *words):
    """The words of a command in the configuration that they are of."""
    return ["masafusion", "sweep", "--config", str(folder / "two.yaml"), "out=two", "tracking.mode=off", *words]


@pytest.fixture
def yaml(two_cases, tmp_path, monkeypatch):
    """The folder that a command is given in, with its configuration two.yaml."""
    write_text(tmp_path / "two.yaml", config.to_yaml(two_cases("launch.workers=2")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@LAUNCHERS
def test_a_result_that_is_gone_when_all_workers_have_ended_is_missed(yaml, by, monkeypatch, capsys):
    def losing(them, how, folder):
        for _ in whole(them, how, folder):
            if by == "ray":
                assert {node["NodeManagerAddress"] for node in sys.modules["ray"].nodes()} == {"127.0.0.1"}
            yield
        shutil.rmtree(next(folder.glob("cases/*/*")))

    whole = launch.LAUNCHERS[by]
    monkeypatch.setitem(launch.LAUNCHERS, by, losing)
    monkeypatch.setattr(sys, "argv", command(yaml, f"launch.by={by}"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "1 of 4 points failed" in (said := " ".join(capsys.readouterr().err.split()))
    assert "was not run" in said


@LAUNCHERS
def test_a_command_that_is_told_to_stop_takes_its_workers_along_and_goes_on_when_given_again(yaml, by):
    words = [sys.executable, "-m", "masafusion_lab.cli", *command(yaml, f"launch.by={by}")[1:]]
    process, hit = subprocess.Popen(words, stderr=subprocess.PIPE, text=True), []
    watch(yaml / "two", lambda pid: process.terminate(), hit)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM" in said
    for _ in range(100):
        if not (alive := Path(f"/proc/{hit[0]}").exists()):
            break
        time.sleep(0.1)
    assert not alive
    assert subprocess.run(words, timeout=300).returncode == 0


@needs("submitit")
def test_a_job_that_slurm_preempts_is_queued_again_by_itself(two_cases, tmp_path, caplog):
    two, hit = two_cases("launch.by=submitit", "launch.workers=2"), []
    watch(tmp_path / "two", lambda pid: os.kill(pid, signal.SIGUSR2), hit)
    assert not sweep(two, request.cases_of(two), tmp_path / "two").failures
    assert str(hit[0]) in begun(tmp_path / "two")
    assert len(begun(tmp_path / "two")) == 3
    assert "died" not in caplog.text
    assert "Requeued job" in "".join(path.read_text() for path in (tmp_path / "two/slurm").glob("*.out"))


@needs("ray")
def test_workers_run_on_a_ray_cluster_that_is_there_and_stays(yaml, tmp_path_factory):
    port = free()
    begin = f"start --head --block --node-ip-address=127.0.0.1 --port={port} --num-cpus=2 --include-dashboard=false"
    it = {
        "env": os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, LOOPBACK: "0"},
        "stdout": subprocess.PIPE,
        "text": True,
    }
    words = [sys.executable, "-m", "ray.scripts.scripts", *begin.split(), "--object-store-memory=100000000"]
    head = subprocess.Popen(words, cwd=tmp_path_factory.mktemp("elsewhere"), **it)
    try:
        next(line for line in head.stdout if "runtime started" in line)
        words = command(yaml, "launch.by=ray", f"launch.address=127.0.0.1:{port}", "cases=cases.csv")
        assert subprocess.run([sys.executable, "-m", "masafusion_lab.cli", *words[1:]], **it).returncode == 0
        assert len(begun(yaml / "two")) == 2
        assert head.poll() is None
    finally:
        head.terminate()
        head.wait(60)


@needs("ray")
def test_an_address_where_no_cluster_answers_is_said(two_cases, tmp_path):
    asked = two_cases("launch.by=ray", f"launch.address=127.0.0.1:{free()}")
    with pytest.raises(InputError, match=r"launch.address=127.0.0.1.*give that of a Ray cluster"):
        sweep(asked, request.cases_of(asked), tmp_path / "two")


def free():
    """A port that nobody has."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]
