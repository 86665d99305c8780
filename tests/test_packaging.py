"""What is installed: all that the package reads, nothing else, beside dependencies that it runs with."""

import tomllib
from fnmatch import fnmatch
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from masafusion_lab import request

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEEDED = {need.name: need.specifier for need in map(Requirement, PYPROJECT["project"]["dependencies"])}


def test_the_built_in_example_and_every_other_file_of_the_package_are_installed():
    package = ROOT / "masafusion_lab"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["masafusion_lab"]
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert request.EXAMPLE in files
    assert files == {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}


def test_the_package_alone_is_installed():
    patterns = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    tops = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    assert [top for top in tops if any(fnmatch(top, pattern) for pattern in patterns)] == ["masafusion_lab"]


def test_no_python_is_promised_that_a_dependency_refuses():
    ours = SpecifierSet(PYPROJECT["project"]["requires-python"])
    for name in NEEDED:
        theirs = SpecifierSet(metadata(name)["Requires-Python"] or "")
        refused = [f"3.{minor}" for minor in range(8, 15) if f"3.{minor}.0" in ours and f"3.{minor}.0" not in theirs]
        assert not refused, f"{name} needs Python {theirs}"


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("torch", ["2.6.0", "2.13.0+cpu", "2.15.0+cu128"], ["3.0.0"]),
        ("lightning", ["2.6.4", "2.6.6"], ["2.6.2", "2.6.3"]),
    ],
)
def test_releases_that_run_are_allowed_and_malicious_ones_are_not(name, allowed, refused):
    assert all(version in NEEDED[name] for version in allowed)
    assert not any(version in NEEDED[name] for version in refused)
