"""Where a model's files are, in a folder or in the hub's cache, and whether they are there, whole and safe to read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.picturebook import MODEL as PICTUREBOOK

SUMS = "SHA256SUMS"
"""The file of a model's folder that says what its weights are, as sha256sum writes and checks it."""

Fetch = Callable[[str], "Path | None"]
"""Of a file's name inside a model its place on this disk, or None where the model has no such file."""


def find(name: str, first: str, what: str) -> tuple[Path, Fetch]:
    """The folder of `name` (a folder, a hub id, or "picturebook") and how to get files of it; `first` must be there."""
    root = PICTUREBOOK if name == "picturebook" else Path(os.path.expanduser(name))
    if name == "picturebook" and not (root / first).is_file():
        raise InputError(f"{what}: the built-in model is not in this installation; give model.path=FOLDER or a hub id")
    if os.path.isdir(root):
        return root, lambda file: root / file if (root / file).is_file() else None
    if os.path.isfile(root):
        raise InputError(
            f"{what}: is a file; give a diffusers folder (from_single_file(...).save_pretrained makes one)"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{what}: no such folder; give a diffusers folder, or a hub id such as owner/name")
    return _hub(name, first, what)


def _hub(repo: str, first: str, what: str) -> tuple[Path, Fetch]:
    """The snapshot in the hub's cache that holds `first`, which is downloaded if it is not there; files on demand."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        cached = try_to_load_from_cache(repo, first)
        if not isinstance(cached, str):
            get_hf_file_metadata(hf_hub_url(repo, first), timeout=3)  # downloads try for half a minute
            cached = hf_hub_download(repo, first, etag_timeout=3)
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{what}: no such folder here, and the hub says: {one_line(error)}") from None
    except Exception:
        raise InputError(
            f"{what}: no such folder here, not in the hub's cache {constants.HF_HUB_CACHE}, and the hub cannot be "
            f"reached{' (HF_HUB_OFFLINE is set)' if constants.is_offline_mode() else ''}: give a local diffusers "
            "folder, or set HF_HOME to a cache that has it"
        ) from None
    root = Path(cached).parent

    def fetch(file: str) -> Path | None:
        if (root / file).is_file():
            return root / file
        try:
            get_hf_file_metadata(hf_hub_url(repo, file, revision=root.name), timeout=3)
        except HfHubHTTPError as error:
            if isinstance(error, EntryNotFoundError):
                return None
            raise InputError(f"{what}: {file} cannot be downloaded: {one_line(error)}") from None
        except Exception:  # no network: what is in the cache is all there is
            return None
        try:
            return Path(hf_hub_download(repo, file, revision=root.name, etag_timeout=3))
        except Exception as error:
            raise InputError(f"{what}: {file} cannot be downloaded: {one_line(error)}") from None

    return root, fetch


def read_json(fetch: Fetch, name: str, root: Path) -> dict[str, Any]:
    """The object in a JSON file of the model."""
    path = fetch(name)
    if path is None:
        raise InputError(f"{root / name}: missing; half a copy, or not a diffusers folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: unreadable, copy it again: {one_line(error)}") from None
    return config


@dataclass(frozen=True)
class Files:
    """The files that hold a part's weights: their folder, whether they are safetensors, and their variant (fp16)."""

    folder: Path
    names: tuple[Path, ...]
    variant: str | None = None
    safe: bool = True


def weight_files(fetch: Fetch, root: Path, part: str, dtype: torch.dtype) -> Files:
    """The files of the weights of a part ("" for an adapter), undamaged; half precision prefers the half-sized ones."""
    stem = str(Path(part, "model" if part == "text_encoder" else "diffusion_pytorch_model"))
    folder = root / part
    for variant in ("fp16", None) if dtype == torch.float16 else (None, "fp16"):
        dot = f".{variant}" if variant else ""
        if file := fetch(f"{stem}{dot}.safetensors"):
            check_weights(file)
            return Files(folder, (file,), variant)
        if index := fetch(f"{stem}.safetensors.index{dot}.json"):
            return Files(folder, _shards(fetch, index, part), variant)
    if not part and (file := fetch(f"{stem}.bin")):
        check_weights(file)
        return Files(folder, (file,), safe=False)
    if pickled := sorted(file for file in folder.glob("*") if file.suffix in (".bin", ".ckpt", ".pt", ".pth")):
        raise InputError(
            f"{pickled[0]}: pickled weights can run code and are not read; get the .safetensors file of this model, or "
            "convert it where you trust it: from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise InputError(f"{root / stem}.safetensors: missing; half a copy, or not a diffusers folder")


def _shards(fetch: Fetch, index: Path, part: str) -> tuple[Path, ...]:
    """The files that an index of weights in several files names, undamaged."""
    names = read_json(lambda _: index, index.name, index.parent).get("weight_map")
    if not isinstance(names, dict) or not all(re.fullmatch(r"[\w.-]+", str(name)) for name in names.values()):
        raise InputError(f"{index}: is no index of weights, copy it again")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if (file := fetch(str(Path(part, name)))) is None:
            raise InputError(f"{index.with_name(name)}: missing; half a copy")
        check_weights(file)
        files.append(file)
    return tuple(files)


def check_weights(file: Path) -> None:
    """Raise InputError for weights that are truncated, garbage, or a pickle that would run code."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".bin":
            torch.load(file, map_location="meta", weights_only=True)
        else:
            with safe_open(file, "pt"):
                pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: truncated or no safetensors file, download or copy it again: {one_line(error)}"
        ) from None
    except Exception as error:
        raise InputError(f"{file}: truncated, or a pickle that would run code, refused: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The error's message in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def damaged(folder: Path) -> list[str]:
    """The weights in the folder of a model that are missing, or no longer what its SUMS says."""
    lines = (line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines())
    return [name for known, name in lines if not (folder / name).is_file() or fingerprint([folder / name]) != known]


def fingerprints(files: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of each file. Raises InputError for one that is not what the hub's cache, which names it so, says."""
    with ThreadPoolExecutor(4) as pool:  # hashing lets go of the interpreter
        found = dict(zip(files, pool.map(lambda file: fingerprint([file]), files.values()), strict=True))
    for name, file in files.items():
        if re.fullmatch("[0-9a-f]{64}", blob := file.resolve().name) and blob != found[name]:
            raise InputError(f"{file}: is damaged, not what was downloaded; remove {file.resolve()} to have it anew")
    return found


def fingerprint(files: Iterable[Path]) -> str:
    """The sha256 of files, one after the other; of each no more than a piece is in memory."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
    return digest.hexdigest()


def sha256(module: torch.nn.Module) -> str:
    """The sha256 of a module's tensors, by name, type, shape and bytes."""

    def one(item: tuple[str, Tensor]) -> bytes:
        name, value = item
        data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(
            f"{name} {value.dtype} {tuple(value.shape)}".encode() + hashlib.sha256(data).digest()
        ).digest()

    with ThreadPoolExecutor(4) as pool:  # hashing lets go of the interpreter
        return hashlib.sha256(b"".join(pool.map(one, sorted(module.state_dict().items())))).hexdigest()
