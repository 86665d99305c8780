"""The tokenizer: CLIP's byte-pair encoding with merges that make every word of the vocabulary one token."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from masafusion_lab.picturebook.captions import VOCABULARY

LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def merged(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The tokens of a word after these merges, the earliest first, as byte-pair encoding applies them."""
    tokens, rank = [*word[:-1], f"{word[-1]}</w>"], {pair: r for r, pair in enumerate(merges)}
    while possible := [(rank[pair], k) for k, pair in enumerate(pairwise(tokens)) if pair in rank]:
        _, k = min(possible)
        tokens[k : k + 2] = ["".join(tokens[k : k + 2])]
    return tokens


def merges_for(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that make each word one token: later ones come after those that made the earlier words, and spare them."""
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(tokens := merged(word, merges)) > 1:
            merges.append((tokens[0], tokens[1]))
    return merges


def save(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer to a folder and return it: padded with end-of-text to LENGTH, a known word one token."""
    merges = merges_for(VOCABULARY)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH, whole_words=True
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
