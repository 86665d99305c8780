"""The command line: masafusion edit, attend, invert, sweep, bench, score ... What people read is written here."""

from __future__ import annotations

import ctypes
import io
import logging
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import rich
import typer
from rich.text import Text

from masafusion_lab import InputError, config, interrupt, request, upkeep
from masafusion_lab.manual import WithKeys, complete
from masafusion_lab.progress import Lost, Voice, bar, console, heard
from masafusion_lab.recorded import recorded
from masafusion_lab.request import cases_of, read
from masafusion_lab.web.gate import check_place

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


@app.command(cls=WithKeys)
def edit(words: Words = None, files: Files = None, print_config: Printed = False) -> None:
    """Edit a picture: invert it, or find its inversion in the store, and leave a folder of pictures and facts.

    A case of several that cannot be edited stops no other; exit status 1 if there was one.
    """
    experiment = replace(read(words or (), files or (), runs=not print_config), axes={})  # of a sweep's file one point
    if print_config:
        typer.echo(config.to_yaml(experiment), nl=False)
        return
    from masafusion_lab import phases, tracking
    from masafusion_lab.callbacks import Attend
    from masafusion_lab.runs import read_json
    from masafusion_lab.watch import Watch

    cases = cases_of(experiment)
    lab = phases.build(experiment, track=bar)
    with recorded(experiment, weights=lab.model.weights) as folder, tracking.recording(experiment, folder) as loggers:
        watching = [Attend(Watch(), every)] if (every := experiment.tracking.attention) else []
        how: dict[str, Any] = {"force": experiment.force, "lost": (lost := Lost(len(cases)))}
        folders = phases.edit(lab, cases, folder, loggers=loggers, callbacks=watching, **how)
    typer.echo(folder)
    for each in folders:
        result = read_json(each / "result.json")
        seconds = ", ".join(f"{phase} {spent:.1f} s" for phase, spent in result["seconds"].items())
        psnr = float(result["reconstruction_psnr"])
        typer.echo(f"{result['case']}: {seconds}; {result['rows']} UNet rows; reconstruction {psnr:.1f} dB")
    lost.end()


@app.command(cls=WithKeys)
def attend(
    words: Words = None,
    files: Files = None,
    print_config: Printed = False,
    steps: Annotated[str, typer.Option(metavar="A:B", help="Steps A to B - 1 are watched.")] = ":",
    layers: Annotated[str, typer.Option(metavar="A:B", help="Layers A to B - 1 are watched, in running order.")] = ":",
    bins: Annotated[int, typer.Option(min=1, help="Parts of the run that maps are kept apart by.")] = 5,
    every: Annotated[int, typer.Option(min=1, help="Self-attention is looked at in one of so many steps.")] = 5,
    heads: Annotated[bool, typer.Option(help="Whether word maps are kept apart by heads.")] = True,
    null: Annotated[bool, typer.Option(help="Whether guidance's null half is watched too, for maps.")] = False,
    limit_gb: Annotated[float, typer.Option("--limit-gb", min=0, help="Memory that maps may take.")] = 1.0,
) -> None:
    """Edit as edit does, and leave the attention too: figures, maps.safetensors, attention.html to explore it.

    Of any method; method.name=replay watches a picture that is only inverted, and needs no target.
    """
    experiment = read(words or (), files or (), runs=not print_config)
    if print_config:
        typer.echo(config.to_yaml(experiment), nl=False)
        return
    from masafusion_lab import phases, tracking
    from masafusion_lab.callbacks import Attend
    from masafusion_lab.explorer import is_kept, keep
    from masafusion_lab.watch import Watch, span

    halves = ("null", "text") if null else ("text",)
    watch = Watch(span(steps, "--steps"), span(layers, "--layers"), bins, heads, every, halves, limit_gb)
    cases = cases_of(experiment)
    lab = phases.build(experiment, track=bar)
    with recorded(experiment, weights=lab.model.weights) as folder, tracking.recording(experiment, folder) as loggers:
        how: dict[str, Any] = {"force": experiment.force, "lost": (lost := Lost(len(cases)))}
        how |= {"loggers": loggers, "callbacks": [Attend(watch, keep=keep)], "whole": lambda f: is_kept(f, watch)}
        folders = phases.edit(lab, cases, folder, **how)
    for each in folders:
        typer.echo(each / "attention.html")
    lost.end()


@app.command(cls=WithKeys)
def invert(words: Words = None, files: Files = None, print_config: Printed = False) -> None:
    """Invert pictures (cases=FOLDER or a manifest, or image=FILE) into the store, from which every edit reads them.

    One of several that cannot be used stops no other; exit status 1 if there was one.
    """
    experiment = read(words or (), files or (), edits=False, runs=not print_config)
    if print_config:
        typer.echo(config.to_yaml(experiment), nl=False)
        return
    from masafusion_lab import phases, tracking
    from masafusion_lab.launch import launch

    cases = cases_of(experiment)
    lab, lost = phases.build(experiment, track=bar), Lost(len(cases))
    with recorded(experiment) as folder, tracking.recording(experiment, folder) as loggers:
        if experiment.launch.by != "here":
            lab.model.rest()
            launch("invert", folder, experiment.launch, experiment.model.device, items=len(cases), track=bar)
        for case, _, found in phases.invert(lab, cases, loggers=loggers, lost=lost if len(cases) > 1 else None):
            typer.echo(f"{case.id}: {'was in the store' if found else 'inverted'}")
    typer.echo(lab.store.root)
    lost.end()


@app.command(cls=WithKeys)
def sweep(words: Words = None, files: Files = None, print_config: Printed = False) -> None:
    """Make an edit at many points (axes.KEY=VALUES), computing once what they have in common; say which is best."""
    from masafusion_lab import survey

    experiment = read(words or (), files or (), runs=not print_config, needs=survey.problems)
    if print_config:
        typer.echo(config.to_yaml(experiment), nl=False)
        return
    from masafusion_lab import phases, tracking
    from masafusion_lab.sweep import sweep as run

    cases = cases_of(experiment)
    lab = phases.build(experiment, track=bar)
    with recorded(experiment, weights=lab.model.weights) as folder, tracking.recording(experiment, folder) as loggers:
        found = run(experiment, cases, folder, lab=lab, track=bar, loggers=loggers, told=lambda f: typer.echo(f.said))
    typer.echo(f"recommended: {found.best.point if found.best else 'none'}")
    typer.echo(folder / "report.html")
    if found.failures:
        log.warning("%s", found.lost)
        raise typer.Exit(1)


@app.command()
def bench(
    words: Words = None,
    files: Files = None,
    status: Annotated[bool, typer.Option("--status", help="Only say how far it is.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Ten cases, in a folder of their own.")] = False,
) -> None:
    """Run a benchmark (--config configs/table1_picturebook.yaml), or go on with it: every row over every case.

    Exit status 1 if an edit failed; the others are done.
    """
    asked = request.benchmark(files or (), words or (), quick, writes=not status)
    from masafusion_lab import bench as benches
    from masafusion_lab import publish
    from masafusion_lab.launch import launch

    experiment, benchmark = benches.of(*asked)
    if status:
        publish.print_progress(benchmark)
        return
    with recorded(experiment) as folder:
        if experiment.launch.by == "here":
            benches.edit(benchmark, track=bar)
        else:
            items = len(list(benchmark.parts()))
            launch("bench", folder, experiment.launch, experiment.model.device, items=items, track=bar)
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


@app.command("app", cls=WithKeys)
def lab(
    words: Words = None,
    files: Files = None,
    host: Annotated[str, typer.Option(help="Who may reach it: 127.0.0.1 this machine alone.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Free from 7860 on, if not given.", show_default=False)] = None,
) -> None:
    """Draw region and sketch in the browser, run edits and compare them; annotate a set of pictures (cases=FOLDER).

    Keys say which model, store and record all of it uses, and what stands in the form; out=FOLDER where it is kept.
    """
    check_place(host, port)
    experiment = read(words or (), files or (), edits=False)
    try:
        from masafusion_lab.app import serve
    except ImportError as error:
        raise InputError(f"the lab needs Gradio ({error}): pip install 'masafusion-lab[app]'") from None
    from masafusion_lab.web.studio import Studio

    studio = Studio(experiment, words or (), files or (), Path(experiment.out or "runs/app"))
    serve(studio, host=host, port=port, told=lambda url: typer.echo(f"{url}  Ctrl-C ends it"))


upkeep.add_to(app)


def main() -> None:
    """Run the command line; whatever goes wrong ends in one line on standard error and an exit status that tells it.

    0 done; 1 failed (the traceback is in a file that is named); 2 something given cannot be used; 128 + n signal n.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    rich.get_console().__class__ = Voice  # of Lightning's bar
    _keep_memory()
    try:
        with heard(), interrupt.handled():
            app()
    except InputError as error:
        code = _say(error, 2)
    except interrupt.Interrupted as stop:
        code = _say(stop, stop.code)
    except Exception as error:
        code = _say(_one_line(error), 1)
    sys.exit(code)


def _keep_memory() -> None:
    """Have glibc keep what a step frees for the next: giving pages back and taking them again costs 7 %."""
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


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


if __name__ == "__main__":
    main()
