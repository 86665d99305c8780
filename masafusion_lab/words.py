"""What a tokenizer makes of a prompt's words: which it cuts off, which it does not know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any


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


def _tokens(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
