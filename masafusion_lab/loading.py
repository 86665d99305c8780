"""Reading a model of the Stable Diffusion family, part by part: a diffusers folder or hub id, checked before use.

Whatever is wrong with what a person named is an InputError of one line. No pickle is ever run: the only pickled weights
that are read at all are published T2I-Adapters, which have no other form, and those by torch's weights-only reader.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from masafusion_lab import InputError
from masafusion_lab.hub import Fetch, Files, find, fingerprint, one_line, read_json, weight_files
from masafusion_lab.network import (
    BASE,
    SUFFIX,
    TAUGHT,
    check_channels,
    check_inputs,
    check_prediction,
    find_unet,
    read_changes,
)
from masafusion_lab.schedule import Schedule

log = logging.getLogger(__name__)

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
    "adapter": ("T2IAdapter",),
}
"""The classes a part may be of; the first is what a configuration without a name means."""


def read(
    name: str, adapter: Mapping[str, str], dtype: torch.dtype, *, unet: str = "", network: str = ""
) -> dict[str, Any]:
    """The parts of model `name`, a folder or hub id, and of the adapters (kind -> folder or hub id), by keyword.

    `network`: the kind of UNet that is wanted; `unet`: where it lies, if not in the model's own folder. All
    configurations are checked against one another, and all files for damage, before the first weight is read. Raises
    InputError.
    """
    root, fetch = find(name, "model_index.json", f"model.path={name}")
    config = {part: read_json(fetch, f"{part}/config.json", root) for part in ("vae", "text_encoder")}
    at = find_unet(root, fetch, unet, network)
    config["unet"] = read_json(at.fetch, f"{at.part}/config.json", at.root)
    check_family(read_json(fetch, "model_index.json", root), config, root, at.root / at.part, network)
    noise = read_json(fetch, "scheduler/scheduler_config.json", root)
    _check_schedule(noise, root)
    if (sampler := noise.get("_class_name", "DDIMScheduler")) != "DDIMScheduler":
        log.info("%s: names %s; here DDIM takes its noise levels and timesteps", root / "scheduler", sampler)
    own = {folder.name.removeprefix("t2iadapter_"): str(folder) for folder in sorted(root.glob("t2iadapter_*/"))}
    places = {
        kind: find(str(folder), "config.json", f"model.adapter.{kind}={folder}")
        for kind, folder in {**own, **adapter}.items()
    }
    for kind, (place, get) in places.items():
        check_adapter(kind, read_json(get, "config.json", place), config["unet"], config["vae"], place)
    files = {part: weight_files(fetch, root, part, dtype) for part in ("vae", "text_encoder")}
    files["unet"] = weight_files(at.fetch, at.root, at.part, dtype)
    base = weight_files(fetch, root, "unet", dtype) if BASE in config["unet"] else None
    if base and config["unet"][BASE] != fingerprint(base.names):
        raise InputError(f"{at.root / at.part}: changes another UNet than {base.folder}; take both from one model")
    check_prediction(at, noise)
    of_adapters = {kind: weight_files(get, place, "", dtype) for kind, (place, get) in places.items()}
    read_from = files | of_adapters | ({"base": base} if base else {})
    with quiet():
        import diffusers
        from transformers import CLIPTextModel

        if base is None:
            net = weights(diffusers.UNet2DConditionModel, files["unet"], dtype)
        else:
            net = diffusers.UNet2DConditionModel.from_config(config["unet"])
            read_changes(net, base, files["unet"])
            net.to(dtype)
        autoencoder = getattr(diffusers, config["vae"].get("_class_name", "AutoencoderKL"))
        return {
            "tokenizer": _tokenizer(root, fetch, config["text_encoder"].get("vocab_size", 49408)),
            "unet": net,
            "vae": weights(autoencoder, files["vae"], dtype),
            "text_encoder": weights(CLIPTextModel, files["text_encoder"], dtype),
            "adapters": {kind: weights(diffusers.T2IAdapter, found, dtype) for kind, found in of_adapters.items()},
            "config": noise,
            "suffix": str(config["unet"].get(TAUGHT, SUFFIX)),
            "files": {f"{part}/{file.name}": file for part, its in read_from.items() for file in its.names},
        }


def check_steps(name: str, steps: int) -> None:
    """Raise InputError unless the schedule of model `name`, a folder or hub id, has so many steps."""
    root, fetch = find(name, "model_index.json", f"model.path={name}")
    _check_schedule(read_json(fetch, "scheduler/scheduler_config.json", root), root, steps)


def _check_schedule(noise: Mapping[str, Any], root: Path, steps: int = 1) -> None:
    try:
        Schedule.from_config(noise, steps)
    except (ValueError, TypeError) as error:
        raise InputError(f"{root / 'scheduler'}: {one_line(error)}") from None


def check_family(
    index: Mapping[str, Any], config: dict[str, dict[str, Any]], root: Path, place: Path, network: str = ""
) -> None:
    """Raise InputError unless UNet (in `place`), autoencoder and text encoder are of SD 1.x / 2.x and fit one another.

    And unless the UNet has the input channels of the kind that is wanted, and no other input.
    """
    unet, vae, text = (config[part] for part in ("unet", "vae", "text_encoder"))
    if "XL" in str(index.get("_class_name")) or "text_encoder_2" in index:
        raise InputError(
            f"{root}: SDXL or another family with a second text encoder; only SD 1.x and 2.x are supported"
        )
    text = {**text, "_class_name": (text.get("architectures") or CLASSES["text_encoder"])[0]}
    for part, values in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        _check_class(part, values, place if part == "unet" else root / part)
    check_inputs(unet, place)
    latent = vae.get("latent_channels", 4)
    check_channels(unet, latent, network, place)
    if (channels := unet.get("out_channels", 4)) != latent:
        raise InputError(f"{place}: out_channels={channels}; the autoencoder's latents have {latent}")
    if (width := unet.get("cross_attention_dim", 1280)) != text.get("hidden_size", 512):
        raise InputError(
            f"{place}: cross_attention_dim={width} does not fit the text encoder's hidden_size="
            f"{text.get('hidden_size', 512)}; these parts belong to different models (SD 1.x has 768, SD 2.x 1024)"
        )


def check_adapter(
    kind: str, adapter: Mapping[str, Any], unet: Mapping[str, Any], vae: Mapping[str, Any], root: Path
) -> None:
    """Raise InputError unless the adapter's features fit the levels of the UNet, in channels and in size."""
    _check_class("adapter", adapter, root)
    want = list(unet.get("block_out_channels", (320, 640, 1280, 1280)))
    have = list(adapter.get("channels", (320, 640, 1280, 1280)))
    if have != want:
        raise InputError(
            f"{root}: this {kind} adapter has channels {have}, the UNet {want}; take one made for this model"
        )
    scale, factor = adapter.get("downscale_factor", 8), 2 ** (len(_levels(vae)) - 1)
    if scale != factor or adapter.get("adapter_type", "full_adapter") == "full_adapter_xl":
        raise InputError(
            f"{root}: this {kind} adapter ({adapter.get('adapter_type', 'full_adapter')}) starts at 1/{scale} of the "
            f"picture, the UNet at 1/{factor}; take one made for this model"
        )


def _levels(vae: Mapping[str, Any]) -> list[int]:
    """Channels of the autoencoder, one a resolution."""
    return vae.get("encoder_block_out_channels") or vae.get("block_out_channels") or [64]


def _check_class(part: str, config: Mapping[str, Any], place: Path) -> None:
    name = config.get("_class_name", CLASSES[part][0])
    if name not in CLASSES[part]:
        raise InputError(f"{place}: is a {name}, must be {' or '.join(CLASSES[part])}")


def weights(cls: Any, files: Files, dtype: torch.dtype, **more: Any) -> Any:
    """A part of class `cls`, of `more` of its options, with its weights, all of them and no others."""
    options = {"use_safetensors": files.safe, "variant": files.variant, "local_files_only": True, **more}
    try:
        model, info = cls.from_pretrained(files.folder, torch_dtype=dtype, output_loading_info=True, **options)
    except Exception as error:
        raise InputError(
            f"{files.folder}: weights and config.json do not fit, copy them again: {one_line(error)}"
        ) from None
    foreign = [key for key in info["unexpected_keys"] if not re.search("position_ids|text_projection|pooler", key)]
    for problem, keys in (
        ("lack", info["missing_keys"]),
        ("hold besides", foreign),
        ("misfit", info["mismatched_keys"]),
    ):
        if keys:
            some = ", ".join(sorted(map(str, keys))[:2])
            raise InputError(
                f"{files.names[0]}: config.json is of another model; its weights {problem} {len(keys)}, as {some}"
            )
    return model


def _tokenizer(root: Path, fetch: Fetch, room: int) -> Any:
    """The tokenizer, of the class that its configuration names, with at most `room` tokens."""
    import transformers

    config = read_json(fetch, "tokenizer/tokenizer_config.json", root)
    name = config.get("tokenizer_class") or CLASSES["tokenizer"][0]
    _check_class("tokenizer", {"_class_name": name}, root / "tokenizer")
    for file in ("special_tokens_map.json", "added_tokens.json"):
        fetch(f"tokenizer/{file}")
    have = {file: fetch(f"tokenizer/{file}") for file in ("tokenizer.json", "vocab.json", "merges.txt")}
    if have["tokenizer.json"] is None and (lost := [file for file, path in have.items() if path is None][1:]):
        raise InputError(f"{root / 'tokenizer' / lost[0]}: missing; half a copy")
    try:
        tokenizer = getattr(transformers, name).from_pretrained(root / "tokenizer", local_files_only=True)
    except Exception as error:
        raise InputError(f"{root / 'tokenizer'}: unreadable, copy it again: {one_line(error)}") from None
    if len(tokenizer) > room:
        raise InputError(
            f"{root / 'tokenizer'}: {len(tokenizer)} tokens, the text encoder knows {room}; these parts belong to "
            "different models"
        )
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and remarks while they read weights; restored afterwards."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    levels = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library, _, _ in levels:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, verbosity, bar in levels:
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def choose_device(device: str) -> torch.device:
    """The device "auto", "cpu", "cuda", "cuda:1", "mps" mean here; InputError for one that this machine lacks."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if have[name]))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or not have.get(chosen.type) or (chosen.index or 0) >= max(1, torch.cuda.device_count()):
        here = ", ".join(name for name, there in have.items() if there)
        raise InputError(f"model.device={device}: this machine has {here}; take one of these or auto")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision that `dtype` means; "auto" is float16 on CUDA and float32 elsewhere."""
    names = ("float32", "float16", "bfloat16")
    if dtype == "auto":
        dtype = "float16" if device.type == "cuda" else "float32"
    if dtype not in names:
        raise InputError(f"model.dtype={dtype}: must be auto, {', '.join(names)}")
    return getattr(torch, dtype)
