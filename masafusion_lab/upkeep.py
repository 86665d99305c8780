"""The commands that look after what is there: doctor, sync, cache."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

InStore = Annotated[Path | None, typer.Option("--store", metavar="FOLDER", help="Another store than the usual one.")]
cache = typer.Typer(no_args_is_help=True, help="The inversions on disk, which are never computed twice.")


def add_to(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(doctor)
    app.command()(sync)
    app.add_typer(cache, name="cache")


def doctor(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Look at this machine and installation: what there is, and what is amiss. Exit status 1 if an edit cannot run."""
    from dataclasses import asdict
    from json import dumps

    from masafusion_lab.doctor import examine

    findings = list(examine())
    if json:
        typer.echo(dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table(box=None, show_header=False)
        marks = {"ok": Text("ok", "green"), "note": Text("note", "yellow"), "bad": Text("bad", "red")}
        for finding in findings:
            table.add_row(marks[finding.state], finding.what, Text(finding.said))
        Console(highlight=False).print(table)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def sync(
    root: Annotated[Path, typer.Argument(help="Where the runs lie.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them.")] = False,
) -> None:
    """Send the W&B runs that were recorded offline."""
    from masafusion_lab.sync import send, unsent

    runs = unsent(root)
    for run in runs:
        typer.echo(run)
    if runs and not dry_run:
        send(runs)
    typer.echo(f"{len(runs)} {'to send' if dry_run else 'sent'}")


@cache.command("ls")
def cache_ls(store: InStore = None) -> None:
    """List the inversions, least recently used first."""
    from masafusion_lab.store import Store

    there = Store(store)
    table = Table(box=None, header_style="dim")
    for heading in ("key", "MB", "last used", "inversion", "prompt"):
        table.add_column(heading)
    for entry in there.entries():
        used = f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}"
        how, prompt = entry.facts.get("inversion", {}).get("name", "?"), str(entry.facts.get("prompt", "?"))
        table.add_row(entry.key[:12], f"{entry.bytes / 1e6:.1f}", used, how, Text(prompt))
    Console(highlight=False).print(table)
    typer.echo(f"{there.root}: {there.size() / 1e6:.1f} MB")


@cache.command("verify")
def cache_verify(store: InStore = None) -> None:
    """Read every inversion and set aside what is damaged; exit status 1 if anything was."""
    from masafusion_lab.store import Store

    there = Store(store)
    damaged = there.verify()
    typer.echo(f"{len(there.entries())} whole, {len(damaged)} set aside as *.corrupt")
    if damaged:
        raise typer.Exit(1)


@cache.command("prune")
def cache_prune(
    limit: Annotated[float, typer.Option("--gb", min=0, help="Gigabytes to keep at most.")] = 10,
    store: InStore = None,
) -> None:
    """Delete the inversions that were not used for the longest time."""
    from masafusion_lab.store import Store

    there = Store(store)
    freed = there.prune(int(limit * 1e9))
    typer.echo(f"{freed / 1e6:.1f} MB freed; {there.size() / 1e6:.1f} MB in {there.root}")
