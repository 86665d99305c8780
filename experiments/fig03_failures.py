"""Figure 3: how methods without a shape to follow fail on edits that change one: source reproduced, or not kept at all.

    python -m experiments.fig03_failures [--count N] [--out FOLDER] [KEY=VALUE ...]

The paper reads (section 4.1): PnP and P2P reconstruct the source, SDE-DiffEdit follows the prompt and generates what is
not asked. How near a result is to the source (PSNR kept) and whether the judge sees the edit are in the table.
"""

from experiments.fig05_single_turn import METHODS
from experiments.figures import Figure, main

FIGURE = Figure(
    "fig03_failures",
    {name: METHODS[name] for name in ("P2P", "PnP", "SDE-DiffEdit")},
    kinds=("pose", "move", "replace"),
    words=("steps=20",),
    lead=("source", "target"),
    count=6,
)

if __name__ == "__main__":
    main(__doc__, FIGURE)
