"""The whole recipe, each part resumed where it was: `python -m experiments.picturebook.all [root=FOLDER]`.

With --minutes the recipe takes that long: each part has its share of what is left, drawing included, and a part's steps
become as many as fit. With --gpu batches are as large as a GPU is used well by: --gpu --minutes 10 makes everything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from experiments.commandline import some_of

PARTS: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    "autoencoder": (4, ("autoencoder",), ("batch=256", "lr=2e-3")),
    "decoder": (3, ("autoencoder", "decoder=true", "steps=1500", "lr=7e-4"), ("batch=128",)),
    "clip": (2, ("clip",), ("batch=512",)),
    "text": (2, ("text",), ("batch=1024",)),
    "coarse": (6, ("unet", "coarse=true", "lr=8e-4"), ("batch=512", "lr=1.6e-3")),
    "unet": (50, ("unet",), ("batch=512", "lr=2e-3", "decay=0.999")),
    "instruct": (12, ("instruct",), ("batch=512", "lr=6e-4")),
    "hive": (4, ("instruct", "grades=true", "steps=2000", "lr=1e-4"), ("batch=512", "lr=2e-4")),
    "inpaint": (8, ("inpaint",), ("batch=512", "lr=6e-4")),
    "judge": (3, ("judge",), ("batch=256",)),
    "sketcher": (2, ("sketcher",), ("batch=128",)),
    "dino": (4, ("dino",), ("batch=128",)),
    "export": (0, ("export",), ()),
}
"""Of each part, in order: its share of the time, its module and settings, and what differs on a GPU."""


def main() -> None:
    """Train and export everything; what is already trained is passed over in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="key=value settings that hold for every part")
    parser.add_argument("--only", type=some_of(PARTS), default=list(PARTS), help=f"parts of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=0, help="time for all of them (default: their own steps)")
    parser.add_argument("--gpu", action="store_true", help="settings for a GPU and its many cores")
    asked, end = parser.parse_args(), time.monotonic()
    end += 60 * asked.minutes
    for k, name in enumerate(asked.only):
        share, (module, *words), on_gpu = PARTS[name]
        if asked.gpu and share:
            words += [*on_gpu, "workers=12"]
        if asked.minutes and share:
            of_left = share / sum(PARTS[later][0] for later in asked.only[k:])
            words.append(f"minutes={max(0.05, of_left * (end - time.monotonic()) / 60):.3f}")
        part = [sys.executable, "-m", f"experiments.picturebook.{module}", *words, *asked.words]
        if code := subprocess.run(part).returncode:
            sys.exit(code)


if __name__ == "__main__":
    main()
