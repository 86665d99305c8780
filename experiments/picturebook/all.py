"""The whole recipe, each part resumed where it was: `python -m experiments.picturebook.all [root=FOLDER]`."""

from __future__ import annotations

import argparse
import subprocess
import sys

PARTS = (
    ("autoencoder",),
    ("autoencoder", "decoder=true", "steps=1500", "lr=7e-4"),
    ("clip",),
    ("unet", "coarse=true", "batch=32", "lr=8e-4"),
    ("unet",),
    ("instruct",),
    ("instruct", "grades=true", "steps=2000", "lr=1e-4"),
    ("inpaint",),
    ("judge",),
    ("sketcher",),
    ("dino",),
    ("export",),
)


def main() -> None:
    """Train and export everything; what is already trained is passed over in seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="key=value settings that hold for every part")
    given = parser.parse_args().words
    for name, *words in PARTS:
        part = [sys.executable, "-m", f"experiments.picturebook.{name}", *words, *given]
        if code := subprocess.run(part).returncode:
            sys.exit(code)


if __name__ == "__main__":
    main()
