"""Launchers for real: on this machine, Ray, submitit; a worker is killed, a job preempted, a result lost."""

import os
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from masafusion_lab import request
from masafusion_lab.sweep import sweep
from tests.test_sweep import pictures

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


def strike(folder, signum, hit):
    """Send a signal, once, to a worker that is in the middle of an item."""

    def strike():
        while not hit:
            if (pid := at_work(folder)) is not None and at_work(folder) == pid:
                os.kill(pid, signum)
                hit.append(pid)
            time.sleep(0.02)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    return thread


def begun(folder):
    """The processes that have been workers."""
    lines = "".join(path.read_text() for path in folder.glob("worker-*.log")).splitlines()
    return {line.split("process ")[1].split(":")[0] for line in lines if " begins, process " in line}


@LAUNCHERS
def test_two_workers_of_which_one_is_killed_end_in_the_bytes_of_one_process(two_cases, tmp_path, by):
    one = two_cases()
    sweep(one, request.cases_of(one), tmp_path / "one")
    two, hit = two_cases(f"launch.by={by}", "launch.workers=2"), []
    thread = strike(tmp_path / "two", signal.SIGKILL, hit)
    found = sweep(two, request.cases_of(two), tmp_path / "two")
    thread.join(1)
    assert str(hit[0]) in begun(tmp_path / "two")
    assert len(begun(tmp_path / "two")) == 3
    assert not found.failures
    assert pictures(tmp_path / "two") == pictures(tmp_path / "one")
    assert (tmp_path / "two/results.parquet").read_bytes() == (tmp_path / "one/results.parquet").read_bytes()
    assert at_work(tmp_path / "two") is None
