"""Figure 12: the source's keys and values read, without an adapter, in other windows of steps; with and without A.

    python -m experiments.fig12_window [--count N] [--out FOLDER] [KEY=VALUE ...]

A window [a, b) counts the 50 steps from the noise on; in the others the target prompt alone denoises. Without A it is
(13) everywhere, with A (14). The paper reads: without A the picture is hardly the source's where the window is short,
and degenerates to the source where it is long; with A all steps may be fused, and the edit stays inside.
"""

from experiments.figures import Figure, main

WINDOWS = ("0,10", "0,25", "0,50", "10,50", "25,50")
FIGURE = Figure(
    "fig12_window",
    {
        f"[{window}){said}": f"method.name=masafusion_no_adapter method.fuse_steps=[{window}] method.use_mask={masked}"
        for masked, said in (("false", ""), ("true", " A"))
        for window in WINDOWS
    },
    kinds=("pose", "recolour", "replace", "pattern"),
    lead=("source", "target"),
    count=4,
)

if __name__ == "__main__":
    main(__doc__, FIGURE)
