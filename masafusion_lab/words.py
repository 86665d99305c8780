"""What a tokenizer makes of a prompt's words: which it cuts off or does not know, and which of two prompts are one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from masafusion_lab import InputError


def cut(tokenizer: Any, text: str, room: int) -> str:
    """The end of `text` beyond `room` tokens, from the start of the first word concerned; "" if there is none."""
    tokens = _tokens(tokenizer, text)
    if len(tokens.input_ids) <= room:
        return ""
    read = text[: tokens.offset_mapping[room][0]]
    return text[len(re.sub(r"\S+\Z", "", read)) :]


def unknown(tokenizer: Any, text: str) -> dict[str, list[str]]:
    """The words that are not one known token each, with the known words most like them: for a whole-word tokenizer."""
    tokens = _tokens(tokenizer, text)
    ids: dict[int, list[int]] = {}
    for word, token in zip(tokens.word_ids(), tokens.input_ids, strict=True):
        ids.setdefault(word, []).append(token)
    strange = [word for word, its in ids.items() if len(its) > 1 or its[0] == tokenizer.unk_token_id]
    if not strange:
        return {}
    vocabulary = set(tokenizer.get_vocab())
    whole = {
        token for token in vocabulary if token.endswith("</w>")
    } or vocabulary  # byte-pair tokens: only ends of words
    known = sorted(
        w for w in (token.removesuffix("</w>") for token in whole) if w.isalpha() and (len(w) > 1 or w == "a")
    )
    texts = dict.fromkeys(text[slice(*tokens.word_to_chars(word))] for word in strange)
    return {word: difflib.get_close_matches(word.lower(), known, 3, 0.5) for word in texts}


def ids(tokenizer: Any, text: str, room: int) -> list[int]:
    """The tokens of a prompt, at most `room` with start and end."""
    return tokenizer(text, truncation=True, max_length=room).input_ids


def find(text: str, word: str) -> list[tuple[int, int]]:
    """The spans of characters where a prompt has a word, or words in a row, in whatever case."""
    found = re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) if word.strip() else ()
    return [match.span() for match in found]


def places(tokenizer: Any, text: str, word: str, room: int) -> list[int]:
    """The positions of a word's tokens in a prompt of `room` tokens with start and end: of all its occurrences.

    Raises InputError for a word that is not in the prompt, or that the encoder does not read.
    """
    found = _positions(tokenizer, text, find(text, word))
    if not found:
        raise InputError(f"{word!r} is no word of {text!r}; take one that is")
    read = [place for place in found if place < room - 1]
    if not read:
        raise InputError(f"{word!r} in {text!r} lies beyond the {room - 2} tokens that are read; shorten the prompt")
    return read


def marks(tokenizer: Any, texts: Sequence[str], words: Sequence[str], room: int, *, strict: bool = True) -> Tensor:
    """1 at the tokens of the words in each text, (B, n); InputError for a word that is not there, if `strict`."""
    marked = torch.zeros(len(texts), room)
    for row, text in zip(marked, texts, strict=True):
        for word in words:
            if strict or find(text, word):
                row[places(tokenizer, text, word, room)] = 1
    return marked


def split(tokenizer: Any, text: str, room: int) -> list[tuple[str, list[int]]]:
    """The words that are read of a prompt, each with the places of its tokens; place 0 is the start of the text."""
    tokens = _tokens(tokenizer, text)
    places: dict[int, list[int]] = {}
    for place, word in enumerate(tokens.word_ids()[:room], 1):
        places.setdefault(word, []).append(place)
    return [(text[slice(*tokens.word_to_chars(word))], its) for word, its in places.items()]


def changed(before: Sequence[str], after: Sequence[str]) -> list[int]:
    """Which words of `after` are not those of `before`, in its order."""
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [k for tag, _, _, start, stop in blocks if tag != "equal" for k in range(start, stop)]


def align(source: Sequence[int], target: Sequence[int]) -> list[int | None]:
    """For each token of `target` the one of `source` that it is, as many as can be in order; None: it is new.

    Needleman and Wunsch with gap 0, match 1 and mismatch -1, of equal alignments the one of Hertz et al. 2022.
    """
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, a in enumerate(source, 1):
        for j, b in enumerate(target, 1):
            best[i][j] = max(best[i][j - 1], best[i - 1][j], best[i - 1][j - 1] + (1 if a == b else -1))
    same: list[int | None] = [None] * len(target)
    i, j = len(source), len(target)
    while i and j:
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            same[j] = i
    return same


def refinement(
    tokenizer: Any, source: str, target: str, room: int, *, by_place: bool = False, as_published: bool = False
) -> tuple[Tensor, Tensor]:
    """What is the source's and what is new in a target prompt: (M (n, n), own (n)) for sequences of n = `room` tokens.

    M[i, j] = 1: token j of the target is token i of the source; own[j] = 1: it is new. Padding is the source's padding;
    as published it is whatever the source has at that position, words too where the source is the longer. `by_place`:
    a token is only the one at its own place. Raises InputError if that is asked of prompts of different length.
    """
    a, b = ids(tokenizer, source, room), ids(tokenizer, target, room)
    if by_place and len(a) != len(b):
        raise InputError(f"{source!r} has {len(a) - 2} tokens and {target!r} {len(b) - 2}: no places in common")
    same = [j if a[j] == b[j] else None for j in range(len(b))] if by_place else align(a, b)
    M, own = torch.zeros(room, room), torch.zeros(room)
    for j, i in enumerate(same):
        if i is None:
            own[j] = 1
        else:
            M[i, j] = 1
    _pad(M, len(b), 0 if as_published else max(0, len(a) - len(b)))
    return M, own


def replacement(
    tokenizer: Any, source: str, target: str, room: int, *, as_published: bool = False
) -> tuple[Tensor, Tensor]:
    """The same for prompts in which words stand for words: (M (n, n), own (n)); see `refinement`.

    Of words with different numbers of tokens each target token has an equal share of all of the source's. What follows
    is shifted accordingly; as published, what follows the last changed word is not. Raises InputError for prompts of
    different word count.
    """
    words = [[(m.group(), *m.span()) for m in re.finditer(r"\S+", text)] for text in (source, target)]
    if len(words[0]) != len(words[1]):
        counts = " and ".join(f"{len(its)} words ({text!r})" for its, text in zip(words, (source, target), strict=True))
        raise InputError(f"replace wants word for word, and these have {counts}; take refine")
    M = torch.zeros(room, room)
    M[0, 0] = i = j = end = 1
    shift = 0
    for (old, *one), (new, *other) in zip(*words, strict=True):
        a, b = _positions(tokenizer, source, [tuple(one)]), _positions(tokenizer, target, [tuple(other)])
        i, j = max(a, default=i - 1) + 1, max(b, default=j - 1) + 1
        if old != new:
            end, shift = j, i - j
        a, b = ([place for place in its if place < room - 1] for its in (a, b))
        if len(a) == len(b):
            M[a, b] = 1
        elif a and b:
            M[torch.tensor(a)[:, None], torch.tensor(b)] = 1 / len(b)
    if as_published:
        M[:, end:] = torch.eye(room)[:, end:]
        M[:, room - max(shift, 0) :] = 0  # where its loop has run out of source tokens
        return M, torch.zeros(room)
    i, j = min(i, room - 1), min(j, room - 1)  # the ends, also of what is cut off
    _pad(M, j, i - j)
    return M, (M.sum(0) == 0).float()


def _pad(M: Tensor, start: int, shift: int) -> None:
    """Let positions from `start` on be those of the source `shift` further on, the last at most."""
    for j in range(start, len(M)):
        M[min(j + shift, len(M) - 1), j] = 1


def _positions(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The positions, after the start token, of the tokens within spans of characters."""
    offsets = _tokens(tokenizer, text).offset_mapping
    return [1 + k for k, (a, b) in enumerate(offsets) if any(start < b and a < stop for start, stop in spans)]


def _tokens(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
