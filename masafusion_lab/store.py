"""Inversions on disk, each under the hash of all that it depends on, and checked whenever it is read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.interrupt import check
from masafusion_lab.inversion import Inversion
from masafusion_lab.runs import explained, replacing, sweep

log = logging.getLogger(__name__)

FORMAT = 1
"""Of an entry, part of its key: raise it when what is stored, or what inverts, changes its meaning."""

REMEDY = "set MASAFUSION_HOME=FOLDER"


@dataclass(frozen=True)
class Entry:
    """What the store holds under a key."""

    key: str
    bytes: int
    used: float
    """Seconds since the epoch when it was last read or written."""
    facts: Mapping[str, Any]
    """What the record depends on; empty where the header cannot be read."""


class Store:
    """Records of single pictures in a folder: <key>.safetensors, with locks/ and progress/ beside them.

    Several processes may use it at once. What needs to write raises InputError where the folder may not be written.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(root).expanduser() if root else home() / "inversions"

    @staticmethod
    def key(facts: Mapping[str, Any]) -> str:
        """The address of a record: sha256 of FORMAT and of the facts (JSON) that it depends on."""
        return hashlib.sha256(_canonical({"format": FORMAT, "facts": facts}).encode()).hexdigest()

    def get(self, key: str) -> Inversion | None:
        """The record, on the CPU, or None; a damaged, foreign or old entry is set aside with one warning."""
        record = self._load(key)
        if record is not None:
            with suppress(OSError):  # others' store is read all the same
                os.utime(self._path(key))
        return record

    def put(self, key: str, record: Inversion, facts: Mapping[str, Any], seconds: float | None = None) -> None:
        """Store the record, which took so many seconds, under the key; it is there whole or not at all."""
        tensors = {"states": record.states} | ({} if record.null is None else {"null": record.null})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {"format": str(FORMAT), "key": key, "facts": _canonical(facts)}
        header |= {} if seconds is None else {"seconds": repr(seconds)}
        with replacing(self._path(key), REMEDY) as partial:
            partial.write_bytes(save(tensors, {**header, "sha256": _checksum(header, tensors)}))

    def seconds(self, key: str) -> float | None:
        """What the record took to compute; None if it is not there, or was stored before that was kept."""
        said = _header(self._path(key)).get("seconds")
        return None if said is None else float(said)

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Be the only process to compute a record; ask `get` again inside, for another may have computed it meanwhile.

        Waits for a process that holds the claim, and ends with it if that dies. Whoever claims several keys does so in
        sorted order. Raises Interrupted while waiting.
        """
        lock = self._lock(key)
        try:
            with explained(self.root, REMEDY):
                lock.acquire(timeout=0)
        except Timeout:
            log.info("record %s is being computed by another process; waiting", key[:12])
            while not lock.is_locked:
                check()
                with suppress(Timeout):
                    lock.acquire(timeout=0.5)
        try:
            yield
        finally:
            lock.release()

    def progress(self, key: str) -> Path:
        """The folder, made if need be, for what an unfinished inversion needs to resume; claim the same key meanwhile.

        Without the claim `prune` takes it for abandoned.
        """
        folder = self.root / "progress" / key
        with explained(folder, REMEDY):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def size(self) -> int:
        """Bytes on disk, with unfinished and damaged records."""
        return sum(_size(path) for path in self._things())

    def entries(self) -> list[Entry]:
        """What there is, least recently used first."""
        return [
            Entry(path.stem, _size(path), _used(path), _facts(path))
            for path in self._things()
            if path.suffix == ".safetensors"
        ]

    def verify(self) -> list[str]:
        """Read every record; the keys of those that were set aside."""
        return [path.stem for path in self._things() if path.suffix == ".safetensors" and not self._load(path.stem)]

    def prune(self, limit_bytes: int) -> int:
        """Delete least recently used records, finished or not, until no more than the limit is left; bytes freed.

        What a process has claimed is spared.
        """
        sweep(self.root, older=3600)
        freed, size = 0, self.size()
        for path in self._things():
            if size - freed <= limit_bytes:
                break
            lock = self._lock(path.stem)
            with suppress(Timeout), explained(self.root, REMEDY), lock.acquire(timeout=0):
                held = _size(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                freed += held
        return freed

    def _path(self, key: str) -> Path:
        return self.root / f"{key}.safetensors"

    def _lock(self, key: str) -> FileLock:
        with explained(self.root, REMEDY):
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.root / "locks" / f"{key}.lock", thread_local=False)

    def _things(self) -> list[Path]:
        """Records, damaged ones, and folders of progress, least recently used first."""
        things = [path for glob in ("[!.]*.safetensors", "*.corrupt", "progress/*") for path in self.root.glob(glob)]
        return sorted(things, key=lambda path: (_used(path), path.name))

    def _load(self, key: str) -> Inversion | None:
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            claimed = header.pop("sha256", "")
            if header.get("format") != str(FORMAT):
                why = f"is of format {header.get('format')}, not {FORMAT}"
            elif header.get("key") != key:
                why = "holds another record"
            elif claimed != _checksum(header, tensors):
                why = "is damaged"
            else:
                return Inversion(tensors["states"], tensors.get("null"))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            why = f"cannot be read ({error})"
        log.warning("%s %s; it is set aside as *.corrupt and computed again", path, why)
        with suppress(OSError):
            path.replace(path.with_suffix(".corrupt"))
        return None


def home() -> Path:
    """The package's folder for what it keeps: $MASAFUSION_HOME, or ~/.cache/masafusion."""
    if given := os.environ.get("MASAFUSION_HOME"):
        return Path(given).expanduser()
    try:
        return Path.home() / ".cache" / "masafusion"
    except RuntimeError:
        raise InputError(f"there is no home folder to keep inversions in: {REMEDY}") from None


def _canonical(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the header and of names, types, shapes and bytes of the tensors."""
    digest = hashlib.sha256(_canonical(header).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def _header(path: Path) -> Mapping[str, str]:
    """What stands beside the tensors of a record; nothing where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _facts(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(_header(path)["facts"])
    except (ValueError, KeyError):
        return {}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    with suppress(FileNotFoundError):  # another process has just finished it
        return sum(file.stat().st_size for file in files if file.is_file())
    return 0


def _used(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0
