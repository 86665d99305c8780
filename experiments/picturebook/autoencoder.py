"""The autoencoder: AutoencoderKL of factor 4 with 4 latent channels, L1 + MSE and a tiny KL, mostly on crops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from experiments.picturebook.data import SIZE, pixels
from experiments.picturebook.training import Part, Settings, as_told, fit, frozen, last, settings, weights

MEASURED = 200
"""Pictures that latents are scaled by."""


@dataclass
class Autoencoder(Settings):
    """channels: of the levels; crop: the side of the training crops; kl: the weight of the KL term's mean.

    decoder: afterwards train the decoder alone, on latents without noise, which stay as they are, for structure too.
    """

    steps: int = 1900
    batch: int = 32
    lr: float = 1.5e-3
    channels: tuple[int, int, int] = (32, 64, 64)
    crop: int = 64
    kl: float = 1e-4
    decoder: bool = False


def build(s: Autoencoder) -> AutoencoderKL:
    """The untrained network; no attention in the middle, as it is convolutional for crops of any size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=tuple(s.channels), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=SIZE, mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip


class Training(Part):
    """Reconstruction of crops."""

    def __init__(self, s: Autoencoder) -> None:
        super().__init__(s)
        self.kl, self.crop = s.kl, s.crop
        self.vae, self.decoder = build(s).to(memory_format=torch.channels_last), s.decoder
        if s.decoder:
            self.vae.load_state_dict(weights(s, "autoencoder", "vae"))
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def batch(self, g: np.random.Generator) -> Tensor:
        """Crops (B, 3, crop, crop) in [-1, 1], at places that are multiples of a latent cell."""
        pictures = self.s.album().pictures
        at = 4 * g.integers((SIZE - self.crop) // 4 + 1, size=(self.s.batch, 2))
        cut = [pictures[i, y : y + self.crop, x : x + self.crop]
               for i, (y, x) in zip(g.integers(len(pictures), size=self.s.batch), at, strict=True)]  # fmt: skip
        return 2 * pixels(np.stack(cut)) - 1

    def training_step(self, x: Tensor, k: int) -> Any:
        """L1 + MSE + kl * KL; of the decoder alone L1 + MSE + 1 - SSIM."""
        with torch.set_grad_enabled(not self.decoder):
            posterior = self.vae.encode(x).latent_dist
        out = self.vae.decode(posterior.mean if self.decoder else posterior.sample()).sample.float()
        mse = F.mse_loss(out, x)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        self.log_dict({"psnr": -10 * torch.log10(mse.detach() / 4), "kl": kl.detach()}, on_step=False, on_epoch=True)
        if self.decoder:
            return F.l1_loss(out, x) + mse + 1 - structural_similarity_index_measure(out, x, data_range=2.0)
        return F.l1_loss(out, x) + mse + self.kl * kl


def trained(s: Settings) -> AutoencoderKL:
    """The trained network, with the factor that gives its latents of drawn pictures variance 1."""
    name = "decoder" if last(s, "decoder").exists() else "autoencoder"
    vae = frozen(build(settings(Autoencoder, [f"root={s.root}"])), weights(s, name, "vae"))
    measured = replace(s.album(), count=min(MEASURED, s.pictures))  # the first of any album
    with torch.no_grad():
        x = vae.encode(2 * pixels(measured.pictures) - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / float(x.std()), 4))
    return vae


def main(words: list[str] | None = None) -> None:
    """Train it."""
    with as_told(Autoencoder, words) as s:
        fit(Training, s, "decoder" if s.decoder else "autoencoder")


if __name__ == "__main__":
    main()
