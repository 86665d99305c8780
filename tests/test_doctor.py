"""The doctor tells what is amiss, and nothing that is amiss keeps it from telling."""

import json
import sys
import time

import pytest

from masafusion_lab import cli, doctor, hub


def findings():
    """What the doctor finds, by what it looked at."""
    return {finding.what: finding for finding in doctor.examine()}


def test_everything_is_looked_at_here():
    found = findings()
    assert list(found)[1:8] == list(doctor.LOOKS)
    assert {found[what].state for what in ("torch", "device", "libraries", "inversions")} == {"ok"}
    assert "HF_HUB_OFFLINE" in found["hub"].said
    assert "offline" in found["tracking"].said


def test_a_broken_optional_package_is_told_and_breaks_nothing(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info/METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor._package("torchvision")  # alone: other packages would remember that it was there
    assert found.state == "note"
    assert "0.28.0 is broken (RuntimeError: operator torchvision::nms" in found.said


def test_whatever_breaks_while_it_is_looked_at_is_a_finding(monkeypatch):
    def broken(what):
        raise RuntimeError("gone\nwrong")

    monkeypatch.setitem(doctor.LOOKS, "device", broken)
    found = findings()
    assert (found["device"].state, found["device"].said) == ("bad", "RuntimeError: gone wrong")
    assert found["inversions"].state == "ok"


def test_a_weight_that_rotted_and_a_file_that_is_missing_are_told(tmp_path, monkeypatch):
    for name in ("model_index.json", "unet/weights.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a" * 100)
    named = f"{hub.fingerprint([tmp_path / 'unet/weights.safetensors'])}  unet/weights.safetensors\n"
    (tmp_path / hub.SUMS).write_text(named)
    monkeypatch.setattr(hub, "PICTUREBOOK", tmp_path)
    assert doctor._model("model").state == "ok"
    (tmp_path / "unet/weights.safetensors").write_bytes(b"a" * 99 + b"b")
    assert "not as it was shipped: unet/weights.safetensors; check out" in doctor._model("model").said
    (tmp_path / "unet/weights.safetensors").unlink()
    assert doctor._model("model").state == "bad"


def test_a_server_that_does_not_answer_is_not_waited_for():
    start = time.monotonic()
    assert not doctor._reached("http://192.0.2.1/", seconds=0.2)
    assert time.monotonic() - start < 2


def test_a_mode_that_wandb_does_not_know_keeps_no_edit_from_running(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    assert findings()["tracking"].state != "bad"


def test_without_wandb_an_edit_runs_all_the_same(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert doctor._tracking("tracking").state == "note"


def test_more_threads_than_cores_are_warned_of(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 10_000)
    found = doctor._torch("torch")
    assert found.state == "note"
    assert "10000 threads on" in found.said
    assert "set OMP_NUM_THREADS=" in found.said


@pytest.mark.parametrize("state", ["ok", "bad"])
def test_the_status_tells_whether_an_edit_can_run(state, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("device", state, "cpu [x]")]))
    monkeypatch.setattr(sys, "argv", ["masafusion", "doctor", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0) == (state == "bad")
    assert json.loads(capsys.readouterr().out) == [{"what": "device", "state": state, "said": "cpu [x]"}]
    monkeypatch.setattr(sys, "argv", ["masafusion", "doctor"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "cpu [x]" in capsys.readouterr().out
