"""The judge: a small network, independent of CLIP, that says what a picture of the picture-book world shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from masafusion_lab import InputError
from masafusion_lab.picturebook import MODEL, labels
from masafusion_lab.picturebook.edits import Example
from masafusion_lab.picturebook.scene import ALL_POSES, BACKGROUNDS, COLOURS, KINDS, PATTERNS, POSES, Scene, Thing

SIZE = 128
LOOKS = ("colour", "pattern", "pose")  # of a thing
NEAR = 0.08  # as a part of the picture's side: how far a centre may be from where it should be
POSSIBLE = [[pose in POSES.get(kind, ("",)) for pose in ALL_POSES] for kind in KINDS]
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Verdict:
    """What B pictures show, as probabilities; attributes are those of each of the 12 KINDS, if it is there.

    background (B, 6); presence (B, 12); colour (B, 12, 8); pattern (B, 12, 4); pose (B, 12, 8) over ALL_POSES, 0 where
    the kind cannot have it; place (B, 12, 2): x and y of the centre, as parts of the picture's sides.
    """

    background: Tensor
    presence: Tensor
    colour: Tensor
    pattern: Tensor
    pose: Tensor
    place: Tensor

    @property
    def shown(self) -> Tensor:
        """Which kinds are there: bool (B, 12)."""
        return self.presence > 0.5

    def __getitem__(self, which: slice) -> Verdict:
        """The verdict on some of the pictures."""
        return Verdict(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


class Block(nn.Module):
    """x + two 3x3 convolutions of it, each after a GroupNorm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(_layer(channels, channels) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x + self.body(x)


def _layer(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.GroupNorm(8, inside), nn.ReLU(inplace=True), nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
    )


class Judge(nn.Module):
    """A residual network down to a 16x16 grid, on which every kind has a map; attributes are read where it peaks.

    A map's softmax pools the features for its kind, and heads shared by all kinds read them, so that a colour belongs
    to a kind. Things are told apart by kind: of two of one kind in a picture it sees the clearer one.
    """

    possible: Tensor

    def __init__(self, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.config = {"width": width, "blocks": blocks}
        self.body = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, 2, 1, bias=False), _layer(width // 4, width // 2, 2), Block(width // 2),
            _layer(width // 2, width, 2), *(Block(width) for _ in range(blocks)), nn.GroupNorm(8, width), nn.ReLU(),
        )  # fmt: skip
        self.map = nn.Conv2d(width, len(KINDS), 1)
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.colour = nn.Linear(width, len(COLOURS))
        self.pattern = nn.Linear(width, len(PATTERNS))
        self.pose = nn.Linear(width, len(ALL_POSES))
        nn.init.constant_(self.map.bias, -4)  # type: ignore[arg-type]  # a kind is absent until it is seen
        self.register_buffer("possible", torch.tensor(POSSIBLE), persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Judge:
        """The trained judge of a folder, or the one that is shipped; raises InputError where it is not whole."""
        return restore(cls, Path(folder or MODEL / "judge"))

    def look(self, pixels: Tensor) -> tuple[Verdict, Tensor]:
        """Logits instead of probabilities (the place as it is), and the maps (B, 12, 16, 16), of pixels in [0, 1]."""
        x = self.body(2 * pixels.contiguous(memory_format=torch.channels_last) - 1)
        maps = self.map(x).float()
        weight = maps.flatten(2).softmax(-1)  # (B, 12, 256)
        kinds = weight.to(x.dtype) @ x.flatten(2).mT  # (B, 12, width)
        cells = [(torch.arange(n, device=x.device) + 0.5) / n for n in maps.shape[-2:]]
        place = weight @ torch.cartesian_prod(*cells).flip(1)  # (B, 12, 2)
        verdict = Verdict(
            self.background(x.mean((2, 3))).float(), maps.amax((2, 3)), self.colour(kinds).float(),
            self.pattern(kinds).float(), self.pose(kinds).float().masked_fill(~self.possible, -1e4), place,
        )  # fmt: skip
        return verdict, maps

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Verdict:
        """The verdict on pictures (B, 3, H, W) in [0, 1]; other sizes than 128x128 are resized."""
        seen, _ = self.look(fit_size(pictures))
        return Verdict(seen.background.softmax(-1), seen.presence.sigmoid(), seen.colour.softmax(-1),
                       seen.pattern.softmax(-1), seen.pose.softmax(-1), seen.place)  # fmt: skip


def fit_size(pictures: Tensor) -> Tensor:
    """Pictures (B, C, H, W) at the 128x128 pixels that the networks of this world were trained on."""
    if pictures.shape[-2:] == (SIZE, SIZE):
        return pictures
    return F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def restore(network: type[N], folder: Path) -> N:
    """A network in use, from the config.json and model.safetensors of a folder; raises InputError of one line."""
    try:
        made = network(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        made.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        part = network.__name__.lower()
        raise InputError(f"{error.filename or folder}: missing; give a folder with a trained {part}, or train one: "
                         f"python -m experiments.picturebook.{part}") from None  # fmt: skip
    except Exception as error:  # truncated, garbage, or of another network
        words = " ".join(str(error).split())[:120]
        raise InputError(f"{folder}: damaged or of another network, copy it again: {words}") from None
    return made.requires_grad_(False).eval()


def keep(network: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors, as `restore` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network.config, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")


def centre(t: Thing) -> tuple[float, float]:
    """The middle of a thing's box."""
    left, top, right, bottom = t.box
    return (left + right) / 2, (top + bottom) / 2


def answers(scene: Scene) -> tuple[int, np.ndarray]:
    """What a judge should say: the background, and by kind (12, 6) whether it is there, colour, pattern, pose, x, y.

    Raises InputError for a scene with two things of one kind, which a judge cannot tell apart; none is ever sampled.
    """
    kinds = [t.kind for t in scene.things]
    if twice := {kind for kind in kinds if kinds.count(kind) > 1}:
        raise InputError(f"things: more than one {twice.pop()} in the scene; the judge tells things apart by kind")
    told, table = labels(scene), np.zeros((len(KINDS), 6), np.float32)
    for (kind, *looks), t in zip(told.things, scene.things, strict=True):
        table[kind] = (1, *looks, *centre(t))
    return told.background, table


def follows(verdict: Verdict, scene: Scene) -> dict[str, Tensor]:
    """Whether each of B pictures shows the scene, bool (B,) by attribute; of all its things, where they are several.

    kind: they are there; alone: nothing else is; colour, pattern, pose: of those kinds; place: near where it should be.
    """
    background, table = answers(scene)
    asked = torch.from_numpy(table).to(verdict.place.device)
    here = asked[:, 0] > 0
    right = {
        name: (getattr(verdict, name)[:, here].argmax(-1) == asked[here, k]).all(-1) for k, name in enumerate(LOOKS, 1)
    }
    away = (verdict.place[:, here] - asked[here, 4:]).norm(dim=-1)
    return {
        "background": verdict.background.argmax(-1) == background,
        "kind": verdict.shown[:, here].all(-1),
        "alone": ~verdict.shown[:, ~here].any(-1),
        **right,
        "place": (away < NEAR).all(-1),
    }


def done(verdict: Verdict, example: Example) -> Tensor:
    """Whether the example's edit is seen in each of B pictures: bool (B,).

    What was added or put instead is there in its colour, what was removed or replaced is gone; colour, pattern, pose
    or background is the new one; what was moved is nearer to its new place than to its old one.
    """
    before, after, shown = example.before, example.after, verdict.shown
    if example.attribute == "background":
        return verdict.background.argmax(-1) == BACKGROUNDS.index(example.target.background)
    seen = torch.ones_like(shown[:, 0])
    if before and (after is None or before.kind != after.kind):
        seen = ~shown[:, KINDS.index(before.kind)]
    if after is None:
        return seen
    k = KINDS.index(after.kind)
    seen = seen & shown[:, k]
    if example.attribute == "place" and before:
        new, old = (
            (verdict.place[:, k] - shown.new_tensor(centre(t), dtype=torch.float32)).norm(dim=-1)
            for t in (after, before)
        )
        return seen & (new < old)
    attribute, names = {"pattern": ("pattern", PATTERNS), "pose": ("pose", ALL_POSES)}.get(
        example.attribute, ("colour", COLOURS)
    )
    return seen & (getattr(verdict, attribute)[:, k].argmax(-1) == names.index(getattr(after, attribute)))
