"""The Editor: a LightningModule whose predict step edits a batch of cases from their records."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from masafusion_lab import InputError, interrupt
from masafusion_lab.attention import Tap
from masafusion_lab.given import Given
from masafusion_lab.inversion import Inversion, Track, silent
from masafusion_lab.lockstep import NotFinite
from masafusion_lab.methods import Method
from masafusion_lab.model import StableDiffusion
from masafusion_lab.once import Ask, call
from masafusion_lab.schedule import Schedule

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One case as tensors, on the CPU: what an edit reads.

    `pixels` (3, H, W) in [0, 1]; `record` of one picture; `mask` A at latent resolution (1, h, w); `hints`: kind ->
    (1 or 3, H, W) in [0, 1]; `shown` (1, H, W): see `Prepared`.
    """

    id: str
    source: str
    target: str
    pixels: Tensor
    record: Inversion
    mask: Tensor | None = None
    hints: Mapping[str, Tensor] = field(default_factory=dict)
    instruction: str = ""
    shown: Tensor | None = None


@dataclass(frozen=True)
class Edited:
    """What an edit made of one case.

    `pictures` (3, H, W) in [0, 1], on the CPU: "roundtrip" (the autoencoder's), "reconstruction", "target" and, where
    the method has one, "intermediate". `psnr`: dB of the first two against the source. `rows`: UNet rows used.
    `seconds` by phase, its share of the batch's.
    """

    id: str
    pictures: Mapping[str, Tensor]
    psnr: Mapping[str, float]
    rows: int
    seconds: Mapping[str, float]
    dtype: str


def noise_for(seed: int, case: str, shape: Sequence[int], purpose: str = "x") -> Tensor:
    """Gaussian noise of a shape, float32, drawn on the CPU: a function of seed, case and purpose alone.

    So neither the order of cases, nor batches, shards or resuming change an image.
    """
    digest = hashlib.sha256(f"{seed}\0{case}\0{purpose}".encode("utf-8", "surrogatepass")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def nobody(batch: Sequence[Item]) -> Sequence[Tap]:
    """Watch nothing."""
    return ()


class Editor(LightningModule):
    """Edits batches of items with one method; of every case the image that it gives alone.

    `watch` gives the taps of a batch; it is asked anew when the batch is edited again, or in parts. `ask`: see `Once`.
    """

    def __init__(
        self,
        model: StableDiffusion,
        method: Method,
        schedule: Schedule,
        *,
        seed: int = 0,
        watch: Callable[[Sequence[Item]], Sequence[Tap]] = nobody,
        track: Track = silent,
        ask: Ask = call,
    ) -> None:
        super().__init__()
        self.model, self.method, self.schedule = model, method, schedule
        self.seed, self.watch, self.track, self.ask = seed, watch, track, ask

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave items where they are: what an edit needs of them is moved when it is used."""
        return batch

    def predict_step(self, batch: Sequence[Item], batch_idx: int = 0) -> list[Edited]:
        """Edit; in float32 if half precision overflows, and in smaller parts if memory does not suffice.

        Raises NotFinite naming stage and step, and InputError where even one picture is too much for the memory.
        """
        names = ", ".join(item.id for item in batch)
        return precisely(self.model, f"editing {names}", lambda: self._in_memory(batch))

    def _in_memory(self, batch: Sequence[Item]) -> list[Edited]:
        """Edit as one batch; if memory runs out one by one, then with the autoencoder working by tiles."""
        try:
            return self.edit(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) > 1:
            log.warning("out of memory with %d pictures at once: one by one; batch=1 spares the attempt", len(batch))
            return [edited for item in batch for edited in self._in_memory([item])]
        if not getattr(self.model.vae, "use_tiling", True):
            log.warning("out of memory: the autoencoder works by tiles from here on, as with model.tiling=true")
            self.model.vae.enable_tiling()
            return self._in_memory(batch)
        height, width = batch[0].pixels.shape[-2:]
        raise InputError(
            f"out of memory for one picture of {width}x{height}: take a smaller size=, model.dtype=float16 or "
            "bfloat16, or model.offload=model"
        )

    def edit(self, batch: Sequence[Item]) -> list[Edited]:
        """Edit a batch of items of one size."""
        model, clock = self.model, Clock(self.model.device)
        given, record, x = self.ready(batch)
        states, pixels = record.states, torch.stack([item.pixels for item in batch]).to(model.device)
        clock.lap("prepare")
        steps = self.method(model, given, record, x, schedule=self.schedule, taps=self.watch(batch))
        what = f"editing {batch[0].id}" if len(batch) == 1 else f"editing {len(batch)} pictures"
        for state, _ in zip(steps, self.track(range(len(self.schedule)), what), strict=False):  # noqa: B007
            interrupt.check()
        clock.lap("denoise")
        x0 = model.encode(pixels)
        latents = {"roundtrip": x0, "reconstruction": states[-1], "target": state.x["target"]}
        if "t2i" in state.x:
            latents["intermediate"] = state.x["t2i"]
        pictures: dict[str, Tensor] = {}
        for name, latent in self.track(list(latents.items()), "decoding"):
            same = name == "reconstruction" and latent.shape == x0.shape and torch.equal(latent, x0)
            pictures[name] = pictures["roundtrip"] if same else model.decode(latent).cpu()
            interrupt.check()
        pictures["target"] = pasted(self.method, given, pictures["target"])
        clock.lap("decode")
        dtype = str(model.dtype).removeprefix("torch.")
        seconds = {phase: spent / len(batch) for phase, spent in clock.seconds.items()}
        of_each = [{name: many[b] for name, many in pictures.items()} for b in range(len(batch))]
        return [
            Edited(
                item.id,
                of,
                {name: psnr(of[name], item.pixels) for name in ("roundtrip", "reconstruction")},
                state.rows,
                seconds,
                dtype,
            )
            for item, of in zip(batch, of_each, strict=True)
        ]

    def ready(self, batch: Sequence[Item]) -> tuple[Given, Inversion, Tensor]:
        """What the method is called with for a batch, on the device: what is given, the record, and noise."""
        device = self.model.device
        record, pixels = self.ask(placed, batch, device)

        def noise(purpose: str) -> Tensor:
            of_each = [noise_for(self.seed, item.id, record.states.shape[2:], purpose) for item in batch]
            return torch.stack(of_each).to(device)

        return replace(self.given(batch, record.null), pixels=pixels, noise=noise), record, noise("x")

    def given(self, batch: Sequence[Item], null: Tensor | None) -> Given:
        """Prompts, mask, hint and null embeddings of a batch; the features of several kinds of hint are added."""
        model = self.model
        told = {"source": [item.source for item in batch], "target": [item.target for item in batch]}
        if self.method.needs.instruction:
            told["instruction"] = [followed(model, self.method, item.instruction) for item in batch]
        texts = [*chain.from_iterable(told.values()), ""]
        *of_each, empty = self.ask(model.embed, texts).split([*map(len, told.values()), 1])
        masks = [item.mask for item in batch if item.mask is not None]
        hints = {kind: torch.stack([item.hints[kind] for item in batch]) for kind in batch[0].hints}
        return Given(
            {**dict(zip(told, of_each, strict=True)), "empty": empty.expand(len(batch), -1, -1)},
            mask=torch.stack(masks).to(model.device) if masks else None,
            shown=torch.stack(shown) if len(shown := [i.shown for i in batch if i.shown is not None]) else None,
            hint=self.ask(features, model, hints) if hints else None,
            null=null,
            texts={"source": [item.source for item in batch], "target": [item.target for item in batch]},
        )


def placed(batch: Sequence[Item], device: torch.device) -> tuple[Inversion, Tensor]:
    """The records of a batch as one, and its pixels (B, 3, H, W), on a device."""
    record = Inversion.stack([item.record for item in batch])
    null = None if record.null is None else record.null.to(device)
    pixels = torch.stack([item.pixels for item in batch]).to(device)
    return Inversion(record.states.to(device), null), pixels


def features(model: StableDiffusion, hints: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The features of hints (B, 1 or 3, H, W) by kind, one (B, c, h, w) a level; those of several kinds are added."""
    of_each = [model.hint(kind, pictures) for kind, pictures in hints.items()]
    return tuple(map(sum, zip(*of_each, strict=True)))  # type: ignore[arg-type]


def followed(model: StableDiffusion, method: Method, instruction: str) -> str:
    """The instruction as the method's network reads it, with what is appended; "" for a method that follows none."""
    needed = method.needs
    if not (needed.instruction and instruction):
        return ""
    return instruction + (model.suffix if needed.suffix is None else needed.suffix)


def pasted(method: Method, given: Given, pictures: Tensor) -> Tensor:
    """Edited pictures (B, 3, H, W), on the CPU; outside the region the given ones, if the method wants them there."""
    if not method.needs.paste or given.mask is None or given.pixels is None:
        return pictures
    mask = F.interpolate(given.mask, pictures.shape[-2:]).cpu() if given.shown is None else given.shown
    return mask * pictures + (1 - mask) * given.pixels.cpu()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; infinite if they are equal."""
    return float(-10 * (a - b).double().square().mean().log10())


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def precisely(model: StableDiffusion, what: str, run: Callable[[], T]) -> T:
    """What `run` gives; if low precision overflows in it, what it gives with the model in float32.

    Raises NotFinite, which says what was under way, for an overflow in float32.
    """
    try:
        return run()
    except ArithmeticError as error:
        if model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type):
            raise NotFinite(f"{what}: {error}") from None
        log.warning("%s in %s: %s; again in float32", what, model.dtype, error)
    with in_float32(model):
        try:
            return run()
        except ArithmeticError as error:
            raise NotFinite(f"{what}, in float32 too: {error}") from None


@contextlib.contextmanager
def in_float32(model: StableDiffusion) -> Iterator[None]:
    """With every part of the model in float32 and no autocast; each gets back its own precision and bits afterwards."""
    parts = [model.unet, model.vae, model.text_encoder, *model.adapters.values()]
    before = [part.dtype for part in parts]
    try:
        for part in parts:
            nn.Module.to(part, torch.float32)  # diffusers' own `to` warns
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for part, dtype in zip(parts, before, strict=True):
            nn.Module.to(part, dtype)


class Clock:
    """Seconds by phase; a lap ends when the device has done what it was asked."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.seconds, self._last = device, dict[str, float](), time.perf_counter()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was spent on `phase`."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
