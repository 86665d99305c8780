"""What all parts share: settings from key=value words, the learning rate over time, one resumable `fit`."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from torch import nn
from yaml import YAMLError

from experiments.picturebook.data import SIZE, Album, Batches
from masafusion_lab import InputError
from masafusion_lab.hub import PICTUREBOOK as MODEL

log = logging.getLogger(__name__)
S = TypeVar("S", bound="Settings")
N = TypeVar("N", bound=nn.Module)
SHIPPED = {
    "autoencoder": MODEL / "vae" / "diffusion_pytorch_model.safetensors",
    "clip": MODEL / "clip" / "model.safetensors",
    "text": MODEL / "text_encoder" / "model.safetensors",
    "unet": MODEL / "unet" / "diffusion_pytorch_model.safetensors",
    **{f"adapter_{kind}": MODEL / f"t2iadapter_{kind}" / "diffusion_pytorch_model.safetensors"
       for kind in ("sketch", "canny", "pose")},
}  # fmt: skip


@dataclass
class Settings:
    """What every part can be told; `steps` is the total, so that a larger one continues a finished training."""

    root: str = "checkpoints/picturebook"
    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    cooldown: float = 0.3  # the last part of the steps, over which the rate falls to 2 %
    decay: float = 0.995  # of the running average of the weights
    epoch: int = 50  # steps from checkpoint to checkpoint
    seed: int = 0
    pictures: int = 100_000
    threads: int = 0  # 0: as many as there are cores
    workers: int = 0  # processes that put batches together, for a GPU that would wait for one
    minutes: float = 0.0  # if above 0, the time for this fit: steps become as many as fit, by the speed seen so far

    def album(self, kind: str = "picture", size: int = SIZE) -> Album:
        """The drawn pictures to train on, or their sketches, canny or pose maps."""
        return Album(Path(self.root) / "data", "train", self.pictures, size, kind)


def settings(kind: type[S], words: list[str]) -> S:
    """The settings that key=value words give.

    Raises InputError, naming a key that is not there or a value that it cannot have.
    """
    try:
        given = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(words))
        return OmegaConf.to_object(given)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError) as error:
        raise InputError(" ".join(str(error).split()).partition(" object_type=")[0]) from None


@contextmanager
def as_told(kind: type[S], words: list[str] | None) -> Iterator[S]:
    """The settings that words give; if none are told, those of the command line, where --help lists them.

    What cannot be used in here then ends the command in one line.
    """
    given = sys.argv[1:] if words is None else words
    if "--help" in given or "-h" in given:
        means = (its.__doc__ for its in (sys.modules[kind.__module__], *kind.__mro__[:-1]))  # but object's
        print(*means, OmegaConf.to_yaml(OmegaConf.structured(kind)), sep="\n\n")
        sys.exit()
    try:
        yield settings(kind, given)
    except InputError as error:
        if words is None:
            sys.exit(str(error))
        raise


class Part(L.LightningModule):
    """A part in training: a loss over its own batches, AdamW, warm-up, a plateau and a cosine cool-down."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.s = s

    def batch(self, g: Any) -> Any:
        """One batch from its generator; each part says how."""
        raise NotImplementedError

    def train_dataloader(self) -> Any:
        """The batches of this epoch, numbered by the step that they are for, wherever a fit was resumed."""
        start = self.trainer.global_step
        data = Batches(self.batch, self.s.seed, start, min(self.s.epoch, max(1, self.s.steps - start)))
        return torch.utils.data.DataLoader(data, batch_size=None, num_workers=self.s.workers)

    def on_train_batch_start(self, batch: Any, k: int) -> None:
        """Chance is a function of (seed, step), so that a resumed training is the undisturbed one."""
        torch.manual_seed(1_000_003 * self.s.seed + self.trainer.global_step)

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step."""
        left = (self.s.steps - step) / max(1.0, self.s.cooldown * self.s.steps)
        fall = 1.0 if left >= 1 else 0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * max(0.0, left)))
        return min(1.0, (step + 1) / max(1, self.s.warmup)) * fall

    def pace(self, name: str) -> float:
        """The factor of a weight's learning rate, by the weight's name."""
        return 1.0

    def configure_optimizers(self) -> Any:
        """AdamW on all that is trained; no decay of norms and biases."""
        kin: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                kin.setdefault((self.pace(name), 0.01 if p.ndim > 1 else 0.0), []).append(p)
        groups = [{"params": its, "lr": self.s.lr * pace, "weight_decay": decay} for (pace, decay), its in kin.items()]
        optimizer = torch.optim.AdamW(groups, lr=self.s.lr, betas=(0.9, 0.99), foreach=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Progress(Callback):
    """After each epoch one line (step, samples a second, the logged means), and the checkpoint `path`, whole or not.

    Under `minutes` it sets how many steps there will be, until the cool-down has begun.
    """

    def __init__(self, path: Path, s: Settings, end: float) -> None:
        self.path, self.s, self.began, self.end = path, s, 0.0, end

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self.began, self.first = time.monotonic(), trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write both; a resumed fit first ends the epoch that it was saved at."""
        if not self.began:
            return
        step = trainer.global_step
        a_step = (time.monotonic() - self.began) / max(1, step - self.first)
        means = " ".join(f"{k} {float(v):.4f}" for k, v in trainer.callback_metrics.items())
        log.info("step %d of %d, %.1f samples a second: %s", step, self.s.steps, self.s.batch / a_step, means)
        if self.s.minutes:
            self.s.steps = max(step, step + int((self.end - time.monotonic()) / a_step))
            trainer.fit_loop.epoch_loop.max_steps = self.s.steps
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        part.replace(self.path)


def last(s: Settings, name: str) -> Path:
    """The last checkpoint of a part."""
    return Path(s.root) / name / "last.ckpt"


def fit(part: type[Part], s: Settings, name: str) -> Path:
    """Train a part to its `steps`, from its last checkpoint if there is one; returns the checkpoint."""
    end = time.monotonic() + 60 * s.minutes  # drawing included
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(s.threads or os.cpu_count() or 1)
    path = last(s, name)
    L.seed_everything(s.seed, verbose=False)
    module = part(s)
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer = L.Trainer(
        accelerator="auto", devices=1, precision="bf16-mixed", max_steps=s.steps, max_epochs=-1,
        reload_dataloaders_every_n_epochs=1, gradient_clip_val=1.0, num_sanity_val_steps=0,
        callbacks=[EMAWeightAveraging(decay=s.decay), Progress(path, s, end)], enable_checkpointing=False,
        logger=CSVLogger(path.parent, name="log", version=""), log_every_n_steps=s.epoch,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=path if path.exists() else None, weights_only=False)
    return path


def weights(s: Settings, name: str, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a part's sub-module `prefix`, float32: averaged, of its last checkpoint, or as they ship."""
    path, shipped = last(s, name), SHIPPED.get(name, Path("none"))
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
        return {k.removeprefix(f"{prefix}."): v.float() for k, v in state.items() if k.startswith(f"{prefix}.")}
    if shipped.exists():
        log.info("%s has no checkpoint: taken from %s", name, shipped)
        return {k: v.float() for k, v in load_file(shipped).items()}
    raise InputError(f"{path}: missing; python -m experiments.picturebook.all trains all that is, in order")


def frozen(module: N, state: dict[str, torch.Tensor]) -> N:
    """The module with these weights, for use only."""
    module.load_state_dict(state)
    return module.requires_grad_(False).eval()
