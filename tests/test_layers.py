"""Who may import whom: the table of layers, held by reading the imports."""

import ast
from pathlib import Path

import pytest

import masafusion_lab

PACKAGE = Path(masafusion_lab.__file__).parent
LAYERS = [
    "schedule fusion given sites attention residual words hub axes metrics ranks protocol region choices configfile "
    "sources once memory",
    "lockstep shared model loading network contrast taps wordmaps encoders",
    "inversion algorithm2 null_text trainer store runs results interrupt",
    "methods",
    "data hints pidinet editor callbacks report tracking fonts look heat maps watch figures explorer annotate",
    "config keys request manual lab batches inverting phases cli upkeep recorded progress doctor sync app web "
    "survey runner sweep forecast landscape plots surveypage search clusters launch bench scoring tables benchpage "
    "publish",
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
LOADERS = {"model", "loading", "hub", "encoders"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def unit(module):
    """The name in the table of a module of the package: its file, or its folder."""
    return module.split(".")[1]


def imports(path):
    """The modules that a file imports, at its top or inside functions, with the line of each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            if node.module == "masafusion_lab":
                yield from ((f"masafusion_lab.{name.name}", node.lineno) for name in node.names)
            else:
                yield node.module, node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_no_layer_above_its_own(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module, line in imports(path):
        where = f"{path.name}:{line} imports {module}"
        if module.split(".")[0] in ("diffusers", "transformers") and own != "picturebook":
            assert own in LOADERS, f"{where}: model.py is the only door to the loaders"
        if own in ("methods", "schedule", "fusion", "attention", "lockstep", "model", "loading"):
            assert module.split(".")[0] not in ("lightning", "wandb"), where
        if (
            not module.startswith("masafusion_lab.")
            or unit(module) == own
            or unit(module) not in {*LAYER, "picturebook"}
        ):
            continue
        if own == "picturebook":
            raise AssertionError(f"{where}: the drawing of the world imports none of the layers")
        assert LAYER.get(unit(module), 0) <= LAYER[own], f"{where}, which lies above it"
        if own == "methods":
            assert LAYER[unit(module)] != 2, f"{where}: methods know no inversion"


def test_methods_do_not_import_each_other():
    known = {"protocol"}
    for path in (PACKAGE / "methods").glob("[a-z]*.py"):
        for module, line in imports(path):
            if module.startswith("masafusion_lab.methods."):
                assert module.split(".")[2] in known, f"{path.name}:{line} imports {module}"


def test_every_module_has_its_layer_and_one_idea():
    for path in MODULES:
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        assert name in {*LAYER, "picturebook"}, f"{path}: give it a layer in this test and in the map"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, f"{path} is two ideas"


def on_import(path):
    """The modules that a file imports when it is itself imported: at its top, but for those of its annotations."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("name", ["cli", "app"])
def test_neither_help_nor_the_first_page_of_the_lab_waits_for_torch(name):
    left, seen = [f"masafusion_lab.{name}"], set()
    while left:
        module = left.pop()
        assert module.split(".")[0] not in ("torch", "lightning", "diffusers", "transformers", "matplotlib")
        place = PACKAGE.parent.joinpath(*module.split("."))
        files = [f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()]
        if module not in seen and files:
            left += [*on_import(files[0]), module.rpartition(".")[0]]
        seen.add(module)
    assert f"masafusion_lab.{name}" in seen
    assert len(seen) > 20
