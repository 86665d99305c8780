"""Loggers of a run: W&B, CSV or TensorBoard, a mirror of its folder whose failures never cost a result."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from masafusion_lab import InputError, __version__

log = logging.getLogger(__name__)

MODES = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
"""What the values of WANDB_MODE mean for tracking.mode."""


class Guarded(Logger):
    """A logger that is given up, with one warning, when it fails: the run goes on without it."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self.logger, self.broken = logger, False

    @property
    def name(self) -> str | None:
        """The name of the record."""
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        """The version of the record."""
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        """Where the record is kept."""
        return self.logger.save_dir

    def attempt(self, what: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Do it, unless something failed before."""
        if self.broken:
            return
        try:
            what(*args, **options)
        except Exception as error:  # whatever a tracker raises
            self.broken = True
            kind = type(self.logger).__name__
            log.warning("%s failed and is given up (%s); results and run go on without it", kind, _one_line(error))

    def log_hyperparams(self, params: Any, *args: Any, **options: Any) -> None:
        """Record settings."""
        self.attempt(self.logger.log_hyperparams, params, *args, **options)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers."""
        self.attempt(self.logger.log_metrics, dict(metrics), step=step)

    def save(self) -> None:
        """Write what is held back."""
        self.attempt(self.logger.save)

    def finalize(self, status: str) -> None:
        """A fit or a prediction has ended."""
        self.attempt(self.logger.finalize, status)


def loggers(experiment: Any, folder: Path) -> list[Logger]:
    """The loggers that an experiment asks for, which keep everything in its run folder; none if they cannot be had.

    W&B is online only with a key: nobody is asked for one, and without it the record waits for `masafusion sync`.
    """
    tracking, folder = experiment.tracking, Path(folder)
    mode = tracking.mode
    if mode == "auto" and tracking.logger == "wandb":
        mode = mode_of_environment()
    if mode == "off":
        return []
    makers: dict[str, Callable[[], Any]] = {
        "csv": lambda: CSVLogger(folder, name="csv", flush_logs_every_n_steps=10),
        "tensorboard": lambda: TensorBoardLogger(folder, name="tensorboard"),
        "wandb": lambda: _wandb(experiment, folder, mode),
    }
    if tracking.logger not in makers:
        raise InputError(f"tracking.logger={tracking.logger!r}: must be one of {', '.join(makers)}")
    try:
        logger = Guarded(makers[tracking.logger]())
    except Exception as error:  # not installed, broken, or refusing
        log.warning("%s cannot record this run (%s); its folder is complete", tracking.logger, _one_line(error))
        return []
    logger.log_hyperparams({**asdict(experiment), "masafusion_lab": __version__})
    return [logger]


@contextmanager
def recording(experiment: Any, folder: Path) -> Iterator[list[Logger]]:
    """The `loggers`, closed at the end whatever happens, waiting a minute at most for what is still to be sent.

    Then it is said how to send what was recorded offline, if anything was.
    """
    opened, useless = loggers(experiment, folder), False
    try:
        yield opened
    except InputError:
        useless = True  # nothing was done, and its folder goes
        raise
    finally:
        for logger in opened:
            if isinstance(logger, Guarded) and isinstance(logger.logger, WandbLogger):
                run = logger.logger.experiment
                logger.attempt(run.finish)
                if run.offline and not useless:
                    key = "" if has_key() else ", with a key, which wandb login gives it"
                    log.info("W&B: recorded offline; `masafusion sync %s` sends it later%s", folder, key)


def log_pictures(logger: Any, key: str, pictures: Mapping[str, Image.Image], step: int, of: str) -> None:
    """Record pictures by name, where a logger can; `of` which case they are."""
    if isinstance(logger, Guarded):
        logger.attempt(log_pictures, logger.logger, key, pictures, step, of)
    elif isinstance(logger, WandbLogger):
        logger.log_image(key, list(pictures.values()), step=step, caption=[f"{of}: {name}" for name in pictures])
    elif isinstance(logger, TensorBoardLogger):
        for name, picture in pictures.items():
            array = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image(f"{key}/{name}", array, step, dataformats="HWC")


def log_table(logger: Any, key: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Record rows of a table, which may hold pictures, where a logger has tables."""
    if isinstance(logger, Guarded):
        logger.attempt(log_table, logger.logger, key, rows, step)
    elif isinstance(logger, WandbLogger) and rows:
        from wandb import Image as Shown

        cells = [[Shown(cell) if isinstance(cell, Image.Image) else cell for cell in row.values()] for row in rows]
        logger.log_table(key, list(rows[0]), cells, step=step)


def log_curves(logger: Any, key: str, x: Sequence[float], curves: Mapping[str, Sequence[float]], step: int) -> None:
    """Record curves over x, whose meaning is the last part of the key, where a logger can draw them."""
    if isinstance(logger, Guarded):
        logger.attempt(log_curves, logger.logger, key, x, curves, step)
    elif isinstance(logger, WandbLogger) and x:  # W&B draws none without points
        from wandb import plot

        chart = plot.line_series(list(x), [list(y) for y in curves.values()], list(curves), key, "step")
        logger.log_metrics({key: chart}, step=step)  # type: ignore[dict-item]


def mode_of_environment() -> str:
    """The mode that WANDB_MODE says, or that follows from there being a key."""
    if wish := os.environ.get("WANDB_MODE"):
        if wish in MODES:
            return MODES[wish]
        log.warning("WANDB_MODE=%s is none of %s: ignored", wish, ", ".join(MODES))
    return "online"


def job_type(experiment: Any) -> str:
    """What a run does, as W&B lists it."""
    kinds = {"bench": experiment.bench.rows, "sweep": experiment.axes, "invert": experiment.cases}
    return next((kind for kind, there in kinds.items() if there), "edit")


def _wandb(experiment: Any, folder: Path, mode: str) -> WandbLogger:
    """A WandbLogger whose run is open, online or offline, in the run folder."""
    import wandb

    tracking = experiment.tracking
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    identity = folder / "wandb" / "id"  # parts of a run that was cut short are sent as one
    if not identity.exists():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    options: dict[str, Any] = {
        "project": tracking.project,
        "entity": tracking.entity or None,
        "group": tracking.group or None,
        "name": tracking.name or folder.resolve().name,
        "tags": list(tracking.tags),
        "job_type": job_type(experiment),
        "id": identity.read_text(encoding="utf-8"),
        "dir": str(folder),
        "reinit": "create_new",
    }
    settings = wandb.Settings(silent=True, console="off", init_timeout=15, finish_timeout=60)
    run = None
    with _environment(folder):
        if mode == "online" and has_key():
            try:
                run = wandb.init(mode="online", resume="allow", settings=settings, **options)
                log.info("W&B: %s", run.url)
            except Exception as error:  # no network, a wrong key
                log.warning("W&B: %s", _one_line(error))
                options["id"] = secrets.token_hex(4)  # W&B's service still holds the other
                identity.write_text(options["id"], encoding="utf-8")
        if run is None:
            run = wandb.init(mode="offline", settings=settings, **options)
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run, save_dir=folder)


def has_key() -> bool:
    """Whether W&B finds a key in the environment or in a netrc file."""
    from wandb import Settings
    from wandb.sdk.lib.wbauth import read_netrc_auth

    _hush()
    if os.environ.get("WANDB_API_KEY"):
        return True
    settings = Settings()
    settings.update_from_env_vars({name: v for name, v in os.environ.items() if v and name != "WANDB_MODE"})
    return read_netrc_auth(host=settings.base_url) is not None


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """With W&B silent, its files in the run folder, and without values that it would choke on; restored afterwards."""
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    _hush()  # until W&B has read WANDB_SILENT
    try:
        for name, value in before.items():
            if name == "WANDB_MODE" or not value:
                del os.environ[name]
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str(folder.resolve() / "wandb"))
        os.environ["WANDB_SILENT"] = "true"
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
            del os.environ[name]
        os.environ.update(before)


def _hush() -> None:
    """Have W&B log what it would print, as of its settings and of a netrc file."""
    from wandb import Settings, termsetup

    termsetup(Settings(silent=True), logging.getLogger("wandb"))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
