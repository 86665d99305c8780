"""What memory a device has, and what a computation holds of it: by these, never by a clock, a sweep sizes its calls."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def total(device: torch.device) -> float:
    """Bytes of memory that the device has, in use or not; infinite where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = float("inf")
    with suppress(AttributeError, ValueError, OSError):
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max": no limit
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def release() -> None:
    """Give back what nobody uses any more: a trainer and what it trained refer to one another, and so to a model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held(run: Callable[[], object]) -> int:
    """Bytes that tensors made during `run` hold at most at one time: the same whatever else the machine does."""
    with _Held() as seen, torch.no_grad():
        run()
    return seen.peak


class _Held(TorchDispatchMode):
    """Follows the storages that operations make, until nobody refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; what it gives and was not given is new."""
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.alive = {key: ref for key, ref in self.alive.items() if not ref[0].expired()}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out
