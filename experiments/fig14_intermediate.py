"""Figure 14: intermediate image, target, and what the adapter alone generates from noise.

    python -m experiments.fig14_intermediate [--count N] [--out FOLDER] [KEY=VALUE ...]

The paper reads: intermediate image and what the adapter alone generates both follow the prompt, and do not keep all of
the source that they should; fusion brings it into the target.
"""

from experiments.figures import Figure, main

FIGURE = Figure(
    "fig14_intermediate",
    {"MaSaFusion": "method.name=masafusion", "adapter alone": "method.name=t2i_only"},
    kinds=("pose", "replace", "add", "move"),
    panels={
        "intermediate image": ("MaSaFusion", "intermediate"),
        "target": ("MaSaFusion", "target"),
        "adapter alone": ("adapter alone", "target"),
    },
    count=4,
)

if __name__ == "__main__":
    main(__doc__, FIGURE)
