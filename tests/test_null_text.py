"""Null-text inversion against Algorithm 2 as two plain loops, and against kills, overflow and divergence."""

import logging
import multiprocessing
import os
import random
import resource
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from masafusion_lab import InputError
from masafusion_lab.inversion import Ddim, Direct
from masafusion_lab.lockstep import NotFinite
from masafusion_lab.null_text import NullText

T, N = 4, 3
PAPER = NullText(inner_steps=N, lr=2e-3)
REFERENCE = NullText("reference", inner_steps=N, early_stop_eps=0.052, early_stop_slope=0.122, guidance=2.0)


def make_batch(model, pictures=2):
    """Latents, source and empty embeddings, and the schedule."""
    x0 = torch.randn(pictures, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = model.embed(["a cat on grass", "a red dog in snow"][:pictures])
    return x0, text, model.embed([""] * pictures), model.schedule(T)


@pytest.fixture
def batch(tiny):
    return make_batch(tiny)


@pytest.fixture
def one(tiny):
    return make_batch(tiny, 1)


class Curve(Logger):
    """Keeps what is logged."""

    name, version = "curve", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def of(self, name):
        return [metrics[name] for _, metrics in self.rows if name in metrics]


class Embeddings(L.Callback):
    """Keeps the step's embedding after each gradient step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append(module.null[batch[0]].detach().clone())


class Stopped(Exception):
    pass


def stop_after(steps):
    """A check that ends the fit after so many gradient steps."""
    left = iter(range(steps - 1))

    def check():
        if next(left, None) is None:
            raise Stopped

    return check


def algorithm_2(model, goal, record, text, empty, schedule, settings):
    """Algorithm 2 as two loops, each outer step from the record's latent and warm start: losses, nulls, latents."""
    w, losses, nulls, latents = settings.guidance, [], [], []
    for i, t in enumerate(schedule.timesteps):
        x = record.states[i]
        null = (record.null[i - 1] if i else empty).clone().requires_grad_()
        optimizer = torch.optim.Adam([null], lr=settings.rate(i))
        with torch.no_grad():
            eps_text = model.unet(x, t, text).sample
        for _ in range(settings.inner_steps):
            eps_null = model.unet(x, t, null).sample
            loss = torch.nn.functional.mse_loss(
                schedule.denoise(x, eps_null + w * (eps_text - eps_null), i), goal[i + 1]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            eps_null = model.unet(x, t, null).sample
            latents.append(schedule.denoise(x, eps_null + w * (eps_text - eps_null), i))
        nulls.append(null.detach())
    return losses, nulls, latents


@pytest.mark.parametrize("settings", [NullText(inner_steps=N), NullText("reference", N, lr=10.0, early_stop=False)])
def test_null_text_inversion_is_algorithm_2_with_its_two_loops(tiny, one, settings):
    """As published, also where the loss rises: the reference keeps the last embedding."""
    curve, settings = Curve(), settings.resolved
    record = settings.invert(tiny, *one, loggers=[curve])
    goal = Direct().invert(tiny, *one).states
    losses, nulls, latents = algorithm_2(tiny, goal, record, *one[1:], settings)
    torch.testing.assert_close(curve.of("nti/loss"), losses, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(record.states[1:], torch.stack(latents), rtol=3e-4, atol=3e-4)
    torch.testing.assert_close(record.null[:2], torch.stack(nulls[:2]), rtol=1e-3, atol=1e-5)
    assert torch.equal(record.states[0], goal[0])
    ends = (record.states - goal).square().mean((1, 2, 3, 4))[1:]
    assert (max(ends / torch.tensor(losses[::N])) > 2) == (settings.preset == "reference")


def test_the_learning_rate_of_the_paper():
    assert NullText().resolved.lr == 2e-4


def test_the_loss_is_logged_by_step_and_inner_step_and_the_error_at_a_steps_end(tiny, one):
    curve = Curve()
    record = PAPER.invert(tiny, *one, loggers=[curve])
    assert list(zip(curve.of("nti/step"), curve.of("nti/inner"), strict=True)) == [
        (i, j) for i in range(T) for j in range(N)
    ]
    goal = Direct().invert(tiny, *one).states
    errors = (record.states - goal).square().mean((1, 2, 3, 4))[1:].tolist()
    torch.testing.assert_close(curve.of("nti/error"), errors, rtol=1e-4, atol=1e-6)


def test_without_inner_steps_it_is_plain_ddim_inversion(tiny, batch):
    record, ddim = NullText(inner_steps=0).invert(tiny, *batch), Ddim().invert(tiny, *batch)
    assert torch.equal(record.states, ddim.states)
    assert torch.equal(record.null, batch[2].expand(T, -1, -1, -1))


def test_it_reconstructs_better_than_plain_ddim_inversion(tiny, batch):
    settings = NullText("reference", inner_steps=5, guidance=2.0)
    goal = Direct().invert(tiny, *batch).states
    ours, ddim = settings.invert(tiny, *batch).states, Ddim(guidance=2.0).invert(tiny, *batch).states
    assert (ours - goal)[-1].square().mean() < 0.7 * (ddim - goal)[-1].square().mean()


def test_a_batch_gets_what_each_picture_gets_alone_however_early_it_stops(tiny, batch):
    x0, text, empty, schedule = batch
    curves = [Curve() for _ in range(3)]
    both = REFERENCE.invert(tiny, *batch, loggers=curves[:1])
    for b in range(2):
        cut = slice(b, b + 1)
        alone = REFERENCE.invert(tiny, x0[cut], text[cut], empty[cut], schedule, loggers=[curves[1 + b]])
        torch.testing.assert_close(both.states[:, cut], alone.states, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(both.null[:2, cut], alone.null[:2], rtol=1e-2, atol=1e-4)
    steps = [len(curve.of("nti/loss")) for curve in curves]
    assert steps[1] != steps[2], "both pictures stop alike: the test shows nothing"
    assert min(steps) < T * N, "none stops early: the test shows nothing"


def test_a_picture_that_has_stopped_does_not_move_and_a_step_that_all_have_stopped_asks_no_unet(tiny, batch):
    seen, calls = Embeddings(), []
    settings = replace(REFERENCE, early_stop_eps=1e9)
    tiny.unet.register_forward_hook(lambda *_: calls.append(1))
    settings.invert(tiny, *batch, callbacks=[seen])
    for first, *rest in (seen.rows[i * N : (i + 1) * N] for i in range(T)):
        assert all(torch.equal(first, e) for e in rest)
    assert len(calls) == T + T * 3  # upwards; then eps of the prompt, one gradient step, and the advance


@pytest.mark.parametrize(
    "change", [{"loss": "sse"}, {"loss": "norm"}, {"optimizer": "sgd", "lr": 1.0}, {"keep": "best"}]
)
def test_every_variant_lowers_the_error(tiny, one, change):
    record = replace(PAPER, guidance=2.0, **change).invert(tiny, *one)
    goal = Direct().invert(tiny, *one).states
    plain = Ddim(guidance=2.0).invert(tiny, *one).states
    assert (record.states - goal)[-1].square().mean() < (plain - goal)[-1].square().mean()


def test_the_presets_are_the_papers_and_the_published_codes():
    paper, reference = NullText().resolved, NullText("reference").resolved
    assert (paper.inner_steps, paper.early_stop, paper.rate(0), paper.rate(49)) == (10, False, 2e-4, 2e-4)
    assert (reference.inner_steps, reference.early_stop) == (10, True)
    assert [reference.rate(i) for i in (0, 49, 100, 200)] == pytest.approx([1e-2, 5.1e-3, 0, 0])
    assert NullText("reference", lr=1e-3, early_stop=False).resolved.rate(50) == pytest.approx(5e-4)
    assert not NullText("reference", early_stop=False).resolved.early_stop


def test_latents_inverted_leaves_the_inverted_states_in_the_record(tiny, one):
    record = replace(PAPER, latents="inverted").invert(tiny, *one)
    assert torch.equal(record.states, Direct().invert(tiny, *one).states)
    assert not torch.equal(record.null[-1], one[2])


def test_gradient_checkpointing_changes_no_embedding_and_is_switched_off_again(tiny, one):
    plain, less = (replace(PAPER, checkpointing=on).invert(tiny, *one) for on in (False, True))
    torch.testing.assert_close(less.null, plain.null, rtol=1e-4, atol=1e-6)
    assert not tiny.unet.is_gradient_checkpointing


def test_the_unet_gets_no_gradient_and_is_in_no_checkpoint_which_loads_without_pickles(tiny, one, tmp_path):
    with pytest.raises(Stopped):
        PAPER.invert(tiny, *one, folder=tmp_path, check=stop_after(2 * N))
    assert [p.name for p in tmp_path.iterdir()] == ["null_text.ckpt"]
    saved = torch.load(tmp_path / "null_text.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"goal", "x", *(f"null.{i}" for i in range(T))}
    assert not saved["optimizer_states"][0]["state"], "a finished step's moments are kept"
    assert saved["done"] == 2
    assert all(p.grad is None and not p.requires_grad for p in tiny.unet.parameters())


def test_divergence_is_told_and_the_best_embedding_kept(tiny, one, caplog):
    goal = Direct().invert(tiny, *one).states
    record = NullText(inner_steps=N, lr=1e3, guidance=7.5).invert(tiny, *one)
    assert record.states.isfinite().all()
    assert "the loss rose" in caplog.text
    plain = Ddim(guidance=7.5).invert(tiny, *one).states
    assert (record.states - goal)[-1].square().mean() <= 1.5 * (plain - goal)[-1].square().mean()


def nan_at(model, call, dtype=None):
    """From the call-th UNet row on (in one dtype), NaN."""
    calls = iter(range(10**6))
    return model.unet.conv_out.register_forward_hook(
        lambda _, args, out: out * torch.nan if dtype in (None, out.dtype) and next(calls) >= call else out
    )


def test_a_loss_that_is_not_finite_names_step_and_inner_step(tiny, one):
    nan_at(tiny, T + (1 + N + 1) + 1 + 2)
    with pytest.raises(NotFinite, match="step 1, inner step 2"):
        PAPER.invert(tiny, *one)


def test_a_gradient_that_is_not_finite_names_the_step(tiny, one):
    tiny.unet.conv_out.register_full_backward_hook(lambda _, grads, out: tuple(g * torch.nan for g in grads))
    with pytest.raises(NotFinite, match=r"gradient .* step 0"):
        PAPER.invert(tiny, *one)


@pytest.mark.parametrize("where", ["upwards", "inner"])
def test_what_overflows_in_low_precision_is_repeated_in_float32(tiny, one, caplog, where):
    tiny.unet.bfloat16()
    weights = {name: p.clone() for name, p in tiny.unet.named_parameters()}
    expected = replace(PAPER, precision="float32").invert(tiny, *one)
    with nan_at(tiny, {"upwards": 1, "inner": T + 3}[where], torch.bfloat16):
        record = PAPER.invert(tiny, *one)
    assert "repeated in float32" in caplog.text
    assert torch.equal(record.states, expected.states)
    assert torch.equal(record.null, expected.null)
    for name, p in tiny.unet.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, weights[name])


def test_what_overflows_under_the_trainers_precision_is_repeated_from_its_first_step_wherever_it_is_cut(
    tiny, one, tmp_path
):
    settings, low, left = replace(PAPER, inner_steps=1), {"precision": "bf16-mixed"}, []
    exact = settings.invert(tiny, *one)
    with nan_at(tiny, 2 * 3, torch.bfloat16), pytest.raises(Stopped):  # two steps low, then two in float32
        settings.invert(tiny, *one, folder=tmp_path, trainer=low, check=stop_after(4))
    with nan_at(tiny, 0, torch.bfloat16):
        record = settings.invert(tiny, *one, folder=tmp_path, trainer=low, check=lambda: left.append(1))
    assert torch.equal(record.states, exact.states)
    assert len(left) == T - 2
    assert not tmp_path.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_unet_leaves_embeddings_and_loss_in_float32(tiny, one, dtype):
    exact = PAPER.invert(tiny, *one)
    tiny.unet.to(dtype)
    record = PAPER.invert(tiny, *one)
    assert record.null.dtype == record.states.dtype == torch.float32
    moved, wanted = (r.null[0] - one[2] for r in (record, exact))
    assert torch.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.5


def world():
    """What an inversion must leave as it found it."""
    return {
        "rng": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "levels": [logging.getLogger(n).level for n in ("lightning.pytorch", "lightning.fabric")],
        "warnings": list(warnings.filters),
        "env": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
        "here": sorted(Path.cwd().iterdir()),
    }


@pytest.mark.parametrize("fault", ["none", "nan", "interrupt"])
@pytest.mark.parametrize("mode", ["deterministic", "training"])
def test_nothing_is_left_changed_whatever_happens(tiny, one, fault, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.unet.train(mode == "training")
    torch.use_deterministic_algorithms(mode == "deterministic")
    try:
        before = world()
        unet = [(m.training, len(m._forward_hooks)) for m in tiny.unet.modules()]
        if fault == "nan":
            with nan_at(tiny, T + 4), pytest.raises(NotFinite):
                PAPER.invert(tiny, *one)
        elif fault == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                PAPER.invert(tiny, *one, check=lambda: os.kill(os.getpid(), signal.SIGINT))
        else:
            PAPER.invert(tiny, *one, trainer={"precision": "bf16-mixed"})
        assert world() == before
        assert [(m.training, len(m._forward_hooks)) for m in tiny.unet.modules()] == unet
        assert all(not p.requires_grad and p.grad is None for p in tiny.unet.parameters())
    finally:
        torch.use_deterministic_algorithms(False)


def test_it_optimises_even_where_gradients_are_off(tiny, one):
    plain = PAPER.invert(tiny, *one)
    with torch.no_grad():
        assert torch.equal(PAPER.invert(tiny, *one).null, plain.null)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        batch = make_batch(tiny, 1)
        assert torch.equal(PAPER.invert(tiny, *batch).null, plain.null)


def test_nothing_is_printed(tiny, one, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        REFERENCE.invert(tiny, *one)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (PAPER, {"max_steps": 5}, "stopped after 1 of 4 steps"),
        (PAPER, {"max_stepz": 5}, "max_stepz"),
        (PAPER, {"devices": 2, "strategy": "ddp"}, "one device"),
        (PAPER, {"precision": "bf16-true"}, "model.dtype"),
        (NullText(inner_steps=-1), {}, "inner_steps=-1"),
        (NullText(lr=0.0), {}, r"lr=0\.0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny, one, settings, options, words):
    with pytest.raises(InputError, match=words) as e:
        settings.invert(tiny, *one, trainer=options)
    assert "\n" not in str(e.value)


# Resume: a child is forked from a server that has imported everything and run nothing.


def child(root, out, settings, kill, at):
    """Invert, and die in the way `kill` names at its `at`-th occasion."""
    torch.set_num_threads(1)
    from masafusion_lab.model import StableDiffusion

    model = StableDiffusion.load(str(root))
    occasions = iter(range(1, 10**6))

    def die(number):
        if next(occasions) == at:
            os.kill(os.getpid(), number)

    def check():
        calls.append(1)
        if kill in ("step", "term"):
            die(signal.SIGKILL if kill == "step" else signal.SIGTERM)

    calls, rename = [], os.replace
    if kill in ("before save", "after save"):

        def replace_and_die(*args):
            if kill == "before save":
                die(signal.SIGKILL)
            rename(*args)
            if kill == "after save":
                die(signal.SIGKILL)

        os.replace = replace_and_die
    record = settings.invert(model, *make_batch(model), folder=Path(out, "progress"), check=check)
    torch.save((record.states, record.null, len(calls)), Path(out, "record.pt"))


@pytest.fixture(scope="module")
def fork():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_null_text", "tests.tiny"])

    def run(*args):
        process = context.Process(target=child, args=args)
        process.start()
        process.join(60)
        return process.exitcode

    return run


@pytest.mark.parametrize(
    "settings", [pytest.param(PAPER, marks=pytest.mark.slow), REFERENCE], ids=["paper", "reference"]
)
def test_killed_anywhere_the_same_call_resumes_and_ends_with_the_bits_of_an_undisturbed_run(
    fork, tiny_root, tmp_path, settings
):
    (tmp_path / "whole").mkdir()
    assert fork(tiny_root, tmp_path / "whole", settings, "", 0) == 0
    whole = torch.load(tmp_path / "whole" / "record.pt")
    assert whole[2] == T * N
    out = tmp_path / "killed"
    out.mkdir()
    for kill, at, code in [
        ("step", 2, -signal.SIGKILL),  # in the first step: nothing is kept yet
        ("before save", 1, -signal.SIGKILL),
        ("after save", 1, -signal.SIGKILL),  # resumes at step 1
        ("term", 2, 128 + signal.SIGTERM),
        ("step", N + 1, -signal.SIGKILL),  # finishes step 1
        ("after save", 2, -signal.SIGKILL),  # all is done but said
    ]:
        assert fork(tiny_root, out, settings, kill, at) == code
        assert not (out / "record.pt").exists()
    assert fork(tiny_root, out, settings, "", 0) == 0
    states, null, steps = torch.load(out / "record.pt")
    assert torch.equal(states, whole[0])
    assert torch.equal(null, whole[1])
    assert steps == 0, "the last run had nothing left to do"
    assert not (out / "progress").exists()


def test_a_stop_that_the_caller_asks_for_passes_through_and_is_resumed(tiny, batch, tmp_path):
    whole = PAPER.invert(tiny, *batch)
    with pytest.raises(Stopped):
        PAPER.invert(tiny, *batch, folder=tmp_path / "a", check=stop_after(2 * N + 1))
    calls = []
    record = PAPER.invert(tiny, *batch, folder=tmp_path / "a", check=lambda: calls.append(1))
    assert len(calls) == 2 * N
    assert torch.equal(record.states, whole.states)
    assert torch.equal(record.null, whole.null)
    assert not (tmp_path / "a").exists()


def test_progress_that_the_disk_does_not_take_is_told_with_the_remedy(tiny, one, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[0][1]))
    try:
        with pytest.raises(InputError, match=r"null_text\.ckpt: .*MASAFUSION_HOME=FOLDER"):
            PAPER.invert(tiny, *one, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["cut", "other picture", "other settings"])
def test_progress_that_is_damaged_or_not_ours_is_not_resumed_from(tiny, one, tmp_path, caplog, fault):
    x0, *rest = one
    with pytest.raises(Stopped):
        PAPER.invert(tiny, *one, folder=tmp_path, check=stop_after(N))
    path, settings = tmp_path / "null_text.ckpt", PAPER
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif fault == "other picture":
        x0 = x0 + 0.1
    else:
        settings = replace(PAPER, guidance=3.0)
    record = settings.invert(tiny, x0, *rest, folder=tmp_path)
    assert "starts anew" in caplog.text
    assert torch.equal(record.null, settings.invert(tiny, x0, *rest).null)
