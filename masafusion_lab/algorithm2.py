"""Algorithm 2 as a LightningModule: null embeddings, one a step, optimised with time as the training set."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from masafusion_lab.lockstep import NotFinite
from masafusion_lab.model import StableDiffusion
from masafusion_lab.runs import replacing
from masafusion_lab.schedule import Schedule
from masafusion_lab.store import REMEDY

if TYPE_CHECKING:
    from masafusion_lab.null_text import NullText

log = logging.getLogger(__name__)

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda r: r.square().flatten(1).mean(1),
    "sse": lambda r: r.square().flatten(1).sum(1),
    "norm": lambda r: r.flatten(1).norm(dim=1),
}
"""The loss of each picture (B) from its residual (B, C, h, w)."""

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class Steps:
    """(step, inner step) of every gradient step: Algorithm 2's two loops as a training set that can resume."""

    def __init__(self, steps: int, inner_steps: int) -> None:
        self.steps, self.inner_steps, self.at = steps, inner_steps, 0

    def __len__(self) -> int:
        return self.steps * self.inner_steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while self.at < len(self):
            self.at += 1
            yield divmod(self.at - 1, self.inner_steps)

    def state_dict(self) -> dict[str, int]:
        """How many were handed out."""
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after those."""
        self.at = state["at"]


class NullTextInversion(L.LightningModule):
    """Algorithm 2 on a batch of pictures, each of which gets what it would get alone.

    `goal` (T + 1, B, C, h, w): the inverted states; `x`, likewise: the states that the embeddings lead to; `null`: an
    embedding (B, n, d) for each step, warm-started from the one before. The UNet is no part of the module. What is
    logged has its place among the fits of a run: fit `place` begins where so many fits before it would have ended.
    """

    goal: Tensor
    x: Tensor

    def __init__(
        self, model: StableDiffusion, goal: Tensor, text: Tensor, empty: Tensor, schedule: Schedule, settings: NullText
    ) -> None:
        super().__init__()
        self.model, self.text, self.schedule, self.settings = model, text, schedule, settings
        self.null = nn.ParameterList([empty.clone() for _ in schedule.timesteps])
        self.register_buffer("goal", goal)
        self.register_buffer("x", torch.cat([goal[:1], torch.zeros_like(goal[1:])]))
        self.path: Path | None = None
        self.key, self.done, self.check, self.place = "", 0, lambda: None, 0
        self.spent, self.began = 0.0, time.monotonic()  # seconds of processes before this one
        # float16 loses the gradient of a mean (about 1e-7): that of about the sum is sent through the UNet instead
        self.scale = 2.0 ** goal[0, 0].numel().bit_length() if model.dtype == torch.float16 else 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One group a step, with its learning rate; moments are fresh, as no other step touches its embedding."""
        groups = [{"params": [e], "lr": self.settings.rate(i)} for i, e in enumerate(self.null)]
        return OPTIMIZERS[self.settings.optimizer](groups, lr=0.0)  # type: ignore[call-arg]

    def predict(self, i: int, text: Tensor, rows: Any = slice(None)) -> Tensor:
        """The eps of the chosen pictures at step i, in the Trainer's precision."""
        with self.trainer.precision_plugin.forward_context():
            return self.model.eps(self.x[i, rows], i, self.schedule, text[rows])

    def residual(self, i: int, rows: Any = slice(None)) -> tuple[Tensor, Tensor]:
        """State i + 1 of the chosen pictures along the guided eps, and how far it is from `goal`."""
        eps_null = self.predict(i, self.null[i], rows)
        eps = eps_null + self.settings.guidance * (self.eps_text[rows] - eps_null)  # (3)
        x = self.schedule.denoise(self.x[i, rows], eps, i)  # (4)
        return x, x - self.goal[i + 1, rows]

    @torch.no_grad()
    def on_train_batch_start(self, batch: tuple[int, int], batch_idx: int) -> None:
        """At a step's first gradient step: start from the last step's optimum, and ask for eps under the prompt."""
        i, j = batch
        if j:
            return
        if i:
            self.null[i].copy_(self.null[i - 1])
        self.eps_text = self.predict(i, self.text)
        self.active = torch.ones(len(self.text), dtype=torch.bool, device=self.x.device)
        self.best, self.best_null = torch.full_like(self.x[0, :, 0, 0, 0], float("inf")), self.null[i].clone()

    def training_step(self, batch: tuple[int, int], batch_idx: int) -> Tensor | None:
        """The loss: within a picture by `settings.loss`, summed over those that have not stopped."""
        i, j = batch
        self.stop, self.losses = torch.zeros_like(self.active), torch.full_like(self.best, float("inf"))
        if not self.active.any():
            return None
        rows = slice(None) if self.active.all() else self.active
        _, residual = self.residual(i, rows)
        losses = LOSSES[self.settings.loss](residual)  # (11)
        if not losses.isfinite().all():
            raise NotFinite(f"the loss of null-text inversion is not finite at step {i}, inner step {j}")
        with torch.no_grad():
            self.losses[rows] = losses
            if j == 0:
                self.start = losses.clone()
            better = self.losses < self.best
            self.best, self.best_null[better] = self.best.minimum(self.losses), self.null[i][better]
            if self.settings.early_stop:
                bound = self.settings.early_stop_eps + i * self.settings.early_stop_slope
                self.stop[rows] = LOSSES["mse"](residual) < bound
        return self.scale * losses.sum()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A gradient step that leaves alone, momentum or not, the pictures that have stopped."""
        e = self.null[batch_idx // self.settings.inner_steps]
        before, stopped = e.detach().clone(), ~self.active
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            e[stopped] = before[stopped]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo the scale of the loss, and look at the gradient."""
        for i, e in enumerate(self.null):
            if e.grad is None:
                continue
            e.grad /= self.scale
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # it looks for itself
            if scaler is None and not e.grad.isfinite().all():
                raise NotFinite(f"the gradient of null-text inversion is not finite at step {i}")

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: tuple[int, int], batch_idx: int) -> None:
        """Log; at a step's end go on to the next state, and keep the progress."""
        i, j = batch
        facts = {"nti/step": float(i), "nti/inner": float(j)}
        if self.active.any():
            facts["nti/loss"] = float(self.losses[self.active].mean())
            self.log("nti/loss", facts["nti/loss"], prog_bar=True, logger=False, batch_size=1)
        if j == self.settings.inner_steps - 1:
            facts["nti/error"] = float(self.finish(i).mean())
            self.log("nti/error", facts["nti/error"], prog_bar=True, logger=False, batch_size=1)
            self.save()
        for logger in self.loggers:  # not by self.log, which repeats what a step has not
            logger.log_metrics(facts, step=(self.place * len(self.null) + i) * self.settings.inner_steps + j)
        self.active &= ~self.stop
        self.check()

    def finish(self, i: int) -> Tensor:
        """Settle step i's embedding, set state i + 1, and give each picture's mean squared error there."""
        x, residual = self.residual(i)
        most: dict[Any, Any] = {"last": torch.inf, "guarded": 2 * self.start, "best": self.best}
        back = LOSSES[self.settings.loss](residual) > most[self.settings.keep]
        if back.any():
            log.log(
                logging.INFO if self.settings.keep == "best" else logging.WARNING,
                "null-text inversion: the loss rose at step %d; the best embedding tried is kept",
                i,
            )
            self.null[i][back] = self.best_null[back]
            x, residual = self.residual(i)
        if not x.isfinite().all():
            raise NotFinite(f"null-text inversion is not finite after step {i}")
        self.x[i + 1], self.done = x, i + 1
        self.null[i].grad = None
        self.trainer.optimizers[0].state.pop(self.null[i], None)
        return LOSSES["mse"](residual)

    def save(self) -> None:
        """Keep the progress at `path`, if it is set, whole or not at all. Raises InputError if the disk is full."""
        if self.path is not None:
            with replacing(self.path, REMEDY) as partial:
                self.trainer.save_checkpoint(partial)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the progress is of, how far it is, and the seconds that it took."""
        seconds = self.spent + time.monotonic() - self.began
        checkpoint |= {"key": self.key, "done": self.done, "seconds": seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """How far it was, after how many seconds."""
        self.done, self.spent = checkpoint["done"], checkpoint.get("seconds", 0.0)
