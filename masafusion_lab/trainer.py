"""Lightning's Trainer as it is run here: on the model's device, without its tips, leaving the process as it was."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng

from masafusion_lab import InputError


def make(
    device: torch.device,
    options: Mapping[str, Any],
    *,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[L.Callback] = (),
) -> L.Trainer:
    """A Trainer for one device, whose every default is overridden by `options`, keys of lightning's Trainer.

    A progress bar only on a terminal, no checkpoints of its own, every step logged. Raises InputError for an option
    that Lightning refuses, or for several devices.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    ours: dict[str, Any] = {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "plugins": [LightningEnvironment()],  # else a SLURM allocation is taken for a request
        "max_epochs": 1,
        "logger": list(loggers) or False,
        "callbacks": list(callbacks),
        "log_every_n_steps": 1,
        "enable_progress_bar": sys.stdout.isatty(),
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, L.callbacks.Checkpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "deterministic": "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else deterministic,
    }
    try:
        trainer = L.Trainer(**{**ours, **options})
    except (TypeError, ValueError, L.utilities.exceptions.MisconfigurationException) as e:
        raise InputError(f"trainer.*: {' '.join(str(e).split())}") from e
    if trainer.world_size > 1:
        raise InputError(f"trainer.devices={options.get('devices')}: one run has one device; start a run for each")
    return trainer


@contextmanager
def undisturbed(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Make and run a Trainer in here: random state, grad mode, determinism, signals and log levels are put back.

    SIGTERM, after which Lightning exits 0, calls `check` and then raises SystemExit(143); SIGINT, after which it exits
    1 and stays deaf, raises KeyboardInterrupt.
    """
    lightning = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in lightning]
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, cublas = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    main = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        with warnings.catch_warnings(), isolate_rng(), torch.inference_mode(False), torch.enable_grad():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            for logger in lightning:
                logger.setLevel(logging.WARNING)
            yield
    except SIGTERMException:
        check()
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as e:
        if isinstance(e.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        for logger, level in zip(lightning, levels, strict=True):
            logger.setLevel(level)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.benchmark = benchmark
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": cublas} if cublas is not None else {}
        for s, handler in handlers.items():
            signal.signal(s, handler)
