"""Figure 5: single-turn edits of the methods that need no network of their own, side by side.

    python -m experiments.fig05_single_turn [--count N] [--out FOLDER] [KEY=VALUE ...]

The paper reads: MaSaFusion (NTI) keeps the source and follows the target prompt better than the others.
"""

from experiments.figures import Figure, main

METHODS = {
    "SDE-DiffEdit": "method.name=sde_diffedit inversion.name=direct",
    "P2P": "method.name=prompt_to_prompt inversion.name=null_text inversion.preset=reference",
    "PnP": "method.name=plug_and_play inversion.name=ddim inversion.guidance=1",
    "MasaCtrl": "method.name=masactrl inversion.name=direct inversion.prompt=empty",
    "GLIDE's rule": "method.name=glide inversion.name=direct",
    "Blended": "method.name=blended inversion.name=direct",
    "MaSaFusion (NTI)": "method.name=masafusion inversion.name=null_text inversion.preset=reference",
}
FIGURE = Figure("fig05_single_turn", METHODS, words=("steps=20",))

if __name__ == "__main__":
    main(__doc__, FIGURE)
