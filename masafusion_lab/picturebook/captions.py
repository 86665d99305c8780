"""The grammar of captions: several wordings of the same scene, in a closed vocabulary."""

from __future__ import annotations

import difflib
import re

from masafusion_lab import InputError
from masafusion_lab.picturebook.scene import ALL_POSES, BACKGROUNDS, COLOURS, KINDS, PATTERNS, Scene, Thing

WORDINGS = 4
PLACE = {"meadow": "on a meadow", "beach": "on a beach", "snow": "in the snow", "desert": "in a desert",
         "forest": "in a forest", "city": "in a city at night"}  # fmt: skip
OVER = {"meadow": "over a meadow", "beach": "over a beach", "snow": "over the snow", "desert": "over a desert",
        "forest": "over a forest", "city": "over a city at night"}  # fmt: skip
VERB = {"standing": "stand", "running": "run", "sitting": "sit", "lying": "lie down", "jumping": "jump",
        "perched": "perch", "flying": "fly"}  # fmt: skip
VOCABULARY: tuple[str, ...] = (
    *KINDS, *COLOURS, *PATTERNS, *ALL_POSES[1:], *BACKGROUNDS, *(verb.split()[0] for verb in VERB.values()),
    "a", "an", "the", "and", "on", "in", "at", "over", "next", "to", "left", "right", "middle", "night", "of", "with",
    "picture", "make", "add", "remove", "replace", "turn", "change", "move", "put", "background", "into", "pattern",
    "it", "by", "down",
)  # fmt: skip
_WORDS = frozenset(VOCABULARY)


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def name(t: Thing, wording: int = 0) -> str:
    """The thing in words: "a red striped horse running", or with wording 1 "a running striped red horse"."""
    if wording == 1:
        return article(" ".join(w for w in (t.pose, t.pattern, t.colour, t.kind) if w))
    pattern = "" if t.pattern == "plain" else t.pattern
    return article(" ".join(w for w in (t.colour, pattern, t.kind, t.pose) if w))


def where(t: Thing) -> str:
    """left, middle or right."""
    return "left" if t.x < 0.42 else "right" if t.x > 0.58 else "middle"


def told_sides(scene: Scene, wording: int) -> list[str]:
    """Where each thing is, if a caption of this wording says it; else nothing."""
    sides = [where(t) for t in scene.things]
    clear = len(sides) == 1 or sorted(sides) == ["left", "right"]
    return sides if clear and wording % WORDINGS == 3 else []


def caption(scene: Scene, wording: int = 0) -> str:
    """The scene in one of WORDINGS wordings (taken modulo); at most 24 words.

    0 "a red striped horse running on a meadow"; 1 "a running striped red horse next to a plain blue cup on a meadow";
    2 "on a meadow a red striped horse running"; 3 names the places, where one or two things have clear ones.
    """
    wording %= WORDINGS
    things = scene.things
    place = (OVER if all(t.airborne for t in things) else PLACE)[scene.background]
    if sides := told_sides(scene, wording):
        ways = {"left": "on the left", "right": "on the right", "middle": "in the middle"}
        return f"{' and '.join(f'{name(t)} {ways[side]}' for t, side in zip(things, sides, strict=True))} {place}"
    names = [name(t, wording) for t in things]
    if wording == 1:
        link = " next to " if len(things) == 2 and not any(t.airborne for t in things) else " and "
        return f"{link.join(names)} {place}"
    return f"{place} {' and '.join(names)}" if wording == 2 else f"{' and '.join(names)} {place}"


def words(text: str) -> list[str]:
    """The words of a text, in small letters, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def check(text: str) -> list[str]:
    """The words of a text; raises InputError for one outside VOCABULARY, naming the nearest known ones."""
    found = words(text)
    for word in found:
        if word not in _WORDS:
            near = difflib.get_close_matches(word, VOCABULARY, 3, 0.5)
            hint = f"the nearest are {', '.join(near)}" if near else f"kinds are {', '.join(KINDS)}"
            raise InputError(f"word: {word!r} is not in the picture-book's vocabulary; {hint}")
    return found
