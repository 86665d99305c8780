"""Draw the built-in example, a pose change of the picture-book world: `python -m experiments.example [FOLDER]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from masafusion_lab.picturebook.edits import edit
from masafusion_lab.request import EXAMPLE
from masafusion_lab.runs import write_picture, write_text

INDEX = 23  # of the test split: a purple horse in the snow stops running
FILE = """\
# What `masafusion edit` edits when no image= is given; drawn by `python -m experiments.example`.
image: horse.png
mask: mask.png
sketch: sketch.png
source: {source}
target: {target}
instruction: {instruction}
"""


def main(argv: list[str] | None = None) -> None:
    """Write horse.png, mask.png, sketch.png and example.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=EXAMPLE.parent, help="where to (default: the package)")
    folder, example = parser.parse_args(argv).folder, edit("test", INDEX, "pose")
    write_picture(folder / "horse.png", Image.fromarray(example.source_picture))
    write_picture(folder / "mask.png", Image.fromarray(example.loose.astype(np.uint8) * 255))
    write_picture(folder / "sketch.png", Image.fromarray(example.sketch))
    prompts = {"source": example.source_prompt, "target": example.target_prompt}
    write_text(folder / "example.yaml", FILE.format(**prompts, instruction=example.instruction))


if __name__ == "__main__":
    main()
