"""Every method on the same test edits of the picture-book world: what is edited, what is kept, what it costs.

    python -m experiments.methods [--cases 200] [--only sdedit,masactrl] [--json FILE] [KEY=VALUE ...]

A benchmark (see masafusion bench) whose rows are the methods, each at its published settings, by direct inversion or by
that which it was published with. l1: mean difference from the true target, of the whole picture; edit_success: the part
of the edits that the world's judge finds done; keep_psnr: dB outside the region, against the source; seconds and UNet
rows an edit, without the inversion. What it will take is said first. What is there is not made again: killed, the same
command goes on, and methods of one inversion share its records.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from experiments.commandline import at_least, in_one_line, some_of
from masafusion_lab import bench, interrupt, lab
from masafusion_lab.forecast import duration
from masafusion_lab.inversion import Direct, Npi
from masafusion_lab.methods import METHODS
from masafusion_lab.model import StableDiffusion
from masafusion_lab.null_text import NullText
from masafusion_lab.progress import bar
from masafusion_lab.protocol import Protocol
from masafusion_lab.runs import read_json, write_json
from masafusion_lab.scoring import Scorer

NTI = "null_text inversion.preset=reference"
INVERSIONS = {
    "masafusion": ["direct", NTI],
    "embctrl": [NTI],  # made for it
    "prompt_to_prompt": ["direct", NTI, "npi"],
    "plug_and_play": ["direct inversion.prompt=empty"],
    "masactrl": ["direct inversion.prompt=empty"],
    "edit_friendly": ["edit_friendly"],
    "reconstruction": ["direct", NTI],
}
"""With which a method is measured; the others with direct inversion, or with none where they read none.

Plain editing reads x_T alone, in which direct and DDIM inversion are the same.
"""
VARIANTS = {
    "glide": {"glide": "", "glide_inpaint": " method.backend=inpaint"},
    "masafusion_no_adapter": {  # Algorithm 5, and the first steps of 50 in which appendix C finds fusion to work
        "masafusion_no_adapter": "",
        "no_adapter_first_20": " method.fuse_steps=[0,20]",
    },
}
"""Of a method that is measured in several forms: their names, and their keys."""
STEPS = {"instruct_pix2pix": 100, "hive": 100}
"""As published, where that is not 50."""
MEASURES = {"l1": "l1", "edit_success": "done", "keep_psnr": "psnr_area"}
"""Column to measure (metrics.MEASURES)."""
COLUMNS = (*MEASURES, "seconds", "rows")
PROTOCOL = Protocol("methods", tuple(MEASURES.values()), (), {"judge": "picturebook/judge"}, {})
CALL = 16
"""UNet rows of a call that is timed."""


def rows_of(names: Iterable[str], words: Sequence[str]) -> dict[str, str]:
    """The rows of the benchmark, "method inversion" -> keys; steps that are given count for all methods."""
    found = {}
    for name in names:
        usual = ["direct"] if METHODS[name]().needs.inversion else [""]
        fixed = f" steps={STEPS[name]}" if name in STEPS and not any(w.startswith("steps=") for w in words) else ""
        for (variant, keys), inversion in product(VARIANTS.get(name, {name: ""}).items(), INVERSIONS.get(name, usual)):
            chosen = f" inversion.name={inversion}" if inversion else ""
            found[f"{variant} {inversion.split(' ')[0] or 'none'}"] = f"method.name={name}{keys}{chosen}{fixed}"
    return found


def inversion_rows(inversion: Any, steps: int) -> int:
    """UNet rows an image of inverting it; a backward pass counts as two forward ones."""
    if not isinstance(inversion, Direct | NullText):
        return 0
    up = steps * (1 if inversion.inverse_guidance == 1 else 2)
    if isinstance(inversion, NullText):
        return up + steps * (1 + 3 * inversion.inner_steps + 2)
    if isinstance(inversion, Npi) and not inversion.interpolation:
        return up + steps
    return up if type(inversion) is Direct else up + 2 * steps


def forecast(made: bench.Benchmark, model: StableDiffusion) -> str:
    """What is left to do, in words: a row takes as long as in a call of CALL rows, timed here."""
    edits = rows = 0
    records: dict[str, int] = {}
    for name, row in made.rows.items():
        inversion, method = lab.chosen(row)
        left = sum(bench.error_of(made.at(cell), row) is not None for cell in made.cells(name))
        edits += left
        rows += left * method.plan(model.sites, row.steps).cost(row.steps, getattr(method, "guidance", 0.0))
        each = repr((inversion, row.steps))
        records[each] = max(records.get(each, 0), left * inversion_rows(inversion, row.steps))
    side, text = model.native // model.factor, model.embed([""]).expand(CALL, -1, -1)
    x, taken = torch.zeros(CALL, model.unet.config.out_channels, side, side, device=model.device), []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            float(model.eps(x, 0, model.schedule(1), text).mean())  # waits for the device
        taken.append((time.perf_counter() - start) / CALL)
    inverted = sum(records.values())
    return (
        f"{edits} edits of {len(made.rows)} rows x {len(made.cases)} cases are left: {rows:,} UNet rows, and at most "
        f"{inverted:,} of inversions that are not in the store; at {1e3 * min(taken):.1f} ms each about "
        f"{duration((rows + inverted) * min(taken))}"
    )


def summed(made: bench.Benchmark, records: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the table, None where a row has no edit or value, and why edits or values are missing."""
    found, lost = [], []
    for name in made.rows:
        its = [record for record in records if record["row"] == name]
        edited = [record for record in its if not record["error"]]
        there = {record["case"] for record in edited}
        results = [read_json(made.at(cell) / "result.json") for cell in made.cells(name) if cell.case.id in there]
        seconds = [sum(s for part, s in result["seconds"].items() if part != "invert") for result in results]
        values, left_out = measured(edited)
        values |= {"seconds": seconds, "rows": [result["rows"] for result in results]}
        method, inversion = name.split(" ")
        means = {key: float(np.mean(values[key])) if values[key] else None for key in COLUMNS}
        found.append({"method": method, "inversion": inversion, **means})
        if why := next((record["error"] for record in its if record["error"]), None):
            lost.append(f"{name}: {len(its) - len(edited)} of {len(its)} edits are missing: {why}")
        lost += [f"{name}: {why}" for why in left_out]
    return found, lost


def measured(edited: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[float]], list[str]]:
    """The values that records of edits have, by column; and, in words, of how many edits there is none, and why."""
    values = {key: [record[of] for record in edited if not math.isnan(record[of])] for key, of in MEASURES.items()}
    why = [line for record in edited for line in record["missing"].splitlines()]
    return values, [
        f"{key} of {len(edited) - len(values[key])} of {len(edited)} edits is left out: "
        + next((line for line in why if line.startswith(of)), "no reason is on record")
        for key, of in MEASURES.items()
        if len(values[key]) < len(edited)
    ]


def show(rows: Sequence[Mapping[str, Any]], count: int) -> None:
    """Print the table."""
    heads = (key.replace("_", "\n") for key in COLUMNS)  # so that 80 columns hold the table
    names = (Column(name, no_wrap=True) for name in ("method", "inversion"))
    table = Table(
        *names, *heads, title=f"{count} test edits of the picture-book world", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    digits = {"l1": 4, "edit_success": 2, "keep_psnr": 1, "seconds": 1, "rows": 0}
    for found in rows:
        cells = ["n/a" if found[key] is None else f"{found[key]:.{digits[key]}f}" for key in COLUMNS]
        table.add_row(found["method"], found["inversion"], *cells)
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in METHODS if name != "replay"]
    parser.add_argument("--cases", type=at_least(1), default=200, help="test edits, the kinds in turn")
    parser.add_argument("--only", type=some_of(METHODS), default=usual, help="methods, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="where the edits are kept")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("words", nargs="*", help="key=value settings of the edits, such as steps=20 batch=4")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    words = [f"out={given.out}", "batch=8", "bench.exact=false", *given.words]
    words += [f"bench.count={given.cases}", "bench.sessions=0", "bench.turns=single"]
    words += [f"bench.rows.{name}={text}" for name, text in rows_of(given.only, given.words).items()]
    with in_one_line(parser), interrupt.handled():
        experiment, made = bench.read([], words)
        made = replace(made, protocol=PROTOCOL)
        print(forecast(made, StableDiffusion.load(**vars(experiment.model))), flush=True)
        bench.edit(made, track=bar)
        rows, lost = summed(made, bench.score(made, Scorer.of(PROTOCOL, {}), track=bar))
    show(rows, given.cases)
    print(*lost, sep="\n")
    if given.json:
        write_json(given.json, rows)


if __name__ == "__main__":
    main()
