"""What a module writes at its top, read from its source, so that nothing is imported to know it."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module of any installed package. Raises FileNotFoundError where there is none."""
    package, *parts = module.split(".")
    spec = find_spec(package)
    path = Path((spec and spec.origin) or package).parent.joinpath(*parts)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def assigned(module: str, name: str) -> ast.expr:
    """What a module assigns to a name. Raises NameError where it assigns nothing."""
    for node in tree(module).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if name in map(ast.unparse, targets) and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            return node.value
    raise NameError(f"{module} assigns nothing to {name}")


def listed(module: str, name: str) -> dict[str, ast.expr]:
    """The dictionary that a module writes out under a name: its keys, each with its value's source."""
    written = assigned(module, name)
    if not isinstance(written, ast.Dict):
        raise TypeError(f"{module}.{name} must be written as a dictionary")
    pairs = zip(written.keys, written.values, strict=True)
    return {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}


def where(module: str, name: str) -> tuple[str, str]:
    """The module and the name there of what a module calls `name`."""
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in ((alias.asname or alias.name) for alias in node.names):
            return node.module or "", next(a.name for a in node.names if (a.asname or a.name) == name)
    return module, name


def class_of(module: str, name: str) -> ast.ClassDef:
    """The class that a module defines. Raises StopIteration where it defines none."""
    return next(node for node in tree(module).body if isinstance(node, ast.ClassDef) and node.name == name)


def is_class(module: str, name: str) -> bool:
    """Whether this is a class of this package."""
    return module.startswith("masafusion_lab") and any(
        isinstance(node, ast.ClassDef) and node.name == name for node in tree(module).body
    )
