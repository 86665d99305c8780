"""An experiment as a person writes it, in YAML files and key=value words: read as mere text, believing nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from masafusion_lab import InputError

Text: TypeAlias = str | list[str]
"""What a person wrote for a key, not yet understood."""
LARGEST = 64 * 1024
"""Bytes of a file."""


def read_yaml(path: str | Path) -> dict[str, tuple[str, Text]]:
    """The keys of a file, in full, with their place in it ("FILE:LINE: ") and their texts, as they are written.

    Tags, anchors and more than one document are refused. Raises InputError.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"--config {path}: {'not a file' if path.exists() else 'no such file'}")
        if (size := path.stat().st_size) > LARGEST:
            raise InputError(f"{path}: has {size} bytes, a configuration at most {LARGEST}")
        found = read_keys(path.read_bytes())
        return {key: (f"{path}:{line}: ", text) for key, (line, text) in found.items()}
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a configuration: {' '.join(str(error).split())[:200]}") from None


def read_keys(content: bytes) -> dict[str, tuple[int, Text]]:
    """The keys of a YAML table, in full, with their lines and texts. Raises ValueError; see `read_yaml`."""
    found: dict[str, tuple[int, Text]] = {}
    documents = 0
    try:
        events = yaml.parse(content.decode("utf-8"), Loader=yaml.SafeLoader)
        for event in events:
            documents += isinstance(event, yaml.DocumentStartEvent)
            if documents > 1:
                raise ValueError("more than one document")
            if isinstance(event, yaml.MappingStartEvent):
                _check(event)
                for key, line, text in _entries(events, ""):
                    if key in found:
                        raise ValueError(f"line {line}: {key} is there twice")
                    found[key] = line, text
            elif isinstance(event, yaml.NodeEvent) and not (isinstance(event, yaml.ScalarEvent) and event.value == ""):
                raise ValueError("not a table of keys")
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return found


def is_mere_text(event: yaml.Event) -> bool:
    """Whether a YAML event neither refers to another, nor is referred to, nor says what type it is of."""
    return not (isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None))


def read_words(words: Iterable[str], problems: list[str]) -> dict[str, tuple[str, Text]]:
    """The key=value words; what is none goes to the problems, with what was probably meant."""
    pairs: dict[str, tuple[str, Text]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key:
            pairs[key.strip()] = "", value
        elif Path(word).suffix in (".yaml", ".yml"):
            problems.append(f"{word}: a file of keys is given as --config {word}")
        elif os.path.isfile(word):
            problems.append(f"{word}: which key is this file? image={word} is the picture to edit")
        else:
            problems.append(f'{word!r}: not key=value; quotes keep a text together, as in source="a cat"')
    return pairs


def short(text: Text) -> str:
    """A text as an error shows it."""
    shown = repr(text) if not isinstance(text, str) or not text.isprintable() else text
    return shown if len(shown) <= 80 else f"{shown[:77]}…"


def _entries(events: Iterator[yaml.Event], prefix: str) -> Iterator[tuple[str, int, Text]]:
    """Key, line and text of all entries of a mapping whose start has been read."""
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        _check(event)
        line = event.start_mark.line + 1
        if not isinstance(event, yaml.ScalarEvent):
            raise ValueError(f"line {line}: a key must be a word")
        key, value = prefix + event.value, next(events)
        _check(value)
        if isinstance(value, yaml.ScalarEvent):
            yield key, line, value.value
        elif isinstance(value, yaml.SequenceStartEvent):
            texts = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                _check(event)
                if not isinstance(event, yaml.ScalarEvent):
                    raise ValueError(f"line {line}: {key} must be a list of plain values")
                texts.append(event.value)
            yield key, line, texts
        elif key.count(".") > 2:
            raise ValueError(f"line {line}: nested too deep")
        else:
            yield from _entries(events, f"{key}.")


def _check(event: yaml.Event) -> None:
    if not is_mere_text(event):
        raise ValueError(f"line {event.start_mark.line + 1}: tags, anchors and aliases are not read")


def dump(values: Mapping[str, Any]) -> str:
    """The YAML of a table, in its order."""
    return yaml.dump(values, Dumper=Plain, sort_keys=False, allow_unicode=True, width=10**9)


class Plain(yaml.SafeDumper):
    """Writes every text so that it is read back as it was."""


Plain.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isascii() and text.isprintable() else '"'
    ),
)
