"""Published instruction-tuned checkpoints become a UNet that the model loads: on a tiny replica of their layout."""

import re
import sys
import types

import pytest
import torch

from experiments.convert_hive import main, weights
from masafusion_lab.model import StableDiffusion

NAMES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def published(name, layers=1):
    """The latent-diffusion name of a UNet's tensor, `layers` a level: input and output blocks are counted through."""
    stem, _, end = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{end}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        block, rest = (f"middle_block.{2 * int(found[2])}" if found[1] == "resnets" else "middle_block.1"), found[3]
    else:
        side, level, kind, k, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
        each = layers + 1
        first = int(level) * each + int(k)
        block = {
            ("down", "resnets"): f"input_blocks.{first + 1}.0",
            ("down", "attentions"): f"input_blocks.{first + 1}.1",
            ("down", "downsamplers"): f"input_blocks.{(int(level) + 1) * each}.0",
            ("up", "resnets"): f"output_blocks.{first}.0",
            ("up", "attentions"): f"output_blocks.{first}.1",
            ("up", "upsamplers"): f"output_blocks.{(int(level) + 1) * each - 1}.2",
        }[side, kind]
        if kind == "downsamplers":
            return f"{block}.op.{end}"
    part, _, end = rest.rpartition(".")
    return f"{block}.{NAMES.get(part, part)}.{end}"


class ModelCheckpoint:
    """As the training framework left it in the checkpoints: a class that is named, and not there."""


@pytest.fixture
def checkpoint(tiny_networks, tmp_path):
    """A checkpoint as published: float32, averages beside the weights, the other networks, and callbacks."""
    unet = StableDiffusion.load(str(tiny_networks), network="hive").unet
    own = {f"model.diffusion_model.{published(name)}": w for name, w in unet.state_dict().items()}
    assert len(own) == len(unet.state_dict())
    state = {name: torch.zeros_like(w) for name, w in own.items()}
    state |= {"model_ema." + name.removeprefix("model.").replace(".", ""): w for name, w in own.items()}
    state |= {"first_stage_model.encoder.conv_in.weight": torch.zeros(3), "model_ema.num_updates": torch.tensor(7)}
    ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    file = tmp_path / "hive_rw_condition.ckpt"
    module = types.ModuleType(ModelCheckpoint.__module__)
    module.ModelCheckpoint = ModelCheckpoint
    sys.modules[module.__name__] = module
    try:
        torch.save({"state_dict": state, "global_step": 3, "callbacks": {ModelCheckpoint: {"best": None}}}, file)
    finally:
        del sys.modules[module.__name__]
    return file


def test_a_converted_checkpoint_is_the_network(checkpoint, tiny_networks, tiny_root, tmp_path):
    main([str(checkpoint), str(tmp_path / "unet"), "--base", str(tiny_root)])
    found = StableDiffusion.load(str(tiny_root), network="hive", unet=str(tmp_path / "unet")).unet
    want = StableDiffusion.load(str(tiny_networks), network="hive").unet
    for name, w in want.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], w, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_written_is_one_line(checkpoint, tiny_root, tmp_path):
    with pytest.raises(SystemExit, match="/unet: cannot be written"):
        main([str(checkpoint), str(checkpoint / "unet"), "--base", str(tiny_root)])


def test_a_conversion_that_is_called_off_leaves_nothing(checkpoint, tiny_root, tmp_path, monkeypatch):
    def called_off(*its):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "replace", called_off)
    with pytest.raises(KeyboardInterrupt):
        main([str(checkpoint), str(tmp_path / "unet"), "--base", str(tiny_root)])
    assert not list(tmp_path.glob("unet*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda found: b"garbage", "is no checkpoint"),
        (lambda found: {"state_dict": {"x": torch.zeros(1)}}, "holds no UNet of the latent-diffusion layout"),
        (lambda found: {n: w[:, :4] if "blocks.0.0.w" in n else w for n, w in found.items()}, "has 4 input channels"),
        (lambda found: {n: w for n, w in found.items() if "output_blocks.2.0" not in n}, "was not trained from"),
    ],
    ids=["garbage", "another thing", "not instruction-tuned", "another model"],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(checkpoint, tiny_root, tmp_path, damage, message):
    made = damage({name: w for name, w in weights(checkpoint).items() if name.startswith("model.")})
    file = tmp_path / "damaged.ckpt"
    file.write_bytes(made) if isinstance(made, bytes) else torch.save(made, file)
    with pytest.raises(SystemExit, match=message):
        main([str(file), str(tmp_path / "unet"), "--base", str(tiny_root)])
    assert not list(tmp_path.glob("unet*"))


def test_nothing_in_a_checkpoint_runs(tiny_root, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.ckpt")
    with pytest.raises(SystemExit, match="would run code"):
        main([str(tmp_path / "evil.ckpt"), str(tmp_path / "unet"), "--base", str(tiny_root)])
    assert not marker.exists()
