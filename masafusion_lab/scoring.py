"""The numbers of an edited case, from its saved picture: a new metric needs no new generation."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.data.case import Box, Case, Made, Picture
from masafusion_lab.data.pictures import open_picture
from masafusion_lab.data.prepared import region, tensor
from masafusion_lab.encoders import Networks
from masafusion_lab.metrics import Pair, measure
from masafusion_lab.protocol import Protocol
from masafusion_lab.region import USUAL, Region
from masafusion_lab.runs import read_json, write_json

READ = ("by", "soft")
"""Settings of the region by which a mask is read."""


def pair(case: Case, picture: Picture, how: Region = USUAL) -> Pair:
    """The edited picture of a case beside what it is compared with; resized as MagicBrush does, by Pillow's bicubic.

    `how`: by which the mask is read, as it was for the edit, but not `scored`, which is the set's own. Either is cut at
    half grey.
    """
    edited, source = open_picture(picture), open_picture(case.image)
    truth = None if case.truth is None else open_picture(case.truth)
    mask, how = (case.mask, how) if case.scored is None else (case.scored, USUAL)

    def at(size: tuple[int, int]) -> Tensor:
        return tensor(edited if edited.size == size else edited.resize(size, Image.Resampling.BICUBIC))

    return Pair(
        edited=tensor(edited),
        source=tensor(source),
        at_source=at(source.size),
        target=case.target,
        local=case.target if case.caption is None else case.caption,
        truth=None if truth is None else tensor(truth),
        at_truth=None if truth is None else at(truth.size),
        mask=None if mask is None else (region(mask, source, source.size, how) > 0.5).float(),
        drawn=case.drawn,
    )


def _digest(picture: Picture | Box | None) -> Any:
    """What tells a picture from another, without decoding it."""
    if isinstance(picture, Path):
        try:
            return hashlib.sha256(picture.read_bytes()).hexdigest()
        except OSError:  # said when it is opened
            return None
    if isinstance(picture, Image.Image):
        return hashlib.sha256(picture.tobytes()).hexdigest()
    return picture.name if isinstance(picture, Made) else picture


@dataclass(frozen=True)
class Scorer:
    """Takes a protocol's measures, through its networks; what they are is part of what a number is filed under."""

    protocol: Protocol
    networks: Networks
    facts: Mapping[str, str]

    @classmethod
    def of(cls, protocol: Protocol, places: Mapping[str, str], device: torch.device | str = "cpu") -> Scorer:
        """The scorer of a protocol with some of its networks from other places."""
        networks = Networks({**protocol.encoders, **places}, protocol.views, device)
        return cls(protocol, networks, networks.facts())

    def score(self, case: Case, folder: Path, *, again: bool = False) -> tuple[dict[str, float], dict[str, str]]:
        """The values of an edited case by measure, NaN with its reason where there is none; kept in scores.json.

        What is there is taken if it was made by the same protocol and networks of the same edit, beside the same
        pictures and caption, unless `again`.
        """
        columns, result = self.protocol.columns, read_json(folder / "result.json")
        changed = result.get("changed", {})
        read = {name: changed[key] for name in READ if (key := f"region.{name}") in changed}
        beside = [case.caption, *map(_digest, (case.image, case.truth, case.mask, case.scored)), *read.items()]
        made_of = [self.protocol.name, self.protocol.version, columns, dict(self.facts), result.get("key"), beside]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        found = read_json(folder / "scores.json")
        if again or found.get("key") != key:
            try:
                both = pair(case, folder / "target.png", Region(**read))
            except InputError as error:  # such as a target picture that cannot be read; not kept, it may be mended
                return dict.fromkeys(columns, math.nan), dict.fromkeys(columns, str(error))
            taken = {name: measure(name, both, self.networks) for name in columns}
            found = {
                "key": key,
                "values": {name: value for name, (value, _) in taken.items()},
                "missing": {name: why for name, (_, why) in taken.items() if why},
            }
            write_json(folder / "scores.json", found)
        return {name: float(value) for name, value in found["values"].items()}, dict(found["missing"])
