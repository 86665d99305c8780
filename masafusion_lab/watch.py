"""Which taps watch a batch of cases while it is edited, and what they saw of each case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from masafusion_lab import InputError, fusion, words
from masafusion_lab.editor import Editor, Item
from masafusion_lab.fusion import Branch, Plan, Span, Weighted
from masafusion_lab.maps import Attention
from masafusion_lab.model import StableDiffusion
from masafusion_lab.taps import DistanceTap, FlowTap, PixelTap, Scope, WordTap, bins

ALL = Span()
AnyTap: TypeAlias = WordTap | PixelTap | FlowTap | DistanceTap
Prompt: TypeAlias = dict[str, Any]
"""Of a prompt: "text", "words" with the places of their tokens, "tokens", "edited" (numbers of words)."""


@dataclass(frozen=True)
class Watch:
    """What is watched; the defaults cost an edit little time and memory."""

    steps: Span = ALL
    """Steps that are watched."""
    layers: Span = ALL
    """Layers that are watched, by depth, of self- and of cross-attention."""
    bins: int = 5
    """Parts of the run that maps are kept apart by."""
    heads: bool = True
    """Whether word maps are kept apart by heads."""
    every: int = 5
    """Self-attention is looked at in the first of so many steps of a bin, and so on; cross-attention in all."""
    halves: tuple[str, ...] = ("text",)
    """Halves of guidance that are watched."""
    limit_gb: float = 1.0
    """Memory that the maps of a batch may take."""

    @property
    def facts(self) -> dict[str, Any]:
        """The settings that decide what is seen."""
        return {name: str(value) for name, value in vars(self).items() if name != "limit_gb"}

    def begin(self, editor: Editor, batch: Sequence[Item], *, times: int = 1) -> Watching:
        """Watch a batch, its records not asked for yet; `times`: so many are to be watched at once.

        Raises InputError where nothing would be seen, or the maps would be more than memory allows.
        """
        model, steps = editor.model, len(editor.schedule)
        plan = editor.method.plan(model.sites, steps)
        run = [i for i in range(steps) if i in plan.run]
        Scope(self.steps, self.layers).check(model.sites, run)
        latents = denoisers(plan)
        shown = [inside for inside, _ in latents.values()]
        seen = [i for i in run if i in self.steps]
        parts = [range(seen[part.start], seen[part.stop - 1] + 1) for part in bins(len(seen), self.bins)]
        looks = Scope({i for part in parts for i in part[:: self.every]}, self.layers, None, self.halves)
        prompts = [prompts_of(model, item) for item in batch]
        tokens = max(prompt["tokens"] for of in prompts for prompt in of.values())
        word = WordTap(parts, tokens, Scope(self.steps, self.layers, None, self.halves), self.heads)
        pixel = PixelTap(parts, replace(looks, branches=shown))
        h, w = (side // model.factor for side in batch[0].pixels.shape[-2:])
        count = times * len(batch)
        need = (
            count
            * len(self.halves)
            * sum(
                word.bytes(site, site.grid(h, w), len(plan.branches)) + pixel.bytes(site, site.grid(h, w), len(shown))
                for site in model.sites
                if site.depth in self.layers
            )
        )
        if need > self.limit_gb * 2**30:
            raise InputError(
                f"attention maps of {count} {'pictures' if count > 1 else 'picture'} would take {need / 2**30:.2f} GB, "
                f"but {self.limit_gb:g} are allowed: take fewer bins, heads or layers, batch=1, or allow more"
            )
        mask = torch.stack([torch.ones(1, h, w) if item.mask is None else item.mask for item in batch]).to(model.device)
        target, _ = latents.get("target", ("", ""))
        pairs = [(inside, target) for x, (inside, _) in latents.items() if target and x != "target"]
        taps: list[AnyTap] = [word, pixel, DistanceTap(mask, steps, pairs, looks)]
        if batch[0].mask is not None:
            edited = {name: torch.stack([_at(of[name], model.length) for of in prompts]) for name in prompts[0]}
            taps.append(FlowTap(mask, steps, edited, looks))
        return Watching(self, word, taps, batch, model, steps, latents, prompts)


@dataclass(frozen=True)
class Watching:
    """The taps of a batch while it is edited; afterwards, what they saw."""

    watch: Watch
    word: WordTap
    taps: Sequence[AnyTap]
    batch: Sequence[Item]
    model: StableDiffusion
    steps: int
    latents: Mapping[str, tuple[str, str]]
    prompts: Sequence[Mapping[str, Prompt]]

    def of(self, b: int) -> Attention:
        """What was seen of case b of the batch."""
        branches, prompts, item = self.word.branches, self.prompts[b], self.batch[b]
        tensors = {name: sums[b].cpu() for tap in self.taps for name, sums in tap.sums.items()}
        for name, maps in tensors.items():
            kind, branch, half, _ = name.split("/")
            if kind == "words":
                n = prompts[_prompt(branches[branch], half)]["tokens"]
                tensors[name] = torch.cat([maps[:, :, :n], maps[:, :, n:].sum(2, keepdim=True)], 2)
        latents = self.latents or {branch.x: (name, name) for name, branch in branches.items()}
        # of those that were there in the steps that were seen
        latents = {x: (a, b if b in branches else a) for x, (a, b) in latents.items() if a in branches}
        facts = {
            "case": item.id,
            "steps": self.steps,
            "grid": list(item.record.states.shape[-2:]),
            "bins": [[part.start, part.stop] for part in self.word.bins],
            "layers": {
                kind: [
                    {"name": s.name, "heads": s.heads, "level": s.level} for s in self.model.sites if s.cross == cross
                ]
                for kind, cross in (("self", False), ("cross", True))
            },
            "branches": {
                name: {"x": branch.x, "text": _prompt(branch, "text"), "null": _prompt(branch, "null")}
                for name, branch in branches.items()
            },
            "latents": {x: {"inside": inside, "outside": outside} for x, (inside, outside) in latents.items()},
            "prompts": prompts,
            "watch": self.watch.facts,
        }
        return Attention(facts, tensors | ({} if item.mask is None else {"mask": item.mask[0]}))


def span(text: str, what: str) -> Span:
    """The integers that "A:B", "A:", ":B" or a single one means. Raises InputError."""
    try:
        if "-" in text:
            raise ValueError
        a, colon, b = text.partition(":")
        return Span(int(a or 0), int(b) if b else None if colon else int(a) + 1)
    except ValueError:
        raise InputError(f"{what} {text}: give a range, 10:20, or one number") from None


def denoisers(plan: Plan) -> dict[str, tuple[str, str]]:
    """By latent, the branches that denoise it inside and outside the region; of one that is replayed, its first."""
    found = {}
    for name in dict.fromkeys(branch.x for branch in plan.branches.values()):
        first = next(b for b, branch in plan.branches.items() if branch.x == name)
        rule = plan.noise.get(name, first)
        its = fusion.denoisers(rule)
        if isinstance(rule, Weighted):  # the first that reads words
            its = tuple(b for b in its if plan.branches[b].prompt != "empty")[:1] or its[:1]
        found[name] = its[0], its[-1]
    return found


def prompts_of(model: StableDiffusion, item: Item) -> dict[str, Prompt]:
    """The prompts of a case as its text encoder reads them."""
    texts = {
        "source": item.source,
        "target": item.target,
        "instruction": vars(item).get("instruction", ""),
        "empty": "",
    }
    found = {name: words.split(model.tokenizer, text, model.length - 2) for name, text in texts.items()}
    said = {name: [word.lower() for word, _ in its] for name, its in found.items()}
    other = {"source": "target", "target": "source"}
    return {
        name: {
            "text": texts[name],
            "words": its,
            "tokens": sum(len(places) for _, places in its) + 2,
            "edited": words.changed(said[other[name]], said[name]) if name in other else [],
        }
        for name, its in found.items()
    }


def _prompt(branch: Branch, half: str) -> str:
    """The prompt that a half of a branch reads, of those whose words are known; others count as the empty one."""
    name = branch.prompt if half == "text" else branch.null
    return name if name in ("source", "target", "instruction") else "empty"


def _at(prompt: Prompt, length: int) -> Tensor:
    """1 at the tokens of the edited words of a prompt, 0 elsewhere: (length,)."""
    at = torch.zeros(length)
    at[[place for k in prompt["edited"] for place in prompt["words"][k][1]]] = 1
    return at
