"""What a batch of cases gives a method: prompts, region, hint, and what else its rules refer to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Follow:
    """How a branch's attention to words follows another's: P_other theirs[i] + P_own diag(own[i]) at step i.

    `theirs` (T, B, n, n), from the other prompt's tokens to the own one's; `own` (T, B, n).
    """

    theirs: Tensor
    own: Tensor


@dataclass(frozen=True)
class Given:
    """What a batch of B cases gives a method.

    `prompts`: name -> (B, n, d), or (T, B, n, d) where it changes with the step, with "source", "target" and "empty",
    and "instruction" for methods that follow one; `mask`: A at latent resolution, (B, 1, h, w) in [0, 1]; `hint`: the
    adapter's features, one (B, c, h, w) a level; `null`: (T, B, n, d), the record's embeddings; `regions`: further
    masks by name; `texts`: "source" and "target" as they were typed, B each; `words`: what `Branch.words` follows by;
    `pixels`: the pictures (B, 3, H, W) in [0, 1]; `noise`: purpose -> Gaussian noise (B, C, h, w), each case's own;
    `extra`: name -> (B, c, h, w), what the UNet sees beside a latent; `seen`: gives the things by which keys and pixels
    are told apart, (2, B, h, w), 0 or 1, as far as they are known by now.
    """

    prompts: Mapping[str, Tensor]
    mask: Tensor | None = None
    hint: tuple[Tensor, ...] | None = None
    null: Tensor | None = None
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    words: Follow | None = None
    pixels: Tensor | None = None
    noise: Callable[[str], Tensor] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    seen: Callable[[], Tensor | None] = lambda: None

    def prompt(self, name: str, i: int) -> Tensor:
        """The embeddings (B, n, d) called `name` at step i; "tuned" is the record's, or "empty" if it has none."""
        if name == "tuned":
            return self.prompts["empty"] if self.null is None else self.null[i]
        prompt = self.prompts[name]
        return prompt[i] if prompt.ndim == 4 else prompt

    def region(self, name: str | None) -> Tensor | None:
        """The mask called `name`; of None the mask."""
        return self.mask if name is None else self.regions[name]
