"""Which UNet a method denoises with: its kinds by input channels, where they lie, and UNets told by their changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masafusion_lab import InputError
from masafusion_lab.hub import Fetch, Files, find, one_line, read_json
from masafusion_lab.schedule import trained

NETWORKS = {"": (1, 0), "instruct": (2, 0), "hive": (2, 0), "inpaint": (2, 1)}
"""Kind of UNet, as in unet_<kind>/ ("": unet/) -> (a, b): for latents of C channels it has aC + b input channels."""

REMEDY = {
    "instruct": "give model.unet=FOLDER or a hub id such as timbrooks/instruct-pix2pix",
    "hive": "give model.unet=FOLDER, made from a published checkpoint by python -m experiments.convert_hive",
    "inpaint": "give model.unet=FOLDER or a hub id such as stable-diffusion-v1-5/stable-diffusion-inpainting",
}
"""Where a UNet of that kind comes from."""

SUFFIX = ", image quality is five out of five"
"""What HIVE's conditional-reward networks were taught to read as the best reward (Zhang et al. 2023)."""

BASE = "_base"
"""Entry of the config.json of a UNet that holds only the weights in which it differs from unet/: that one's sha256."""

TAUGHT = "_suffix"
"""Entry of a UNet's config.json: what a network of graded rewards was taught in place of SUFFIX."""


INPUTS = {
    "time_cond_proj_dim": "the strength of guidance (distilled models, as LCM)",
    "class_embed_type": "a picture's embedding, a class or a noise level (unCLIP, upscalers)",
    "num_class_embeds": "a class or a noise level (class-conditional models, upscalers)",
    "encoder_hid_dim_type": "embeddings of pictures, or text of another encoder (IP-Adapter, Kandinsky)",
    "encoder_hid_dim": "text of another encoder (DeepFloyd IF)",
    "addition_embed_type": "what is added to the time: pooled text, sizes or a picture (SDXL, Kandinsky)",
    "attention_type": "boxes of things (GLIGEN)",
    "dual_cross_attention": "a picture's embedding beside the text (Versatile Diffusion)",
}
"""Entry of a UNet's config.json -> the input that it stands for, which SD 1.x and 2.x have not."""


@dataclass(frozen=True)
class Place:
    """Where a part lies: the root that files are asked for in, how, and its folder there."""

    root: Path
    fetch: Fetch
    part: str


def find_unet(root: Path, fetch: Fetch, unet: str = "", network: str = "") -> Place:
    """Where the UNet lies: in `unet` (a UNet's folder, a whole model's, or a hub id), or in the model's own folder.

    There in unet_<network>/, if there is one, else in unet/.
    """
    if not unet:
        own = f"unet_{network}"
        return Place(root, fetch, own if network and fetch(f"{own}/config.json") else "unet")
    place, get = find(unet, "unet/config.json", f"model.unet={unet}")
    if get("unet/config.json") or not get("config.json"):
        return Place(place, get, "unet")
    place = place.resolve()
    return Place(place.parent, lambda file: path if (path := place.parent / file).is_file() else None, place.name)


def check_prediction(at: Place, noise: Mapping[str, Any]) -> None:
    """Raise InputError where the model that the UNet comes from says that it was trained for another schedule."""
    name = "scheduler/scheduler_config.json"
    own = read_json(at.fetch, name, at.root) if at.part == "unet" and at.fetch(name) else noise
    predicts, want = (config.get("prediction_type", "epsilon") for config in (own, noise))
    if predicts != want:
        raise InputError(f"{at.root / at.part}: predicts {predicts}, this model's schedule is for {want}")
    try:
        same = torch.equal(trained(own), trained(noise))
    except (ValueError, TypeError) as error:
        raise InputError(f"{at.root / 'scheduler'}: {one_line(error)}") from None
    if not same:
        raise InputError(f"{at.root / at.part}: was trained with other betas than this model's schedule has")


def check_inputs(unet: Mapping[str, Any], place: Path) -> None:
    """Raise InputError for a UNet's configuration that asks for an input beside latents, time and text."""
    for key, what in INPUTS.items():
        if (value := unet.get(key)) not in (None, False, "default"):
            raise InputError(
                f"{place}: {key}={value}: this UNet also reads {what}, which no method here gives; take a model of "
                "SD 1.x or 2.x without it"
            )


def check_channels(unet: Mapping[str, Any], latent: int, network: str, place: Path) -> None:
    """Raise InputError unless a UNet's configuration has the input channels of that kind, for latents of `latent`."""
    channels, (times, plus) = unet.get("in_channels", 4), NETWORKS[network]
    if channels == (want := times * latent + plus):
        return
    task = {9: ", an inpainting model's", 8: ", an instruction-tuned or upscaling model's"}.get(channels, "")
    if network:
        raise InputError(f"{place}: in_channels={channels}{task}; this method needs {want}: {REMEDY[network]}")
    raise InputError(f"{place}: in_channels={channels}{task}; the autoencoder's latents have {latent}")


def read_changes(unet: Any, base: Files, changes: Files) -> None:
    """Give a UNet the weights of `base` with `changes` in their place. Raises InputError where they do not fit."""
    from safetensors.torch import load_file

    weights = {name: w for file in (*base.names, *changes.names) for name, w in load_file(file).items()}
    try:
        unet.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{changes.folder}: does not fit {base.folder}, copy both again: {one_line(error)}") from None
