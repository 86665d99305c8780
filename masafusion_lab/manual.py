"""Help that teaches: examples, and every key with its default, type and meaning; and the completion of keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_origin

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from masafusion_lab import keys

TITLES = {
    "": "The edit and the run",
    "region": "The region",
    "model": "The model",
    "tracking": "The record",
    "sweep": "The sweep",
    "bench": "The benchmark",
    "launch": "Who runs it",
}
EXAMPLES = {
    "the built-in example": "masafusion edit",
    "a picture of yours, inside a box": 'masafusion edit image=cat.png source="a cat" target="a dog" box=20,40,90,120 '
    "canny=auto",
    "an experiment on file, and what differs from it": "masafusion edit --config configs/sd14_null_text.yaml seed=1",
    "the same, with the attention to explore": "masafusion attend",
    "what would be run": "masafusion edit steps=20 method.preserve_steps=[0,10] --print-config",
    "the 55 windows of fusion of Figure 12": "masafusion sweep axes.method.fusion_steps='windows(0,50,5)'",
}


class WithKeys(TyperCommand):
    """A command whose help goes on with examples, and every key with its default, type and meaning."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        super().format_help(ctx, formatter)
        out = Console(highlight=False)
        out.print("Examples", style="bold")
        for what, command in EXAMPLES.items():
            out.print(Text.assemble(f"  {what}\n", (f"    {command}", "cyan")), soft_wrap=True)
        for title, listed in keys.tables().items():
            out.print(_table(TITLES.get(title, title), listed))


def _table(title: str, listed: Iterable[keys.Key]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="dim", ratio=2)
    table.add_column(ratio=5)
    for key in listed:
        if get_origin(key.type) is dict:
            name = Text(f"{key.name}.…=")
        else:
            name = Text(f"{key.name}={keys.written(key.default)}")
        table.add_row(name, Text(key.kind), Text(key.doc))
    return table


def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The words that may stand here, each with its meaning."""
    return list(keys.complete(incomplete, ctx.params.get("words") or ()))
