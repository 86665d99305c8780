"""The picture-book model's training: a part that was cut short ends as one that was not."""

import pytest
import torch

pytest.importorskip("experiments.picturebook.training")

from experiments.picturebook import autoencoder, tokenizer, unet
from experiments.picturebook.training import fit, settings
from masafusion_lab.picturebook.captions import VOCABULARY


def train(root):
    words = [f"root={root}", "steps=6", "batch=2", "epoch=2", "pictures=8", "channels=[8,8,8]", "threads=1", "warmup=2"]
    path = fit(autoencoder.Training, settings(autoencoder.Autoencoder, words), "vae")
    return torch.load(path, weights_only=False)


@pytest.mark.slow
def test_a_training_that_was_cut_short_gives_the_weights_of_an_undisturbed_one(tmp_path, monkeypatch):
    whole, step = train(tmp_path / "whole"), autoencoder.Training.training_step

    def killed(self, x, k):
        if self.trainer.global_step == 5:
            raise SystemExit("killed")
        return step(self, x, k)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder.Training, "training_step", killed)
        with pytest.raises(SystemExit):
            train(tmp_path / "parts")
    parts = train(tmp_path / "parts")
    assert parts["global_step"] == whole["global_step"] == 6
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, parts["state_dict"][name]), name


def test_every_word_of_the_world_is_one_token_and_strange_words_are_more(tmp_path):
    words = tokenizer.save(tmp_path)
    for word in VOCABULARY:
        assert len(words(word, add_special_tokens=False).input_ids) == 1, word
    assert len(words("hrose", add_special_tokens=False).input_ids) > 1
    assert len(words("", padding="max_length").input_ids) == tokenizer.LENGTH


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(Exception, match="stepps"):
        settings(autoencoder.Autoencoder, ["stepps=3"])


def test_a_grown_unet_holds_the_coarse_one_at_the_same_scale():
    words = ["channels=[16,32,32]", "heads=[1,2,2]"]
    torch.manual_seed(0)
    coarse = unet.build(settings(unet.Unet, [*words, "coarse=true"]), 8)
    fine = unet.build(settings(unet.Unet, words), 8)
    before = fine.conv_in.weight.clone()
    unet.grow(fine, coarse.state_dict())
    for inner, outer in (
        (coarse.mid_block, fine.mid_block),
        (coarse.down_blocks[0].attentions, fine.down_blocks[1].attentions),
        (coarse.up_blocks[1].attentions, fine.up_blocks[1].attentions),
    ):
        for (name, a), b in zip(inner.state_dict().items(), outer.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert torch.equal(fine.conv_in.weight, before)
    assert fine(torch.randn(1, 4, 16, 16), 3, torch.randn(1, 4, 8)).sample.isfinite().all()
