"""A run's folder while a command writes into it: its log, and what is left of it when something goes wrong."""

from __future__ import annotations

import logging
import secrets
import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from masafusion_lab import InputError, config, interrupt

log = logging.getLogger(__name__)


class RunLog(logging.FileHandler):
    """The run's log: what a full disk does not take is left out, and hides no error; of libraries the warnings."""

    def filter(self, record: logging.LogRecord) -> Any:
        """Whether to write it."""
        return (record.levelno >= logging.WARNING or record.name.startswith("masafusion_lab")) and super().filter(
            record
        )

    def close(self) -> None:
        """Close it, with what it could not write."""
        with suppress(OSError):
            super().close()


@contextmanager
def recorded(
    experiment: config.Experiment, root: Path = Path("runs"), *, weights: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """The run's folder while it is written: with run.log, which has the warnings of libraries too, and the traceback of
    an error that nobody foresaw.

    It is `out`, or a new one below `root`; `weights`: see `Run`. Nothing is left of a new folder in which, because of
    something that cannot be used, nothing was made.
    """
    from masafusion_lab.runs import Run, explained

    now = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = Path(experiment.out) if experiment.out else root / now
    new, entered = not folder.exists(), False
    every = logging.getLogger()
    loud, logging.raiseExceptions = logging.raiseExceptions, False  # else a full disk prints W&B's tracebacks
    try:
        with Run(folder, config.to_yaml(experiment), experiment.force, weights):
            entered = True
            with explained(folder):
                file = RunLog(folder / "run.log", encoding="utf-8", errors="backslashreplace")
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            every.addHandler(file)
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
                every.removeHandler(file)
                file.close()
    except InputError:
        if new and entered and not any(folder.rglob("result.json")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        logging.raiseExceptions = loud
