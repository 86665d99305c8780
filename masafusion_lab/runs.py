"""What a run writes: whole files or none, in a folder that one process at a time writes under one configuration."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from PIL import Image

from masafusion_lab import InputError
from masafusion_lab.axes import RUNNING
from masafusion_lab.configfile import Text, read_keys, short
from masafusion_lab.interrupt import Interrupted
from masafusion_lab.protocol import SELECTING

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

INDIFFERENT = (
    *("out", "store", "force", "batch", "tracking", "launch"),
    *(f"sweep.{key}" for key in RUNNING),
    *(f"bench.{key}" for key in SELECTING),
)
"""Keys of a configuration that change how fast and where results come and who hears of them, never the results."""

REMEDY = "write elsewhere with out=FOLDER"

_PARTIAL = ".partial-"


@contextmanager
def explained(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn what keeps a file from being written (space, quota, rights) into an InputError with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"the disk is full or your quota used up ({_free(path)} free): make room, or {remedy}"
        elif error.errno == errno.EFBIG:
            why = f"larger than this process may write ({_free(path)} free): raise ulimit -f, or {remedy}"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            why = f"cannot be written ({os.strerror(error.errno)}): {remedy}"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
            why = f"cannot be made ({os.strerror(error.errno)}): {remedy}"
        else:
            raise
        raise InputError(f"{path}: {why}") from error


def _free(path: Path) -> str:
    """The free space of the file system on which `path` would be."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"


@contextmanager
def replacing(path: Path, remedy: str = REMEDY) -> Iterator[Path]:
    """Give a name beside `path`, with its suffix, to write to; it becomes `path` at the end, whole and at once.

    If the body raises, nothing of it remains and `path` is what it was. Folders are made as needed. Raises InputError,
    with the free space and the remedy, where the disk is full or may not be written.
    """
    path = Path(path)
    partial = path.with_name(f"{_PARTIAL}{secrets.token_hex(6)}{path.suffix}")
    with explained(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def sweep(folder: Path, older: float = 0.0) -> None:
    """Remove what killed processes had half written below a folder, if untouched for so many seconds."""
    for partial in folder.rglob(f"{_PARTIAL}*"):
        with suppress(OSError):  # finished, or removed, in the meantime
            if time.time() - partial.stat().st_mtime >= older:
                partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8; a byte of the command line that is none is written as an escape."""
    with replacing(path) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, obj: Any) -> None:
    """Write strict JSON; a number that is not finite becomes the text that float() reads: "inf", "-inf", "nan"."""
    text = json.dumps(_strict(obj), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def _strict(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _strict(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [_strict(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    if hasattr(obj, "item"):  # a number of torch or NumPy
        obj = obj.item()
    return str(obj) if isinstance(obj, float) and not math.isfinite(obj) else obj


def write_parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as a Parquet file, the same bytes for the same records; a column of mixed types becomes text."""
    from pyarrow import Table, parquet

    columns = dict.fromkeys(name for record in records for name in record)
    rows = [{name: record.get(name) for name in columns} for record in records]
    for name in columns:
        there = [row for row in rows if row[name] is not None]
        if len({float if isinstance(row[name], int) else type(row[name]) for row in there}) > 1:
            for row in there:
                row[name] = str(row[name])
        for row in there:
            if isinstance(text := row[name], str):  # such as a file's name that is no UTF-8
                row[name] = text.encode("utf-8", "backslashreplace").decode()
    with replacing(path) as partial:
        parquet.write_table(Table.from_pylist(rows), partial, compression="zstd")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_picture(path: Path, picture: Tensor | Image.Image) -> None:
    """Write a picture, or a tensor (1 or 3, H, W) in [0, 1], in the format of the suffix.

    Raises ArithmeticError for a tensor that is not finite: it would be a black picture.
    """
    if not isinstance(picture, Image.Image):
        if not picture.isfinite().all():
            raise ArithmeticError(f"{path}: the picture is not finite")
        levels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    with replacing(path) as partial:
        picture.save(partial)


def case_folder(root: Path, case_id: str) -> Path:
    """The folder of a case below root, whatever its id says; two ids never share one."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", case_id)[:48].strip("-")
    return Path(root) / f"{slug or 'case'}-{hashlib.sha256(case_id.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


class Run:
    """A folder while one process writes one configuration's results into it: config.yaml, state.json, and the rest.

    state.json holds "state" (running, done, interrupted, failed), "pid", "started" and "ended" (UTC), and "error".
    Entering raises InputError if another process is writing there, or if, without `force`, the folder was begun under a
    configuration that differs in more than INDIFFERENT, holds results of other `weights` (digests by name; none: not
    looked at), or holds things that no run wrote. Lock and state of a process that died are taken over.
    """

    def __init__(
        self, folder: Path, config_text: str, force: bool = False, weights: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.config_text, self.force, self.weights = Path(folder), config_text, force, dict(weights or {})
        self._lock = FileLock(self.folder / ".lock", thread_local=False)
        self._state: dict[str, Any] = {}

    def __enter__(self) -> Run:
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                pid = read_json(self.folder / "state.json").get("pid", "(just started)")
                raise InputError(
                    f"{self.folder}: is being written by process {pid}; wait for it, or {REMEDY}"
                ) from None
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
            self._write_state(
                state="done" if error is None else "interrupted" if stopped else "failed",
                ended=_now(),
                error=None if error is None else f"{type(error).__name__}: {error}",
            )
        except InputError as unwritten:
            if error is None:
                raise
            log.warning("%s", unwritten)
        finally:
            self._lock.release()

    def _begin(self) -> None:
        before = read_json(self.folder / "state.json")
        config = self.folder / "config.yaml"
        if not self.force:
            if config.exists():
                self._refuse_other(config)
            elif strange := sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(".")):
                raise InputError(
                    f"{self.folder}: holds {strange[0]}, which no run wrote; {REMEDY}, or force=true to write there"
                )
            then = before.get("weights", {})
            then = {"model": then} if isinstance(then, str) else then  # as versions before wrote it
            other = [name for name in then if self.weights and then[name] != self.weights.get(name)]
            if other and any(self.folder.rglob("result.json")):
                raise InputError(
                    f"{self.folder}: was made with other weights, or in another precision ({', '.join(other)}): "
                    f"{REMEDY}, or force=true"
                )
        if before.get("state") == "running":
            log.warning("%s: process %s died here; its run is taken up", self.folder, before.get("pid"))
        sweep(self.folder)
        write_text(config, self.config_text)
        news = {"weights": self.weights} if self.weights else {}
        self._write_state(state="running", pid=os.getpid(), started=_now(), ended=None, error=None, **news)

    def _refuse_other(self, config: Path) -> None:
        then, now = _texts(config.read_bytes()), _texts(self.config_text.encode("utf-8", "backslashreplace"))
        differ = [k for k in {**then, **now} if then.get(k) != now.get(k)]
        if changed := [k for k in differ if not any(f"{k}.".startswith(f"{key}.") for key in INDIFFERENT)]:
            texts = ((k, short(then.get(k, "nothing")), short(now.get(k, "nothing"))) for k in changed[:8])
            said = "; ".join(f"{k}: {before} there, {after} now" for k, before, after in texts)
            more = f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
            raise InputError(
                f"{self.folder}: was begun under another configuration ({said}{more}): {REMEDY}, or force=true"
            )

    def _write_state(self, **news: Any) -> None:
        self._state |= news
        write_json(self.folder / "state.json", self._state)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _texts(config: bytes) -> dict[str, Text]:
    """The keys of a configuration with their texts; of one that cannot be read, its lines."""
    try:
        return {key: text for key, (_, text) in read_keys(config).items()}
    except (ValueError, RecursionError):
        lines = config.decode("utf-8", "replace").splitlines()
        return {f"line {number}": line for number, line in enumerate(lines, 1)}
