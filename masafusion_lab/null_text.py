"""Null-text inversion: its settings, and a fit of Algorithm 2 that resumes, and repeats in float32 what overflowed."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from masafusion_lab import InputError, __version__
from masafusion_lab.algorithm2 import NullTextInversion, Steps
from masafusion_lab.choices import Checked
from masafusion_lab.inversion import Direct, Inversion, Track, retrace, silent
from masafusion_lab.lockstep import NotFinite
from masafusion_lab.model import StableDiffusion
from masafusion_lab.runs import sweep
from masafusion_lab.schedule import Schedule
from masafusion_lab.trainer import make, undisturbed

log = logging.getLogger(__name__)

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"lr": 2e-4, "lr_schedule": "constant", "early_stop": False, "keep": "guarded"},
    "reference": {"lr": 1e-2, "lr_schedule": "reference", "early_stop": True, "keep": "last"},
}
"""What a preset says of the fields that are left None: the paper's appendix A, or the code of Mokady et al. 2023."""


PROGRESS = "null_text.ckpt"
"""How far an inversion is, in its folder."""


@dataclass(frozen=True)
class NullText(Checked):
    """Settings of Algorithm 2; a field that is None takes the value of the preset."""

    name: ClassVar[str] = "null_text"
    preset: Literal["paper", "reference"] = "paper"
    """paper: learning rate 2e-4, no early stop; reference: the published code's falling rate and early stop."""
    inner_steps: int = 10
    """N, the gradient steps of each denoising step; 0 is plain DDIM inversion."""
    lr: float | None = None
    """Learning rate."""
    lr_schedule: Literal["constant", "reference"] | None = None
    """constant, or reference: lr (1 - i / 100) at step i, not below 0."""
    early_stop: bool | None = None
    """Whether a picture's step ends once its mean squared error is below early_stop_eps + i * early_stop_slope."""
    early_stop_eps: float = 1e-5
    """That bound at the first step."""
    early_stop_slope: float = 2e-5
    """What that bound gains a step."""
    loss: Literal["mse", "sse", "norm"] = "mse"
    """Of a picture's residual: mean or sum of squares, or norm."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Fresh at each step."""
    keep: Literal["last", "guarded", "best"] | None = None
    """A step's embedding: the last, as in the published code; guarded: the best tried, if the loss ended above twice
    its start; or always the best."""
    guidance: float = 7.5
    """w of the resimulation; the edit should use the same."""
    latents: Literal["resimulated", "inverted"] = "resimulated"
    """What the source branch will read: the states that the optimised embeddings lead to, or the inverted ones."""
    inverse_guidance: float = 1.0
    """w while inverting; away from 1 it costs a second row a step."""
    prompt: Literal["source", "empty"] = "source"
    """The prompt that the picture is inverted under."""
    precision: Literal["model", "float32"] = "model"
    """Of the UNet while inverting; embeddings and loss are float32 in any case."""
    checkpointing: bool = False
    """Gradient checkpointing: less memory, a third more time, the same embeddings."""

    @property
    def resolved(self) -> NullText:
        """These settings with every None replaced by the preset's value. Raises InputError for one that cannot be."""
        if self.inner_steps < 0 or (self.lr is not None and not 0 < self.lr < float("inf")):
            raise InputError(f"inversion.inner_steps={self.inner_steps}, lr={self.lr}: at least 0, and above 0")
        return replace(self, **{k: v for k, v in PRESETS[self.preset].items() if getattr(self, k) is None})

    def rate(self, i: int) -> float:
        """The learning rate at step i, of resolved settings."""
        return (self.lr or 0.0) * (max(0.0, 1 - i / 100) if self.lr_schedule == "reference" else 1.0)

    def invert(
        self,
        model: StableDiffusion,
        x0: Tensor,
        text: Tensor,
        empty: Tensor,
        schedule: Schedule,
        *,
        track: Track = silent,
        folder: Path | None = None,
        trainer: Mapping[str, Any] | None = None,
        loggers: Sequence[Any] = (),
        callbacks: Sequence[L.Callback] = (),
        check: Callable[[], None] = lambda: None,
        place: int = 0,
    ) -> Inversion:
        """The record of pictures x0 (B, C, h, w) with source and empty embeddings text, empty (B, n, d).

        `trainer`: keys of lightning's Trainer, which win over ours. With a `folder`, progress is kept there after each
        denoising step; the same call resumes from it, to the same bits, and removes it when done. `check` is called
        after each gradient step; what it raises ends the fit. `place`: how many fits of its run lie before this one in
        what is logged. Raises NotFinite naming the step, after a second try in float32 if the UNet runs in less;
        SystemExit(143) on SIGTERM if nobody handles it.
        """
        options = dict(trainer or {})
        if str(options.get("precision", "")) in ("16-true", "bf16-true", "64-true"):
            raise InputError(
                f"trainer.precision={options['precision']}: embeddings are float32; set model.dtype instead"
            )
        with torch.inference_mode(False):  # what was made in inference mode cannot enter a backward
            x0, text, empty = (tensor.detach().clone() for tensor in (x0, text, empty))
        batch = x0, text, empty, schedule
        run = partial(_run, self.resolved, model, *batch, track, loggers, callbacks, check, place)
        with _float32(model.unet, self.precision == "float32"):
            try:
                return run(options, folder)
            except NotFinite as e:
                if model.dtype == torch.float32 and "16" not in str(options.get("precision")):
                    raise
                log.warning("%s; it ran in low precision and is repeated in float32", e)
        with _float32(model.unet):  # its progress apart, or each attempt would begin where the other was
            record = run(options | {"precision": "32-true"}, None if folder is None else Path(folder) / "float32")
        _forget(folder)
        return record


def _run(
    settings: NullText,
    model: StableDiffusion,
    x0: Tensor,
    text: Tensor,
    empty: Tensor,
    schedule: Schedule,
    track: Track,
    loggers: Sequence[Any],
    callbacks: Sequence[L.Callback],
    check: Callable[[], None],
    place: int,
    options: Mapping[str, Any],
    folder: Path | None,
) -> Inversion:
    began = time.monotonic()
    depends = __version__, asdict(settings), schedule.timesteps, model.dtype, sorted(options.items())
    key = hashlib.sha256(repr(depends).encode())
    for tensor in (x0, text, empty, schedule.abar):
        key.update(tensor.float().cpu().contiguous().numpy().tobytes())
    path = None if folder is None else Path(folder) / PROGRESS
    saved = _saved(path, key.hexdigest())
    if saved is None:
        direct = Direct(inverse_guidance=settings.inverse_guidance, prompt=settings.prompt)
        with torch.inference_mode(False):
            goal = direct.invert(model, x0, text, empty, schedule, track=track).states
    else:
        goal = saved["state_dict"]["goal"].to(x0.device)
        log.info("null-text inversion resumes after step %d of %d", saved["done"], len(schedule))
    if settings.inner_steps == 0:
        x = retrace(model, goal[0], text, empty, schedule, w=settings.guidance, track=track)
        return Inversion(x, empty.expand(len(schedule), *empty.shape))
    with undisturbed(check), _checkpointing(model.unet, settings.checkpointing):
        module = NullTextInversion(model, goal, text, empty, schedule, settings)
        module.path, module.key, module.check, module.place = path, key.hexdigest(), check, place
        module.began = began
        fit = make(model.device, options, loggers=loggers, callbacks=callbacks).fit
        steps = Steps(len(schedule), settings.inner_steps)
        fit(module, steps, ckpt_path=path if saved else None, weights_only=True if saved else None)
    if module.done < len(schedule):
        raise InputError(
            f"the trainer stopped after {module.done} of {len(schedule)} steps: lift its limit in trainer.*"
        )
    _forget(folder)
    x = module.x if settings.latents == "resimulated" else module.goal
    return Inversion(x.to(x0.device), torch.stack([e.detach() for e in module.null]).to(x0.device), module.spent)


def _forget(folder: Path | None) -> None:
    """Remove the progress in a folder, which is done with, and the folder unless it holds something else."""
    if folder is not None:
        sweep(Path(folder))
        (Path(folder) / PROGRESS).unlink(missing_ok=True)
        with suppress(OSError):
            Path(folder).rmdir()


def _saved(path: Path | None, key: str) -> dict[str, Any] | None:
    """The checkpoint at `path`, if it is whole and of the inversion with this key."""
    if path is None or not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["key"] == key:
            return saved
        why = "belongs to another picture, prompt or setting"
    except Exception as e:  # torch raises anything for a damaged file
        why = f"cannot be read ({type(e).__name__})"
    log.warning("%s %s; null-text inversion starts anew", path, why)
    return None


@contextmanager
def _float32(unet: nn.Module, on: bool = True) -> Iterator[Any]:
    """The UNet in float32 for a while; lower precisions come back with the bits they had."""
    dtype = next(unet.parameters()).dtype
    on = on and dtype != torch.float32
    try:
        yield nn.Module.to(unet, torch.float32) if on else None  # diffusers' own `to` warns
    finally:
        if on:
            nn.Module.to(unet, dtype)


@contextmanager
def _checkpointing(unet: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing of the UNet for a while."""
    on = on and not unet.is_gradient_checkpointing
    if on:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            unet.disable_gradient_checkpointing()
