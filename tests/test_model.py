"""The model: pixels to latents, words to embeddings, the noise seen; and that how it is run changes nothing."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from masafusion_lab import InputError
from masafusion_lab.model import StableDiffusion
from tests.tiny import tiny_model

UNET = "unet/diffusion_pytorch_model.safetensors"


def pictures(batch=2, height=64, width=96):
    """Smooth pictures, as photographs are."""
    coarse = torch.rand(batch, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def noise(batch=2, height=16, width=24):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tiny_root, tmp_path):
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_root, tmp_path / "model"))


@pytest.fixture
def strict(folder):
    """The tiny model with a tokenizer that knows whole words only."""
    words = folder / "tokenizer"
    tokenizer = CLIPTokenizer(
        str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=24, whole_words=True
    )
    tokenizer.save_pretrained(words)
    return StableDiffusion.load(str(folder))


def test_latents_are_the_posteriors_mean_scaled(tiny):
    with torch.no_grad():
        mean = tiny.vae.encode(2 * pictures() - 1).latent_dist.mean
        decoded = tiny.vae.decode(mean).sample
    assert torch.equal(tiny.encode(pictures()), 0.18215 * mean)
    torch.testing.assert_close(tiny.decode(0.18215 * mean), (decoded / 2 + 0.5).clamp(0, 1))


def test_a_batch_is_its_pictures_one_by_one(tiny):
    x, text, schedule = noise(), tiny.embed(["a cat", "a red dog running"]), tiny.schedule(10)
    sketch = pictures()[:, :1].round()

    def parts(rows):
        hint = tiny.hint("sketch", sketch[rows])
        return (
            tiny.encode(pictures()[rows]),
            tiny.decode(x[rows]),
            tiny.eps(x[rows], 3, schedule, text[rows], hint=hint),
        )

    singles = zip(parts(slice(0, 1)), parts(slice(1, 2)), strict=True)
    for both, single in zip(parts(slice(0, 2)), singles, strict=True):
        torch.testing.assert_close(both, torch.cat(single), rtol=1e-4, atol=1e-5)
    assert torch.equal(text, torch.cat([tiny.embed(["a cat"]), tiny.embed(["a red dog running"])]))


def test_pictures_need_not_be_square(tiny):
    assert (tiny.factor, tiny.multiple, tiny.native, tiny.length) == (4, 16, 64, 24)
    x = tiny.encode(pictures(1, 48, 112))
    assert x.shape == (1, 4, 12, 28)
    assert tiny.decode(x).shape == (1, 3, 48, 112)
    assert [tuple(f.shape[2:]) for f in tiny.hint("pose", pictures(1, 48, 112))] == [(12, 28), (6, 14), (3, 7)]


@pytest.mark.parametrize(
    ("size", "says"),
    [((50, 64), "64x50: .* multiples of 16 .*; take 64x48 or 64x64"), ((8, 20), "20x8: .*; take 16x16 or 32x16")],
)
def test_a_size_that_does_not_fit_names_those_that_do(tiny, size, says):
    for use in (tiny.encode, lambda picture: tiny.hint("pose", picture)):
        with pytest.raises(InputError, match=says):
            use(torch.zeros(1, 3, *size))


def test_the_noise_of_a_v_prediction_is_found_from_it(tmp_path, tiny):
    other, x, text = tiny_model(tmp_path, prediction="v_prediction"), noise(1), tiny.embed(["a cat"])
    schedule = other.schedule(10)
    a, v = schedule.level(3), tiny.eps(x, 3, tiny.schedule(10), text)  # the same weights, of which one says it is v
    torch.testing.assert_close(other.eps(x, 3, schedule, text), a**0.5 * v + (1 - a) ** 0.5 * x)
    a = schedule.level(4)
    torch.testing.assert_close(other.eps(x, 3, schedule, text, level=4), a**0.5 * v + (1 - a) ** 0.5 * x)


def test_hints_of_grey_and_of_colour_are_given_to_adapters_of_either(tiny):
    grey = pictures()[:, :1].round()
    for mine, same in (
        (tiny.hint("pose", grey), tiny.hint("pose", grey.expand(-1, 3, -1, -1))),
        (tiny.hint("sketch", grey.expand(-1, 3, -1, -1)), tiny.hint("sketch", grey)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, same, strict=True))
    with pytest.raises(InputError, match=r"no depth adapter \(it has: pose, sketch\); give model.adapter.depth=FOLDER"):
        tiny.hint("depth", grey)


def test_silent_features_are_no_features_and_a_call_uses_none_of_them_up(tiny):
    x, text, schedule = noise(), tiny.embed(["a cat", "a red dog running"]), tiny.schedule(10)
    hint = list(tiny.hint("sketch", pictures()[:, :1].round()))
    plain, silent = tiny.eps(x, 3, schedule, text), [torch.zeros_like(f) for f in hint]
    assert torch.equal(tiny.eps(x, 3, schedule, text, hint=silent), plain)
    guided = tiny.eps(x, 3, schedule, text, hint=hint)
    assert len(hint) == 3
    assert torch.equal(tiny.eps(x, 3, schedule, text, hint=hint), guided)
    assert not torch.allclose(guided, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [
        ("a cat", ""),
        ("", ""),
        (" ".join(["cat"] * 22), ""),
        (" ".join(["cat"] * 22) + " on the  grass", "on the  grass"),
        (" ".join(["cat"] * 20) + " axolotl", "axolotl"),  # cut within a word: all of it is named
        ("ab" * 20, "ab" * 20),
        (" ".join(["Cat,"] * 12), "Cat,"),
    ],
)
def test_words_beyond_the_encoders_length_are_named(tiny, prompt, lost):
    assert tiny.cut(prompt) == lost
    if lost and prompt != lost:
        assert torch.equal(tiny.embed([prompt]), tiny.embed([prompt + " in snow"]))


def test_a_model_of_whole_words_refuses_others_and_names_those_it_knows(strict, tiny):
    known = "a red cat on the Grass"
    assert torch.equal(strict.embed([known, ""]), tiny.embed([known, ""]))
    with pytest.raises(
        InputError, match=r"'a catt on gras': .*'catt' \(near: cat.*'gras' \(near: grass.*words that it"
    ):
        strict.embed(["a cat", "a catt on gras"])
    with pytest.raises(InputError, match=r"'zzz' \(near: none\)"):
        strict.embed(["zzz"])


def test_a_model_of_word_pieces_takes_any_text(tiny):
    for prompt in ("", "axolotl", "a: b {x} ${HOME} -x", "läuft 猫 🐈\n\0", "word " * 300):
        assert tiny.embed([prompt]).shape == (1, 24, 32)


def test_the_digest_is_of_what_the_weights_are_not_of_how_they_were_saved(folder, tiny):
    assert StableDiffusion.load(str(folder)).digest() == tiny.digest()
    again = folder.parent / "again"
    shutil.copytree(folder, again)
    tiny.unet.save_pretrained(again / "unet", max_shard_size="300KB")
    (again / UNET).unlink()
    tiny.text_encoder.save_pretrained(again / "text_encoder")
    assert StableDiffusion.load(str(again)).digest() == tiny.digest()
    halves = {name: value.half() for name, value in load_file(folder / UNET).items()}
    save_file(halves, folder / UNET, metadata={"format": "pt"})
    rounded = StableDiffusion.load(str(folder)).digest(["unet"])
    save_file({name: value.float() for name, value in halves.items()}, folder / UNET, metadata={"format": "pt"})
    assert StableDiffusion.load(str(folder)).digest(["unet"]) == rounded != tiny.digest(["unet"])


def test_one_bit_of_one_weight_or_another_word_changes_the_digest(folder, tiny):
    data = bytearray((folder / UNET).read_bytes())
    data[-1] ^= 1
    (folder / UNET).write_bytes(data)
    words = json.loads((folder / "tokenizer/tokenizer.json").read_text())
    known = words["model"]["vocab"]
    known["cat</w>"], known["dog</w>"] = known["dog</w>"], known["cat</w>"]
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(words))
    other = StableDiffusion.load(str(folder))
    assert other.digest(["unet"]) != tiny.digest(["unet"])
    assert other.digest(["text_encoder"]) != tiny.digest(["text_encoder"])
    assert other.digest(["vae", "sketch"]) == tiny.digest(["vae", "sketch"]) != tiny.digest(["vae", "pose"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_to_whole(tiny, tiny_root, dtype):
    half = StableDiffusion.load(str(tiny_root), dtype=dtype)
    assert half.dtype == half.vae.dtype == half.text_encoder.dtype == getattr(torch, dtype)
    text, x = tiny.embed(["a cat on grass", ""]), noise()

    def results(model):
        hint = model.hint("sketch", pictures()[:, :1].round())
        eps = model.eps(x, 3, model.schedule(10), text, hint=hint)
        return model.encode(pictures()), model.decode(x), model.embed(["a cat on grass"]), eps

    for whole, rounded in zip(results(tiny), results(half), strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - whole).square().mean() < 1e-3 * whole.square().mean()


def test_tiles_decode_nearly_the_same_picture(tiny, tiny_root):
    """Not the same: this autoencoder's attention and normalisation see one tile, the more so with random weights."""
    tiled = StableDiffusion.load(str(tiny_root), tiling=True)
    x = tiny.encode(pictures(2, 128, 192))  # over the 64 pixels of a tile
    assert (tiled.decode(x) - tiny.decode(x)).abs().mean() < 0.1
    small = tiny.encode(pictures(2, 64, 64))
    torch.testing.assert_close(tiled.decode(small), tiny.decode(small), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_unet_sees_the_same_noise(tiny, tiny_root):
    compiled = StableDiffusion.load(str(tiny_root), compile=True)
    kinds = {type(module).__name__ for module in compiled.unet.modules() if module._compiled_call_impl}
    assert kinds == {"ResnetBlock2D", "FeedForward"}  # all but attention
    schedule = tiny.schedule(10)
    for batch, width in ((1, 16), (4, 16), (2, 24), (10, 16)):
        x, text = noise(batch, 16, width), tiny.embed(["a cat on grass"] * batch)
        torch.testing.assert_close(
            compiled.eps(x, 3, schedule, text), tiny.eps(x, 3, schedule, text), rtol=1e-3, atol=1e-4
        )


def test_what_is_not_finite_is_no_picture(tiny):
    with pytest.raises(ArithmeticError, match=r"pixels are not finite in torch.float32; take model.dtype=float32"):
        tiny.decode(torch.full((1, 4, 16, 16), torch.nan))
    with pytest.raises(ArithmeticError, match="latents are not finite"):
        tiny.encode(torch.full((1, 3, 64, 64), torch.inf))


def test_offload_is_of_no_use_without_a_gpu_and_says_so(tiny, tiny_root, caplog):
    with caplog.at_level(logging.WARNING):
        model = StableDiffusion.load(str(tiny_root), offload="model")
    assert "ignored, the model runs on the CPU" in caplog.text
    assert torch.equal(model.embed(["a cat"]), tiny.embed(["a cat"]))
    with pytest.raises(InputError, match=r"model.offload=disk: must be none or model"):
        StableDiffusion.load(str(tiny_root), offload="disk")


def test_nothing_is_trained(tiny):
    parts = (tiny.unet, tiny.vae, tiny.text_encoder, *tiny.adapters.values())
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not any(module.training for part in parts for module in part.modules())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{"dtype": "float32"}, {"dtype": "auto"}, {"dtype": "bfloat16"}, {"offload": "model"}]
)
def test_a_gpu_gives_what_the_processor_gives(tiny, tiny_root, settings):
    model = StableDiffusion.load(str(tiny_root), device="cuda", **{"dtype": "float32"} | settings)
    x, text = noise(), tiny.embed(["a cat on grass", ""])
    eps = model.eps(x.cuda(), 3, model.schedule(10), text.cuda(), hint=model.hint("pose", pictures()))
    expected = tiny.eps(x, 3, tiny.schedule(10), text, hint=tiny.hint("pose", pictures()))
    assert (eps.cpu() - expected).square().mean() < 1e-3 * expected.square().mean()
    assert (model.decode(model.encode(pictures())).cpu() - tiny.decode(tiny.encode(pictures()))).abs().mean() < 0.01
    resident = [part.device.type for part in (model.unet, model.vae, model.text_encoder)]
    assert resident == (["cpu", "cuda", "cpu"] if model.offload else ["cuda"] * 3)
    model.rest()
    assert {p.device.type for part in (model.unet, model.vae, model.text_encoder) for p in part.parameters()} == {"cpu"}
    assert torch.equal(
        model.eps(x.cuda(), 3, model.schedule(10), text.cuda(), hint=model.hint("pose", pictures())), eps
    )
