"""Write what is trained as the diffusers folder that ships: `python -m experiments.picturebook.export [out=...]`."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from experiments.picturebook import adapter, autoencoder, clip, grown, instruct, text, unet
from experiments.picturebook.training import Settings, as_told, last, settings
from masafusion_lab import InputError
from masafusion_lab.hub import SUMS, fingerprint
from masafusion_lab.network import TAUGHT
from masafusion_lab.runs import write_text

log = logging.getLogger(__name__)
LIMIT = 90 * 10**6


@dataclass
class Export(Settings):
    """out: the folder, replaced part by part."""

    out: str = "masafusion_lab/picturebook/model"


def export(s: Export) -> Path:
    """Write pipeline, CLIP and adapters, float16 safetensors; returns the folder."""
    out, towers = Path(s.out), clip.trained(s)
    StableDiffusionPipeline(
        vae=autoencoder.trained(s), text_encoder=text.trained(s), tokenizer=clip.words(s), unet=unet.trained(s),
        scheduler=DDIMScheduler(**unet.SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(out)  # fmt: skip
    towers.half().save_pretrained(out / "clip")
    clip.words(s).save_pretrained(out / "clip")
    levels = settings(unet.Unet, [f"root={s.root}"]).channels
    for kind in adapter.CHANNELS:
        adapter.trained(s, kind, levels).half().save_pretrained(out / f"t2iadapter_{kind}")
    for kind, more in (("instruct", {}), ("hive", {TAUGHT: instruct.suffix()}), ("inpaint", {})):
        if last(s, f"unet_{kind}").exists():
            grown.export(s, kind, out, **more)
    for name in ("judge", "dino"):
        if (made := Path(s.root) / name / "model").is_dir():
            shutil.copytree(made, out / name, dirs_exist_ok=True)
    files = sorted(out.rglob("*.safetensors"))
    write_text(out / SUMS, "".join(f"{fingerprint([file])}  {file.relative_to(out).as_posix()}\n" for file in files))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    log.info("%s: %.1f MB", out, size / 1e6)
    if size > LIMIT:
        raise InputError(f"{out}: {size / 1e6:.1f} MB, the limit is {LIMIT / 1e6:.0f}")
    return out


def main(words: list[str] | None = None) -> None:
    """Write it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with as_told(Export, words) as s:
        export(s)


if __name__ == "__main__":
    main()
