"""README's table of methods says what the code does: needs, inversion, network and cost."""

import re
from pathlib import Path

import pytest

from masafusion_lab import InputError, config
from masafusion_lab.methods import METHODS
from masafusion_lab.model import StableDiffusion

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TABLE = {
    name: [cell.strip() for cell in cells.split("|")]
    for name, cells in re.findall(r"^\| `(\w+)` \|(.*)\|$", README.partition("| `method.name` |")[2], re.MULTILINE)
    if name in METHODS
}
"""Method to its cells: needs, inversion, network, rule, rows."""
NETWORK = {"instruct": "8 channels", "hive": "8 channels", "inpaint": "9 channels"}
STEPS = 50


@pytest.fixture(scope="module")
def sites(tiny_root):
    return StableDiffusion.load(str(tiny_root)).sites


def made(name, settings=""):
    """The method with settings as a person types them."""
    return config.method(config.load(words=[f"method.name={name}", *(f"method.{word}" for word in settings.split())]))


def lacking(plan, **given):
    """Whether the plan is refused a batch without region, or without sketch."""
    there = {"masked": True, "hinted": True} | given
    try:
        plan.check(steps=STEPS, layers=10, latents=Everything(), prompts=Everything(), **there)
    except InputError:
        return True
    return False


class Everything:
    def __contains__(self, name):
        return True


def needed(method, sites):
    """What it needs beside prompts, and its network."""
    plan, found = method.plan(sites, STEPS), set()
    found |= {"mask"} if lacking(plan, masked=False) else set()
    found |= {"sketch"} if lacking(plan, hinted=False) else set()
    found |= {"instruction"} if method.needs.instruction else set()
    adapter = {"adapter"} if "sketch" in found else set()
    return found | adapter | ({NETWORK[method.needs.network]} if method.needs.network else set())


def test_every_method_is_in_the_table():
    assert sorted(TABLE) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_its_row_is_true(sites, name):
    needs_cell, inversion, network, _, rows = TABLE[name]
    said = re.findall(r"(\w[\w ]*?)(?: \((not )?`([^`]+)`\))?(?:, |$)", f"{needs_cell}, {network}".strip(", "))
    usual = needed(made(name), sites)
    assert usual == {what for what, without, settings in said if without or not settings}
    for what, without, settings in said:
        if settings:
            assert (what in needed(made(name, settings), sites)) == (not without)
    assert inversion == ("any" if made(name).needs.inversion else "none")
    for cost, masked, settings in re.findall(r"(\d+)(?: (with a mask)| \(`([^`]+)`\))?(?:; |$)", rows):
        method = made(name, settings)
        plan = method.plan(sites, STEPS)
        assert int(cost) == (plan if masked else plan.everywhere()).cost(STEPS, method.guidance)
