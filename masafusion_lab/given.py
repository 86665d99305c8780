"""What a batch of cases gives a method: prompts, region, hint, and what else its rules refer to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from masafusion_lab import InputError


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
    and "instruction" for methods that follow one; `mask`: A at latent resolution, (B, 1, h, w) in [0, 1]; `shown`: the
    pixels (B, 1, H, W), on the CPU, outside of which the picture's own may be put back, None: those of A; `hint`: the
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
    shown: Tensor | None = None

    def prompt(self, name: str, i: int) -> Tensor:
        """The embeddings (B, n, d) called `name` at step i; "tuned" is the record's, or "empty" if it has none."""
        if name == "tuned" and self.null is not None:
            return self.null[i]
        prompt = self.text("empty" if name == "tuned" else name)
        return prompt[i] if prompt.ndim == 4 else prompt

    def text(self, name: str) -> Tensor:
        """The embeddings called `name`, (B, n, d) or (T, B, n, d). Raises InputError where they are not given."""
        if name not in self.prompts:
            raise InputError(f"the prompt {name!r} is wanted and not given: Given(prompts={{{name!r}: embeddings}})")
        return self.prompts[name]

    def typed(self, name: str) -> Sequence[str]:
        """The prompts called `name` as they were typed, B. Raises InputError where they are not given."""
        if name not in self.texts:
            raise InputError(f"the words of {name!r} are wanted and not given: Given(texts={{{name!r}: [words, ...]}})")
        return self.texts[name]

    def region(self, name: str | None) -> Tensor | None:
        """The mask called `name`; of None the mask."""
        return self.mask if name is None else self.regions[name]

    def check(self, steps: int, shape: Sequence[int]) -> None:
        """Raise InputError for what does not fit latents of that shape (B, C, h, w), in so many steps."""
        B, _, h, w = shape
        for name, text in self.prompts.items():
            fits(f"Given.prompts[{name!r}]", text, (steps, B) if text.ndim == 4 else (B,))
        for name, region in {"mask": self.mask, **self.regions}.items():
            fits(f"the region, Given.{name}, in latent cells", region, (B, 1, h, w))
        fits("Given.null", self.null, (steps, B))
        for name, extra in self.extra.items():
            fits(f"Given.extra[{name!r}]", extra, (B, extra.shape[1], h, w))
        for features in self.hint or ():
            fits("Given.hint", features, (B,))


def fits(what: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    """Raise InputError, which calls it `what`, unless a tensor, if there is one, has a shape that begins so."""
    if tensor is not None and tensor.shape[: len(shape)] != torch.Size(shape):
        rest = ", ..." * (tensor.ndim > len(shape))
        raise InputError(
            f"{what}: is {tuple(tensor.shape)}, must be ({', '.join(map(str, shape))}{rest}): make it of the same "
            "pictures, size and schedule as the edit"
        )
