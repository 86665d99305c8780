"""CLIP: text and image towers trained against each other; the text tower then conditions the UNet, frozen, as in SD."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from experiments.picturebook import tokenizer
from experiments.picturebook.data import SIZE, Album, pixels
from experiments.picturebook.training import Part, Settings, as_told, fit, frozen, settings, weights


@dataclass
class Clip(Settings):
    """width and layers of each tower; patch: the image tower's, in pixels."""

    steps: int = 450
    batch: int = 128
    lr: float = 1e-3
    text_width: int = 128
    text_layers: int = 4
    width: int = 192
    layers: int = 4
    patch: int = 16


def words(s: Settings) -> CLIPTokenizer:
    """The tokenizer, written beside the checkpoints."""
    return tokenizer.save(Path(s.root) / "tokenizer")


def build(s: Clip, words: CLIPTokenizer) -> CLIPModel:
    """The untrained towers."""
    text = {"vocab_size": len(words), "hidden_size": s.text_width, "intermediate_size": 4 * s.text_width,
            "num_hidden_layers": s.text_layers, "num_attention_heads": 4, "projection_dim": 128,
            "max_position_embeddings": tokenizer.LENGTH, "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}  # fmt: skip
    vision = {"hidden_size": s.width, "intermediate_size": 4 * s.width, "num_hidden_layers": s.layers,
              "num_attention_heads": 6, "image_size": SIZE, "patch_size": s.patch, "projection_dim": 128}  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def tokens(words: CLIPTokenizer, album: Album) -> np.ndarray:
    """Token ids (count, WORDINGS, LENGTH) of every caption of an album."""
    flat = [text for wordings in album.captions for text in wordings]
    ids = words(flat, padding="max_length", max_length=tokenizer.LENGTH, return_tensors="np").input_ids
    return ids.reshape(len(album.captions), -1, tokenizer.LENGTH).astype(np.int64)


class Training(Part):
    """The symmetric contrastive loss over a batch."""

    def __init__(self, s: Clip) -> None:
        super().__init__(s)
        tokens_of = words(s)
        self.ids, self.clip = tokens(tokens_of, s.album()), build(s, tokens_of)

    def batch(self, g: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, SIZE, SIZE) in [-1, 1], as the image tower takes them, and one wording's ids (B, LENGTH)."""
        which = np.sort(g.choice(len(self.ids), self.s.batch, replace=False))
        ids = self.ids[which, g.integers(self.ids.shape[1], size=self.s.batch)]
        return 2 * pixels(self.s.album().pictures[which]) - 1, torch.from_numpy(ids)

    def training_step(self, batch: tuple[Tensor, Tensor], k: int) -> Any:
        """The loss; `found`: how often a picture's own caption is the nearest of the batch."""
        out = self.clip(pixel_values=batch[0], input_ids=batch[1], return_loss=True)
        found = (out.logits_per_image.argmax(1) == torch.arange(len(batch[0]), device=self.device)).float().mean()
        self.log_dict({"loss": out.loss.detach(), "found": found}, on_step=False, on_epoch=True)
        return out.loss


def trained(s: Settings) -> CLIPModel:
    """The trained towers."""
    c = settings(Clip, [f"root={s.root}"])
    return frozen(build(c, words(s)), weights(s, "clip", "clip"))


def main(words: list[str] | None = None) -> None:
    """Train it."""
    with as_told(Clip, words) as s:
        fit(Training, s, "clip")


if __name__ == "__main__":
    main()
