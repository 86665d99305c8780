"""What this machine and installation have, and what is amiss: told, never raised."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from masafusion_lab import __version__

OPTIONAL = ("wandb", "tensorboard", "torchvision", "accelerate")
"""Packages without which an edit runs, but which can break others when they themselves are broken."""


@dataclass(frozen=True)
class Finding:
    """One fact: `state` is ok, note (worth knowing) or bad (an edit will not run)."""

    what: str
    state: Literal["ok", "note", "bad"]
    said: str


def examine() -> Iterator[Finding]:
    """Look at everything; whatever breaks while it is looked at is itself a finding."""
    yield Finding("masafusion", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for what, look in LOOKS.items():
        try:
            yield look(what)
        except Exception as error:
            yield Finding(what, "bad", _one_line(error))
    yield from map(_package, OPTIONAL)


def _torch(what: str) -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = f"{torch.__version__}, {torch.get_num_threads()} threads on {cores} cores"
    if torch.get_num_threads() > cores:
        return Finding(what, "note", f"{said}: they wait for one another; set OMP_NUM_THREADS={cores}")
    return Finding(what, "ok", said)


def _device(what: str) -> Finding:
    import torch

    from masafusion_lab.loading import choose_device, choose_dtype

    device = choose_device("auto")
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    if device.type != "cuda":
        return Finding(what, "ok", f"{device}, {dtype}")
    card = torch.cuda.get_device_properties(device)
    return Finding(what, "ok", f"{device} ({card.name}, {card.total_memory / 2**30:.0f} GiB), {dtype}")


def _engine(what: str) -> Finding:
    names = ("lightning", "diffusers", "transformers", "safetensors", "omegaconf")
    for name in ("lightning.pytorch", "diffusers", "transformers"):
        importlib.import_module(name)
    return Finding(what, "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def _model(what: str) -> Finding:
    from masafusion_lab.hub import PICTUREBOOK, damaged

    if not (PICTUREBOOK / "model_index.json").is_file():
        return Finding(what, "note", "not in this installation; give model.path=FOLDER or a hub id")
    if wrong := damaged(PICTUREBOOK):
        files = f"{', '.join(wrong[:3])}{', …' if wrong[3:] else ''}"
        return Finding(what, "bad", f"{PICTUREBOOK}: not as it was shipped: {files}; check out or install it again")
    return Finding(what, "ok", f"{PICTUREBOOK}, every file as it was shipped")


def _hub(what: str) -> Finding:
    from huggingface_hub import constants

    cache = f"cache {constants.HF_HUB_CACHE}"
    if constants.is_offline_mode():
        return Finding(what, "note", f"HF_HUB_OFFLINE is set: only what is in the {cache}")
    if _reached(constants.ENDPOINT):
        return Finding(what, "ok", f"{constants.ENDPOINT} can be reached; {cache}")
    return Finding(what, "note", f"{constants.ENDPOINT} cannot be reached: only folders, and what is in the {cache}")


def _reached(address: str, seconds: float = 2.0) -> bool:
    """Whether a server answers in time; name resolution, which heeds no time limit, is not waited for."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except Exception:
            return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(seconds)


def _tracking(what: str) -> Finding:
    from masafusion_lab.tracking import has_key, mode_of_environment

    if (mode := mode_of_environment()) != "online":
        return Finding(what, "note", f"WANDB_MODE is set: W&B is {mode}")
    try:
        there = has_key()
    except Exception as error:  # wandb is missing or broken: an edit runs all the same
        return Finding(what, "note", f"W&B cannot be used ({_one_line(error)}): runs are not recorded by it")
    if not there:
        return Finding(
            what, "note", "W&B has no key (wandb login): runs are recorded offline, to be sent by masafusion sync"
        )
    return Finding(what, "ok", "W&B is online")


def _inversions(what: str) -> Finding:
    from masafusion_lab.store import Store

    store = Store()
    folder = next(place for place in (store.root, *store.root.parents) if place.is_dir())
    if not os.access(folder, os.W_OK):
        return Finding(what, "bad", f"{store.root} cannot be written: set MASAFUSION_HOME=FOLDER")
    size, free = store.size() / 1e6, shutil.disk_usage(folder).free / 1e9
    return Finding(what, "ok", f"{store.root}: {len(store.entries())} records, {size:.1f} MB; {free:.1f} GB free")


def _package(name: str) -> Finding:
    what = f"{name} (optional)"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(what, "ok", "not installed")
    try:
        importlib.import_module(name)
    except Exception as error:
        why = f"{version} is broken ({_one_line(error)})"
        return Finding(what, "note", f"{why}; pip uninstall {name}, or install the right version")
    return Finding(what, "ok", version)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


LOOKS: dict[str, Callable[[str], Finding]] = {
    "torch": _torch,
    "device": _device,
    "libraries": _engine,
    "built-in model": _model,
    "hub": _hub,
    "tracking": _tracking,
    "inversions": _inversions,
}
"""What is looked at, in order."""
