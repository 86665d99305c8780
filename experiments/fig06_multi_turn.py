"""Figure 6: sessions of three turns, each turn an edit of the method's own result of the turn before.

    python -m experiments.fig06_multi_turn [--count N] [--out FOLDER] [KEY=VALUE ...]

The paper reads: the others lose what is not edited from turn to turn, MaSaFusion keeps it.
"""

from experiments.fig05_single_turn import METHODS
from experiments.figures import Figure, main

FIGURE = Figure("fig06_multi_turn", METHODS, words=("steps=20",), turns="multi", count=2)

if __name__ == "__main__":
    main(__doc__, FIGURE)
