"""Figure 7: MaSaFusion under regions A that are larger and larger than what is edited.

    python -m experiments.fig07_region [--count N] [--out FOLDER] [KEY=VALUE ...]

The region grows by rings of latent cells. The paper reads: an extremely large region cannot keep textures. One that
grows to the whole picture leaves nothing to keep, and is refused.
"""

from experiments.figures import Figure, main

FIGURE = Figure(
    "fig07_region",
    {f"A + {n} cells" if n else "A as painted": f"method.name=masafusion dilate={n}" for n in (0, 1, 2, 4, 8)},
    kinds=("add", "replace", "recolour", "pose"),
    count=4,
)

if __name__ == "__main__":
    main(__doc__, FIGURE)
