# %% [markdown]
# # masafusion_lab in five minutes
#
# A picture, a model, an inversion, an edit. Everything here runs on a laptop, without any download: the pictures are
# drawn by the package itself, and the model is a small latent diffusion model that was trained on such pictures.

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from masafusion_lab import config, phases
from masafusion_lab.data.picturebook import cases


def show(**pictures):
    """Pictures side by side, under their names."""
    _, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3.3))
    for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture, cmap="gray")
        axis.set_title(name)
        axis.axis("off")


# %% [markdown]
# ## The world
#
# An edit is drawn from a description, so its target is known: here are a source, the picture that a perfect edit
# would give, the region *A* that may change, and the sketch of what it shall show.

# %%
case = next(cases("test", [0], kinds=["pose"]))
case = replace(case, hints={"sketch": case.hints["sketch"]})  # of the conditions that are known, one will do
print(f"{case.source!r} -> {case.target!r}")
show(source=case.image, truth=case.truth, region=case.mask, sketch=case.hints["sketch"])

# %% [markdown]
# ## The lab
#
# An experiment is written as on the command line: `masafusion edit steps=20` is the same. `masafusion edit --help` lists
# every key. Building its lab loads the model; inverting the picture finds the noise that it may have come from.

# %%
experiment = config.load(words=["steps=20", "inversion.name=direct"])
lab = phases.build(experiment)
_, record, found = next(phases.invert(lab, [case]))
print(f"states {tuple(record.states.shape)}: x_T first, x_0 last;", "from the store" if found else "inverted now")

# %% [markdown]
# The record is kept in a store on disk: the next edit of this picture does not invert it again. It holds every state
# from noise to picture. The last one is decoded here, and a few on the way.

# %%
states = {f"state {i}": lab.model.decode(record.states[i])[0].permute(1, 2, 0) for i in (0, 10, 15, 20)}
show(**states)

# %% [markdown]
# ## The edit
#
# MaSaFusion denoises an *intermediate* image, which follows the sketch, and beside it the *target*, which borrows from
# the intermediate image where to look inside the region, and from the source everything outside of it.

# %%
(folder,) = phases.edit(lab, [case], Path("runs/quickstart"))
names = ("source", "reconstruction", "intermediate", "target")
show(**{name: Image.open(folder / f"{name}.png") for name in names})

# %% [markdown]
# The folder also holds `report.html`, to be opened in a browser, and `result.json`, with the facts. Try other settings:
# `method.preserve_steps=[0,10]` lets go of the source half-way, `method.name=plain` edits without fusion, and
# `inversion.name=null_text` trains the inversion.
