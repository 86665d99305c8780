"""Which inversion reconstructs best, and what it costs: test pictures of the picture-book world.

    python -m experiments.inversion_quality [--count 10] [--json FILE] [KEY=VALUE ...]

psnr: of the reconstruction (the record's last state, decoded) against the picture, in dB; `round trip` is what the
autoencoder alone leaves of it. ratio: seconds over those of direct inversion. What is in the store is not timed;
what was cut short, only from there.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.commandline import at_least, in_one_line
from masafusion_lab import config, interrupt, lab, phases
from masafusion_lab.data.picturebook import cases
from masafusion_lab.metrics import l2, psnr
from masafusion_lab.progress import bar
from masafusion_lab.runs import write_json

ROWS = {
    "direct": ["inversion.name=direct"],
    "DDIM, w = 7.5": ["inversion.name=ddim"],
    "null-text, paper": ["inversion.name=null_text", "inversion.preset=paper"],
    "null-text, reference": ["inversion.name=null_text", "inversion.preset=reference"],
}


def run(count: int, words: list[str]) -> dict[str, dict[str, float]]:
    """PSNR and seconds a picture of each inversion."""
    facts: dict[str, dict[str, Any]] = {}
    for name, settings in ROWS.items():
        its = lab.build(config.load(words=[*settings, *words]), track=bar)
        start, found = time.perf_counter(), []
        inverted = list(phases.invert(its, list(cases("test", count))))
        spent = time.perf_counter() - start
        for case, record, _ in inverted:
            picture = its.prepare(case).pixels
            found.append(float(psnr(l2(its.model.decode(record.states[-1])[0].cpu(), picture))))
            if name == "direct":
                x0 = its.model.encode(picture[None])
                trip = psnr(l2(its.model.decode(x0)[0].cpu(), picture))
                facts.setdefault("round trip", {"all": []})["all"].append(float(trip))
        facts[name] = {"all": found}
        if not any(hit for *_, hit in inverted):
            facts[name]["seconds"] = spent / count
    for row in facts.values():
        row["psnr"] = float(np.mean(row.pop("all")))
        if "seconds" in row and "seconds" in facts["direct"]:
            row["ratio"] = row["seconds"] / facts["direct"]["seconds"]
    return facts


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=at_least(1), default=10, help="test pictures")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("words", nargs="*", help="key=value settings, such as batch=5")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    with in_one_line(parser), interrupt.handled():
        facts = run(given.count, given.words)
    table = Table("inversion", "PSNR, dB", "seconds", "over direct")
    for name, row in facts.items():
        table.add_row(name, *(f"{row[key]:.2f}" if key in row else "" for key in ("psnr", "seconds", "ratio")))
    Console().print(table)
    if given.json:
        write_json(given.json, facts)


if __name__ == "__main__":
    main()
