"""Every key that a person can set, with default, type and meaning, read from the sources: nothing heavy is imported."""

from __future__ import annotations

import ast
import difflib
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, make_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from masafusion_lab.sources import assigned, class_of, is_class, listed, where

CHOSEN = {"inversion": ("masafusion_lab.phases", "INVERSIONS"), "method": ("masafusion_lab.methods", "METHODS")}
"""Tables whose keys depend on their `name`: the module and the dictionary in it of classes by name."""
TRAINER = "lightning.pytorch.trainer.trainer"
"""The module of Lightning's Trainer."""
TYPES: dict[str, Any] = {t.__name__: t for t in (bool, dict, float, int, list, str, tuple)} | {
    "Any": Any,
    "Literal": Literal,
}
KINDS = {int: "whole number", float: "number", bool: "true | false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """A key such as steps or inversion.lr: its type, its default, and what it means."""

    name: str
    type: Any
    default: Any
    doc: str = ""

    @property
    def kind(self) -> str:
        """Its type in words."""
        return _kind(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it may have, where they can be listed."""
        found = [("true", "false") if kind is bool else get_args(kind) for kind in self._options if _is_listed(kind)]
        return tuple(str(choice) for choices in found for choice in choices)

    @property
    def _options(self) -> tuple[Any, ...]:
        """The types that it may be of."""
        return get_args(self.type) if _is_union(self.type) else (self.type,)

    def read(self, value: str | list[str]) -> Any:
        """The value that a text, or a list of texts, means. Raises ValueError saying what it must be."""
        if self.type is str and isinstance(value, str):
            return value
        if type(None) in get_args(self.type) and value in ("null", "none", "None", "~", ""):
            return None
        if isinstance(value, str) and get_origin(self.type) in (list, tuple):
            value = value.strip()
            inner = value[1:-1] if value[:1] + value[-1:] in ("[]", "()") else value
            value = [part.strip() for part in inner.split(",") if part.strip()]
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            if len({*self._options} - {type(None)}) > 1:  # as many keys of Lightning's have
                text = value if isinstance(value, str) else f"[{', '.join(value)}]"
                plain = OmegaConf.to_object(OmegaConf.from_dotlist([f"v={text}"]))["v"]  # type: ignore[index, call-overload]
                kinds = sorted(self._options, key=lambda kind: kind is str)  # which any text is
                read = next(meant for kind in kinds for meant in _fitting(kind, plain, text))
            else:
                holder = OmegaConf.structured(_holder(self.type))
                OmegaConf.update(holder, "v", value)
                read = OmegaConf.to_object(holder).v  # type: ignore[union-attr]
        except (OmegaConfBaseException, ValueError, RecursionError, StopIteration):
            raise ValueError(f"must be {self.kind}") from None
        if isinstance(read, float) and not math.isfinite(read):
            raise ValueError("must be a finite number")
        return read


@cache
def _holder(kind: Any) -> type:
    """A dataclass of one field `v` of that type, whose values OmegaConf checks."""
    return make_dataclass("Holder", [("v", kind)])


def _fitting(kind: Any, value: Any, text: str) -> list[Any]:
    """What a plain value, written so, means as a value of that type: one thing, or nothing."""
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if str(choice) == text]
    if get_origin(kind) is list:
        fits = isinstance(value, list) and all(_fitting(get_args(kind)[0], each, str(each)) for each in value)
    else:
        fits = type(value) is kind or (kind is float and type(value) is int)
    return [text] if kind is str else [value] if fits else []


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_listed(kind: Any) -> bool:
    return kind is bool or get_origin(kind) is Literal


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if _is_union(kind):
        return " | ".join(dict.fromkeys(" | ".join(map(_kind, get_args(kind))).split(" | ")))
    if get_origin(kind) in (list, tuple):
        return f"[{', '.join('…' if part is ... else _kind(part) for part in get_args(kind))}]"
    return "table" if get_origin(kind) is dict else KINDS[kind]


@cache
def tables() -> dict[str, list[Key]]:
    """The keys by table: "", model, tracking, and one such as inversion.name=null_text for each class to choose."""
    found: dict[str, list[Key]] = {}
    for key in fields("masafusion_lab.config", "Experiment"):
        table = key.name.rpartition(".")[0]
        if key.name in CHOSEN:
            for name, (module, title) in classes(key.name).items():
                found[f"{key.name}.name={name}"] = fields(module, title, f"{key.name}.")
        else:
            found.setdefault(table, []).append(key)
    return found


def known(chosen: Mapping[str, str | None]) -> dict[str, Key]:
    """The keys by name for the named inversion and method, or for all of them if None; a dictionary is one key."""
    found = {f"{table}.name": name_key(table) for table in CHOSEN}
    for title, keys in tables().items():
        table, _, name = title.partition(".name=")
        if not name or chosen[table] in (name, None):
            found |= {key.name: key for key in keys}
    return found


@cache
def name_key(table: str) -> Key:
    """The key that chooses the class of a table: inversion.name, method.name."""
    default = next(key.default for key in fields("masafusion_lab.config", "Experiment") if key.name == table)
    return Key(f"{table}.name", Literal[tuple(classes(table))], default["name"], f"Which {table}.")


def find(name: str, keys: Mapping[str, Key]) -> Key | None:
    """The key of that name, which may be an entry of a dictionary, model.adapter.sketch; None if there is none."""
    if name in keys and get_origin(keys[name].type) is not dict:
        return keys[name]
    if name.startswith("trainer."):
        return trainer_keys().get(name)
    for table, _, entry in (name.rpartition("."), name.partition(".")):  # axes.method.guidance is an entry of axes
        if table in keys and entry and get_origin(keys[table].type) is dict:
            return Key(name, get_args(keys[table].type)[1], None, keys[table].doc)
    return None


def suggest(name: str, names: Iterable[str], like: float = 0.7) -> str:
    """; did you mean …? with the name most like it, by the whole or by what follows the last dot; or nothing.

    `like`: how alike they must be, 1 being equal.
    """
    names = list(names)
    last = {full.rpartition(".")[2]: full for full in reversed(names)}
    near = difflib.get_close_matches(name.lower(), names, 1, like)
    near = near or [last[end] for end in difflib.get_close_matches(name.rpartition(".")[2], last, 1, 0.8)]
    return f"; did you mean {near[0]}?" if near else ""


def unknown(name: str, text: str | list[str], keys: Mapping[str, Key]) -> str:
    """What to say of a key that is none of these, or of a table to which a text is given as if it were a key."""
    if name in keys:
        entry = re.search(r"\{\W*(\w+)\W*:\s*['\"]?([^\s,{}'\"]+)", text if isinstance(text, str) else "")
        example = re.search(rf"{re.escape(name)}\.[^\s=]+=\S+\b", keys[name].doc)
        said = f"{name}.{entry[1]}={entry[2]}" if entry else example[0] if example else f"{name}.…=…"
        return f"is a table; give its entries one by one, as {said}"
    if inside := [key for key in keys if key.startswith(f"{name}.")]:
        return f"is a table; give one of its keys, as {inside[0]}=…"
    for table in CHOSEN:
        having = [
            title.partition("=")[2]
            for title, fields in tables().items()
            if title.startswith(f"{table}.name=") and any(name == k.name or find(name, {k.name: k}) for k in fields)
        ]
        if having:
            return f"is a key of {table}.name={' | '.join(having)}, not of the {table} that is chosen"
    names = trainer_keys() if name.startswith("trainer.") else keys
    return f"unknown key{suggest(name, names) or '; masafusion edit --help lists them'}"


def complete(incomplete: str, before: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """Words that `incomplete` may become, with a meaning: keys, and values where they can be listed.

    `before`: the words before it, from which inversion and method are known, and the key if the shell splits at "=".
    """
    words = list(before)
    whole = "\0".join(words).replace("\0=\0", "=").split("\0")  # bash takes "=" for a word of its own
    pairs = dict(word.partition("=")[::2] for word in whole if "=" in word)
    keys = known({table: pairs.get(f"{table}.name", name_key(table).default) for table in CHOSEN})
    name, equals, start = incomplete.partition("=")
    if words[-1:] == ["="] or (words and incomplete == "="):
        name, equals, start, prefix = words[-1 - (incomplete != "=")], "=", incomplete.lstrip("="), ""
    else:
        prefix = f"{name}="
    if equals:
        choices = key.choices if (key := find(name, keys)) else ()
        yield from ((prefix + choice, "") for choice in choices if choice.startswith(start))
        return
    names = {f"{key}=": each.doc for key, each in keys.items() if get_origin(each.type) is not dict}
    if name.startswith("trainer"):
        names |= {f"{key}=": "" for key in trainer_keys()}
    found = [(word, doc) for word, doc in names.items() if word.startswith(incomplete)]
    yield from found
    if len(found) == 1 and (key := keys.get(found[0][0][:-1])) and written(key.default):
        yield found[0][0] + written(key.default), "the default"  # a second match keeps the shell from adding a space


def written(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def classes(table: str) -> dict[str, tuple[str, str]]:
    """Of a table in CHOSEN the classes by name, each as its module and its name there."""
    module, name = CHOSEN[table]
    return {key: where(module, ast.unparse(value)) for key, value in listed(module, name).items()}


def about(table: str, name: str) -> str:
    """What the class of that name in a table in CHOSEN says of itself, in one line."""
    module, title = classes(table)[name]
    return (ast.get_docstring(class_of(module, title)) or "").partition("\n")[0]


@cache
def fields(module: str, name: str, prefix: str = "") -> list[Key]:
    """The fields of a dataclass as keys, those of its bases first; a field that is itself a dataclass as its fields."""
    node = class_of(module, name)
    found: dict[str, Key] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and is_class(*where(module, base.id)):
            found |= {key.name: key for key in fields(*where(module, base.id), prefix)}
    for statement, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or "ClassVar" in (annotation := ast.unparse(statement.annotation)):
            continue
        key = prefix + ast.unparse(statement.target)
        if is_class(*where(module, annotation)):
            found |= {inner.name: inner for inner in fields(*where(module, annotation), f"{key}.")}
            continue
        said = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        kind = eval(annotation, {"__builtins__": {}}, TYPES)
        found[key] = Key(key, kind, _default(module, statement.value), " ".join(str(said).split()))
    return list(found.values())


@cache
def trainer_keys() -> dict[str, Key]:
    """The keys of Lightning's Trainer, trainer.NAME, with the types of its signature."""
    make = next(n for n in class_of(TRAINER, "Trainer").body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    kinds = {f"trainer.{arg.arg}": _written(TRAINER, arg.annotation) for arg in make.args.kwonlyargs}
    return {name: Key(name, Union[kind], None) for name, kind in kinds.items() if kind}  # noqa: UP007


def _written(module: str, node: ast.expr | None) -> tuple[Any, ...]:
    """The types, of those of an annotation of Lightning's, whose values can be written in words."""
    match node:
        case ast.Constant(value=None):
            return (type(None),)
        case ast.Name(id=name) if name in ("bool", "int", "float", "str"):
            return (TYPES[name],)
        case ast.Name(id=name) if (there := where(module, name))[0] != module:
            return _written(there[0], ast.Name(there[1])) if there[0].startswith("lightning.") else ()
        case ast.Name(id=name):
            with suppress(NameError):  # a class
                return _written(module, assigned(module, name))
        case ast.Subscript(value=ast.Name(id="Literal")):
            return (eval(ast.unparse(node), {"__builtins__": {}}, TYPES),)
        case ast.Subscript(value=ast.Name(id="Optional")):
            return (*_written(module, node.slice), type(None))
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=parts)):
            return tuple(kind for part in parts for kind in _written(module, part))
        case ast.Subscript(value=ast.Name(id="list")):
            return tuple(list[kind] for kind in _written(module, node.slice))  # type: ignore[valid-type]
    return ()


def _default(module: str, value: ast.expr | None) -> Any:
    """The value of a field's default, which is written out, a constant of the module, or field(default_factory=…)."""
    if isinstance(value, ast.Call):
        made = value.keywords[0].value
        return ast.literal_eval(made.body) if isinstance(made, ast.Lambda) else TYPES[ast.unparse(made)]()
    if isinstance(value, ast.Name):
        return ast.literal_eval(assigned(module, value.id))
    return None if value is None else ast.literal_eval(value)
