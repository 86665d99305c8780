"""The noise schedule: timesteps, cumulative alphas, and equations (1), (4) and (5) as diffuse, denoise and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from masafusion_lab import InputError

Spacing: TypeAlias = Literal["leading", "linspace"]


@dataclass(frozen=True)
class Schedule:
    """The T steps of deterministic DDIM; state 0 is x_T (noise), state T is x_0.

    `timesteps` (T, descending, parts of one too) says when the UNet is asked on the way from state i to i + 1; `abar`
    (T + 1) is the cumulative alpha of each state. Equations (4) and (5) of the paper lack a factor sqrt(abar) before
    the noise term; these are the scheduler's.
    """

    timesteps: tuple[float, ...]
    abar: Tensor
    prediction: str = "epsilon"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], steps: int = 50, spacing: Spacing = "leading") -> Schedule:
        """The schedule of a diffusers scheduler configuration, in `steps` DDIM steps.

        'leading' spacing has an offset of one, as StableDiffusionPipeline enforces: with offset 0 the last step of SD
        1.x is the identity. 'linspace' is k-diffusion's: evenly from the last trained timestep to 0, log-SNRs between
        whole ones interpolated, and its end is x_0 itself. Raises InputError for a configuration that no SD 1.x / 2.x
        model has.
        """
        n = int(config.get("num_train_timesteps", 1000))
        if not 1 <= steps <= n - 1:
            raise InputError(f"steps={steps}: must lie between 1 and {n - 1}")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise InputError(f"the scheduler predicts {prediction!r}; only 'epsilon' and 'v_prediction' are known")
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            beta = torch.tensor(config["trained_betas"], dtype=torch.float32)
        elif kind == "scaled_linear":
            beta = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
        elif kind == "linear":
            beta = torch.linspace(start, end, n, dtype=torch.float32)
        else:
            raise InputError(f"beta_schedule={kind!r} is unknown; SD models have 'scaled_linear' or 'linear'")
        if config.get("rescale_betas_zero_snr"):
            raise InputError("rescale_betas_zero_snr: models whose last state is noise alone are not supported")
        abar = torch.cumprod(1 - beta, 0)
        if spacing == "linspace":
            times, snr = torch.linspace(n - 1, 0, steps), abar.logit()
            between = torch.lerp(snr[times.floor().long()], snr[times.ceil().long()], times.frac()).sigmoid()
            return cls(tuple(times.tolist()), torch.cat([between, torch.ones(1)]), prediction)
        timesteps = (torch.arange(steps) * (n // steps) + 1).flip(0)
        last = torch.ones(1) if config.get("set_alpha_to_one", False) else abar[:1]
        return cls(tuple(timesteps.tolist()), torch.cat([abar[timesteps], last]), prediction)

    def __len__(self) -> int:
        return len(self.timesteps)

    def level(self, i: int) -> float:
        """The cumulative alpha of state i, 0 <= i <= T."""
        return float(self.abar[i])

    def denoise(self, x: Tensor, eps: Tensor, i: int, eta: float = 0.0) -> Tensor:
        """State i -> i + 1 along the predicted noise (DDIM), but for the noise `sigma(i, eta)` that is still to add."""
        return self._move(x, eps, self.level(i), self.level(i + 1), self.sigma(i, eta))  # (4)

    def sigma(self, i: int, eta: float = 1.0) -> float:
        """The standard deviation of the new noise in the step from state i; at eta 1 DDPM's and Euler ancestral's.

        Song et al. 2021 (DDIM), equation (16).
        """
        a, b = self.level(i), self.level(i + 1)
        return eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5

    def noise(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        """State i + 1 -> i, the inverse of `denoise` for the same eps."""
        return self._move(x, eps, self.level(i + 1), self.level(i))  # (5)

    def diffuse(self, x0: Tensor, eps: Tensor, i: int) -> Tensor:
        """x_0 noised straight to state i."""
        a = self.level(i)
        return a**0.5 * x0 + (1 - a) ** 0.5 * eps  # (1)

    def renoise(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        """State i + 1 -> i by noise alone: a step of the Markov chain whose marginals `diffuse` gives."""
        a = self.level(i) / self.level(i + 1)
        return a**0.5 * x + (1 - a) ** 0.5 * eps

    def eps(self, x: Tensor, out: Tensor, i: int) -> Tensor:
        """The noise that a UNet output means, x being at state i: itself, or from a v-prediction."""
        if self.prediction == "epsilon":
            return out
        a = self.level(i)
        return a**0.5 * out + (1 - a) ** 0.5 * x

    @staticmethod
    def _move(x: Tensor, eps: Tensor, a: float, b: float, sigma: float = 0.0) -> Tensor:
        return (b / a) ** 0.5 * x + b**0.5 * (((1 - b - sigma**2) / b) ** 0.5 - ((1 - a) / a) ** 0.5) * eps
