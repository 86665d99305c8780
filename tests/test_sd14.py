"""Models of SD 1.x structure: one of full size and random weights, and a small one with real pictures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from experiments.random_sd import SIZES, build, parts, write_tokenizer
from masafusion_lab.data.case import Case
from masafusion_lab.data.prepared import prepare
from masafusion_lab.loading import quiet
from masafusion_lab.model import StableDiffusion

LEFT = ("source", "mask", "sketch", "reconstruction", "intermediate", "target", "strip")
CAT = "images/t2ia_edit_cat__"


def edit(model, out, **settings):
    """`masafusion edit` in two steps, in a process of its own; its result."""
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [Path(sys.executable).with_name("masafusion"), "edit", f"model.path={model}", f"out={out}", *words]
    done = subprocess.run([*command, "steps=2", "tracking.mode=off"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").is_file()
    assert (out / "config.yaml").is_file()
    return json.loads((out / "result.json").read_text())


def pixels(file):
    """(3, H, W) in [0, 1] of a picture in a folder of results."""
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model of four levels and latents of an eighth, of random weights."""
    folder = tmp_path_factory.mktemp("small")
    with quiet():
        build(folder, SIZES["small"])
    return folder


@pytest.fixture
def real(realdata, small, tmp_path):
    """That model with the words of CLIP and a real autoencoder, TAESD's."""
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    write_tokenizer(folder / "tokenizer", realdata / "text")
    down, up = (load_file(realdata / f"weights/taesd_{half}.safetensors") for half in ("encoder", "decoder"))
    state = {f"encoder.layers.{key}": value for key, value in down.items()}
    for key, value in up.items():
        layer, _, rest = key.partition(".")
        state[f"decoder.layers.{int(layer) - 1}.{rest}"] = value
    vae = AutoencoderTiny()
    vae.load_state_dict(state)
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_model_of_full_size_edits_a_photograph(tmp_path):
    subprocess.run([sys.executable, "-m", "experiments.random_sd", tmp_path / "sd"], check=True, capture_output=True)
    coffee = pytest.importorskip("skimage.data").coffee()
    Image.fromarray(coffee).resize((512, 512)).save(tmp_path / "photo.png")
    for name, ring in (("mask", {"fill": 255}), ("sketch", {"outline": 255, "width": 3})):
        picture = Image.new("L", (512, 512))
        ImageDraw.Draw(picture).ellipse((128, 128, 384, 384), **ring)
        picture.save(tmp_path / f"{name}.png")
    files = {name: tmp_path / f"{name}.png" for name in ("mask", "sketch")}
    prompts = {"source": "a cup of coffee", "target": "a red cup of coffee"}
    result = edit(tmp_path / "sd", tmp_path / "out", image=tmp_path / "photo.png", **files, **prompts)
    for name in LEFT[:-1]:
        assert Image.open(tmp_path / f"out/{name}.png").size == (512, 512)
    assert result["size"] == [512, 512]
    assert result["rows"] == 20
    assert result["reconstruction_psnr"] == result["roundtrip_psnr"]
    assert result["peak_memory_gb"] < 24


def test_the_small_model_has_the_structure_of_the_full_one(small):
    model = StableDiffusion.load(str(small))
    assert (model.factor, model.multiple, model.native, model.length) == (8, 64, 512, 77)
    assert len(model.tokenizer) == 49408
    assert model.config["prediction_type"] == "epsilon"
    assert [tuple(f.shape[1:]) for f in model.hint("sketch", torch.zeros(1, 1, 64, 128))] == [
        (32, 8, 16),
        (64, 4, 8),
        (64, 2, 4),
        (64, 1, 2),
    ]


def test_the_full_one_has_as_many_parameters_as_sd_1_4():
    with torch.device("meta"):
        counted = {name: sum(p.numel() for p in make().parameters()) for name, make in parts(SIZES["full"]).items()}
    assert counted == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "t2iadapter_sketch": 77_000_640,
    }


@pytest.mark.realdata
@pytest.mark.timeout(600)
def test_an_edit_of_the_cat_reconstructs_what_its_autoencoder_can(realdata, real, tmp_path):
    files = {"image": "im", "mask": "mask", "sketch": "edge_2"}
    files = {key: realdata / f"{CAT}{name}.png" for key, name in files.items()}
    result = edit(real, tmp_path / "out", **files, source="a cat", target="a cat with its head turned")
    assert result["reconstruction_psnr"] == result["roundtrip_psnr"] == pytest.approx(23.72, abs=0.02)
    assert {f"{name}.png" for name in LEFT} <= set(result["files"])
    model, source = StableDiffusion.load(str(real)), pixels(tmp_path / "out/source.png")
    roundtrip = model.decode(model.encode(source[None]))[0]
    assert torch.equal(source, pixels(files["image"]))
    assert (pixels(tmp_path / "out/reconstruction.png") - roundtrip).abs().max() < 1.01 / 255
    assert (pixels(tmp_path / "out/target.png") - source).abs().mean() > 0.02
    tiled = StableDiffusion.load(str(real), tiling=True)
    assert (tiled.decode(tiled.encode(source[None])) - roundtrip).abs().mean() < 0.01


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("image", "mask", "sketch", "size"),
    [
        ("t2ia_sketch__scenery.jpg", "t2ia_seg_sketch__mask.png", None, (768, 512)),  # 730x487, no multiple of 64
        ("t2ia_edit_cat__im.png", "t2ia_edit_cat__mask.png", "t2ia_edit_cat__edge_2.png", (512, 512)),  # RGBA
        ("ldm_bench_dog.png", "ldm_bench_dog_mask.png", "t2ia_edit_cat__edge.png", (512, 512)),  # 253 levels, RGB
        ("t2ia_canny__toy_canny.png", None, "t2ia_canny__toy_canny.png", (512, 768)),  # L, as picture and as hint
        ("masactrl_tshirt.png", None, None, (512, 512)),  # 1024x1024
    ],
)
def test_real_pictures_of_odd_sizes_and_modes_are_prepared(realdata, image, mask, sketch, size):
    pictures = realdata / "images"
    same = mask and Image.open(pictures / mask).size == Image.open(pictures / image).size
    hints = {"sketch": pictures / sketch} if sketch else {}
    case = Case("case", pictures / image, "", "", mask=pictures / mask if same else None, hints=hints)
    prepared = prepare(case, factor=8, multiple=64, native=512)
    width, height = size
    assert prepared.pixels.shape == (3, height, width)
    assert 0 <= prepared.pixels.min() < prepared.pixels.max() <= 1
    assert prepared.original == Image.open(pictures / image).size
    if same:
        assert prepared.mask.shape == (1, height // 8, width // 8)
        assert 0.1 < prepared.mask.mean() < 0.25  # both regions are 13 % of the pixels; cells that they touch count
    for hint in prepared.hints.values():
        assert hint.shape == (1, height, width)
        assert 0 < hint.mean() < 0.3
