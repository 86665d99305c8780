"""UNets that see more beside the latent, grown from the trained one: what of them is trained, and what ships."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from experiments.picturebook import autoencoder, clip, text, unet
from experiments.picturebook.training import Part, weights
from masafusion_lab import InputError
from masafusion_lab.hub import fingerprint
from masafusion_lab.network import BASE

TRAINED = re.compile(r"conv_in|attentions|norm|time_emb")
"""The weights that are trained and ship, 45 % of all: what reads the input, the words and the step."""


@dataclass
class Grown(unet.Unet):
    """The settings of the UNet, whose shape it keeps; `blank`: how often what lies beside the latent is left out."""

    steps: int = 6000
    lr: float = 3e-4
    blank: float = 0.1


def grow(net: UNet2DConditionModel, extra: int) -> UNet2DConditionModel:
    """The network with `extra` input channels more, which it does not heed yet."""
    state = net.state_dict()
    state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, extra))
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    out = UNet2DConditionModel(**{**config, "in_channels": net.config.in_channels + extra})
    out.load_state_dict(state)
    return out


class Training(Part):
    """The UNet's loss, with `extra` channels beside the latent; of the weights those of TRAINED learn."""

    def __init__(self, s: Grown, extra: int, start: str = "unet") -> None:
        super().__init__(s)
        words, self.text, self.vae = clip.words(s), text.trained(s), autoencoder.trained(s)
        self.words, self.empty = words, words("", padding="max_length", return_tensors="np").input_ids[0]
        self.register_buffer("abar", DDIMScheduler(**unet.SCHEDULER).alphas_cumprod, persistent=False)
        net = unet.build(s, self.text.config.hidden_size)
        if start == "unet":
            net.load_state_dict(weights(s, "unet", "unet"))
        net = grow(net, extra)
        if start != "unet":
            net.load_state_dict(weights(s, start, "unet"))
        self.unet = net
        unet.speed_up(net, s)
        for name, p in self.unet.named_parameters():
            p.requires_grad_(bool(TRAINED.search(name)))

    def drawn(self, g: np.random.Generator, x0: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, 4, h, w), noise alike, timesteps (B)."""
        noise = torch.from_numpy(g.standard_normal(x0.shape, np.float32))
        return torch.from_numpy(x0).float(), noise, unet.timesteps(g, len(x0))

    def loss(
        self, x0: Tensor, noise: Tensor, t: Tensor, ids: Tensor, beside: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """The mean squared error of the velocity, weighted by noise as the UNet's was, and by cells if told."""
        s: Any = self.s
        abar = self.abar[t].view(-1, 1, 1, 1)  # type: ignore[index]
        x, v = abar.sqrt() * x0 + (1 - abar).sqrt() * noise, abar.sqrt() * noise - (1 - abar).sqrt() * x0  # (1)
        with torch.no_grad():
            tokens = self.text(ids).last_hidden_state
        out = self.unet(torch.cat([x, beside], 1), t, tokens).sample.float()
        weight = torch.ones(1) if weight is None else weight
        error = (weight * (out - v).square()).mean((1, 2, 3)) / weight.mean()
        abar = abar.flatten()
        loss = (error * ((s.snr + 1) * (1 - abar)).clamp(max=1)).mean()
        self.log_dict({"loss": loss.detach(), "mse": error.detach().mean()}, on_step=False, on_epoch=True,
                      batch_size=len(x))  # fmt: skip
        return loss


def export(s: unet.Unet, kind: str, out: Path, **more: Any) -> Path:
    """Write out/unet_<kind>/: config.json, with `more` entries, and in float16 only what differs from out/unet.

    Raises InputError where more differs than was trained: it then was grown from another UNet.
    """
    file = out / "unet" / "diffusion_pytorch_model.safetensors"
    base, own = load_file(file), weights(s, f"unet_{kind}", "unet")
    own = {name: w.half().contiguous() for name, w in own.items()}
    changed = {name: w for name, w in own.items() if TRAINED.search(name)}
    kept = {name: w for name, w in own.items() if name not in changed}  # to the rounding of their running average
    if strange := [name for name, w in kept.items() if not torch.allclose(w, base[name], rtol=0.01, atol=1e-3)]:
        raise InputError(f"unet_{kind} was grown from another UNet than {file}: {len(strange)} differ, as {strange[0]}")
    folder = out / f"unet_{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((out / "unet" / "config.json").read_text())
    config |= {"in_channels": own["conv_in.weight"].shape[1], BASE: fingerprint([file]), **more}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(changed, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder
