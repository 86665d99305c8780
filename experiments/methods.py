"""Every method on the same test edits of the picture-book world: what is edited, what is kept, what it costs.

    python -m experiments.methods [--cases 200] [--only sdedit,masactrl] [--json FILE] [KEY=VALUE ...]

l1: mean difference from the true target, of the whole picture; edit_success: the part of the edits that the world's
judge finds done; keep_psnr: dB outside the region, against the source; seconds and UNet rows an edit, without the
inversion. Each method runs with its defaults, the published ones. What is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from experiments.edit_quality import measure
from masafusion_lab import InputError, config, lab, phases
from masafusion_lab.data.picturebook import cases
from masafusion_lab.methods import METHODS, needs
from masafusion_lab.picturebook.changes import EDITS
from masafusion_lab.picturebook.edits import edit
from masafusion_lab.picturebook.judge import Judge
from masafusion_lab.progress import bar
from masafusion_lab.runs import write_json

INVERSIONS = {"plain": ["ddim"], "plug_and_play": ["ddim"], "prompt_to_prompt": ["direct", "null_text"],
              "masafusion": ["direct", "null_text"], "edit_friendly": ["edit_friendly"]}  # fmt: skip
"""With which a method is measured; the others with direct inversion, or with none where they read none."""
COLUMNS = ("l1", "edit_success", "keep_psnr", "seconds", "rows")


def row(method: str, inversion: str, count: int, out: Path, words: Sequence[str]) -> dict[str, Any]:
    """The measures of a method over the first `count` test edits, or why there are none."""
    found: dict[str, Any] = {"method": method, "inversion": inversion}
    preset = ["inversion.preset=reference"] if inversion == "null_text" else []
    chosen = [] if inversion == "none" else [f"inversion.name={inversion}", *preset]
    try:
        experiment = config.load(words=[f"method.name={method}", *chosen, *words])
        made = phases.edit(lab.build(experiment, track=bar), list(cases("test", count)), out / f"{method}-{inversion}")
    except InputError as error:
        return found | dict.fromkeys(COLUMNS) | {"error": str(error)}
    edited = [np.asarray(Image.open(folder / "target.png").convert("RGB")) for folder in made]
    results = [json.loads((folder / "result.json").read_text()) for folder in made]
    true = [edit("test", k, EDITS[k % len(EDITS)]).target_picture for k in range(count)]
    seen = measure(edited, Judge.load())
    spent = [sum(s for phase, s in result["seconds"].items() if phase != "invert") for result in results]
    return found | {
        "l1": float(np.mean([np.abs(a.astype(float) - b).mean() / 255 for a, b in zip(edited, true, strict=True)])),
        "edit_success": float(np.mean(seen["done"])),
        "keep_psnr": float(np.mean(seen["kept_db"])),
        "seconds": float(np.mean(spent)),
        "rows": float(np.mean([result["rows"] for result in results])),
    }


def show(rows: Sequence[dict[str, Any]], count: int) -> None:
    """Print the table, and why a row is empty."""
    table = Table("method", "inversion", *COLUMNS, title=f"{count} test edits of the picture-book world")
    digits = {"l1": 4, "edit_success": 2, "keep_psnr": 1, "seconds": 1, "rows": 0}
    for found in rows:
        cells = ["n/a" if found[key] is None else f"{found[key]:.{digits[key]}f}" for key in COLUMNS]
        table.add_row(found["method"], found["inversion"], *cells)
    Console().print(table)
    for found in rows:
        if "error" in found:
            print(f"{found['method']}: {found['error']}")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="test edits, the kinds in turn")
    parser.add_argument("--only", default="", help="methods, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="where the edits are kept")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("words", nargs="*", help="key=value settings of the edits, such as steps=20")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    names = given.only.split(",") if given.only else [name for name in METHODS if name != "replay"]
    if strange := [name for name in names if name not in METHODS]:
        parser.error(f"--only {strange[0]}: no such method; there are {', '.join(METHODS)}")
    rows = []
    for name in names:
        usual = ["direct"] if needs(METHODS[name]()).inversion else ["none"]
        for inversion in INVERSIONS.get(name, usual):
            rows.append(row(name, inversion, given.cases, given.out, given.words))
            if given.json:
                write_json(given.json, rows)
    show(rows, given.cases)


if __name__ == "__main__":
    main()
