"""Maps of attention: over a picture, of a prompt's words (DAAM), of what pixels attend to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masafusion_lab import InputError

SPECIALS = ("⟨start⟩", "⟨end⟩", "⟨padding⟩")
"""What a text encoder reads beside the words, and how their maps are called; "end" can be a word of the prompt."""


@dataclass(frozen=True)
class Heat:
    """A map (h, w), not negative: of a word over a picture, or of what a pixel attends to."""

    name: str
    values: Tensor

    def expand(self, height: int, width: int) -> Tensor:
        """The map at another size, bicubic, from 0 at its lowest to 1 at its highest."""
        big = F.interpolate(self.values[None, None].float(), (height, width), mode="bicubic")[0, 0]
        return (big - big.min()) / (big.max() - big.min()).clamp(min=1e-12)

    def overlay(self, picture: Image.Image, *, strength: float = 0.7) -> Image.Image:
        """The map in colours over the grey picture."""
        from matplotlib import colormaps

        colours = colormaps["inferno"](self.expand(picture.height, picture.width).numpy())[..., :3]
        grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
        return Image.fromarray((255 * (strength * colours + (1 - strength) * grey) + 0.5).astype(np.uint8))

    def mask(self, height: int, width: int) -> Tensor:
        """Where the map, at that size, is above Otsu's threshold: the cut that parts its values into two best."""
        from skimage.filters import threshold_otsu

        big = self.expand(height, width).numpy()
        return torch.from_numpy(big > threshold_otsu(big))


@dataclass(frozen=True)
class WordMaps:
    """The word maps of one branch in some steps, layers and heads: DAAM's, and those of the specials.

    `raw`: attention summed over the steps, (tokens + 1, h, w) a layer and head, whose last token is all the padding;
    `words`: each word of the prompt with the places of its tokens.
    """

    raw: Sequence[Tensor]
    words: Sequence[tuple[str, Sequence[int]]]
    grid: tuple[int, int]

    @cached_property
    def steps(self) -> float:
        """What all tokens of a pixel sum to: the number of steps in which the branch was there and seen."""
        return float(self.raw[0].float().sum(0).mean())

    @cached_property
    def tokens(self) -> Tensor:
        """The mean map of each token, (tokens + 1, h, w) at latent resolution (Tang et al. 2023, (4))."""
        big = (F.interpolate(maps[None].float(), self.grid, mode="bicubic")[0].clamp(min=0) for maps in self.raw)
        return sum(big, torch.zeros(())) / len(self.raw)

    def word(self, text: str) -> Heat:
        """The map of a word or phrase, the mean over its tokens and all places where it stands, or of one of SPECIALS.

        Raises InputError, naming the words that there are.
        """
        if text in SPECIALS:
            return Heat(text, self.tokens[(0, -2, -1)[SPECIALS.index(text)]])
        return Heat(text, self.tokens[self.places(text)].mean(0))

    def places(self, text: str) -> list[int]:
        """The places of all tokens of a word or phrase, wherever it stands in the prompt. Raises InputError."""
        said, wanted, found = [word.lower() for word, _ in self.words], _spaced(text.lower()), list[int]()
        for a in range(len(said)):
            for b in range(a + 1, len(said) + 1):
                if wanted and _spaced(" ".join(said[a:b])) == wanted:
                    found += [place for _, places in self.words[a:b] for place in places]
        if not found:
            there = ", ".join(dict.fromkeys(word for word, _ in self.words)) or "none"
            raise InputError(f"{text!r} is not in the prompt, whose words are: {there}; or {', '.join(SPECIALS)}")
        return found

    def all(self) -> dict[str, Heat]:
        """The maps of all words, in the prompt's order, and of the specials."""
        start, *others = SPECIALS
        return {word: self.word(word) for word in (start, *(word for word, _ in self.words), *others)}


@dataclass(frozen=True)
class PixelMaps:
    """The self-attention of one branch in some steps and layers: shares of mass, (h', w', h", w") a layer."""

    raw: Sequence[Tensor]

    @cached_property
    def mean(self) -> Tensor:
        """The mean over the layers, (h', w', h", w") on the finest of their grids: density, 1 being the mean."""
        cells, keys = (max(maps.shape[k : k + 2] for maps in self.raw) for k in (0, 2))
        total = torch.zeros(*cells, *keys)
        for maps in self.raw:
            density = maps.float() * maps.shape[2] * maps.shape[3]
            density = _resized(density.permute(2, 3, 0, 1).flatten(0, 1), cells).unflatten(0, maps.shape[2:])
            total += _resized(density.permute(2, 3, 0, 1).flatten(0, 1), keys).unflatten(0, cells) / len(self.raw)
        return total

    def pixel(self, x: float, y: float) -> Heat:
        """What the pixel attends to that lies at these parts, 0 to 1, of the picture's width and height."""
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise InputError(f"pixel ({x}, {y}): give parts of the picture's width and height, 0 to 1")
        mean = self.mean
        h, w = mean.shape[:2]
        return Heat(f"({x:.2f}, {y:.2f})", mean[min(int(y * h), h - 1), min(int(x * w), w - 1)])

    def region(self, mask: Tensor) -> Heat:
        """What the pixels of a region (h, w) attend to on average."""
        mean = self.mean
        share = F.adaptive_avg_pool2d(mask[None, None].float(), (mean.shape[0], mean.shape[1]))[0, 0]
        return Heat("region", (mean * share[..., None, None]).sum((0, 1)) / share.sum())

    def components(self) -> Tensor:
        """The first three principal components of what pixels attend to, as colours (3, h', w') in [0, 1]."""
        return components([self])[0]


def components(many: Sequence[PixelMaps]) -> list[Tensor]:
    """The principal components of maps of one size together, so that a colour means the same in each; see above."""
    means = [maps.mean for maps in many]
    rows = torch.cat([mean.flatten(2).flatten(0, 1) for mean in means])
    rows = rows - rows.mean(0)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    parts = u[:, :3] * s[:3]
    parts = parts * torch.where(parts.gather(0, parts.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    low, high = parts.min(0).values, parts.max(0).values
    colours = F.pad((parts - low) / (high - low).clamp(min=1e-12), (0, 3 - parts.shape[1]))
    return [its.T.unflatten(1, means[0].shape[:2]) for its in colours.chunk(len(means))]


def _spaced(text: str) -> str:
    """A text with a space between two letters alone: tokenizers make words of "t-shirt" and "42", not of "red cat"."""
    return re.sub(r"(?<![^\W\d_]) | (?![^\W\d_])", "", " ".join(text.split()))


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (n, h, w) at another size, bilinear."""
    return F.interpolate(x[None], tuple(size), mode="bilinear")[0] if tuple(x.shape[-2:]) != tuple(size) else x
