"""The command line: masafusion edit | invert | bench | score | doctor | sync | cache. What people read is here."""

from __future__ import annotations

import logging
import secrets
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from masafusion_lab import InputError, config, interrupt
from masafusion_lab.manual import WithKeys, complete
from masafusion_lab.progress import Spoken, bar, console
from masafusion_lab.request import cases_of, read

log = logging.getLogger(__name__)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", autocompletion=complete, show_default=False, help="Keys, in any order."),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file of keys; of several the later win, and KEY=VALUE over all."
    ),
]
Printed = Annotated[bool, typer.Option("--print-config", help="Print the whole configuration, and do nothing.")]
InStore = Annotated[Path | None, typer.Option("--store", metavar="FOLDER", help="Another store than the usual one.")]

app = typer.Typer(
    name="masafusion",
    help="Edit real pictures in words, by inversion, then fusion (MaSaFusion, arXiv:2405.15313).\n\n"
    "Begin with [cyan]masafusion edit[/], which edits the built-in example; [cyan]masafusion edit --help[/] lists "
    "every key; [cyan]masafusion doctor[/] looks at this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache = typer.Typer(no_args_is_help=True, help="The inversions on disk, which are never computed twice.")
app.add_typer(cache, name="cache")


@app.command(cls=WithKeys)
def edit(words: Words = None, files: Files = None, print_config: Printed = False) -> None:
    """Edit a picture: invert it, or find its inversion in the store, and leave a folder of pictures and facts."""
    experiment = read(words or (), files or ())
    if print_config:
        typer.echo(config.to_yaml(experiment), nl=False)
        return
    from masafusion_lab import phases, tracking
    from masafusion_lab.runs import read_json

    cases = cases_of(experiment)
    lab = phases.build(experiment, track=bar)
    with recorded(experiment) as folder, tracking.recording(experiment, folder) as loggers:
        folders = phases.edit(lab, cases, folder, loggers=loggers)
    typer.echo(folder)
    for each in folders:
        result = read_json(each / "result.json")
        seconds = ", ".join(f"{phase} {spent:.1f} s" for phase, spent in result["seconds"].items())
        psnr = float(result["reconstruction_psnr"])
        typer.echo(f"{result['case']}: {seconds}; {result['rows']} UNet rows; reconstruction {psnr:.1f} dB")


@app.command(cls=WithKeys)
def invert(words: Words = None, files: Files = None, print_config: Printed = False) -> None:
    """Invert pictures (cases=FOLDER or a manifest, or image=FILE) into the store, from which every edit reads them."""
    experiment = read(words or (), files or (), edits=False)
    if print_config:
        typer.echo(config.to_yaml(experiment), nl=False)
        return
    from masafusion_lab import phases, tracking

    cases = cases_of(experiment)
    lab = phases.build(experiment, track=bar)
    with recorded(experiment) as folder, tracking.recording(experiment, folder) as loggers:
        for case, _, found in phases.invert(lab, cases, loggers=loggers):
            typer.echo(f"{case.id}: {'was in the store' if found else 'inverted'}")
    typer.echo(lab.store.root)


@app.command(cls=WithKeys)
def bench(
    words: Words = None,
    files: Files = None,
    status: Annotated[bool, typer.Option("--status", help="Only say how far it is.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Ten cases, in a folder of their own.")] = False,
) -> None:
    """Run a benchmark (--config configs/table1_picturebook.yaml), or go on with it: every row over every case.

    Exit status 1 if an edit failed; the others are done.
    """
    from masafusion_lab import bench as benches
    from masafusion_lab import publish

    experiment, benchmark = benches.read(files or (), words or (), quick)
    if status:
        publish.print_progress(benchmark)
        return
    with recorded(experiment):
        benches.edit(benchmark, track=bar)
        failed = publish.print_scores(experiment, benchmark)
    if failed:
        raise typer.Exit(1)


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="Of a benchmark.")],
    words: Words = None,
) -> None:
    """Take a benchmark's measures anew from its saved pictures, and write its tables and page anew."""
    from masafusion_lab import bench as benches
    from masafusion_lab import publish

    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: holds no benchmark; give the folder that masafusion bench wrote")
    experiment, benchmark = benches.read([folder / "config.yaml"], [*(words or ()), f"out={folder}"])
    with recorded(experiment):
        publish.print_scores(experiment, benchmark, again=True)


@app.command()
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


@app.command()
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


def main() -> None:
    """Run the command line; whatever goes wrong ends in one line on standard error and an exit status that tells it.

    0 done; 1 failed (the traceback is in a file that is named); 2 something given cannot be used; 128 + n signal n.
    """
    package, spoken = logging.getLogger("masafusion_lab"), Spoken()
    package.setLevel(logging.INFO)
    package.addHandler(spoken)
    try:
        with interrupt.handled():
            app()
    except InputError as error:
        code = _say(error, 2)
    except interrupt.Interrupted as stop:
        code = _say(stop, stop.code)
    except Exception as error:
        code = _say(_one_line(error), 1)
    finally:
        package.removeHandler(spoken)
    sys.exit(code)


def _say(what: object, code: int) -> int:
    console.print(Text.assemble(("masafusion: ", "red"), str(what)), soft_wrap=True)
    return code


def _one_line(error: Exception) -> str:
    """What an unforeseen error says, and the file that its traceback was written to."""
    place = getattr(error, "log", None)
    if place is None:
        with tempfile.NamedTemporaryFile("w", prefix="masafusion-", suffix=".log", delete=False) as file:
            file.writelines(traceback.format_exception(error))
            place = file.name
    said = " ".join(str(error).split())[:300]
    return f"{said if isinstance(error, ArithmeticError) else f'{type(error).__name__}: {said}'}; see {place}"


@contextmanager
def recorded(experiment: config.Experiment) -> Iterator[Path]:
    """The run's folder while it is written: with run.log, and the traceback of an error that nobody foresaw.

    Nothing is left of a new folder in which, because of something that cannot be used, nothing was made.
    """
    from masafusion_lab.runs import Run

    now = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = Path(experiment.out) if experiment.out else Path("runs") / now
    new, entered = not folder.exists(), False
    package = logging.getLogger("masafusion_lab")
    try:
        with Run(folder, config.to_yaml(experiment), experiment.force):
            entered = True
            file = logging.FileHandler(folder / "run.log", encoding="utf-8", errors="backslashreplace")
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            package.addHandler(file)
            try:
                yield folder
            except KeyboardInterrupt:
                raise interrupt.Interrupted(signal.SIGINT) from None
            except interrupt.Interrupted:
                log.info("the same command with out=%s goes on from here", folder)
                raise
            except InputError:
                raise
            except Exception as error:
                told = {"msg": "".join(traceback.format_exception(error)), "levelname": "ERROR", "name": __name__}
                file.emit(logging.makeLogRecord(told))
                error.log = folder / "run.log"  # type: ignore[attr-defined]
                raise
            finally:
                package.removeHandler(file)
                file.close()
    except InputError:
        if new and entered and not any(folder.rglob("result.json")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


if __name__ == "__main__":
    main()
