"""A folder of Stable Diffusion's structure with random weights: to measure and test at full size without a download.

    python -m experiments.random_sd FOLDER --size small

The pictures that such a model makes are noise; its memory, its speed, and every path of the code are the real ones.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, T2IAdapter, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = 49408
"""Tokens of CLIP's vocabulary: 256 bytes, each also as the end of a word, merges, start and end of text."""
MERGES = WORDS - 2 * 256 - 2

CLASSES = {
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
"""Library and class of each part, as the index of the folder names them."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; the defaults are those of SD 1.x: 860 M parameters in the UNet, pixels by 8."""

    unet: tuple[int, ...] = (320, 640, 1280, 1280)
    vae: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    heads: int = 8
    width: int = 768
    text_layers: int = 12
    text_heads: int = 12


SIZES = {"full": Shape(), "small": Shape((32, 64, 64, 64), (32, 32, 32, 32), 1, 2, 64, 2, 4)}


def build(
    folder: Path, shape: Shape, *, prediction: str = "epsilon", vocabulary: Path | None = None, seed: int = 0
) -> None:
    """Write the model and its sketch adapter, float16, a part at a time, so that at most one is in memory.

    `vocabulary`: a folder with OpenAI's bpe_simple_vocab_16e6.txt.gz, else merges of no meaning, as many as CLIP has.
    """
    torch.manual_seed(seed)
    write_tokenizer(folder / "tokenizer", vocabulary)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    scheduler.save_pretrained(folder / "scheduler")
    for name, make in parts(shape).items():
        make().half().save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionPipeline", **CLASSES}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def parts(shape: Shape) -> dict[str, Callable[[], Any]]:
    """How each part with weights is made, by its folder."""
    return {
        "unet": lambda: UNet2DConditionModel(
            sample_size=64,
            block_out_channels=shape.unet,
            layers_per_block=shape.layers,
            attention_head_dim=shape.heads,  # diffusers' name for their number
            cross_attention_dim=shape.width,
        ),
        "vae": lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=shape.vae,
            layers_per_block=shape.layers,
            latent_channels=4,
            sample_size=512,
        ),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=WORDS,
                hidden_size=shape.width,
                intermediate_size=4 * shape.width,
                projection_dim=shape.width,
                num_hidden_layers=shape.text_layers,
                num_attention_heads=shape.text_heads,
                bos_token_id=WORDS - 2,
                eos_token_id=WORDS - 1,
                pad_token_id=WORDS - 1,
            )
        ),
        "t2iadapter_sketch": lambda: T2IAdapter(
            in_channels=1, channels=list(shape.unet), num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter"
        ),
    }


def write_tokenizer(folder: Path, vocabulary: Path | None = None) -> None:
    """Write a CLIP tokenizer: OpenAI's, or one whose merges are the first pairs of bytes."""
    letters = sorted(ByteLevel.alphabet())
    if vocabulary is None:
        merges = list(islice(product(letters, letters), MERGES))
    else:
        with gzip.open(vocabulary / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as lines:
            merges = [tuple(line.split()) for line in islice(lines, 1, MERGES + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *map(" ".join, merges)])
    (folder / "merges.txt").write_text(text + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--prediction", choices=["epsilon", "v_prediction"], default="epsilon")
    parser.add_argument("--vocabulary", type=Path, help="folder with bpe_simple_vocab_16e6.txt.gz of openai/CLIP")
    args = parser.parse_args()
    build(args.folder, SIZES[args.size], prediction=args.prediction, vocabulary=args.vocabulary)
