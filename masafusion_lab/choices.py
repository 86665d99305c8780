"""Settings that are one of a few words: checked where they are set, from Python as by a key."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from masafusion_lab import InputError


class Checked:
    """A dataclass that, when it is made, raises InputError for a field that is none of the values of its Literal."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, allowed in _listed(cls).items():
            if (value := getattr(self, name)) not in allowed:
                said = ", ".join(map(repr, allowed))
                raise InputError(f"{cls.__name__}: {name}={value!r} must be one of {said}")


@cache
def _listed(cls: Any) -> dict[str, tuple[Any, ...]]:
    """The fields of a dataclass whose values its types list, and these values."""
    hints, found = get_type_hints(cls), {}
    for name in (field.name for field in fields(cls)):
        kinds = [kind for kind in (hints[name], *get_args(hints[name])) if get_origin(kind) is Literal]
        unset = [None] if type(None) in get_args(hints[name]) else []
        if kinds:
            found[name] = (*get_args(kinds[0]), *unset)
    return found
