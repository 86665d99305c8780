"""Sending the W&B runs that were recorded offline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from masafusion_lab import InputError


def unsent(root: Path) -> list[Path]:
    """The folders under `root` of offline runs that have ended and not been sent, oldest first. Raises InputError."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds the runs, as in masafusion sync runs")
    files = root.rglob("offline-run-*/run-*.wandb")
    runs = (f.parent for f in files if not f.with_name(f"{f.name}.synced").exists())
    return sorted((run for run in runs if not _goes_on(run.parents[1])), key=lambda run: run.name)


def _goes_on(folder: Path) -> bool:
    """Whether a process writes a run into the folder: half of it would be sent, and taken for the whole."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # others' runs, which may be read only
        return False


def send(runs: Sequence[Path]) -> None:
    """Send them by `wandb sync`, which marks those that arrived. Raises InputError if one did not."""
    here = {key: value for key, value in os.environ.items() if key not in ("WANDB_MODE", "WANDB_SILENT")}
    command = [sys.executable, "-m", "wandb", "sync", *map(str, runs)]
    done = subprocess.run(command, env=here, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    left = [run for run in runs if not any(run.glob("run-*.wandb.synced"))]
    if done.returncode or left:
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        why = said[-1].strip() if said else f"exit status {done.returncode}"
        raise InputError(f"{len(left)} of {len(runs)} runs were not sent: {why}; needs the network and `wandb login`")
