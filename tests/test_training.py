"""The picture-book model's training: a part that was cut short ends as one that was not."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

pytest.importorskip("experiments.picturebook.training")

from experiments.picturebook import all as recipe
from experiments.picturebook import autoencoder, data, grown, inpaint, instruct, text, tokenizer, training, unet
from experiments.picturebook.training import fit, settings
from masafusion_lab import InputError, network
from masafusion_lab.hub import Files
from masafusion_lab.picturebook import ALL_POSES, BACKGROUNDS, COLOURS, KINDS, PATTERNS, scene
from masafusion_lab.picturebook.captions import VOCABULARY, WORDINGS, caption, words
from masafusion_lab.words import unknown


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


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stepps=3", "'stepps' not in 'Autoencoder'"),
        ("steps=few", "'few' .* Integer full_key: steps"),
        ("lr=[1", "parsing"),
    ],
)
def test_a_setting_that_cannot_be_is_named_in_one_line(word, said, monkeypatch):
    with pytest.raises(InputError, match=said):
        settings(autoencoder.Autoencoder, [word])
    monkeypatch.setattr(sys, "argv", ["autoencoder", word])
    with pytest.raises(SystemExit, match=said) as end:
        autoencoder.main()
    assert "\n" not in str(end.value)


def test_a_rate_rises_over_the_warm_up_if_there_is_one_and_falls_to_two_hundredths():
    def rates(*words):
        part = training.Part(settings(training.Settings, ["steps=100", *words]))
        return [part.rate(step) for step in (0, 50, 100)]

    assert rates("warmup=10") == pytest.approx([0.1, 1, 0.02])
    assert rates("warmup=0", "cooldown=0") == [1, 1, pytest.approx(0.02)]


def test_the_settings_of_a_part_are_listed_with_what_they_mean(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["autoencoder", "--help"])
    with pytest.raises(SystemExit) as end:
        autoencoder.main()
    said = capsys.readouterr().out
    assert not end.value.code
    assert all(
        part in said for part in ("AutoencoderKL", "crop: the side", "crop: 64", "root: checkpoints/picturebook")
    )


def test_a_part_that_builds_on_one_that_is_not_there_says_how_to_have_it(tmp_path):
    with pytest.raises(InputError, match=r"unet_coarse/last.ckpt: missing; python -m experiments\.picturebook\.all "):
        training.weights(settings(unet.Unet, [f"root={tmp_path}"]), "unet_coarse", "unet")


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


SMALL = ["channels=[16,32]", "heads=[1,2]", "pictures=8", "batch=2", "steps=2", "epoch=2", "threads=1", "warmup=1"]


def test_an_input_that_was_grown_is_not_heeded_yet():
    torch.manual_seed(0)
    net = unet.build(settings(unet.Unet, SMALL[:2]), 8)
    more = grown.grow(net, 5)
    x, beside, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 16, 16), torch.randn(1, 4, 8)
    torch.testing.assert_close(more(torch.cat([x, beside], 1), 3, text).sample, net(x, 3, text).sample)


def test_regions_to_fill_are_things_boxes_or_all():
    g = np.random.default_rng(0)
    things = np.zeros((64, 32, 32), np.uint8)
    things[:, 10:14, 10:14] = 255
    whole = inpaint.regions(g, things, 0.5, 1.0)
    assert whole.shape == (64, 1, 32, 32)
    assert whole.min() == 1
    around = inpaint.regions(g, things, 1.0, 0.0)
    assert around[:, :, 10:14, 10:14].min() == 1
    assert around.max((0, 1))[0].max() == 0
    drawn = inpaint.regions(g, things, 0.0, 0.0)
    assert 0.05 < drawn.mean() < 0.6
    assert set(np.unique(drawn)) == {0, 1}


@pytest.mark.parametrize("wording", range(WORDINGS))
def test_what_is_asked_of_a_captions_tokens_is_what_it_tells(wording):
    tables = [COLOURS, PATTERNS, ALL_POSES, text.SIDES]
    for k in range(40):
        described = scene("train", k)
        read, asked = words(caption(described, wording)), text.answers(described, wording)
        assert {KINDS[n] for n in np.flatnonzero(asked[:, 0])} == set(read) & set(KINDS)
        told = {table[n] for row in asked for table, n in zip(tables, row[1:], strict=True) if n != text.UNTOLD}
        assert told - {"", "plain"} == set(read) & set().union(*tables) - {"plain"}


def test_a_reader_tells_whose_colour_is_whose():
    torch.manual_seed(0)
    reader, tokens = text.Reader(16), torch.randn(2, 5, 16)
    asked = torch.full((2, len(KINDS), 5), text.UNTOLD)
    asked[..., 0] = 0
    for b, colours in enumerate(((0, 4), (4, 0))):  # of the first two kinds, swapped
        for kind, colour in enumerate(colours):
            asked[b, kind, :2] = torch.tensor([1, colour])
    background = torch.tensor([2, 3])
    optimizer = torch.optim.Adam(reader.parameters(), 0.02)
    for _ in range(150):
        loss, right = reader.loss(tokens, background, asked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert right == {"colour": 1}
    place, there, looks = reader(tokens)
    assert place.shape == (2, len(BACKGROUNDS))
    assert (there > 0).sum(1).tolist() == [2, 2]
    assert looks["side"].shape == (2, len(KINDS), len(text.SIDES))


def test_the_time_for_all_is_shared_by_the_parts_that_are_left(monkeypatch, capsys):
    ran, clock = [], [0.0]

    def run(part):
        ran.append(part[2:])
        clock[0] += 30
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(recipe.subprocess, "run", run)
    monkeypatch.setattr(recipe.time, "monotonic", lambda: clock[0])
    asked = ["all", "--gpu", "--minutes", "10", "--only", "unet,inpaint,export", "root=here"]
    monkeypatch.setattr(sys, "argv", asked)
    recipe.main()
    assert [part[0].rpartition(".")[2] for part in ran] == ["unet", "inpaint", "export"]
    assert [word for part in ran for word in part if word.startswith("minutes")] == ["minutes=8.621", "minutes=9.500"]
    assert all("root=here" in part for part in ran)
    assert "workers=12" in ran[0]
    assert "workers=12" not in ran[2]
    monkeypatch.setattr(sys, "argv", ["all", "--only", "unett"])
    with pytest.raises(SystemExit):
        recipe.main()
    assert "'unett': there are autoencoder, " in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_however_many_put_them_together(workers):
    numbers = data.Batches(lambda g: g.integers(10**9), 0, 3, 5)
    loaded = [int(n) for n in torch.utils.data.DataLoader(numbers, batch_size=None, num_workers=workers)]
    assert loaded == [np.random.default_rng((0, k)).integers(10**9) for k in range(3, 8)]


def test_a_fit_with_so_many_minutes_has_as_many_steps_as_fit(tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 6))
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))  # six seconds from look to look
    words = [f"root={tmp_path}", "steps=1000", "batch=2", "epoch=2", "pictures=4", "threads=1", "minutes=0.9"]
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    path = fit(autoencoder.Training, settings(autoencoder.Autoencoder, [*words, "channels=[8,8,8]"]), "vae")
    assert 4 <= torch.load(path, weights_only=False)["global_step"] <= 16


def test_grades_are_words_that_the_model_knows(tmp_path):
    assert not unknown(tokenizer.save(tmp_path), f"make the horse red{instruct.suffix()}")


def test_latents_are_scaled_by_a_few_pictures_without_drawing_all(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(autoencoder, "MEASURED", 2)
    vae = autoencoder.trained(settings(training.Settings, [f"root={tmp_path}", "pictures=25000"]))
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["train-2-picture-128.npy"]
    with torch.no_grad():
        x = vae.encode(2 * data.pixels(data.Album(tmp_path / "data", count=2).pictures) - 1).latent_dist.mean
    assert float(x.std()) * vae.config.scaling_factor == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_grown_networks_learn_and_ship_as_what_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(
        data, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1)
    )  # few pictures, no new processes
    words = [f"root={tmp_path}", *SMALL]
    torch.manual_seed(0)
    net = unet.build(settings(unet.Unet, words), 128)
    training.last(settings(unet.Unet, words), "unet").parent.mkdir()
    state = {f"unet.{name}": w for name, w in net.state_dict().items()}
    state |= {f"text.{name}": w for name, w in text.trained(settings(unet.Unet, words)).state_dict().items()}
    torch.save({"state_dict": state}, training.last(settings(unet.Unet, words), "unet"))
    net.half().save_pretrained(tmp_path / "model" / "unet")
    instruct.main(words)
    instruct.main([*words, "grades=true"])
    inpaint.main(words)
    for kind, channels in (("instruct", 8), ("hive", 8), ("inpaint", 9)):
        folder = grown.export(settings(unet.Unet, words), kind, tmp_path / "model", _suffix="!")
        merged = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
        files = [Files(f, (f / "diffusion_pytorch_model.safetensors",)) for f in (tmp_path / "model/unet", folder)]
        network.read_changes(merged, *files)
        trained = training.weights(settings(unet.Unet, words), f"unet_{kind}", "unet")
        for name, w in merged.state_dict().items():
            torch.testing.assert_close(w, trained[name], rtol=1e-2, atol=1e-3, msg=name)
        assert merged.config.in_channels == channels
        assert trained["conv_in.weight"][:, 4:].abs().max() > 0
        shipped = load_file(files[1].names[0])
        assert not any("resnets" in name and "conv" in name for name in shipped)  # half of all weights
