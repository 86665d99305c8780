"""A case's result in its folder: there whole or not at all, and known again by the digests of its files.

result.json, written last, holds "key" (of all that the result depends on), "files" (their names), "sha256" (of each
file), and "inputs" (of what it was made: prompts, and the digests of pictures) beside what else is known.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from masafusion_lab import InputError
from masafusion_lab.hub import fingerprint
from masafusion_lab.runs import explained, read_json, write_json

log = logging.getLogger(__name__)

RESULT, ERROR = "result.json", "error.json"


class Changed(InputError):
    """A result is there of the same configuration and other inputs: it is not replaced without a word."""


def begin_case(folder: Path) -> None:
    """Make the folder; a case that was done in it is no longer, so that its files may be replaced one by one."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT).unlink(missing_ok=True)


def finish_case(folder: Path, result: Mapping[str, Any]) -> None:
    """Write result.json, the last file of a case, with the digests of its "files"."""
    if missing := [name for name in result["files"] if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: {result['key']} is not finished without {', '.join(missing)}")
    (folder / ERROR).unlink(missing_ok=True)
    write_json(folder / RESULT, {**result, "sha256": {name: fingerprint([folder / name]) for name in result["files"]}})


def fail_case(folder: Path, why: str, root: Path) -> None:
    """Put on record in error.json why a case has no result, in one line in which `root` is not named."""
    begin_case(folder)
    said = re.sub(rf"(?<![\w./-]){re.escape(f'{root}{os.sep}')}", "", why)
    write_json(folder / ERROR, {"error": " ".join(said.split())[:500]})


def damage(folder: Path) -> str | None:
    """Which file of a finished case is missing, or is not what was written, by its bytes; None if all are whole.

    A result without digests, as versions before wrote it, is taken to be whole if its files are there.
    """
    result = read_json(folder / RESULT)
    files, known = result.get("files"), result.get("sha256", {})
    if not (isinstance(files, list) and isinstance(known, dict)):
        return f"{folder / RESULT}: is missing or damaged"
    for name in map(str, files):
        path = folder / name
        try:
            if known.get(name) not in (None, fingerprint([path])):
                return f"{path}: is damaged: not what was written"
        except OSError as error:
            return f"{path}: {'is missing' if isinstance(error, FileNotFoundError) else 'cannot be read'}"
    return None


def is_done(folder: Path, key: str) -> bool:
    """Whether the folder holds a case finished under this key, all of its files as they were written."""
    return read_json(folder / RESULT).get("key") == key and damage(folder) is None


def stays_done(folder: Path, key: str) -> bool:
    """Whether the case is done; one that is damaged is told of, and is begun anew."""
    if is_done(folder, key):
        if "sha256" not in read_json(folder / RESULT):
            _told_undigested(folder.parent)
        return True
    if (folder / RESULT).is_file() and (why := damage(folder)):
        log.warning("%s; the case is made again", why)
        begin_case(folder)
    return False


@cache
def _told_undigested(root: Path) -> None:
    log.warning("%s: holds results of an earlier version, without digests: whether they are damaged is not known", root)


def of_settings(folder: Path, changed: Mapping[str, Any]) -> bool:
    """Whether the result in a folder was made under these settings (see `lab.changes`), wherever and however many."""
    aside = {"batch": None, "model.device": None}
    now = json.loads(json.dumps(changed)) | aside
    return now == read_json(folder / RESULT).get("changed", {}) | aside
