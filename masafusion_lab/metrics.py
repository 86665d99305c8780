"""How near an edited picture is to what was asked: the metrics of MagicBrush and PIE-Bench, and area-correct ones.

Where a published form depends on how much of the picture is kept, one that does not stands beside it: with a part k of
the pixels kept, mse = k mse_area, so psnr = psnr_area - 10 log10 k, and ssim = k ssim_area + (1 - k) of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from masafusion_lab import InputError

EMPTY = "the mask is empty"
IDENTICAL = 100.0
"""dB of two pictures that are equal, or so nearly that 8 bits cannot tell; infinity has no mean."""


class Encoders(Protocol):
    """Networks that look at a picture (3, H, W) in [0, 1] or read a text; InputError where one cannot be had."""

    def clip(self, picture: Tensor) -> Tensor:
        """CLIP's embedding (d,) of a picture."""

    def text(self, words: str) -> Tensor:
        """CLIP's embedding (d,) of a text."""

    def dino(self, picture: Tensor) -> Tensor:
        """DINO's class token (d,)."""

    def keys(self, picture: Tensor) -> Tensor:
        """The keys (tokens, d) of DINO's last layer, its heads side by side; levels are taken as they are given."""

    def lpips(self, a: Tensor, b: Tensor) -> Tensor:
        """The learned perceptual distance of two pictures, a scalar."""

    def done(self, picture: Tensor, drawn: Any) -> Tensor:
        """Whether the judge finds an edit of the picture-book world done, 0 or 1."""


@dataclass(frozen=True)
class Pair:
    """An edited picture beside what it is compared with; pictures (3, H, W) in [0, 1].

    `edited` is as it was made, `at_source` and `at_truth` the same at the size of `source` and of `truth`, what a
    perfect edit gives; `mask` (1, H, W) of the source's size is 1 where it was to be edited. `target` and `local` are
    texts: the whole result, and what the edit brings in. `drawn`: the picture-book world's own description.
    """

    edited: Tensor
    source: Tensor
    at_source: Tensor
    target: str = ""
    local: str = ""
    truth: Tensor | None = None
    at_truth: Tensor | None = None
    mask: Tensor | None = None
    drawn: Any = None


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean |a - b|."""
    return (a - b).abs().mean()


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean (a - b)^2, which MagicBrush calls L2."""
    return (a - b).square().mean()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of two vectors, in double precision as MagicBrush's."""
    a, b = a.double().flatten(), b.double().flatten()
    return a @ b / (a.norm() * b.norm())


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error of pictures in [0, 1]; at most IDENTICAL."""
    return (-10 * mse.double().log10()).clamp(max=IDENTICAL)


def mse_kept(a: Tensor, b: Tensor, mask: Tensor, *, area: bool) -> Tensor:
    """Mean squared error of what is kept (mask 0): over the kept pixels, or, as PIE-Bench, over all, the rest black."""
    keep = _some(1 - mask, "the mask leaves nothing outside").expand_as(a)
    total = ((a - b) * keep).double().square().sum()
    return total / (keep.sum() if area else keep.numel())


def ssim_kept(a: Tensor, b: Tensor, mask: Tensor, *, area: bool) -> Tensor:
    """Mean SSIM of two pictures whose edited pixels are black: over the kept pixels, or, as PIE-Bench, over all."""
    keep = _some(1 - mask, "the mask leaves nothing outside")
    if min(a.shape[-2:]) < 6:
        raise InputError("the picture is smaller than half of SSIM's window of 11 pixels")
    _, full = structural_similarity_index_measure(
        (a * keep)[None], (b * keep)[None], data_range=1.0, return_full_image=True
    )
    where = keep if area else torch.ones_like(keep)
    return (full[0].mean(0) * where[0]).sum() / where.sum()


def self_similarity(keys: Tensor) -> Tensor:
    """The cosines (tokens, tokens) of all pairs of tokens."""
    size = keys.norm(dim=1, keepdim=True)
    return keys @ keys.T / (size @ size.T).clamp(min=1e-8)


def structure(a: Tensor, b: Tensor) -> Tensor:
    """Structure distance (Tumanyan et al. 2022) of keys (tokens, d): the MSE of their self-similarities."""
    return l2(self_similarity(a), self_similarity(b))


def cut_out(picture: Tensor, mask: Tensor) -> Tensor:
    """The smallest rectangle of a picture that holds the mask, but for the border that PIE-Bench adds to every mask."""
    inner = F.pad(mask[:, 1:-1, 1:-1], (1, 1, 1, 1))
    held = inner if inner.any() else _some(mask, EMPTY)
    rows, columns = (held[0].amax(dim).nonzero().flatten() for dim in (1, 0))
    return picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def budget(
    source: Tensor, roundtrip: Tensor, reconstruction: Tensor, edited: Tensor, mask: Tensor, seam: int
) -> dict[str, float]:
    """The squared error of what is kept, per kept pixel and channel, by where it comes from; pictures (3, H, W).

    autoencoder: source to round trip; inversion: from there to the reconstruction; seam and fusion: from there to the
    result, within `seam` pixels of the mask and beyond. `total` is source to result, `together` what it has beyond the
    sum of the four, since errors may add up or cancel.
    """
    keep = _some(1 - mask, "the mask leaves nothing outside")
    near = keep * F.max_pool2d(mask[None], 2 * seam + 1, 1, seam)[0]
    count = 3 * keep.double().sum()

    def of(a: Tensor, b: Tensor, where: Tensor) -> float:
        return float(((a - b).double().square() * where).sum() / count)

    parts = {
        "autoencoder": of(source, roundtrip, keep),
        "inversion": of(roundtrip, reconstruction, keep),
        "fusion": of(reconstruction, edited, keep - near),
        "seam": of(reconstruction, edited, near),
    }
    total = of(source, edited, keep)
    return {**parts, "together": total - sum(parts.values()), "total": total}


def _some(region: Tensor, why_not: str) -> Tensor:
    if not region.any():
        raise InputError(why_not)
    return region


def _truth(pair: Pair) -> tuple[Tensor, Tensor]:
    if pair.truth is None or pair.at_truth is None:
        raise InputError("no target picture is known")
    return pair.at_truth, pair.truth


def _mask(pair: Pair) -> Tensor:
    if pair.mask is None:
        raise InputError("no region is given")
    return pair.mask


Of: TypeAlias = Callable[[Pair, Encoders], Tensor]


def _kept(of: Callable[..., Tensor], *, area: bool, then: Callable[[Tensor], Tensor] = lambda value: value) -> Of:
    return lambda pair, see: then(of(pair.at_source, pair.source, _mask(pair), area=area))


def _lpips(pair: Pair, see: Encoders) -> Tensor:
    keep = _some(1 - _mask(pair), "the mask leaves nothing outside")
    return see.lpips(pair.at_source * keep, pair.source * keep)


def _structure(levels: float) -> Of:
    return lambda pair, see: structure(see.keys(levels * pair.at_source), see.keys(levels * pair.source))


def _to_truth(encode: str) -> Of:
    def of(pair: Pair, see: Encoders) -> Tensor:
        look, truth = getattr(see, encode), _truth(pair)[1]
        return cosine(look(pair.edited), look(truth))

    return of


def _to_text(text: str) -> Of:
    return lambda pair, see: cosine(see.clip(pair.edited), see.text(getattr(pair, text)))


def _clip_score(shown: Callable[[Pair], Tensor]) -> Of:
    """100 times the cosine to the target prompt, at least 0: torchmetrics' CLIPScore, which PIE-Bench takes."""
    return lambda pair, see: (100 * cosine(see.clip(shown(pair)), see.text(pair.target))).clamp(min=0)


def _changed(pair: Pair, see: Encoders) -> Tensor:
    return (pair.at_source - pair.source).abs()[:, _some(_mask(pair), EMPTY)[0] > 0].mean()


def _hit(pair: Pair, see: Encoders) -> Tensor:
    at_truth, truth = _truth(pair)
    inside = F.interpolate(_some(_mask(pair), EMPTY)[None], truth.shape[-2:])[0]
    return psnr(mse_kept(at_truth, truth, 1 - inside, area=True))


@dataclass(frozen=True)
class Measure:
    """A column of a table: what it is of one pair (InputError saying why where it has no value), and how it is shown.

    Shown is `times` the value under `title`, with so many `digits`.
    """

    title: str
    higher_is_better: bool
    of: Of
    digits: int = 4
    times: float = 1


MEASURES: dict[str, Measure] = {
    # MagicBrush (Zhang et al. 2023, evaluation/image_eval.py), against the target picture at its own size
    "l1": Measure("L1", False, lambda pair, see: l1(*_truth(pair))),
    "l2": Measure("L2", False, lambda pair, see: l2(*_truth(pair))),
    "clip_i": Measure("CLIP-I", True, _to_truth("clip")),
    "dino": Measure("DINO", True, _to_truth("dino")),
    "clip_t": Measure("CLIP-T", True, _to_text("local")),
    "clip_t_global": Measure("CLIP-T global", True, _to_text("target")),
    # PIE-Bench (Ju et al. 2024, evaluation/matrics_calculator.py), against the source; "kept" is outside the region
    "structure": Measure("structure x1e3", False, _structure(255), 2, 1e3),  # levels that the network was not made for
    "psnr": Measure("PSNR kept", True, _kept(mse_kept, area=False, then=psnr), 2),
    "lpips": Measure("LPIPS kept x1e3", False, _lpips, 2, 1e3),
    "mse": Measure("MSE kept x1e4", False, _kept(mse_kept, area=False), 2, 1e4),
    "ssim": Measure("SSIM kept x1e2", True, _kept(ssim_kept, area=False), 2, 1e2),
    "clip_whole": Measure("CLIP whole", True, _clip_score(lambda pair: pair.edited), 2),
    "clip_edited": Measure("CLIP edited", True, _clip_score(lambda p: p.at_source * _some(_mask(p), EMPTY)), 2),
    # the same, with levels of 0 to 1, and independent of how large the region is
    "structure_unit": Measure("structure, levels 0-1, x1e3", False, _structure(1), 2, 1e3),
    "psnr_area": Measure("PSNR kept, by area", True, _kept(mse_kept, area=True, then=psnr), 2),
    "mse_area": Measure("MSE kept, by area, x1e4", False, _kept(mse_kept, area=True), 2, 1e4),
    "ssim_area": Measure("SSIM kept, by area, x1e2", True, _kept(ssim_kept, area=True), 2, 1e2),
    "clip_cut": Measure("CLIP edited, cut out", True, _clip_score(lambda p: cut_out(p.at_source, _mask(p))), 2),
    # what a sweep trades off: is the edit made, and in the region alone
    "psnr_whole": Measure("PSNR to the source", True, lambda p, see: psnr(l2(p.at_source, p.source)), 2),
    "changed": Measure("L1 edited, to the source", True, _changed),
    "hit": Measure("PSNR edited, to the target", True, _hit, 2),
    # the picture-book world's judge
    "done": Measure("edit done", True, lambda pair, see: see.done(pair.edited, pair.drawn), 2),
}
"""Name to measure."""


def measure(name: str, pair: Pair, see: Encoders) -> tuple[float, str]:
    """A measure of a pair, and why it has none: NaN where it has no value or that is not finite."""
    try:
        value = float(MEASURES[name].of(pair, see))
    except InputError as error:
        return float("nan"), str(error)
    return (value, "") if value - value == 0 else (float("nan"), f"is {value}")


class Mean(Metric):
    """The mean of a measure over pairs, in torchmetrics' form; pairs without a value are left out and counted."""

    full_state_update = False
    total: Tensor
    count: Tensor
    missing: Tensor

    def __init__(self, name: str, see: Encoders) -> None:
        super().__init__()
        self.name, self.see = name, see
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for state in ("count", "missing"):
            self.add_state(state, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a larger mean is a better one."""
        return MEASURES[self.name].higher_is_better

    def update(self, pair: Pair) -> None:
        """Count a pair in."""
        value, why_not = measure(self.name, pair, self.see)
        self.missing += bool(why_not)
        if not why_not:
            self.total += value
            self.count += 1

    def compute(self) -> Tensor:
        """The mean; NaN of nothing."""
        return self.total / self.count
