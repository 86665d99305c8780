"""The text encoder that the UNet reads: CLIP's text tower, then taught to keep what belongs to which thing.

Contrast with pictures asks for a bag of words: two things may swap their colours. So a reader asks each kind's colour,
pattern, pose and side back from the tokens, by one attention head, as a pixel of the UNet would.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from experiments.picturebook import clip
from experiments.picturebook.data import Album
from experiments.picturebook.training import Part, Settings, as_told, fit, frozen, last, weights
from masafusion_lab.picturebook import ALL_POSES, BACKGROUNDS, COLOURS, KINDS, PATTERNS, Scene, labels
from masafusion_lab.picturebook.captions import WORDINGS, told_sides

SIDES = ("left", "middle", "right")
LOOKS = {"colour": len(COLOURS), "pattern": len(PATTERNS), "pose": len(ALL_POSES), "side": len(SIDES)}
"""What is asked of each kind that a caption names, and how many answers there are."""
UNTOLD = -1
"""The answer that a caption does not give."""


@dataclass
class Text(Settings):
    """Steps of captions alone; afterwards the encoder learns on beside the UNet."""

    steps: int = 600
    batch: int = 256
    lr: float = 5e-4
    epoch: int = 100


class Reader(nn.Module):
    """Answers read from tokens (B, n, width): the background, and for every kind whether it is there, and its LOOKS."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.asked = nn.Parameter(torch.randn(len(KINDS) + 1, width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.background, self.there = nn.Linear(width, len(BACKGROUNDS)), nn.Linear(width, 1)
        self.looks = nn.ModuleDict({name: nn.Linear(width, n) for name, n in LOOKS.items()})

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits: (B, backgrounds), (B, kinds), {look: (B, kinds, answers)}."""
        weight = (self.asked @ self.key(tokens).mT / tokens.shape[-1] ** 0.5).softmax(-1)  # (B, kinds + 1, n)
        read = weight @ self.value(tokens)
        things = read[:, :-1]
        return self.background(read[:, -1]), self.there(things)[..., 0], {k: f(things) for k, f in self.looks.items()}

    def loss(self, tokens: Tensor, background: Tensor, answers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the cross-entropies, and the part of the answers that are right.

        background (B,); answers (B, kinds, 1 + looks): whether the kind is there, then each of LOOKS or UNTOLD.
        """
        place, there, looks = self(tokens)
        here = answers[..., 0] > 0
        loss = F.cross_entropy(place, background) + F.binary_cross_entropy_with_logits(there, here.float())
        right = {}
        for k, (name, logits) in enumerate(looks.items(), 1):
            asked = here & (answers[..., k] != UNTOLD)
            if asked.any():
                loss = loss + F.cross_entropy(logits[asked], answers[..., k][asked])
                right[name] = (logits[asked].argmax(-1) == answers[..., k][asked]).float().mean()
        return loss, right


def answers(scene: Scene, wording: int) -> np.ndarray:
    """What a caption tells of each kind: (kinds, 1 + looks), int8."""
    out = np.full((len(KINDS), 1 + len(LOOKS)), UNTOLD, np.int8)
    out[:, 0] = 0
    sides = told_sides(scene, wording) or [None] * len(scene.things)
    for (kind, *looks), side in zip(labels(scene).things, sides, strict=True):
        out[kind] = [1, *looks, UNTOLD if side is None else SIDES.index(side)]
    return out


def told(album: Album) -> tuple[np.ndarray, np.ndarray]:
    """The backgrounds (count,) and the answers (count, wordings, kinds, 1 + looks) of an album, kept beside it."""
    path = album.folder / f"{album.split}-{album.count}-told.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scenes = [album.scene(k) for k in range(album.count)]
        every = np.stack([[answers(scene, wording) for wording in range(WORDINGS)] for scene in scenes])
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, background=np.array([labels(scene).background for scene in scenes]), answers=every)
        part.replace(path)
    with np.load(path) as kept:
        return kept["background"].astype(np.int64), kept["answers"]


class Captions:
    """The captions of an album as token ids, with what they tell."""

    def __init__(self, s: Settings) -> None:
        self.ids = clip.tokens(clip.words(s), s.album())
        self.background, self.answers = told(s.album())

    def __call__(self, which: np.ndarray, wording: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, n), backgrounds (B,) and answers (B, kinds, 1 + looks)."""
        answers = self.answers[which, wording].astype(np.int64)
        return tuple(map(torch.from_numpy, (self.ids[which, wording], self.background[which], answers)))  # type: ignore[return-value]


def start(s: Settings) -> CLIPTextModel:
    """The encoder before it is taught: CLIP's tower."""
    towers = clip.trained(s)
    text = CLIPTextModel(towers.config.text_config)
    text.load_state_dict(towers.text_model.state_dict())
    return text


class Training(Part):
    """The reader's loss over captions alone."""

    def __init__(self, s: Text) -> None:
        super().__init__(s)
        self.captions, self.text = Captions(s), start(s)
        self.reader = Reader(self.text.config.hidden_size)

    def batch(self, g: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Captions of pictures, each in one wording."""
        n = self.s.batch
        return self.captions(g.integers(len(self.captions.ids), size=n), g.integers(WORDINGS, size=n))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], k: int) -> Tensor:
        """The loss."""
        ids, background, answers = batch
        loss, right = self.reader.loss(self.text(ids).last_hidden_state, background, answers)
        self.log_dict({"loss": loss.detach(), **right}, on_step=False, on_epoch=True, batch_size=len(ids))
        return loss


def latest(s: Settings) -> str:
    """The part whose checkpoint has the encoder last: learnt beside a UNet, or alone."""
    return next((name for name in ("unet", "unet_coarse", "text") if last(s, name).exists()), "text")


def trained(s: Settings) -> CLIPTextModel:
    """The encoder as the UNet has it, or as it ships."""
    return frozen(start(s), weights(s, latest(s), "text"))


def reader(s: Settings) -> Reader:
    """The reader that was taught with it, or a new one."""
    made = Reader(start(s).config.hidden_size)
    if last(s, latest(s)).exists():
        made.load_state_dict(weights(s, latest(s), "reader"))
    return made


def main(words: list[str] | None = None) -> None:
    """Train it."""
    with as_told(Text, words) as s:
        fit(Training, s, "text")


if __name__ == "__main__":
    main()
