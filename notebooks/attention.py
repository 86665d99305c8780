# %% [markdown]
# # See the attention
#
# From one edit to the paper's argument: which word acts where, what a pixel attends to, and what crosses the border of
# the region. From a shell, `masafusion attend` leaves the same in the folder of an edit.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import display
from PIL import Image

from masafusion_lab import config, phases
from masafusion_lab.callbacks import Attend
from masafusion_lab.data.picturebook import cases
from masafusion_lab.explorer import is_kept, keep
from masafusion_lab.maps import Attention
from masafusion_lab.watch import Watch

case = next(cases("test", [0], kinds=["pose"]))
lab, watch = phases.build(config.load(words=["steps=20"])), Watch(bins=4)
attend = Attend(watch, keep=keep)  # what `masafusion attend` does beside the edit
(folder,) = phases.edit(
    lab, [case], Path("runs/attention"), callbacks=[attend], whole=lambda folder: is_kept(folder, watch)
)
seen = Attention.load(folder / "maps.safetensors")
target = Image.open(folder / "target.png")
print(f"{case.source!r} -> {case.target!r}")

# %% [markdown]
# ## Which word acts where
#
# The cross-attention of every word, added up over the steps (DAAM), as in Figure 10: of the source under its own prompt,
# of the intermediate image and of the target under theirs. The start, the end and the padding of the text are tokens like
# the others, and get much of the attention.

# %%
Image.open(folder / "attention_words.png")

# %%
# A word can be asked for by itself, in some steps, layers or heads.
prompt = seen.facts["prompts"]["target"]
word = prompt["words"][prompt["edited"][0]][0]
_, axes = plt.subplots(1, 4, figsize=(12, 3.3))
for axis, (a, b) in zip(axes, seen.facts["bins"], strict=True):
    axis.imshow(seen.words("target", steps=(a, b)).word(word).overlay(target))
    axis.set_title(f"{word!r}, steps {a} to {b - 1}")
    axis.axis("off")

# %% [markdown]
# ## What a pixel attends to
#
# The paper borrows the intermediate image's self-attention for the target, because both have the new shape, and the
# source has not. So the target's own map should be nearer to the intermediate image's than to the source's: the numbers
# are the total variation of what a pixel attends to, 0 where it is equal and 1 where it is disjoint.

# %%
display(Image.open(folder / "attention_self_attention.png"))
for x, name in (("source", "source"), ("t2i", "intermediate")):
    apart = seen.curves("distance", f"{seen.branch(x)}:{seen.branch('target')}")
    inside, outside = apart.nanmean((0, 1)).tolist()
    print(f"{name:>12} from the target: {inside:.3f} inside the region, {outside:.3f} outside")

# %% [markdown]
# ## What crosses the border
#
# Interference, as a share: of what pixels inside the region read, all but what is made anew, and of what those outside
# read, what is made anew. It counts whose values are read; by place alone (dashed) the old things that lie inside would
# pass for new. Below: how much of the edited words' cross-attention lies outside, and as the edit uses it none, as there
# the source's prompt denoises; and how far the maps of the others are from the target's own.

# %%
Image.open(folder / "attention_interference.png")

# %% [markdown]
# ## Explore it
#
# `attention.html` in the same folder, here `runs/attention`, opens in a browser, without a network: choose branch, steps,
# layer, head and word, and point at a pixel. Try `lab` with another `method.name`: its branches are watched in the same
# way; `method.name=replay` watches a picture that is only inverted.
