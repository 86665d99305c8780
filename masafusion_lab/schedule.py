"""The noise schedule: timesteps, cumulative alphas, and equations (1), (4) and (5) as diffuse, denoise and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from masafusion_lab import InputError

SAMPLERS = (
    *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete", "HeunDiscrete"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep"),
    *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "UniPCMultistep"),
    "SASolver",
)
"""diffusers' classes, less "Scheduler", that sample one and the same trained diffusion, each by steps of its own."""

UNKNOWN = ("thresholding", "clip_sample", "use_flow_sigmas")
"""Switches of theirs that the steps here lack."""


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
    def from_config(cls, config: Mapping[str, Any], steps: int = 50, *, even: bool = False) -> Schedule:
        """The schedule of a diffusers scheduler configuration, in `steps` DDIM steps.

        Of whatever class in SAMPLERS the configuration is, it is read as `DDIMScheduler.from_config` does, but that
        steps_offset is 1 and set_alpha_to_one false where they are not written, as in StableDiffusionPipeline and its
        first PNDMScheduler. Each step ends at the next timestep; diffusers' own steps are n // steps long even where
        the spacing is another. From timestep 0 a step changes nothing unless set_alpha_to_one. `even`: in place of
        the configuration's spacing k-diffusion's, from the last trained timestep to 0, log-SNRs between whole ones
        interpolated, with x_0 itself as its end. Raises InputError for a configuration that DDIM cannot follow.
        """
        abar, spacing = trained(config), config.get("timestep_spacing", "leading")
        n, offset = len(abar), int(config.get("steps_offset", 1))
        leads = spacing == "leading" and not even
        most = n - offset if leads else n
        if not 1 <= steps <= most:
            raise InputError(f"steps={steps}: must lie between 1 and {most}")
        room = n - 1 - (steps - 1) * (n // steps)
        if leads and not 0 <= offset <= room:
            raise InputError(f"steps_offset={offset}: must lie between 0 and {room} for steps={steps}")
        times = torch.linspace(n - 1, 0, steps) if even else _timesteps(spacing, n, steps, offset)
        if abar[int(times[0])] == 0:
            raise InputError(
                f"timestep {times[0]:g} is noise alone (rescale_betas_zero_snr): steps along eps find no x_0 there; "
                'write "timestep_spacing": "leading", or take fewer steps'
            )
        levels = _between(abar, times) if even else abar[times]
        last = torch.ones(1) if even or config.get("set_alpha_to_one", False) else abar[:1]
        return cls(tuple(times.tolist()), torch.cat([levels, last]), config.get("prediction_type", "epsilon"))

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


def trained(config: Mapping[str, Any]) -> Tensor:
    """The cumulative alphas (n), float32, that a model of this scheduler configuration was trained with.

    Raises InputError for a configuration that no SD 1.x / 2.x model has.
    """
    name = str(config.get("_class_name", "DDIMScheduler"))
    if name.removesuffix("Scheduler") not in SAMPLERS:
        raise InputError(
            f"{name} is for networks that were distilled, or trained otherwise than by DDPM; take a model that "
            "DDIMScheduler, PNDMScheduler or EulerDiscreteScheduler can sample"
        )
    if on := [key for key in UNKNOWN if config.get(key)]:
        raise InputError(f"{on[0]}=true: the steps here do nothing of the kind; write false if the model does without")
    if (prediction := config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
        raise InputError(f"the scheduler predicts {prediction!r}; only 'epsilon' and 'v_prediction' are known")
    n = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        beta = torch.tensor(config["trained_betas"], dtype=torch.float32)
        if beta.shape != (n,):
            raise InputError(f"trained_betas: {beta.numel()} of them, for num_train_timesteps={n}; write one for each")
    elif kind == "scaled_linear":
        beta = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    elif kind == "linear":
        beta = torch.linspace(start, end, n, dtype=torch.float32)
    else:
        raise InputError(f"beta_schedule={kind!r} is unknown; SD models have 'scaled_linear' or 'linear'")
    abar = torch.cumprod(1 - beta, 0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


def _between(abar: Tensor, times: Tensor) -> Tensor:
    """The cumulative alphas of timesteps and parts of them, by log-SNRs."""
    snr = abar.logit()
    return torch.lerp(snr[times.floor().long()], snr[times.ceil().long()], times.frac()).sigmoid()


def _timesteps(spacing: str, n: int, steps: int, offset: int) -> Tensor:
    """The timesteps, descending, as DDIMScheduler spaces them."""
    if spacing == "leading":
        return (torch.arange(steps) * (n // steps) + offset).flip(0)
    if spacing == "trailing":
        return (n - torch.arange(steps, dtype=torch.float64) * (n / steps)).round().long() - 1
    if spacing == "linspace":
        return torch.linspace(n - 1, 0, steps, dtype=torch.float64).round().long()
    raise InputError(f"timestep_spacing={spacing!r} is unknown; it may be leading, trailing or linspace")
