"""The UNet: noise prediction in the autoencoder's latents under the frozen CLIP text tower, coarse pictures first."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from experiments.picturebook import autoencoder, clip
from experiments.picturebook.data import SIZE, Album, pixels
from experiments.picturebook.training import Part, Settings, fit, frozen, last, settings, weights

log = logging.getLogger(__name__)
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
             "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1}  # fmt: skip


@dataclass
class Unet(Settings):
    """coarse: so many first steps see pictures of half the side, in batches of twice the size.

    snr: of min-SNR weighting; drop: the part of the prompts that is left out; more: start from the shipped weights.
    """

    steps: int = 16_000
    batch: int = 16
    lr: float = 6e-4
    warmup: int = 300
    decay: float = 0.995
    epoch: int = 100
    coarse: int = 5000
    channels: list[int] = field(default_factory=lambda: [64, 128, 192])
    heads: list[int] = field(default_factory=lambda: [2, 4, 6])
    snr: float = 5.0
    drop: float = 0.1
    more: bool = False


def build(s: Unet, width: int) -> UNet2DConditionModel:
    """The untrained network for text embeddings of this width: self- and cross-attention at every resolution."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=tuple(s.channels), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=tuple(s.heads), cross_attention_dim=width,
    )  # fmt: skip


@torch.no_grad()
def latents(vae: AutoencoderKL, album: Album) -> np.ndarray:
    """The means (count, 4, size / 4, size / 4) of an album, scaled, float16 on disk under its digest."""
    digest = hashlib.sha256(b"".join(p.numpy().tobytes() for p in vae.encoder.parameters())).hexdigest()[:8]
    path = album.folder / f"latents-{album.split}-{album.count}-{album.size}-{digest}.npy"
    if not path.exists():
        log.info("encoding %d pictures of %d pixels", album.count, album.size)
        part, side = path.with_suffix(f".{os.getpid()}"), album.size // 4
        out = np.lib.format.open_memmap(part, "w+", np.float16, (album.count, 4, side, side))
        for i in range(0, album.count, 50):
            with torch.autocast("cpu", torch.bfloat16):
                mean = vae.encode(2 * pixels(album.pictures[i : i + 50]) - 1).latent_dist.mean
            out[i : i + 50] = mean.float().numpy() * vae.config.scaling_factor
        out.flush()
        part.replace(path)
    return np.load(path, mmap_mode="r")


class Training(Part):
    """The mean squared error of the noise, weighted by min-SNR."""

    def __init__(self, s: Unet) -> None:
        super().__init__(s)
        words, self.text = clip.words(s), clip.trained(s).text_model
        self.empty = words("", padding="max_length", return_tensors="np").input_ids[0]
        self.ids, vae = clip.tokens(words, s.album()), autoencoder.trained(s)
        self.fine, self.coarse = (latents(vae, s.album(size=size)) for size in (SIZE, SIZE // 2))
        self.register_buffer("abar", DDIMScheduler(**SCHEDULER).alphas_cumprod, persistent=False)
        self.unet = build(s, self.text.config.hidden_size).to(memory_format=torch.channels_last)
        if s.more and not last(s, "unet").exists():
            self.unet.load_state_dict(weights(s, "unet", "unet"))

    def batch(self, g: np.random.Generator) -> tuple[Tensor, ...]:
        """Latents (B, 4, h, w), noise alike, timesteps (B), and ids (B, n) of a wording, of "" where dropped."""
        s: Any = self.s
        coarse = self.trainer.global_step < s.coarse
        n, x = (2 * s.batch, self.coarse) if coarse else (s.batch, self.fine)
        which = np.sort(g.integers(len(self.ids), size=n))
        x0 = torch.from_numpy(x[which]).float().to(memory_format=torch.channels_last)
        ids = self.ids[which, g.integers(self.ids.shape[1], size=n)]
        ids[g.random(n) < s.drop] = self.empty
        noise = torch.from_numpy(g.standard_normal(x0.shape, np.float32)).to(memory_format=torch.channels_last)
        return x0, noise, torch.from_numpy(self.timesteps(g.random(n))), torch.from_numpy(ids)

    def timesteps(self, u: np.ndarray) -> np.ndarray:
        """Timesteps from numbers in [0, 1)."""
        return (1000 * u).astype(np.int64)

    def predict(self, x: Tensor, t: Tensor, text: Tensor, hint: Any) -> Tensor:
        """The predicted noise."""
        return self.unet(x, t, text, down_intrablock_additional_residuals=hint).sample

    def training_step(self, batch: tuple[Tensor, ...], k: int) -> Tensor:
        """The loss."""
        x0, noise, t, ids, *hint = batch
        abar = self.abar[t].view(-1, 1, 1, 1)
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise  # (1)
        with torch.no_grad():
            text = self.text(ids).last_hidden_state
        error = (self.predict(x, t, text, self.features(*hint)).float() - noise).square().mean((1, 2, 3))
        snr = self.abar[t] / (1 - self.abar[t])
        loss = (error * snr.clamp(max=self.s.snr) / snr).mean()  # type: ignore[attr-defined]
        self.log_dict({"loss": loss.detach(), "mse": error.detach().mean()}, on_step=False, on_epoch=True)
        return loss

    def features(self, *hint: Tensor) -> list[Tensor] | None:
        """What an adapter adds; nothing here."""
        return None


def trained(s: Settings) -> UNet2DConditionModel:
    """The trained network."""
    u = settings(Unet, [f"root={s.root}"])
    return frozen(build(u, settings(clip.Clip, [f"root={s.root}"]).text_width), weights(s, "unet", "unet"))


def main(words: list[str] | None = None) -> None:
    """Train it."""
    fit(Training, settings(Unet, words), "unet")


if __name__ == "__main__":
    main()
