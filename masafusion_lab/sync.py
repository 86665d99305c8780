"""Sending the W&B runs that were recorded offline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from masafusion_lab import InputError


def unsent(root: Path) -> list[Path]:
    """The folders under `root` of offline runs that have not been sent, oldest first. Raises InputError."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds the runs, as in masafusion sync runs")
    files = root.rglob("offline-run-*/run-*.wandb")
    return sorted((f.parent for f in files if not f.with_name(f"{f.name}.synced").exists()), key=lambda run: run.name)


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
