"""Figures 8, 9 and 11: edits that leave shapes as they are, by EmbCtrl and by methods made for them.

    python -m experiments.fig08_11_shape_invariant [--count N] [--out FOLDER] [KEY=VALUE ...]

The paper reads: the other methods keep the source roughly, and change what shall stay, such as a face; swapping the
embeddings of the changed words alone (EmbCtrl) keeps the most. None is told the region.
"""

from experiments.fig05_single_turn import METHODS
from experiments.figures import Figure, main

NTI = "inversion.name=null_text inversion.preset=reference"
FIGURE = Figure(
    "fig08_11_shape_invariant",
    {
        "plain, NTI": f"method.name=plain {NTI}",
        "P2P": METHODS["P2P"],
        "PnP": METHODS["PnP"],
        "MasaCtrl, no hint": f"{METHODS['MasaCtrl']} method.hint_until=0",
        "EmbCtrl": f"method.name=embctrl {NTI}",
    },
    kinds=("recolour", "pattern"),
    words=("steps=20",),
    lead=("source", "target"),
    count=6,
)

if __name__ == "__main__":
    main(__doc__, FIGURE)
