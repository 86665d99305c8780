"""What a person hears while something runs, on standard error: the log, and a bar for every long loop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from masafusion_lab import InputError

if TYPE_CHECKING:
    from masafusion_lab.data.case import Case

log = logging.getLogger(__name__)


class Voice(Console):
    """A console that falls silent when nobody listens any more, a terminal or pipe that has gone: a run goes on."""

    def __exit__(self, *error: Any) -> None:
        """Say what was printed."""
        try:
            super().__exit__(*error)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        """Do not end the process, as rich does."""
        self.quiet = True


console = Voice(stderr=True)
"""Results go to standard output."""


def bar(items: Iterable[Any], what: str) -> Iterator[Any]:
    """Hand on the items, with a bar, or off a terminal one line as they begin; a `Track` (see inversion.py)."""
    if not console.is_terminal:
        log.info("%s", what)
        yield from items
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, description=what)


class Lost:
    """The cases of so many that cannot be used, each told of as it is met, and all of them at the end."""

    def __init__(self, of: int) -> None:
        self.of, self.cases = of, list[str]()

    def __call__(self, case: Case, error: InputError) -> None:
        """Tell of one."""
        self.cases.append(case.id)
        log.warning("%s: %s", case.id, str(error).removeprefix(f"{case.id}: "))

    def end(self) -> None:
        """Say how many there were; exit status 1 if there was one."""
        if self.cases:
            log.warning("%d of %d cases could not be used: %s", len(self.cases), self.of, ", ".join(self.cases))
            raise typer.Exit(1)


class Library(logging.Logger):
    """Logger of a library: whatever it asks for, it reaches the root's handlers, of which none is the terminal."""

    propagate = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802
        """Add a handler, but none that writes to the terminal."""
        if not isinstance(hdlr, logging.StreamHandler) or isinstance(hdlr, logging.FileHandler):
            super().addHandler(hdlr)


class Spoken(logging.Handler):
    """Says on standard error what the library logs, a warning once, above a progress bar if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        said, warning = record.getMessage(), record.levelno >= logging.WARNING
        if warning and said in self.warned:
            return
        if warning:
            self.warned.add(said)
        console.print(Text(f"warning: {said}", "yellow") if warning else Text(said, "dim"), soft_wrap=True)


@contextmanager
def heard() -> Iterator[None]:
    """In here what this package logs is said, and what libraries log or warn of is not; enter before they are imported.

    It reaches the root's handlers, so a run's log.
    """
    package, every = logging.getLogger("masafusion_lab"), logging.getLogger()
    spoken, unsaid = Spoken(), logging.NullHandler()
    package.setLevel(logging.INFO)
    package.addHandler(spoken)
    every.addHandler(unsaid)  # or Python would say what libraries log
    logging.setLoggerClass(Library)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        package.removeHandler(spoken)
        every.removeHandler(unsaid)
        logging.setLoggerClass(logging.Logger)
        logging.captureWarnings(False)
