"""Cases of PIE-Bench (Ju et al. 2024): mapping_file.json and annotation_images/ below a folder.

A mask is a list start, length, start, length, ... over the pixels of 512x512 by rows. Scores count the border of one
pixel to it whatever the list says; what is edited is the region as drawn, or none where that is all (edits of style)
or nothing, so that methods which need none run there too. Square brackets in prompts mark the words that differ, and
are no part of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from masafusion_lab.data.case import Case, Made
from masafusion_lab.data.folder import inside, read_object, told

log = logging.getLogger(__name__)

SIDE = 512
KINDS = ("random", "change object", "add object", "delete object", "change content", "change pose", "change colour",
         "change material", "change background", "change style")  # fmt: skip
"""By editing_type_id."""
BLENDED = ("method.blend_source", "method.blend_target")
"""What blended_word, a word of each prompt, sets for methods with a local blend."""
BRACKETS = str.maketrans("", "", "[]")


def read_cases(root: Path) -> list[Case]:
    """The cases in the mapping file's order; raises InputError with all that is missing or misshapen, a line each."""
    root = Path(root)
    mapping = read_object(root / "mapping_file.json", "give bench.root=FOLDER with it and annotation_images")
    images, problems, cases = (root / "annotation_images").resolve(), list[str](), list[Case]()
    for id, entry in mapping.items():
        wrong: list[str] = []
        case = _case(id, entry if isinstance(entry, dict) else {}, images, wrong)
        problems += [f"{id}: {why}" for why in wrong]
        if case is not None:
            cases.append(case)
    return told(root, cases, problems)


def decode(runs: Sequence[int], side: int = SIDE, *, border: bool = True) -> np.ndarray:
    """The mask, uint8 (side, side), 1 inside, that a list of starts and lengths means, with or without its border."""
    flat = np.zeros(side * side, np.uint8)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = 1
    mask = flat.reshape(side, side)
    if border:
        mask[[0, -1]] = 1
        mask[:, [0, -1]] = 1
    return mask


def _case(id: str, entry: dict[str, Any], images: Path, wrong: list[str]) -> Case | None:
    texts = {}
    for key in ("image_path", "original_prompt", "editing_prompt"):
        texts[key] = entry.get(key)
        if not isinstance(texts[key], str) or not texts[key]:
            wrong.append(f"has no {key}")
    runs, kind = entry.get("mask"), str(entry.get("editing_type_id"))
    if not isinstance(runs, list) or len(runs) % 2 or not all(type(n) is int and 0 <= n <= SIDE * SIDE for n in runs):
        wrong.append("mask is no list of starts and lengths")
    if kind not in map(str, range(len(KINDS))):
        wrong.append(f"editing_type_id={kind} is none of 0 to {len(KINDS) - 1}")
    image = None if wrong else inside("image_path", str(texts["image_path"]), images, wrong)
    if image is None:
        return None
    source, target = (str(texts[key]).translate(BRACKETS) for key in ("original_prompt", "editing_prompt"))
    drawn, scored = (Made(f"{id}: its mask", partial(_picture, runs, border)) for border in (False, True))
    some = drawn.make().getbbox() is not None and scored.make().getextrema()[0] == 0
    instruction = str(entry.get("editing_instruction", ""))
    mask, words = drawn if some else None, str(entry.get("blended_word") or "").translate(BRACKETS).split()
    if len(words) not in (0, len(BLENDED)):
        log.warning("%s: blended_word=%s: must be a word of each prompt; no local blend", id, " ".join(words))
    settings = dict(zip(BLENDED, words, strict=True)) if len(words) == len(BLENDED) else {}
    return Case(id, image, source, target, instruction, mask=mask, scored=scored, kind=KINDS[int(kind)],
                settings=settings)  # fmt: skip


def _picture(runs: Any, border: bool) -> Image.Image:
    return Image.fromarray(decode(runs, border=border) * 255)
