"""Figure 4: the intermediate image from three starts: Gaussian noise x, the source's x_T^S, and x inside A on x_T^S.

    python -m experiments.fig04_initial_noise [--count N] [--out FOLDER] [KEY=VALUE ...]

The paper reads: only x gives an intermediate image that is right in A; the others have the shape, and wrong textures,
as pixels in A attend to what is around it. The pictures are the intermediate images; the table is of the targets that
are made with them.
"""

from experiments.figures import Figure, main

STARTS = {"x": "gauss", "x_T^S": "source", "x in A, else x_T^S": "mixed"}
FIGURE = Figure(
    "fig04_initial_noise",
    {title: f"method.name=masafusion method.init_t2i={start}" for title, start in STARTS.items()},
    kinds=("pose", "replace", "add", "move"),
    panels={title: (title, "intermediate") for title in STARTS},
    count=4,
)

if __name__ == "__main__":
    main(__doc__, FIGURE)
