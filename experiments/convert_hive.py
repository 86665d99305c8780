"""Convert a published InstructPix2Pix or HIVE checkpoint to a diffusers UNet, for `model.unet=FOLDER`.

`python -m experiments.convert_hive CHECKPOINT FOLDER --base MODEL`, where MODEL is the folder or hub id of the Stable
Diffusion that it was trained from: 1.5 for instruct-pix2pix-00-22000.ckpt, hive_rw.ckpt and hive_rw_condition.ckpt, 2.1
base for hive_v2_rw.ckpt and hive_v2_rw_condition.ckpt. Autoencoder and text encoder are those of that model. Then:

masafusion edit method.name=hive model.path=MODEL model.unet=FOLDER image=FILE instruction="..." steps=100

(method.name=instruct_pix2pix for all but the two "condition" checkpoints, which are told how good the result shall be.)
Of the checkpoint's weights the averaged ones are taken, as the published scripts do. It is read by torch's weights-only
reader: no code in it is run.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.hub import find, one_line, read_json

log = logging.getLogger(__name__)
UNET = "model.diffusion_model."


class Unused:
    """Stands for the one class of the training framework that the checkpoints name, and that nothing here needs."""


def weights(path: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors by name. Raises InputError for what is none, or would run code."""
    named = (Unused, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([named]):
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(f"{path}: is no checkpoint, or one that would run code: {one_line(error)}") from None
    found = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    return {str(name): w for name, w in found.items() if isinstance(w, Tensor)}


def averaged(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's tensors, each as its running average where the checkpoint has one."""
    names = [name for name in found if name.startswith(UNET)]
    return {n: found.get("model_ema." + n.removeprefix("model.").replace(".", ""), found[n]) for n in names}


def convert(checkpoint: Path, folder: Path, base: str) -> Path:
    """Write the UNet's folder, float16 safetensors; returns it. Raises InputError, and then writes nothing."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    if folder.exists():
        raise InputError(f"{folder}: is there already; give another folder")
    root, fetch = find(base, "unet/config.json", f"--base {base}")
    config = read_json(fetch, "unet/config.json", root)
    ldm = averaged(weights(checkpoint))
    if (first := ldm.get(f"{UNET}input_blocks.0.0.weight")) is None:
        raise InputError(f"{checkpoint}: holds no UNet of the latent-diffusion layout ({UNET}...)")
    config["in_channels"] = first.shape[1]
    if config["in_channels"] != 2 * config["out_channels"]:
        raise InputError(f"{checkpoint}: has {first.shape[1]} input channels, an instruction-tuned UNet 8")
    unet = UNet2DConditionModel.from_config(config)
    try:
        unet.load_state_dict(convert_ldm_unet_checkpoint(ldm, config))
    except Exception as error:
        raise InputError(f"{checkpoint}: was not trained from {base}: {one_line(error)}") from None
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        unet.half().save_pretrained(part)
        part.replace(folder)
    except Exception as error:  # a full disk is told by a class of each library's own
        raise InputError(f"{folder}: cannot be written: {one_line(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def main(argv: list[str] | None = None) -> None:
    """Convert, and say where to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".ckpt or .safetensors")
    parser.add_argument("folder", type=Path, help="where to write the UNet; must not exist")
    parser.add_argument("--base", required=True, help="the Stable Diffusion model that it was trained from")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        log.info("written: model.unet=%s", convert(given.checkpoint, given.folder, given.base))
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
