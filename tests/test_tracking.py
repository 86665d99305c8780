"""What loggers are told, and that none of their troubles reaches a run or its results."""

import json
import logging
import os
import subprocess
import sys

import pytest
import wandb
from lightning.pytorch.loggers.logger import Logger

from masafusion_lab import config, phases, tracking
from tests.edits import STEPS, case
from tests.edits import lab as make_lab

KEY = "0123456789" * 4


def settings(*words):
    return config.load(words=words)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def on_record(folder):
    """The records of the one offline run in a folder, as W&B itself reads them."""
    (run,) = folder.glob("wandb/offline-run-*")
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    said = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]


def find(tree, name):
    """All values of a key, however deep."""
    if isinstance(tree, dict):
        yield from (value for key, value in tree.items() if key == name)
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from find(branch, name)


def test_an_offline_run_holds_configuration_losses_psnr_times_and_pictures(tiny_root, tmp_path, caplog):
    words = ("inversion.name=null_text", "inversion.inner_steps=2", "tracking.group=cats")
    folder, service = tmp_path / "run", "WANDB_SERVICE"  # which another test may have started
    environment = {name: value for name, value in os.environ.items() if name != service}
    its = make_lab(tiny_root, tmp_path / "store", *words)
    with caplog.at_level(logging.INFO), tracking.recording(settings(*words, "source=a: b ${HOME}"), folder) as loggers:
        phases.edit(its, [case()], folder, loggers=loggers)
    assert f"recorded offline; `masafusion sync {folder}` sends it later" in caplog.text
    assert {name: value for name, value in os.environ.items() if name != service} == environment
    text = json.dumps(records := on_record(folder))
    for name in ("nti/step", "nti/inner", "nti/loss", "nti/error", "invert/seconds", "edit/reconstruction_psnr"):
        assert name in text
    for name in ("edit/seconds/denoise", "edit/pictures", "a: b ${HOME}", "cats", "cat: intermediate"):
        assert name in text
    losses = [row for row in find(records, "history") if "nti/loss" in json.dumps(row)]
    assert len(losses) == STEPS * 2
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 6
    home = os.environ["HOME"]
    assert not [path for path in os.listdir(home) if "wandb" in path or path in (".local", ".cache", ".config")]


def test_parts_of_a_run_that_was_cut_short_have_one_identity(tmp_path):
    for _ in range(2):
        with tracking.recording(settings(), tmp_path):
            pass
    runs = [path.name for path in tmp_path.glob("wandb/offline-run-*")]
    assert len({name.split("-")[3] for name in runs}) == 1


def test_values_that_wandb_would_choke_on_do_no_harm(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    monkeypatch.setenv("WANDB_SILENT", "")
    with tracking.recording(settings(), tmp_path):
        pass
    assert "WANDB_MODE=nonsense is none of" in caplog.text
    assert on_record(tmp_path)
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"]) == ("nonsense", "")


def test_a_wrong_key_ends_in_a_record_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "nonsense")
    with tracking.recording(settings(), tmp_path):
        pass
    assert "W&B: " in caplog.text
    assert on_record(tmp_path)
    assert "nonsense" not in json.dumps(on_record(tmp_path))


@pytest.mark.slow
def test_a_dead_network_ends_in_a_record_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with tracking.recording(settings("tracking.mode=online"), tmp_path) as loggers:
        loggers[0].log_metrics({"x": 1.0})
    assert "W&B: " in caplog.text
    assert KEY not in json.dumps(on_record(tmp_path))


@pytest.mark.parametrize(("mode", "wish"), [("off", ""), ("auto", "disabled")])
def test_no_record_where_none_is_wanted(tmp_path, monkeypatch, mode, wish):
    monkeypatch.setenv("WANDB_MODE", wish)
    assert tracking.loggers(settings(f"tracking.mode={mode}"), tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trouble", ["missing", "broken", "refusing"])
def test_without_a_working_wandb_there_is_a_warning_and_no_logger(tmp_path, monkeypatch, caplog, trouble):
    if trouble == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif trouble == "broken":
        monkeypatch.delitem(sys.modules, "wandb")
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "wandb.py").write_text("raise RuntimeError('operator does not exist')")
    else:
        monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(ValueError("no")))
    environment = dict(os.environ)
    assert tracking.loggers(settings(), tmp_path / "run") == []
    assert "wandb cannot record this run" in caplog.text
    assert dict(os.environ) == environment


@pytest.mark.parametrize(("kind", "file"), [("csv", "metrics.csv"), ("tensorboard", "events.out.*")])
def test_other_loggers_record_too(tiny_root, tmp_path, kind, file):
    folder = tmp_path / "run"
    loggers = tracking.loggers(settings(f"tracking.logger={kind}"), folder)
    phases.edit(make_lab(tiny_root, tmp_path / "store"), [case()], folder, loggers=loggers)
    (found,) = (folder / kind).rglob(file)
    for name in (b"edit/reconstruction_psnr", b"edit/seconds/denoise"):
        assert name in found.read_bytes()
    assert list((folder / kind).rglob("hparams.yaml"))


class Failing(Logger):
    """Raises whatever it is asked, after so many times."""

    name, version, save_dir = "failing", 0, None

    def __init__(self, good):
        super().__init__()
        self.good, self.asked = good, 0

    def log_metrics(self, *args, **options):
        self.asked += 1
        if self.asked > self.good:
            raise OSError("No space left on device")

    log_hyperparams = finalize = save = log_metrics


@pytest.mark.parametrize("good", [0, 4])
def test_a_logger_that_fails_in_the_middle_is_given_up_and_the_results_are_there(tiny_root, tmp_path, caplog, good):
    lab = make_lab(tiny_root, tmp_path / "store", "inversion.name=null_text", "inversion.inner_steps=2")
    failing = Failing(good)
    (folder,) = phases.edit(lab, [case()], tmp_path / "run", loggers=[tracking.Guarded(failing)])
    assert (folder / "result.json").exists()
    assert failing.asked == good + 1
    assert caplog.text.count("Failing failed and is given up (OSError: No space left on device)") == 1


def test_what_wandb_finds_amiss_in_files_of_this_machine_is_not_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "netrc").write_text("machine api.somewhere.org login x\n")
    (tmp_path / "netrc").chmod(0o600)
    for name, value in {"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "https://api.somewhere.org"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not tracking.has_key()
    with tracking._environment(tmp_path):
        wandb.termwarn("/some/where is not as it should be")
    assert capsys.readouterr().err == ""
