"""The only door to diffusers and transformers: a latent diffusion model, SD 1.x or 2.x."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masafusion_lab import InputError, words
from masafusion_lab.attention import Step, install
from masafusion_lab.hub import fingerprints, sha256
from masafusion_lab.loading import choose_device, choose_dtype, read
from masafusion_lab.network import SUFFIX
from masafusion_lab.residual import sharing
from masafusion_lab.schedule import Schedule
from masafusion_lab.sites import Site

log = logging.getLogger(__name__)
LOADING = threading.Lock()


@contextmanager
def alone() -> Iterator[None]:
    """One load at a time in a process: diffusers changes torch for all threads meanwhile."""
    with LOADING:
        yield


IGNORED = "_|dtype$|torch_dtype$|transformers_version$"
"""Entries of a configuration that say how it was saved, not what it is."""


@dataclass
class StableDiffusion:
    """UNet, autoencoder, text encoder and adapters of one model, with their conventions of pixels and text.

    `offload`: every part stays in main memory but while it is used. `suffix`: how its UNet, if one of graded rewards,
    is told to do its best; `files`: of its weights. One thread at a time.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    config: Mapping[str, Any]
    adapters: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False
    suffix: str = SUFFIX
    files: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze every part, put it where it belongs, and install the attention processor."""
        self.sites: tuple[Site, ...] = install(self.unet)
        for part in (self.unet, self.vae, self.text_encoder, *self.adapters.values()):
            part.requires_grad_(False).eval().to("cpu" if self.offload else self.device)
        self._used: Any = None
        self._digests: dict[str, str] = {}

    @classmethod
    @alone()
    def load(
        cls,
        path: str = "picturebook",
        *,
        adapter: Mapping[str, str] | None = None,
        unet: str = "",
        network: str = "",
        dtype: str = "float32",
        device: str = "cpu",
        offload: str = "none",
        tiling: bool = False,
        compile: bool = False,
    ) -> StableDiffusion:
        """Load a diffusers folder or hub id, with the adapters that lie in it or are given as kind -> folder or id.

        `unet`: the folder or id of another UNet than the model's own; `network`: its kind, see `network.NETWORKS`.
        `dtype` and `device` may be "auto": float16 on CUDA, else float32. `offload="model"` keeps every part in main
        memory but while it is used; `tiling` encodes and decodes large pictures by tiles, one at a time; `compile`
        compiles the UNet's residual and feed-forward blocks. Raises InputError for what is no whole SD 1.x / 2.x model.
        """
        place = choose_device(device)
        if offload not in ("none", "model"):
            raise InputError(f"model.offload={offload}: must be none or model")
        if offload == "model" and place.type == "cpu":
            log.warning("model.offload=model is of use with a GPU only: ignored, the model runs on the CPU")
            offload = "none"
        parts = read(path, adapter or {}, choose_dtype(dtype, place), unet=unet, network=network)
        model = cls(**parts, device=place, offload=offload == "model")
        if tiling:
            model.vae.enable_tiling()
            model.vae.enable_slicing()
        if compile:
            compile_blocks(model.unet)
        return model

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's precision."""
        return self.unet.conv_in.weight.dtype

    @cached_property
    def factor(self) -> int:
        """Pixels along a side of a latent cell."""
        config = self.vae.config
        return 2 ** (len(getattr(config, "encoder_block_out_channels", config.block_out_channels)) - 1)

    @cached_property
    def multiple(self) -> int:
        """Both sides of a picture must divide by this: a latent cell, with adapters one of the deepest level."""
        return self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1 if self.adapters else 0)

    @cached_property
    def native(self) -> int:
        """The side, in pixels, of the pictures it was trained on."""
        size = self.unet.config.sample_size
        return self.factor * (max(size) if isinstance(size, Sequence) else size)

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError, with the nearest sizes, for pixels that this model cannot take."""
        m = self.multiple
        if height % m or width % m or min(height, width) < m:
            sizes = [{max(side // m * m, m), -(-side // m) * m} for side in (width, height)]
            near = " or ".join(f"{w}x{h}" for w, h in itertools.product(*map(sorted, sizes)))
            raise InputError(f"{width}x{height}: both sides must be multiples of {m} for this model; take {near}")

    def schedule(self, steps: int = 50, *, even: bool = False) -> Schedule:
        """The model's noise schedule in `steps` DDIM steps; see `Schedule.from_config`."""
        return Schedule.from_config(self.config, steps, even=even)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents x_0 (B, C, h, w), float32, of pixels (B, 3, H, W) in [0, 1]: the posterior's mean, scaled."""
        self.check_size(*pixels.shape[-2:])
        vae = self._use(self.vae)
        out = vae.encode((2 * pixels - 1).to(self.device, vae.dtype))
        mean = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
        return self._finite((mean * vae.config.scaling_factor).float(), "latents")

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], float32, of latents x_0. Raises ArithmeticError for one that is not finite."""
        vae = self._use(self.vae)
        x = (x0 / vae.config.scaling_factor).to(self.device, vae.dtype)
        return self._finite((vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1), "pixels")

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, n, d), float32, padded or cut to the encoder's length n.

        Raises InputError for a word that a whole-word tokenizer does not know.
        """
        for prompt in prompts if self.tokenizer.init_kwargs.get("whole_words") else ():
            if strange := words.unknown(self.tokenizer, prompt):
                said = "; ".join(f"{word!r} (near: {', '.join(near) or 'none'})" for word, near in strange.items())
                raise InputError(
                    f"{prompt!r}: this model does not know {said}; take words that it knows, or a larger one"
                )
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        return self._use(self.text_encoder)(ids.to(self.device)).last_hidden_state.float()

    @cached_property
    def length(self) -> int:
        """Tokens of a prompt, with start, end and padding."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def cut(self, text: str) -> str:
        """The end of a prompt that the encoder does not read, in whole words; "" if it reads all."""
        return words.cut(self.tokenizer, text, self.length - 2)

    @torch.no_grad()
    def hint(self, kind: str, picture: Tensor) -> tuple[Tensor, ...]:
        """The adapter's features, float32, one (B, c, h, w) a level, of a hint picture (B, 1 or 3, H, W) in [0, 1].

        An adapter of one channel reads the picture's first; an adapter of three a grey picture thrice.
        """
        if kind not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise InputError(f"this model has no {kind} adapter (it has: {have}); give model.adapter.{kind}=FOLDER")
        self.check_size(*picture.shape[-2:])
        adapter = self._use(self.adapters[kind])
        channels = adapter.config.in_channels
        picture = picture[:, :1].expand(-1, channels, -1, -1) if picture.shape[1] != channels else picture
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
        extra: Tensor | None = None,
    ) -> Tensor:
        """The noise eps (R, C, h, w), float32, that the UNet sees at step i in latents x under text (R, n, d).

        `level` is the state that x is at, if not i: DDIM inversion asks at timestep i about state i + 1. `extra`
        (R, c, h, w) lies beside the latents in the UNet's input. Raises InputError for a UNet of other channels.
        """
        given = x if extra is None else torch.cat([x, extra], 1)
        if given.shape[1] != (channels := self.unet.config.in_channels):
            raise InputError(
                f"this UNet has {channels} input channels and is given {given.shape[1]}: it was made for another method"
            )
        with sharing(self.unet, self.sites, step):
            out = self._use(self.unet)(
                given.to(self.dtype),
                schedule.timesteps[i],
                text.to(self.dtype),
                down_intrablock_additional_residuals=None if hint is None else [f.to(self.dtype) for f in hint],
                cross_attention_kwargs={"step": step} if step is not None else None,
            ).sample.float()
        return schedule.eps(x, out, i if level is None else level)

    def digest(self, parts: Sequence[str] = ("unet", "vae", "text_encoder")) -> str:
        """sha256 of the named parts (adapters by kind): weights, configuration, and the text encoder's words.

        Of what can change a result: not of the libraries' versions, nor of the precision that the files were saved in.
        """
        for part in parts:
            if part not in self._digests:
                module = self.adapters[part] if part in self.adapters else getattr(self, part)
                config = module.config if isinstance(module.config, Mapping) else module.config.to_diff_dict()
                facts: list[Any] = [{k: v for k, v in config.items() if not re.match(IGNORED, k)}, sha256(module)]
                if part == "text_encoder":
                    facts += [self.tokenizer.get_vocab(), self.length, self.tokenizer.pad_token_id]
                self._digests[part] = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256("".join(self._digests[part] for part in parts).encode()).hexdigest()

    @cached_property
    def weights(self) -> dict[str, str]:
        """Digests: "model" of all of its parts, and of each file, of all its bytes. Raises InputError for a bad one."""
        parts = "unet", "vae", "text_encoder", *sorted(self.adapters)
        return {"model": self.digest(parts), **fingerprints(self.files)}

    def rest(self) -> None:
        """Leave a GPU to others: every part goes to main memory, and is back only while it is used."""
        if self.device.type == "cpu":
            return
        for part in (self.unet, self.vae, self.text_encoder, *self.adapters.values()):
            part.to("cpu")
        self.offload, self._used = True, None
        torch.cuda.empty_cache()

    def _use(self, part: Any) -> Any:
        """The part, on the device; with offload, the part that was used before goes back to main memory."""
        if self.offload and self._used is not part:
            if self._used is not None:
                self._used.to("cpu")
            self._used = part.to(self.device)
        return part

    def _finite(self, x: Tensor, what: str) -> Tensor:
        if not x.isfinite().all():
            raise ArithmeticError(
                f"the autoencoder's {what} are not finite in {self.vae.dtype}; take model.dtype=float32"
            )
        return x


def compile_blocks(unet: torch.nn.Module) -> None:
    """Compile residual and feed-forward blocks in place: all but attention, whose routes change with the step.

    Raises the process's limit of recompilations, which would end in uncompiled blocks without a word.
    """
    from diffusers.models.attention import FeedForward
    from diffusers.models.resnet import ResnetBlock2D

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # a width is a recompilation
    for module in unet.modules():
        if isinstance(module, FeedForward | ResnetBlock2D):
            module.compile()
