"""The settings of a run as a form: its fields, read from the classes that are set, and the words that it amounts to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from masafusion_lab import config, keys

MAIN = ("steps", "seed", "size", "dilate")
"""Keys that belong to no method and no inversion."""
CHOSEN = ("method", "inversion")
"""Tables whose keys depend on what is chosen, in their order on the page."""


@dataclass(frozen=True)
class Field:
    """A key, its value at the start as a person writes it, and which choice it belongs to: method.name=plain, or ""."""

    key: keys.Key
    value: str
    of: str = ""

    @property
    def choices(self) -> list[str]:
        """What it may be, where that can be listed; null is: as its preset says."""
        may_be_none = self.key.default is None and self.key.choices
        return [*self.key.choices, *(["null"] if may_be_none else [])]


def fields(experiment: config.Experiment) -> Iterator[Field]:
    """Every field, those of all methods and inversions among them; what the experiment says stands in them."""
    tables = keys.tables()
    for table in CHOSEN:
        yield Field(replace(keys.name_key(table), doc=""), getattr(experiment, table)["name"])
    plain = {key.name: key for key in tables[""]}
    for name in MAIN:
        yield Field(plain[name], keys.written(getattr(experiment, name)))
    for table in CHOSEN:
        said = getattr(experiment, table)
        for name in keys.classes(table):
            for key in tables[of := f"{table}.name={name}"]:
                value = said.get(key.name.partition(".")[2], key.default) if name == said["name"] else key.default
                yield Field(key, keys.written(value), of)


def words(form: Sequence[Field], values: Iterable[Any]) -> list[str]:
    """The key=value words of a form's values, without the fields of methods and inversions that are not chosen."""
    pairs = [
        (field, value if isinstance(value, str) else keys.written(value))
        for field, value in zip(form, values, strict=True)
    ]
    chosen = {f"{field.key.name}={value}" for field, value in pairs if field.key.name.endswith(".name")} | {""}
    return [f"{field.key.name}={value}" for field, value in pairs if field.of in chosen]
