"""Cases from a folder of pictures, or from a manifest of them that nobody needs to trust."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import yaml

from masafusion_lab import InputError
from masafusion_lab.configfile import is_mere_text
from masafusion_lab.data.case import HINTS, Box, Case

TEXTS = ("id", "source", "target", "instruction")
COLUMNS = (*TEXTS, "image", "mask", "box", *HINTS, "truth")
"""Of a manifest; only `image` must be there. `box` is left,top,right,bottom in place of a mask; the rest are files."""

SETTINGS = "method."
"""With which further columns begin: settings of the method for one case, as method.blend_source."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Of the files in a folder that are taken for pictures."""

LARGEST, LARGEST_YAML = 16_000_000, 2_000_000
"""Bytes of a manifest."""

LARGEST_CAPTION = 10_000
"""Bytes of a text file that is taken for a picture's prompt."""

NONE: Mapping[str, str] = MappingProxyType({})
"""No text that is usual."""

Row = tuple[str, Mapping[str, Any]]
"""Where it is ("line 3"), and its values by column."""


class _Bad(ValueError):
    """A manifest that cannot be read on from this line."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"line {line}: {why}")


def read_cases(path: Path, usual: Mapping[str, str] = NONE) -> list[Case]:
    """The cases of a folder (each picture one) or of a manifest .csv, .jsonl, .yaml, in their order.

    In a folder a text file that is named as a picture, cat.txt beside cat.png, says what the picture shows: its source
    prompt. `usual`: texts (source, target, instruction) for the cases that have none of their own. Files are relative
    to the manifest, and outside its folder nothing is read, not through links either. Text is taken as it stands: no
    types, no references. An id not given is the picture's name without suffix. Raises InputError with all problems, one
    a line.
    """
    path = Path(path)
    rows, problems = _pictures(path) if path.is_dir() else _manifest(path)
    root = (path if path.is_dir() else path.parent).resolve()
    cases: dict[str, Case] = {}
    first: dict[str, str] = {}
    strange: set[str] = set()  # columns, each told once
    for where, row in rows:
        wrong: list[str] = []
        case = _case({**row, **{text: usual[text] for text in usual if row.get(text, "") == ""}}, root, wrong)
        own = {column for column in row if column.startswith(SETTINGS)}
        wrong[:0] = [_strange(column) for column in row if column not in {*COLUMNS, *strange, *own}]
        strange.update(row)
        if case is not None and case.id in cases:
            wrong.append(f"id {case.id!r} is that of {first[case.id]}; give each case its own")
        elif case is not None:
            cases[case.id], first[case.id] = case, where
        problems += [f"{where}: {why}" for why in wrong]
    return told(path, list(cases.values()), problems, f"; columns are {', '.join(COLUMNS)}")


def told(path: Path, cases: list[Case], problems: list[str], remedy: str = "; copy it again") -> list[Case]:
    """The cases of a set, unless there are problems with it or none in it. Raises InputError, a line a problem."""
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise InputError("\n  ".join([f"{path}: cannot be used:", *problems[:20], *more]))
    if not cases:
        raise InputError(f"{path}: holds no cases{remedy}")
    return cases


def _pictures(folder: Path) -> tuple[list[Row], list[str]]:
    """A row for each picture, and the captions that cannot be read.

    Pictures whose names differ in their suffixes alone are told apart by them.
    """
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not names:
        raise InputError(f"{folder}: holds no pictures; give a folder with some ({', '.join(SUFFIXES)})")
    stems = Counter(Path(name).stem for name in names)
    ids = {name: name if stems[Path(name).stem] > 1 else Path(name).stem for name in names}
    problems: list[str] = []
    return [(n, {"image": n, "id": id, "source": _caption(folder, n, problems)}) for n, id in ids.items()], problems


def _caption(folder: Path, picture: str, problems: list[str]) -> str:
    """The source prompt in the text file beside a picture; "" without one. What is wrong is added to the list."""
    name, wrong = Path(picture).with_suffix(".txt").name, list[str]()
    file = inside("caption", name, folder.resolve(), wrong) if (folder / name).exists() else None
    try:
        if file and file.stat().st_size > LARGEST_CAPTION:
            wrong.append(f"caption={name!r} has more than {LARGEST_CAPTION} bytes; it is read as the picture's prompt")
        elif file:
            return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        wrong.append(f"caption={name!r} cannot be read ({error}); save it as UTF-8")
    problems += [f"{picture}: {why}" for why in wrong]
    return ""


def _manifest(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a manifest as far as it can be read, and what keeps it from being read on."""
    readers = {".csv": _csv, ".jsonl": _jsonl, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: is neither a folder nor a manifest ({', '.join(readers)})")
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: is larger than {LARGEST // 1_000_000} MB; split it")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: is not UTF-8; save it as such") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a folder of pictures or a manifest") from None
    rows: list[Row] = []
    try:
        rows.extend(readers[path.suffix.lower()](text))
    except _Bad as error:
        return rows, [str(error)]
    return rows, []


def _csv(text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise _Bad(1, f"columns twice: {', '.join(sorted({name for name in header if header.count(name) > 1}))}")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header):
                raise _Bad(line, f"{len(cells)} cells under {len(header)} columns; put text with commas in quotes")
            if cells:
                yield f"line {line}", dict(zip(header, cells, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise _Bad(line, f"is not CSV ({error})") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file of a set, in which no key is there twice. Raises InputError with the remedy."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        if isinstance(found, dict):
            return found
        raise ValueError("not an object")
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); {remedy}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} twice")
    return dict(pairs)


def _jsonl(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                raise _Bad(number, f"is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise _Bad(number, "is not a JSON object")
            yield f"line {number}", row


def _yaml(text: str) -> Iterator[Row]:
    """A list of mappings of scalars, each as it is written; what could run, refer or nest is refused unread."""
    if len(text) > LARGEST_YAML:
        raise _Bad(1, f"is more than {LARGEST_YAML // 1_000_000} MB of YAML, which is slow to read; write .jsonl")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            line = event.start_mark.line + 1
            if not is_mere_text(event):
                raise _Bad(line, "has a tag, an anchor or an alias; put text that begins with ! & * in quotes")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > len(_SHAPE) or not isinstance(event, _SHAPE[depth - 1]):
                    raise _Bad(line, _SAID)
            depth -= isinstance(event, yaml.CollectionEndEvent)
        node = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _Bad(mark.line + 1 if mark else 1, f"is not YAML ({error.problem}); put text in quotes") from None
    except yaml.YAMLError as error:
        raise _Bad(1, f"is not YAML ({' '.join(str(error).split())})") from None
    if node is not None and not isinstance(node, yaml.SequenceNode):
        raise _Bad(node.start_mark.line + 1, _SAID)
    for item in node.value if node else ():
        line = item.start_mark.line + 1
        if not isinstance(item, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in item.value):
            raise _Bad(line, _SAID)
        keys = [key.value for key, _ in item.value]
        if len(set(keys)) < len(keys):
            raise _Bad(line, f"has {max(keys, key=keys.count)!r} twice")
        yield f"line {line}", {key.value: _plain(value) for key, value in item.value}


_SHAPE = (yaml.SequenceStartEvent, yaml.MappingStartEvent, yaml.SequenceStartEvent)  # the last for a box
_SAID = "is not as it should be: a list of mappings of text (- image: …)"


def _plain(node: yaml.Node) -> Any:
    """The text of a scalar, the texts of a list of them."""
    return [child.value for child in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def _strange(column: str) -> str:
    near = difflib.get_close_matches(column, COLUMNS, 1)
    return f"{column!r} is no column; {f'did you mean {near[0]}?' if near else 'they are ' + ', '.join(COLUMNS)}"


def _case(row: Mapping[str, Any], root: Path, wrong: list[str]) -> Case | None:
    """The case of a row, or None; what is wrong with it is added to the list."""
    for column in row:
        if (column in COLUMNS or column.startswith(SETTINGS)) and column != "box" and not isinstance(row[column], str):
            wrong.append(f"{column}={row[column]!r} is not text; put it in quotes")
        elif re.search("[\ud800-\udc7f\udd00-\udfff]", str(row[column])):  # the others: names of files in no UTF-8
            wrong.append(f"{column}={row[column]!r} holds half a character; write it as UTF-8")
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    files = {c: inside(c, texts[c], root, wrong) for c in ("image", "mask", *HINTS, "truth") if texts.get(c)}
    box = _box(row["box"], wrong) if row.get("box") else None
    if not row.get("image"):
        wrong.append("has no image")
    if row.get("mask") and row.get("box"):
        wrong.append("has a mask and a box; give one")
    if wrong:
        return None
    found = cast("dict[str, Path]", files)
    return Case(
        id=texts.get("id") or found["image"].relative_to(root).with_suffix("").as_posix(),
        image=found["image"],
        source=texts.get("source", ""),
        target=texts.get("target", ""),
        instruction=texts.get("instruction", ""),
        mask=found.get("mask", box),
        hints={kind: found[kind] for kind in HINTS if kind in found},
        truth=found.get("truth"),
        settings={column: text for column, text in texts.items() if column.startswith(SETTINGS) and text},
    )


def inside(column: str, value: str, root: Path, wrong: list[str]) -> Path | None:
    """The file that a manifest names, if it is there and inside the manifest's folder."""
    try:
        path = (root / value).resolve()
        if not path.is_relative_to(root):
            wrong.append(f"{column}={value!r} lies outside {root}; copy it in")
        elif not path.is_file():
            wrong.append(f"{column}={value!r}: no such file in {root}")
        else:
            return path
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with NUL, or links in a ring
        wrong.append(f"{column}={value[:80]!r}: is no name of a file ({error})")
    return None


def _box(value: Any, wrong: list[str]) -> Box | None:
    """Four numbers, of a list or separated by commas."""
    try:
        sides = [float(side) for side in (value.split(",") if isinstance(value, str) else value)]
        x0, y0, x1, y1 = sides
        if all(map(math.isfinite, sides)) and 0 <= x0 < x1 and 0 <= y0 < y1:
            return x0, y0, x1, y1
    except (TypeError, ValueError):
        pass
    wrong.append(f"box={value!r} is not left,top,right,bottom, in pixels or in fractions of the picture")
    return None
