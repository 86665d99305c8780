"""What the commands of this folder share: numbers that can be, names that there are, errors in one line, bars."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from masafusion_lab import InputError, interrupt


def at_least(least: int) -> Callable[[str], int]:
    """What argparse takes for a whole number from `least` on."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text}: at least {least}")
        return value

    return number


def some_of(there: Collection[str]) -> Callable[[str], list[str]]:
    """What argparse takes for some of these names, separated by commas."""

    def names(text: str) -> list[str]:
        if strange := [name for name in text.split(",") if name not in there]:
            raise argparse.ArgumentTypeError(f"{strange[0]!r}: there are {', '.join(there)}")
        return text.split(",")

    return names


@contextmanager
def in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """In here what cannot be used ends in one line and exit status 2, a signal that is heeded in 128 and its number.

    A command of ours that ended badly has said why; its status is handed on.
    """
    try:
        yield
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except interrupt.Interrupted as stop:
        parser.exit(stop.code, f"{parser.prog}: {stop}\n")
    except subprocess.CalledProcessError as error:
        parser.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)


def show(found: Mapping[str, float], bars: Mapping[str, tuple[str, float]]) -> None:
    """Print numbers, each beside its bar (">=" or "<=", and the limit) if it has one."""
    table = Table("number", "value", "bar", "")
    for name, value in found.items():
        sign, limit = bars.get(name, ("", 0.0))
        reached = value <= limit if sign == "<=" else value >= limit
        verdict = ("reached" if reached else "NOT reached") if sign else ""
        table.add_row(name, f"{float(value):.2f}", f"{sign} {limit:g}" if sign else "", verdict)
    Console().print(table)
