"""What may go wrong while editing: found where it happens, never a black picture, nothing left changed."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image

from masafusion_lab import InputError, phases
from masafusion_lab.lockstep import NotFinite
from masafusion_lab.runs import case_folder, read_json
from tests.edits import STEPS, Calls, case, drawn
from tests.edits import lab as make_lab


@pytest.fixture
def lab(tiny_root, tmp_path):
    return make_lab(tiny_root, tmp_path / "store")


class Nan:
    """Makes the UNet's output NaN from a call on, as a forward hook; in half precision only, if so asked."""

    def __init__(self, model, call, half=False):
        self.calls, self.call, self.half = 0, call, half
        self.model, self.hook = model, model.unet.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.calls += 1
        if self.calls > self.call and (not self.half or self.model.dtype != torch.float32):
            output.sample.fill_(float("nan"))


def test_nan_while_inverting_is_found_at_its_step(lab, tmp_path):
    Nan(lab.model, 1)
    with pytest.raises(NotFinite, match=rf"inverting cat: DDIM inversion is not finite at step 1 of {STEPS}"):
        phases.edit(lab, [case()], tmp_path / "run")
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_nan_while_editing_is_found_at_its_step_and_no_picture_is_written(lab, tmp_path):
    list(phases.invert(lab, [case()]))
    Nan(lab.model, 1)
    with pytest.raises(NotFinite, match=rf"editing cat: latent 't2i' is not finite after step 1 of {STEPS}"):
        phases.edit(lab, [case()], tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.png"))


def test_nan_of_the_autoencoder_is_found_and_no_picture_is_written(lab, tmp_path):
    lab.model.vae.decoder.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(NotFinite, match=r"editing cat: the autoencoder's .* not finite"):
        phases.edit(lab, [case()], tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.png"))


def test_an_overflow_of_half_precision_is_repeated_in_float32(tiny_root, tmp_path, caplog):
    lab = make_lab(tiny_root, tmp_path / "store", "model.dtype=bfloat16")
    Nan(lab.model, 1, half=True)
    (folder,) = phases.edit(lab, [case()], tmp_path / "run")
    assert caplog.text.count("again in float32") == 2
    assert json.loads((folder / "result.json").read_text())["dtype"] == "float32"
    assert lab.model.dtype == lab.model.vae.dtype == torch.bfloat16
    for low, high in Image.open(folder / "target.png").getextrema():
        assert low < high


def test_nan_in_the_null_text_loss_stops_at_its_step(tiny_root, tmp_path):
    lab = make_lab(tiny_root, tmp_path / "store", "inversion.name=null_text", "inversion.inner_steps=2")
    Nan(lab.model, STEPS + 1 + 2 + 1 + 1)
    with pytest.raises(NotFinite, match="loss of null-text inversion is not finite at step 1"):
        phases.edit(lab, [case()], tmp_path / "run")


class Unplugged(RuntimeError):
    pass


def state(model):
    """All that an edit could leave changed."""
    return {
        "processors": {name: id(p) for name, p in model.unet.attn_processors.items()},
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.unet.modules()
        ],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": (torch.get_default_dtype(), model.dtype, model.vae.dtype),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "checkpointing": model.unet.is_gradient_checkpointing,
        "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "levels": [logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric", "wandb")],
        "training": [m.training for m in model.unet.modules()],
    }


@pytest.mark.parametrize("words", [(), ("inversion.name=null_text", "inversion.inner_steps=2")], ids=["direct", "nti"])
@pytest.mark.parametrize("phase", ["inverting", "editing"])
def test_an_exception_leaves_everything_as_it_was(tiny_root, tmp_path, words, phase):
    lab = make_lab(tiny_root, tmp_path / "store", "trainer.precision=bf16-mixed", "trainer.deterministic=true", *words)
    if phase == "editing":
        list(phases.invert(lab, [case()]))
    x, text = torch.ones(1, 4, 8, 8), lab.model.embed(["a cat"])
    with torch.no_grad():
        plain = lab.model.eps(x, 0, lab.schedule, text)
    before, count = state(lab.model), Calls(lab.model)

    def unplug(module, args, output):
        if count.count == 2:
            raise Unplugged

    hook = lab.model.unet.register_forward_hook(unplug)
    with pytest.raises(Unplugged):
        phases.edit(lab, [case()], tmp_path / "run")
    hook.remove()
    count.hook.remove()
    assert state(lab.model) == before
    with torch.no_grad():
        assert torch.equal(lab.model.eps(x, 0, lab.schedule, text), plain)
    assert phases.edit(lab, [case()], tmp_path / "run")


def test_a_case_may_have_any_name_and_its_files_stay_inside(lab, tmp_path):
    names = ["../../x", "/etc/passwd", "CON", "n" * 300, "<script>alert(1)</script>", "a\nb", "caf\udce9"]
    folders = phases.edit(lab, [case(name, shift=k) for k, name in enumerate(names)], tmp_path / "run")
    for name, folder in zip(names, folders, strict=True):
        assert folder.resolve().parent == (tmp_path / "run").resolve()
        assert json.loads((folder / "result.json").read_text())["case"] == name
        assert "<script>alert" not in (folder / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "store"]


class Full(L.Callback):
    """Once a case is done, lets this process write only files half as large as its strip."""

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        limit = max(path.stat().st_size for path in self.folder.glob("*/strip.png")) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_whole_files_only_and_the_earlier_cases(lab, tmp_path):
    cases, full = [case("a"), case("b", shift=3)], Full()
    full.folder = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(InputError, match=r"strip.png: .* \(.* MB free\): .* out=FOLDER"):
            phases.edit(lab, cases, full.folder, callbacks=[full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    done = [(case_folder(full.folder, c.id) / "result.json").exists() for c in cases]
    assert done == [True, False]
    for path in full.folder.rglob("*.*"):
        assert path.suffix in (".png", ".html", ".json")
        if path.suffix == ".png":
            Image.open(path).load()
    assert len(phases.edit(lab, cases, full.folder)) == 2


def command(tiny_root, tmp_path, *words):
    """The command line of an edit of files on disk, by null-text inversion."""
    files = {"image": drawn(), "mask": drawn("L", fill=255), "sketch": drawn("L", 4, outline=255)}
    for name, picture in files.items():
        picture.save(tmp_path / f"{name}.png")
    usual = f"model.path={tiny_root} model.device=cpu size=48x32 steps={STEPS} tracking.mode=off"
    nti = "inversion.name=null_text inversion.inner_steps=6"
    paths = [f"{name}={tmp_path / name}.png" for name in files]
    prompts = ["source=a cat on grass", "target=a red dog on grass"]
    return [sys.executable, "-m", "masafusion_lab.cli", "edit", *usual.split(), *nti.split(), *paths, *prompts, *words]


def outcome(folder):
    """The bytes of all finished pictures."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*.png"))}


@pytest.mark.slow
def test_sigterm_to_the_command_line_ends_with_143_and_the_run_goes_on(tiny_root, tmp_path):
    env = {**os.environ, "MASAFUSION_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    words = command(tiny_root, tmp_path, f"out={tmp_path / 'run'}", "inversion.inner_steps=12")
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "home").rglob("null_text.ckpt")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 143, said
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "interrupted"
    assert "Traceback" not in said
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumes after step" in done.stderr
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "done"


KILLS = 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_moments_it_finishes_later_with_the_same_bytes(tiny_root, tmp_path):
    """Each a random time after the run began; one that was faster is begun anew, inversion and all."""

    def run(name, after=None):
        """Exit status, and the seconds from when the run began in its folder."""
        env = {**os.environ, "MASAFUSION_HOME": str(tmp_path / name / "home"), "OMP_NUM_THREADS": "1"}
        words = command(tiny_root, tmp_path, f"out={tmp_path / name / 'run'}")
        process = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while read_json(tmp_path / name / "run/state.json").get("pid") != process.pid and process.poll() is None:
            time.sleep(0.01)
        began = time.monotonic()
        try:
            return process.wait(after), time.monotonic() - began
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(), after

    code, seconds = run("whole")
    assert code == 0
    whole, kills, chance = outcome(tmp_path / "whole/run"), 0, random.Random(0)
    while kills < KILLS:
        code, _ = run("cut", chance.uniform(0, seconds))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        for name, there in outcome(tmp_path / "cut/run").items():
            assert there == whole[name], "a file is there whole or not at all"
        if code == 0:
            assert outcome(tmp_path / "cut/run") == whole
            shutil.rmtree(tmp_path / "cut")
    assert run("cut")[0] == 0
    assert outcome(tmp_path / "cut/run") == whole
