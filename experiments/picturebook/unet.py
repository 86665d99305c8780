"""The UNet and its adapters: velocities of the autoencoder's latents under the frozen CLIP text tower.

`coarse=true` first trains all levels but the first on pictures of half the side, which costs a third; the whole network
then grows around them: each level keeps its scale in the picture.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from experiments.picturebook import adapter, autoencoder, clip, text
from experiments.picturebook.data import SIZE, Album, pixels
from experiments.picturebook.training import Part, Settings, as_told, fit, frozen, last, settings, weights
from masafusion_lab.picturebook.captions import WORDINGS

log = logging.getLogger(__name__)
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
             "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1,
             "prediction_type": "v_prediction"}  # fmt: skip


@dataclass
class Unet(Settings):
    """coarse: the inner levels alone; more: start from the shipped weights.

    snr: of the truncated weighting of steps (weights of cells by what they show would bias what is sampled);
    drop: the part of the prompts that is left out; hints: the part of the batches that an adapter guides; pace: the
    factor of the text encoder's learning rate, 0 to leave it as it is; bind: the weight of its reader's loss; compiled:
    the transformer blocks, which saves a sixth of the time and needs a C++ compiler.
    """

    steps: int = 16_500
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 300
    decay: float = 0.995
    epoch: int = 100
    channels: list[int] = field(default_factory=lambda: [32, 64, 128, 192])
    heads: list[int] = field(default_factory=lambda: [1, 2, 4, 6])
    snr: float = 5.0
    drop: float = 0.1
    hints: float = 0.25
    pace: float = 0.3
    bind: float = 0.1
    coarse: bool = False
    more: bool = False
    compiled: bool = False

    @property
    def size(self) -> int:
        """The side of the pictures."""
        return SIZE // 2 if self.coarse else SIZE


def build(s: Unet, width: int) -> UNet2DConditionModel:
    """The untrained network for text embeddings of this width: self- and cross-attention at every resolution."""
    channels, heads = s.channels[s.coarse :], s.heads[s.coarse :]
    return UNet2DConditionModel(
        sample_size=s.size // 4, block_out_channels=tuple(channels), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels), attention_head_dim=tuple(heads),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels), cross_attention_dim=width, time_embedding_dim=256,
    )  # fmt: skip


def grow(unet: UNet2DConditionModel, coarse: dict[str, Tensor]) -> None:
    """Put the coarse network's weights where they act at the same scale; where it was wider, their first part."""
    own = unet.state_dict()
    for name, value in coarse.items():
        if name.startswith(("conv_in", "conv_norm_out", "conv_out")):
            continue  # the picture enters and leaves elsewhere now
        if name == "time_embedding.linear_1.weight":
            value = value.unflatten(1, (-1, 2)).sum(2)  # half as many frequencies
        there = own[re.sub(r"(?<=down_blocks\.)\d+", lambda m: str(int(m[0]) + 1), name)]
        part = tuple(map(slice, map(min, there.shape, value.shape)))
        there[part] = value[part]


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


def speed_up(unet: UNet2DConditionModel, s: Unet) -> None:
    """Have it train faster: attention that few pixels train faster with, and `compiled` blocks."""
    unet.set_attn_processor(AttnProcessor())
    if s.compiled:
        for block in filter(lambda m: isinstance(m, BasicTransformerBlock), unet.modules()):
            block.compile()


def timesteps(g: np.random.Generator, n: int) -> Tensor:
    """Timesteps (n), evenly spread over the 1000, in any order."""
    return torch.from_numpy((1000 * (g.permutation(n) + g.random()) / n).astype(np.int64))


class Training(Part):
    """The mean squared error of the velocity, of noisy and of fine steps alike."""

    def __init__(self, s: Unet) -> None:
        super().__init__(s)
        self.text = text.trained(s).requires_grad_(s.pace > 0)
        self.reader = text.reader(s)
        self.empty = clip.words(s)("", padding="max_length", return_tensors="np").input_ids[0]
        self.captions = text.Captions(s)
        self.latents = latents(autoencoder.trained(s), s.album(size=s.size))
        self.drawn = {} if s.coarse else {kind: s.album(kind).pictures for kind in adapter.CHANNELS}
        self.register_buffer("abar", DDIMScheduler(**SCHEDULER).alphas_cumprod, persistent=False)
        self.unet = build(s, self.text.config.hidden_size)
        self.adapters = nn.ModuleDict({kind: adapter.build(kind, s.channels) for kind in self.drawn})
        if not (s.coarse or last(s, "unet").exists()):
            if s.more:
                self.unet.load_state_dict(weights(s, "unet", "unet"))
                for kind, network in self.adapters.items():
                    network.load_state_dict(weights(s, f"adapter_{kind}", f"adapters.{kind}"))
            else:
                grow(self.unet, weights(s, "unet_coarse", "unet"))
        speed_up(self.unet, s)

    def pace(self, name: str) -> float:
        """The text encoder follows slowly."""
        return self.s.pace if name.startswith("text.") else 1.0  # type: ignore[attr-defined]

    def batch(self, g: np.random.Generator) -> tuple[Any, ...]:
        """Latents (B, 4, h, w), noise alike, timesteps (B), captions (ids, backgrounds, answers) in one wording each,
        which are dropped (B), and a hint {kind: (B, 1 or 3, SIZE, SIZE) in [0, 1]} or none."""
        s: Any = self.s
        which = np.sort(g.integers(len(self.latents), size=s.batch))
        x0 = torch.from_numpy(self.latents[which]).float()
        captions = self.captions(which, g.integers(WORDINGS, size=s.batch))
        dropped = torch.from_numpy(g.random(s.batch) < s.drop)
        noise = torch.from_numpy(g.standard_normal(x0.shape, np.float32))
        hint = {}
        if self.drawn and g.random() < s.hints:
            kind = str(g.choice(list(self.drawn), p=[0.6, 0.2, 0.2]))
            lines = self.drawn[kind][which]
            hint[kind] = pixels(lines if lines.ndim == 4 else lines[..., None])
        return x0, noise, timesteps(g, s.batch), captions, dropped, hint

    def training_step(self, batch: tuple[Any, ...], k: int) -> Tensor:
        """The loss."""
        x0, noise, t, (ids, *answers), dropped, hint = batch
        s: Any = self.s
        abar = self.abar[t].view(-1, 1, 1, 1)
        x, v = abar.sqrt() * x0 + (1 - abar).sqrt() * noise, abar.sqrt() * noise - (1 - abar).sqrt() * x0  # (1)
        tokens = self.text(ids).last_hidden_state
        read, right = self.reader.loss(tokens, *answers)
        empty = self.text(torch.from_numpy(self.empty[None]).to(ids.device)).last_hidden_state
        tokens = torch.where(dropped.view(-1, 1, 1), empty, tokens)
        features = [f for kind, lines in hint.items() for f in self.adapters[kind](lines)] or None
        out = self.unet(x, t, tokens, down_intrablock_additional_residuals=features).sample.float()
        error = (out - v).square().mean((1, 2, 3))
        snr = self.abar[t] / (1 - self.abar[t])
        loss = (error * ((s.snr + 1) / (snr + 1)).clamp(max=1)).mean()
        self.log_dict({"loss": loss.detach(), "mse": error.detach().mean(), "read": read.detach(), **right},
                      on_step=False, on_epoch=True, batch_size=len(x))  # fmt: skip
        return loss + s.bind * read


def trained(s: Settings) -> UNet2DConditionModel:
    """The trained network."""
    u = settings(Unet, [f"root={s.root}"])
    return frozen(build(u, settings(clip.Clip, [f"root={s.root}"]).text_width), weights(s, "unet", "unet"))


def main(words: list[str] | None = None) -> None:
    """Train it."""
    with as_told(Unet, words) as s:
        fit(Training, s, "unet_coarse" if s.coarse else "unet")


if __name__ == "__main__":
    main()
