"""Runs that were recorded offline are found, sent, and found no more."""

import sys

import pytest

from masafusion_lab import InputError, cli, sync
from masafusion_lab.runs import Run

SENDER = """
import pathlib, sys
assert sys.argv[1] == "sync", sys.argv
for run in map(pathlib.Path, sys.argv[2:]):
    if "refused" not in run.name:
        file, = run.glob("run-*.wandb")
        file.with_name(file.name + ".synced").touch()
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three offline runs, one of them sent already, and a `wandb` that marks what it is given, as the real one does."""
    for number, name in enumerate(("a", "b", "c")):
        folder = tmp_path / f"runs/{name}/wandb/offline-run-2026112{number}_000000-{name}"
        folder.mkdir(parents=True)
        (folder / f"run-{name}.wandb").touch()
    (folder / "run-c.wandb.synced").touch()
    (tmp_path / "path/wandb").mkdir(parents=True)
    (tmp_path / "path/wandb/__init__.py").touch()
    (tmp_path / "path/wandb/__main__.py").write_text(SENDER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return tmp_path / "runs"


def masafusion(capsys, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["masafusion", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0, *capsys.readouterr()


def test_runs_are_listed_then_sent_then_no_longer_there(runs, capsys, monkeypatch):
    code, out, _ = masafusion(capsys, monkeypatch, "sync", runs, "--dry-run")
    assert code == 0
    assert [line.rpartition("-")[2] for line in out.splitlines()] == ["a", "b", "2 to send"]
    assert masafusion(capsys, monkeypatch, "sync", runs)[1].endswith("2 sent\n")
    assert masafusion(capsys, monkeypatch, "sync", runs)[1] == "0 sent\n"


def test_a_run_that_did_not_arrive_is_told(runs):
    folder = runs / "d/wandb/offline-run-20261130_000000-refused"
    folder.mkdir(parents=True)
    (folder / "run-refused.wandb").touch()
    with pytest.raises(InputError, match=r"1 of 3 runs were not sent.*wandb login"):
        sync.send(sync.unsent(runs))
    assert [run.name for run in sync.unsent(runs)] == [folder.name]


def test_a_run_that_goes_on_is_not_sent_before_it_has_ended(runs):
    with Run(runs / "a", "seed: 0", force=True):
        assert [run.name[-1] for run in sync.unsent(runs)] == ["b"]
    assert [run.name[-1] for run in sync.unsent(runs)] == ["a", "b"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none: no such folder"):
        sync.unsent(tmp_path / "none")


@pytest.mark.slow
def test_wandb_itself_refuses_without_a_key_and_says_so(tmp_path, monkeypatch):
    import wandb

    wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off")).finish()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"1 of 1 runs were not sent.*API key"):
        sync.send(sync.unsent(tmp_path))
