"""A Stable-Diffusion-shaped model with random weights, small enough to run a thousand times in a test."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, T2IAdapter, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = """a an the red blue orange cat dog horse running standing sitting on grass in snow with and hat""".split()
CHANNELS = (16, 32, 32)


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a handful of whole words; any other word becomes letters."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = [*letters, *(f"{c}</w>" for c in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.append(parts[0])
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)


def tiny_folder(root: Path, *, prediction: str = "epsilon", sample_size: int = 16, seed: int = 0) -> Path:
    """Write the folder: UNet with attention everywhere, f4 autoencoder, text encoder, sketch and pose adapters."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(root / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=24,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=sample_size * 4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    loud(unet)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root)
    for kind, channels in (("sketch", 1), ("pose", 3)):
        adapter = T2IAdapter(
            in_channels=channels,
            channels=list(CHANNELS),
            num_res_blocks=1,
            downscale_factor=4,
            adapter_type="full_adapter",
        )
        adapter.save_pretrained(root / f"t2iadapter_{kind}")
    return root


def loud(unet: UNet2DConditionModel) -> None:
    """Make words and features matter, of which random weights say almost nothing at their default size."""
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "attn" in name and name.endswith("weight"):
                p.mul_(3)


def tiny_network(root: Path, kind: str, channels: int, *, seed: int = 1) -> Path:
    """Write unet_<kind>/ beside the folder's UNet, alike but for its input channels; returns its folder."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**{**UNet2DConditionModel.load_config(root / "unet"), "in_channels": channels})
    loud(unet)
    unet.save_pretrained(root / f"unet_{kind}")
    return root / f"unet_{kind}"


def tiny_model(root: Path, **changes):
    """The folder's model, loaded through the package's own door."""
    from masafusion_lab.model import StableDiffusion

    return StableDiffusion.load(str(tiny_folder(root, **changes)))
