"""The only door to diffusers and transformers: a latent diffusion model of the Stable Diffusion family, SD 1.x or 2.x."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.attention import Site, Step, install
from masafusion_lab.schedule import Schedule

PICTUREBOOK = Path(__file__).parent / "picturebook" / "model"


@dataclass
class StableDiffusion:
    """UNet, autoencoder, text encoder and adapters of one model folder, with their conventions of pixels and text."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    config: Mapping[str, Any]
    adapters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze every part, and install the attention processor."""
        self.sites: tuple[Site, ...] = install(self.unet)
        for part in (self.unet, self.vae, self.text_encoder, *self.adapters.values()):
            part.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        path: str = "picturebook",
        *,
        adapter: Mapping[str, str] | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> StableDiffusion:
        """Load a diffusers folder or hub id, with the adapters that lie in it or are given as kind -> folder or id."""
        from diffusers import AutoencoderKL, AutoencoderTiny, T2IAdapter, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        root = PICTUREBOOK if path == "picturebook" else Path(path)
        torch_dtype = getattr(torch, dtype)
        options: dict[str, Any] = {"torch_dtype": torch_dtype, "use_safetensors": True}
        vae_class = json.loads((root / "vae" / "config.json").read_text())["_class_name"]
        vae = (AutoencoderTiny if vae_class == "AutoencoderTiny" else AutoencoderKL).from_pretrained(
            root, subfolder="vae", **options
        )
        adapters = {
            folder.name.removeprefix("t2iadapter_"): T2IAdapter.from_pretrained(folder, **options).to(device)
            for folder in sorted(root.glob("t2iadapter_*"))
        }
        return cls(
            unet=UNet2DConditionModel.from_pretrained(root, subfolder="unet", **options).to(device),
            vae=vae.to(device),
            text_encoder=CLIPTextModel.from_pretrained(root, subfolder="text_encoder", dtype=torch_dtype).to(device),
            tokenizer=CLIPTokenizer.from_pretrained(root, subfolder="tokenizer"),
            config=json.loads((root / "scheduler" / "scheduler_config.json").read_text()),
            adapters=adapters,
        )

    @property
    def device(self) -> torch.device:
        """Where the UNet lives."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's precision."""
        return self.unet.dtype

    @cached_property
    def factor(self) -> int:
        """Pixels along a side of a latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @cached_property
    def multiple(self) -> int:
        """Both sides of a picture must divide by this."""
        return self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @cached_property
    def native(self) -> int:
        """The side, in pixels, of the pictures it was trained on."""
        return self.unet.config.sample_size * self.factor

    def schedule(self, steps: int = 50) -> Schedule:
        """The model's noise schedule in `steps` DDIM steps."""
        return Schedule.from_config(self.config, steps)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents x_0 (B, C, h, w), float32, of pixels (B, 3, H, W) in [0, 1]: the posterior's mean, scaled."""
        out = self.vae.encode((2 * pixels - 1).to(self.device, self.vae.dtype))
        mean = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
        return (mean * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], float32, of latents x_0."""
        x = (x0 / self.vae.config.scaling_factor).to(self.device, self.vae.dtype)
        return (self.vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, n, d), float32, padded or cut to the encoder's length n."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state.float()

    @cached_property
    def length(self) -> int:
        """Tokens of a prompt, with start, end and padding."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    @torch.no_grad()
    def hint(self, kind: str, picture: Tensor) -> tuple[Tensor, ...]:
        """The adapter's features, float32, one (B, c, h, w) a level, of a hint picture (B, 1 or 3, H, W) in [0, 1]."""
        if kind not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise InputError(f"this model has no {kind} adapter (it has: {have}); give adapter.{kind}=FOLDER")
        adapter = self.adapters[kind]
        return tuple(f.float() for f in adapter(picture.to(self.device, adapter.dtype)))

    def eps(
        self,
        x: Tensor,
        i: int,
        schedule: Schedule,
        text: Tensor,
        *,
        hint: Iterable[Tensor] | None = None,
        step: Step | None = None,
        level: int | None = None,
    ) -> Tensor:
        """The noise eps (R, C, h, w), float32, that the UNet sees at step i in latents x (R, C, h, w) under text (R, n, d).

        `level` is the state that x is at, if not i: DDIM inversion asks at timestep i about state i + 1.
        """
        out = self.unet(
            x.to(self.dtype),
            schedule.timesteps[i],
            text.to(self.dtype),
            down_intrablock_additional_residuals=None if hint is None else [f.to(self.dtype) for f in hint],
            cross_attention_kwargs={"step": step} if step is not None else None,
        ).sample.float()
        return schedule.eps(x, out, i if level is None else level)

    def digest(self, parts: Sequence[str] = ("unet", "vae", "text_encoder")) -> str:
        """sha256 of the weights of the named parts, adapters by kind."""
        sha = hashlib.sha256()
        for part in parts:
            module = self.adapters[part] if part in self.adapters else getattr(self, part)
            for name, value in module.state_dict().items():
                sha.update(name.encode())
                sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()
