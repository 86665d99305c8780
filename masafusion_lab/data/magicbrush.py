"""Cases of MagicBrush (Zhang et al. 2023) in the layout of its archives, and its parquet files brought into it.

    images/ID/ID-input.png, ID-output1.png, ID-mask1.png, ...   edit_sessions.json: ID -> turns {input, mask, output,
    instruction}   global_descriptions.json, local_descriptions.json (or local_captions.json): ID -> file -> text

A mask is transparent where the edit takes place. Prompts are the global descriptions of a turn's input and output.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from masafusion_lab import InputError
from masafusion_lab.data.case import Case, Made
from masafusion_lab.data.folder import inside, read_object, told

LOCAL = ("local_descriptions.json", "local_captions.json")


def read_sessions(root: Path, texts: Path | None = None) -> list[Case]:
    """The turns of all sessions, one after the other; `texts`: where the descriptions are, if not in `root`.

    Raises InputError with all that is missing, a line each.
    """
    root = Path(root)
    sessions = _table(root, "edit_sessions.json")
    whole, local = (_table(texts or root, *names) for names in (("global_descriptions.json",), LOCAL))
    described = (whole, "input", "global"), (whole, "output", "global"), (local, "output", "local")
    images, problems, cases = (root / "images").resolve(), list[str](), list[Case]()
    for session, turns in sessions.items():
        if Path(session).name != session:
            problems.append(f"{session!r}: is no name of a session")
            continue
        for k, turn in enumerate(turns if isinstance(turns, list) else [turns], 1):
            where, wrong = f"{session}, turn {k}", list[str]()
            names = {part: turn.get(part) if isinstance(turn, dict) else None for part in ("input", "output", "mask")}
            if not all(isinstance(name, str) and name for name in names.values()):
                problems.append(f"{where}: must have input, output and mask in edit_sessions.json")
                continue
            files = {part: inside(part, f"{session}/{name}", images, wrong) for part, name in names.items()}
            source, target, caption = (
                _text(table, session, str(names[part]), what, wrong) for table, part, what in described
            )
            problems += [f"{where}: {why}" for why in wrong]
            if not wrong:
                mask = files["mask"]
                cases.append(
                    Case(
                        id=f"{session}-{k}",
                        image=files["input"],  # type: ignore[arg-type]
                        source=source,
                        target=target,
                        instruction=str(turn.get("instruction", "")),
                        mask=Made(str(mask), partial(transparent, mask)),  # type: ignore[arg-type]
                        truth=files["output"],
                        turn=k,
                        session=session,
                        caption=caption,
                    )
                )
    return told(root, cases, problems)


def transparent(path: Path) -> Image.Image:
    """The region (L, 255 inside) of a mask whose transparent pixels are it. Raises InputError for one without any."""
    with Image.open(path, formats=["PNG"]) as mask:
        if "A" not in mask.getbands() and "transparency" not in mask.info:
            raise InputError(f"{path}: has no transparency, which is the region in MagicBrush's masks; unpack it again")
        alpha = np.asarray(mask.convert("RGBA"))[..., 3]
    return Image.fromarray((alpha != 255).astype(np.uint8) * 255)


def unpack(root: Path, folder: Path, split: str = "dev") -> Path:
    """Bring the hub's parquet files of a split (data/SPLIT-*.parquet below root) into the archives' layout in `folder`.

    Descriptions are not in them. Raises InputError where there are no such files.
    """
    from masafusion_lab.runs import write_json, write_picture

    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{root}: its parquet files are read by pyarrow: pip install pyarrow") from None
    files = sorted(Path(root).glob(f"data/{split}-*.parquet"))
    if not files:
        raise InputError(f"{root}: has neither edit_sessions.json nor data/{split}-*.parquet; unpack the archive there")
    sessions: dict[str, dict[int, dict[str, str]]] = {}
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(16):
            for row in batch.to_pylist():
                name, k = str(row["img_id"]), int(row["turn_index"])
                turn = {
                    "input": f"{name}-input.png" if k == 1 else f"{name}-output{k - 1}.png",
                    "mask": f"{name}-mask{k}.png",
                    "output": f"{name}-output{k}.png",
                }
                for part, column in (("input", "source_img"), ("mask", "mask_img"), ("output", "target_img")):
                    place = folder / "images" / name / turn[part]
                    if not place.is_relative_to(folder / "images") or "/" in name or name in ("", ".", ".."):
                        raise InputError(f"{file}: img_id={name!r} is no name")
                    if not place.exists():
                        write_picture(place, Image.open(io.BytesIO(row[column]["bytes"]), formats=["PNG", "JPEG"]))
                sessions.setdefault(name, {})[k] = {**turn, "instruction": row["instruction"]}
    in_order = {name: [turns[k] for k in sorted(turns)] for name, turns in sessions.items()}
    write_json(folder / "edit_sessions.json", in_order)  # the last: it says that all is there
    return folder


def _table(root: Path, *names: str) -> Mapping[str, Any]:
    """The object in the first of these JSON files that is there."""
    path = next((root / name for name in names if (root / name).is_file()), root / names[0])
    return read_object(path, "give bench.root=FOLDER with the whole archive of the test or dev set")


def _text(table: Mapping[str, Any], session: str, name: str, what: str, wrong: list[str]) -> str:
    texts = table.get(session)
    text = texts.get(name) if isinstance(texts, dict) else None
    if not isinstance(text, str):
        wrong.append(f"has no {what} description of {name}")
        return ""
    return text
