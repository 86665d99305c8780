"""Every key that a person can set, with default, type and meaning, read from the sources: nothing heavy is imported."""

from __future__ import annotations

import ast
import difflib
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, make_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

CHOSEN = {"inversion": ("masafusion_lab.phases", "INVERSIONS"), "method": ("masafusion_lab.methods", "METHODS")}
"""Tables whose keys depend on their `name`: the module and the dictionary in it of classes by name."""
TYPES: dict[str, Any] = {t.__name__: t for t in (bool, dict, float, int, list, str, tuple)} | {
    "Any": Any,
    "Literal": Literal,
}
KINDS = {int: "whole number", float: "number", bool: "true | false", str: "text", type(None): "null", Any: "value"}


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
        options = get_args(self.type) if _is_union(self.type) else (self.type,)
        listed = [("true", "false") if option is bool else get_args(option) for option in options if _is_listed(option)]
        return tuple(choice for choices in listed for choice in choices)

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
            if self.type is Any:
                value = value if isinstance(value, str) else f"[{', '.join(value)}]"
                return OmegaConf.to_object(OmegaConf.from_dotlist([f"v={value}"]))["v"]  # type: ignore[index, call-overload]
            holder = OmegaConf.structured(_holder(self.type))
            OmegaConf.update(holder, "v", value)
            read = OmegaConf.to_object(holder).v  # type: ignore[union-attr]
        except (OmegaConfBaseException, ValueError, RecursionError):
            raise ValueError(f"must be {self.kind}") from None
        if isinstance(read, float) and not math.isfinite(read):
            raise ValueError("must be a finite number")
        return read


@cache
def _holder(kind: Any) -> type:
    """A dataclass of one field `v` of that type, whose values OmegaConf checks."""
    return make_dataclass("Holder", [("v", kind)])


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_listed(kind: Any) -> bool:
    return kind is bool or get_origin(kind) is Literal


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if _is_union(kind):
        return " | ".join(map(_kind, get_args(kind)))
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
    for table, _, entry in (name.rpartition("."), name.partition(".")):  # axes.method.guidance is an entry of axes
        if table in keys and entry and (table != "trainer" or entry in trainer_keys()):
            return Key(name, get_args(keys[table].type)[1], None, keys[table].doc)
    return None


def suggest(name: str, names: Iterable[str]) -> str:
    """; did you mean …? with the name most like it, by the whole or by what follows the last dot; or nothing."""
    names = list(names)
    last = {full.rpartition(".")[2]: full for full in reversed(names)}
    near = difflib.get_close_matches(name, names, 1, 0.7)
    near = near or [last[end] for end in difflib.get_close_matches(name.rpartition(".")[2], last, 1, 0.8)]
    return f"; did you mean {near[0]}?" if near else ""


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
        choices = keys[name].choices if name in keys else ()
        yield from ((prefix + choice, "") for choice in choices if choice.startswith(start))
        return
    names = {f"{key}=": each.doc for key, each in keys.items() if get_origin(each.type) is not dict}
    if name.startswith("trainer"):
        names |= {f"trainer.{entry}=": "" for entry in trainer_keys()}
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
    listed = _assigned(module, name)
    if not isinstance(listed, ast.Dict):
        raise TypeError(f"{module}.{name} must be written as a dictionary")
    return {
        str(key.value): _where(module, value.id)
        for key, value in zip(listed.keys, listed.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
    }


def about(table: str, name: str) -> str:
    """What the class of that name in a table in CHOSEN says of itself, in one line."""
    module, title = classes(table)[name]
    node = next(n for n in _tree(module).body if isinstance(n, ast.ClassDef) and n.name == title)
    return (ast.get_docstring(node) or "").partition("\n")[0]


@cache
def fields(module: str, name: str, prefix: str = "") -> list[Key]:
    """The fields of a dataclass as keys, those of its bases first; a field that is itself a dataclass as its fields."""
    node = next(n for n in _tree(module).body if isinstance(n, ast.ClassDef) and n.name == name)
    found: dict[str, Key] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and _is_class(*_where(module, base.id)):
            found |= {key.name: key for key in fields(*_where(module, base.id), prefix)}
    for statement, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or "ClassVar" in (annotation := ast.unparse(statement.annotation)):
            continue
        key = prefix + ast.unparse(statement.target)
        if _is_class(*_where(module, annotation)):
            found |= {inner.name: inner for inner in fields(*_where(module, annotation), f"{key}.")}
            continue
        said = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        kind = eval(annotation, {"__builtins__": {}}, TYPES)
        found[key] = Key(key, kind, _default(module, statement.value), " ".join(str(said).split()))
    return list(found.values())


@cache
def trainer_keys() -> tuple[str, ...]:
    """The names of what Lightning's Trainer can be given."""
    package = find_spec("lightning")
    source = Path(package.origin or "").with_name("pytorch") / "trainer" / "trainer.py" if package else Path()
    body = ast.parse(source.read_text(encoding="utf-8")).body
    trainer = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    make = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return tuple(argument.arg for argument in make.args.kwonlyargs)


def _default(module: str, value: ast.expr | None) -> Any:
    """The value of a field's default, which is written out, a constant of the module, or field(default_factory=…)."""
    if isinstance(value, ast.Call):
        made = value.keywords[0].value
        return ast.literal_eval(made.body) if isinstance(made, ast.Lambda) else TYPES[ast.unparse(made)]()
    if isinstance(value, ast.Name):
        return ast.literal_eval(_assigned(module, value.id))
    return None if value is None else ast.literal_eval(value)


@cache
def _tree(module: str) -> ast.Module:
    path = Path(__file__).parent.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _assigned(module: str, name: str) -> ast.expr:
    """What a module assigns to a name."""
    for node in _tree(module).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if name in map(ast.unparse, targets) and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            return node.value
    raise NameError(f"{module} assigns nothing to {name}")


def _where(module: str, name: str) -> tuple[str, str]:
    """The module and the name there of what a module calls `name`."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in ((alias.asname or alias.name) for alias in node.names):
            return node.module or "", next(a.name for a in node.names if (a.asname or a.name) == name)
    return module, name


def _is_class(module: str, name: str) -> bool:
    return module.startswith("masafusion_lab") and any(
        isinstance(node, ast.ClassDef) and node.name == name for node in _tree(module).body
    )
