"""What was seen of a case's attention, and how it is asked for: by word, by pixel, as curves; and maps.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.heat import PixelMaps, WordMaps
from masafusion_lab.runs import replacing

FORMAT = 2
"""Of maps.safetensors: raise it when what is in it changes its meaning."""


@dataclass(frozen=True)
class Attention:
    """All that the taps saw of one case; what maps.safetensors holds.

    `tensors` by name, as taps.py says of each, without the batch:
      words/BRANCH/HALF/DEPTH    (bins, heads or 1, tokens + 1, h, w)    cross-attention, sums over the steps of a bin
      pixels/BRANCH/HALF/DEPTH   (bins, h', w', h", w")                  self-attention, from cells to cells
      flow/BRANCH/HALF/DEPTH     (T, heads, 2)                           shares of self-attention that leave A, enter A
      mixed/BRANCH/HALF/DEPTH    (T, heads, 2)                           shares read inside of what is not new, outside
                                                                         of what is
      spill/BRANCH/HALF/DEPTH    (T, heads, 2)                           mass of the edited words inside A, outside
      distance/A:B/HALF/DEPTH    (T, heads, 2)                           total variation inside A, outside
      mask                       (h, w)                                  A, if there is a region
    `facts`, JSON in the file's metadata: "case"; "steps"; "grid", of the latent; "bins", [first, stop] each; "layers",
    of "self" and "cross" attention by depth: "name", "heads", "level"; "branches", name -> "x", its latent, and the
    prompts that its "text" and "null" halves read; "latents", name -> the branches that denoise it "inside" and
    "outside"; "prompts", name -> "text", "words" with the places of their tokens, "tokens", start and end among them,
    "edited", numbers of the words that the other prompt does not have; "watch", settings; "key", of the edit's result.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def main(self) -> str:
        """The latent that all is about: the target, or of a picture that is only inverted the source."""
        return "target" if "target" in self.facts["latents"] else next(iter(self.facts["latents"]))

    def words(
        self,
        branch: str = "target",
        *,
        half: str = "text",
        steps: tuple[int, int] | None = None,
        layers: Iterable[int] | None = None,
        head: int | None = None,
    ) -> WordMaps:
        """The word maps of a branch, or of the branch that denoises a latent, in some steps [a, b), layers and heads.

        Of layers all but the middle block's, as DAAM. Raises InputError for what was not seen.
        """
        found, bins = self._layers("words", branch, half), self._bins(steps)
        if layers is None:
            sites = self.facts["layers"]["cross"]
            layers = [d for d in found if not sites[d]["name"].startswith("mid")] or list(found)
        raw = []
        for depth in layers:
            maps = _one(found, depth, "cross-attention layer")[bins].sum(0)
            raw += [maps[k] for k in ([head] if head is not None else range(len(maps))) if _has(maps, k, depth)]
        prompt = self.facts["prompts"][self.facts["branches"][self.branch(branch)][half]]
        return WordMaps(raw, [(word, places) for word, places in prompt["words"]], tuple(self.facts["grid"]))

    def pixels(
        self,
        branch: str = "target",
        *,
        half: str = "text",
        steps: tuple[int, int] | None = None,
        layers: Iterable[int] | None = None,
    ) -> PixelMaps:
        """The self-attention of a branch, or of the branch that denoises a latent, in some steps [a, b) and layers.

        Of layers those with the most pixels that were told apart. Raises InputError for what was not seen.
        """
        found, bins = self._layers("pixels", branch, half), self._bins(steps)
        if layers is None:
            finest = max(maps.shape[1] for maps in found.values())
            layers = [depth for depth, maps in found.items() if maps.shape[1] == finest]
        chosen = (_one(found, depth, "self-attention layer")[bins].float().sum(0) for depth in layers)
        return PixelMaps([maps / maps.sum((2, 3), keepdim=True).clamp(min=1e-12) for maps in chosen])

    def curves(self, kind: str, name: str, half: str = "text") -> Tensor:
        """(layers, T, 2): "flow", "mixed" or "spill" of a branch, "distance" of "A:B", the mean over heads.

        NaN where nothing was seen. Raises InputError for what was not recorded.
        """
        found = self._layers(kind, name, half)
        return torch.stack([x.float().nanmean(1) for x in found.values()])

    def depths(self, kind: str, name: str, half: str = "text") -> list[int]:
        """The layers of `curves`."""
        return list(self._layers(kind, name, half))

    def interference(self, latent: str = "target", kind: str = "mixed") -> Tensor:
        """(layers, T, 2): what is read across by the pixels of A, and by the others, each by what denoises it there.

        "mixed": by what is read, the share of what is kept inside A and of what is new outside; "flow": by place, the
        share that leaves A, and that enters. A branch's attention elsewhere is not counted: it makes no picture.
        """
        inside, outside = self._sides(kind, latent)
        return torch.stack([inside[..., 0], torch.where(outside.isnan(), inside, outside)[..., 1]], -1)

    def spilled(self, latent: str = "target") -> Tensor:
        """(layers, T): the share of the edited words' mass that acts outside A, counted as in `interference`.

        It is 0 where another prompt denoises the outside, which does not have these words.
        """
        its, branches = self.facts["latents"][latent], self.facts["branches"]
        inside, outside = self._sides("spill", latent)
        if branches[its["inside"]]["text"] != branches[its["outside"]]["text"]:
            outside = 0 * outside
        inside, outside = inside[..., 0], torch.where(outside.isnan(), inside, outside)[..., 1]
        return outside / (inside + outside)

    def seen(self, kind: str, name: str, half: str = "text") -> bool:
        """Whether anything of a kind was recorded of a branch, or of "A:B": it need not be there in steps looked at."""
        return any(key.startswith(f"{kind}/{name}/{half}/") for key in self.tensors)

    def branch(self, name: str) -> str:
        """A branch by its name, or by that of the latent that it denoises inside the region. Raises InputError."""
        name = self.facts["latents"].get(name, {}).get("inside", name)
        if name not in self.facts["branches"]:
            there = ", ".join([*self.facts["branches"], *self.facts["latents"]])
            raise InputError(f"branch {name!r} was not seen; there are {there}")
        return name

    def save(self, path: Path) -> None:
        """Write maps.safetensors, whole or not at all: word and pixel maps in float16, the facts as its metadata."""
        small = {name: x.half() if name.startswith(("words/", "pixels/")) else x for name, x in self.tensors.items()}
        header = {"format": str(FORMAT), "facts": json.dumps(self.facts, ensure_ascii=True)}
        with replacing(path) as partial:
            partial.write_bytes(save({name: x.contiguous() for name, x in small.items()}, header))

    @classmethod
    def load(cls, path: Path) -> Attention:
        """Read it. Raises InputError for what is no such file."""
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.get("format") != str(FORMAT):
                raise InputError(f"{path}: is of format {header.get('format')}, not {FORMAT}; attend again")
            return cls(json.loads(header["facts"]), tensors)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: holds no attention maps ({' '.join(str(error).split())[:100]})") from None

    def _sides(self, kind: str, latent: str) -> tuple[Tensor, Tensor]:
        """The curves of what denoises a latent inside and outside the region; NaN where nothing else does outside."""
        its = self.facts["latents"][latent]
        inside = self.curves(kind, its["inside"])
        there = self.seen(kind, its["outside"])
        return inside, self.curves(kind, its["outside"]) if there else torch.full_like(inside, torch.nan)

    def _layers(self, kind: str, branch: str, half: str) -> dict[int, Tensor]:
        """The tensors of a kind by depth. Raises InputError if there are none."""
        prefix = f"{kind}/{branch if kind == 'distance' else self.branch(branch)}/{half}/"
        found = {int(name[len(prefix) :]): x for name, x in self.tensors.items() if name.startswith(prefix)}
        if not found:
            raise InputError(f"{kind} of {branch}, {half} half: was not recorded")
        return dict(sorted(found.items()))

    def _bins(self, steps: tuple[int, int] | None) -> slice:
        """The bins that make up the steps [a, b). Raises InputError if they do not."""
        cuts = [first for first, _ in self.facts["bins"]] + [self.facts["bins"][-1][1]]
        a, b = steps or (cuts[0], cuts[-1])
        if a not in cuts or b not in cuts or a >= b:
            raise InputError(
                f"steps {a}:{b}: maps are kept for steps that begin and end at {', '.join(map(str, cuts))}"
            )
        return slice(cuts.index(a), cuts.index(b))


def _one(found: Mapping[int, Tensor], depth: int, what: str) -> Tensor:
    if depth not in found:
        raise InputError(f"{what} {depth}: was not seen; there are {', '.join(map(str, found))}")
    return found[depth]


def _has(maps: Tensor, head: int, depth: int) -> bool:
    if not 0 <= head < len(maps):
        raise InputError(f"head {head}: layer {depth} has heads 0 to {len(maps) - 1}")
    return True
