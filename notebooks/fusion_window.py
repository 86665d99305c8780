# %% [markdown]
# # In which steps should fusion act?
#
# MaSaFusion fuses source and target in every step. Figure 12 of the paper asks what happens if it does so only in a
# window $[a, b)$ of them, with the plain prediction before and after. Here all windows of a grid are tried on one
# picture. Points of a sweep are data, so what two of them compute alike is computed once: fifteen windows in ten steps
# cost a quarter of the UNet's rows, fifty-five in fifty steps a sixth.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from pyarrow import parquet

from masafusion_lab import config
from masafusion_lab.data.picturebook import cases
from masafusion_lab.sweep import sweep

# %% [markdown]
# An experiment is written as on the command line, where `masafusion sweep steps=10 axes.method.fusion_steps='windows(0,10,2)'`
# is the same. `windows(0,10,2)` stands for every $[a, b)$ with ends on 0, 2, ..., 10.

# %%
experiment = config.load(words=["steps=10", "axes.method.fusion_steps=windows(0,10,2)"])
case = next(cases("test", [0], kinds=["pose"]))
folder = Path("runs/fusion_window")
found = sweep(experiment, [case], folder, told=lambda planned: print(planned.said))
print("recommended:", found.best.point)

# %% [markdown]
# Measures over the start and the end of the window: how well the outside of the region is kept, and how well the inside
# meets the picture that a perfect edit would give. The best is framed; dashes frame the window that is recommended,
# which trades the two off by rank.

# %%
for name in ("map-psnr_area", "map-hit", "trade-off"):
    _, axis = plt.subplots(figsize=(8, 6))
    axis.imshow(Image.open(folder / f"{name}.png"))
    axis.axis("off")

# %% [markdown]
# The pictures themselves, as in Figure 12:

# %%
_, axis = plt.subplots(figsize=(10, 8))
axis.imshow(Image.open(folder / "sheet-0.png"))
axis.axis("off")

# %% [markdown]
# All of it is in one table, and in `report.html` beside it. Run this cell's call again: nothing is computed twice.

# %%
rows = parquet.read_table(folder / "results.parquet").to_pylist()
print(len(rows), "points;", rows[0])
