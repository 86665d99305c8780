"""What a person may call a model: whole folders load; whatever else is refused in one line that says what to do."""

import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter, UNet2DConditionModel
from diffusers.utils import logging as of_diffusers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as of_transformers

from masafusion_lab import InputError, hub
from masafusion_lab.loading import choose_device, choose_dtype
from masafusion_lab.model import StableDiffusion

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
ADAPTER = "t2iadapter_sketch/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_root, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_root, tmp_path / "model"))


def refused(path, **settings):
    """The message by which a model is refused: one line."""
    with pytest.raises(InputError) as caught:
        StableDiffusion.load(str(path), **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        UNET,
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        TEXT,
        "tokenizer/tokenizer_config.json",
        "t2iadapter_sketch/config.json",
        ADAPTER,
    ],
)
def test_half_a_copy_names_the_file_that_is_missing(folder, file):
    (folder / file).unlink()
    assert f"{folder / file}: missing; half a copy" in refused(folder)


def test_the_tokenizer_needs_one_form_of_its_words_only(folder, tiny):
    (folder / "tokenizer/tokenizer.json").unlink()
    assert torch.equal(StableDiffusion.load(str(folder)).embed(["a red cat"]), tiny.embed(["a red cat"]))
    (folder / "tokenizer/merges.txt").unlink()
    assert "tokenizer/merges.txt: missing; half a copy" in refused(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "model.path=nowhere: no such folder; give a diffusers folder, or a hub id"),
        ("/no/such/folder", "no such folder; give a diffusers folder"),
        ("x" * 300, "no such folder"),
        ("a\0b", "no such folder"),
        ("~nobody-of-that-name/x/y", "no such folder"),
    ],
)
def test_no_folder(name, says):
    assert says in refused(name)


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "sd.safetensors").touch()
    assert "is a file; give a diffusers folder" in refused(tmp_path / "sd.safetensors")


@pytest.mark.parametrize("file", [UNET, TEXT, ADAPTER])
@pytest.mark.parametrize("damage", ["truncated", "short by a byte", "empty", "garbage", "header of 2^40 bytes"])
def test_damaged_weights_name_their_file(folder, file, damage):
    whole = (folder / file).read_bytes()
    damaged = {
        "truncated": whole[:1000],
        "short by a byte": whole[:-1],
        "empty": b"",
        "garbage": b"\xff\x00garbage" * 100,
        "header of 2^40 bytes": (2**40).to_bytes(8, "little") + b"{}",
    }
    (folder / file).write_bytes(damaged[damage])
    assert f"{folder / file}: truncated or no safetensors file, download or copy it again" in refused(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_configuration_names_its_file(folder, content):
    (folder / "unet/config.json").write_bytes(content)
    assert f"{folder / 'unet/config.json'}: unreadable, copy it again" in refused(folder)


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer/tokenizer.json").write_text("{")
    assert f"{folder / 'tokenizer'}: unreadable, copy it again" in refused(folder)


class TestPickles:
    """Pickled weights can run code: none ever does."""

    @pytest.fixture
    def evil(self, tmp_path):
        """An object whose unpickling leaves a file behind; checked not to be there when the test is done."""
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return open, (str(marker), "w")

        yield Evil()
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "unet.pt"])
    def test_in_place_of_weights_it_is_not_even_read(self, folder, evil, name):
        (folder / UNET).unlink()
        (folder / "unet" / name).write_bytes(pickle.dumps(evil))
        assert f"{name}: pickled weights can run code and are not read; get the .safetensors" in refused(folder)

    def test_renamed_to_safetensors(self, folder, evil):
        (folder / UNET).write_bytes(pickle.dumps(evil))
        assert "truncated or no safetensors file" in refused(folder)

    def test_as_an_adapter(self, folder, evil):
        (folder / ADAPTER).unlink()
        torch.save({"body": evil}, folder / "t2iadapter_sketch/diffusion_pytorch_model.bin")
        assert "diffusion_pytorch_model.bin: truncated, or a pickle that would run code, refused" in refused(folder)

    def test_a_published_adapter_is_pickled_and_loads(self, folder, tiny):
        weights = load_file(folder / ADAPTER)
        (folder / ADAPTER).unlink()
        torch.save(weights, folder / "t2iadapter_sketch/diffusion_pytorch_model.bin")
        assert StableDiffusion.load(str(folder)).digest(["sketch"]) == tiny.digest(["sketch"])


@pytest.mark.parametrize(
    ("file", "entries", "says"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "SDXL.*only SD 1.x and 2.x"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "=text_time: .*pooled text.*SDXL"),
        ("unet/config.json", {"in_channels": 9}, "in_channels=9, an inpainting model's; .* latents have 4"),
        ("unet/config.json", {"in_channels": 8}, "in_channels=8, an instruction-tuned .*; .* latents have 4"),
        ("unet/config.json", {"out_channels": 8}, "out_channels=8; the autoencoder's latents have 4"),
        ("vae/config.json", {"latent_channels": 16}, "in_channels=4; the autoencoder's latents have 16"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "is a UNet2DModel, must be UNet2DConditionModel"),
        ("vae/config.json", {"_class_name": "VQModel"}, "is a VQModel, must be AutoencoderKL or AutoencoderTiny"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "is a T5EncoderModel, must be CLIPText"),
        ("text_encoder/config.json", {"hidden_size": 64}, "cross_attention_dim=32 .* hidden_size=64; .* different"),
        ("text_encoder/config.json", {"vocab_size": 9}, "tokens, the text encoder knows 9; .* different models"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, "is a T5Tokenizer, must be CLIPTok"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "scheduler: the scheduler predicts"),
        ("unet/config.json", {"layers_per_block": 2}, "weights and config.json do not fit"),
        ("unet/config.json", {"conv_in_kernel": 1}, "weights and config.json do not fit|config.json is of another"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D"] * 3}, "config.json is of another model; .* besides"),
        ("t2iadapter_sketch/config.json", {"channels": [320, 640, 1280, 1280]}, r"\[320.* the UNet \[16, 32, 32\]"),
        ("t2iadapter_sketch/config.json", {"downscale_factor": 8}, "starts at 1/8 of the picture, the UNet at 1/4"),
        ("t2iadapter_sketch/config.json", {"_class_name": "ControlNetModel"}, "ControlNetModel, must be T2IAdapter"),
    ],
)
def test_another_kind_of_model_is_named(folder, file, entries, says):
    change(folder / file, **entries)
    with pytest.raises(InputError, match=says):
        raise InputError(refused(folder))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"time_cond_proj_dim": 64}, "time_cond_proj_dim=64: .* the strength of guidance"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64}, "projection: .*unCLIP"),
        ({"num_class_embeds": 1000}, "num_class_embeds=1000: .* a noise level"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8}, "image_proj: .* embeddings of pictures"),
        ({"addition_embed_type": "text"}, "addition_embed_type=text: .* added to the time"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True: .* beside the text"),
        ({"attention_type": "gated"}, "attention_type=gated: .*GLIGEN"),
    ],
)
def test_a_unet_that_asks_for_more_than_a_latent_a_time_and_text_is_refused_before_its_weights(folder, entries, says):
    made = UNet2DConditionModel(**{**UNet2DConditionModel.load_config(folder / "unet"), **entries})
    made.save_pretrained(folder / "unet")  # whole, and of one piece: nothing else is wrong with it
    (folder / UNET).write_bytes(b"")
    with pytest.raises(InputError, match=f"{folder / 'unet'}: .*{says}.*; take a model of SD 1.x or 2.x"):
        StableDiffusion.load(str(folder))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"_class_name": "LCMScheduler"}, "LCMScheduler is for networks that were distilled.*take a model that DDIM"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler is for networks"),
        ({"clip_sample": True}, "clip_sample=true: .*write false"),
        ({"thresholding": True}, "thresholding=true: .*write false"),
        ({"timestep_spacing": "log"}, "timestep_spacing='log' is unknown; it may be leading, trailing or linspace"),
        ({"trained_betas": [0.1]}, "trained_betas: 1 of them, for num_train_timesteps=1000"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "timestep 999 is noise alone.*leading"),
    ],
)
def test_a_scheduler_that_ddim_cannot_follow_is_refused_by_name(folder, entries, says):
    change(folder / "scheduler/scheduler_config.json", **entries)
    with pytest.raises(InputError, match=f"{folder / 'scheduler'}: .*{says}"):
        StableDiffusion.load(str(folder))


def test_the_folders_spacing_is_followed_and_another_sampler_is_said(folder, caplog):
    entries = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    change(folder / "scheduler/scheduler_config.json", **entries)
    with caplog.at_level("INFO"):
        schedule = StableDiffusion.load(str(folder)).schedule(50)
    assert schedule.timesteps == tuple(range(999, 0, -20))
    assert f"{folder / 'scheduler'}: names EulerDiscreteScheduler; here DDIM takes" in caplog.text


def test_a_unet_from_elsewhere_was_trained_with_the_same_betas(folder, tiny_root, tmp_path):
    other = Path(shutil.copytree(tiny_root, tmp_path / "other"))
    change(other / "scheduler/scheduler_config.json", beta_end=0.02)
    assert "was trained with other betas" in refused(folder, unet=str(other))
    change(other / "scheduler/scheduler_config.json", _class_name="TCDScheduler")
    assert "TCDScheduler is for networks" in refused(folder, unet=str(other))


def test_weights_of_another_shape_are_refused(folder):
    weights = load_file(folder / UNET)
    save_file(weights | {"conv_in.bias": torch.zeros(3)}, folder / UNET)
    assert "conv_in" in refused(folder)


def test_an_adapter_from_elsewhere_takes_the_place_of_the_folders_own(folder, tiny_root, tmp_path):
    torch.manual_seed(1)
    other = T2IAdapter.from_config(T2IAdapter.load_config(tiny_root / "t2iadapter_sketch"))
    other.save_pretrained(tmp_path / "mine")
    model = StableDiffusion.load(
        str(folder), adapter={"sketch": str(tmp_path / "mine"), "depth": str(tmp_path / "mine")}
    )
    assert sorted(model.adapters) == ["depth", "pose", "sketch"]
    assert model.digest(["sketch"]) == model.digest(["depth"]) != model.digest(["pose"])
    assert "model.adapter.sketch=gone: no such folder" in refused(folder, adapter={"sketch": "gone"})


def test_weights_in_several_files(folder, tiny):
    whole = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / UNET).unlink()
    whole.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert StableDiffusion.load(str(folder)).digest() == tiny.digest()
    first = min((folder / "unet").glob("*-of-*"))
    first.rename(first.with_suffix(".kept"))
    assert f"{first}: missing; half a copy" in refused(folder)
    (index,) = (folder / "unet").glob("*.index.json")
    for bad in ("{", "{}", json.dumps({"weight_map": {"a": "../../secret"}})):
        index.write_text(bad)
        assert f"{index}: " in refused(folder)


def test_half_precision_prefers_the_smaller_files(folder):
    weights = load_file(folder / UNET)
    halves = {name: value.half() + 1 for name, value in weights.items()}
    save_file(halves, folder / "unet/diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    name = "conv_in.bias"
    assert torch.equal(StableDiffusion.load(str(folder)).unet.state_dict()[name], weights[name])
    assert torch.equal(StableDiffusion.load(str(folder), dtype="float16").unet.state_dict()[name], halves[name])


class TestHub:
    """A hub id, with no network."""

    ID = "CompVis/stable-diffusion-v1-4"

    @pytest.fixture(autouse=True, params=["offline", "no network"])
    def away(self, request, monkeypatch, tmp_path):
        def unknown_host(host, *args, **kwargs):
            raise socket.gaierror(f"no network in tests: {host}")

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", request.param == "offline")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
        return request.param

    def cached(self, tmp_path, source):
        commit = "0" * 40
        repo = tmp_path / "hub/models--CompVis--stable-diffusion-v1-4"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs/main").write_text(commit)
        return Path(shutil.copytree(source, repo / "snapshots" / commit))

    def test_what_is_not_in_the_cache_says_how_to_go_on(self, away, tmp_path):
        message = refused(self.ID)
        assert f"{tmp_path / 'hub'}, and the hub cannot be reached" in message
        assert "give a local diffusers folder, or set HF_HOME" in message
        assert ("(HF_HUB_OFFLINE is set)" in message) == (away == "offline")

    def test_what_is_in_the_cache_loads(self, tmp_path, tiny_root, tiny):
        self.cached(tmp_path, tiny_root)
        assert StableDiffusion.load(self.ID).digest() == tiny.digest()

    def test_half_a_cache_is_half_a_copy(self, tmp_path, tiny_root):
        (self.cached(tmp_path, tiny_root) / UNET).unlink()
        assert f"{UNET}: missing; half a copy" in refused(self.ID)


def test_the_built_in_model_is_found_in_the_package(monkeypatch, tiny_root, tiny, tmp_path):
    assert Path(hub.__file__).parent / "picturebook/model" == hub.PICTUREBOOK
    monkeypatch.setattr(hub, "PICTUREBOOK", tiny_root)
    assert StableDiffusion.load().digest() == tiny.digest()
    monkeypatch.setattr(hub, "PICTUREBOOK", tmp_path)
    assert "the built-in model is not in this installation; give model.path=FOLDER" in refused("picturebook")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:1", "meta", ""])
def test_a_device_that_this_machine_lacks(device):
    with pytest.raises(InputError, match=f"model.device={device}: this machine has cpu.*or auto"):
        choose_device(device)


def test_auto_is_whole_precision_on_the_processor_and_half_on_the_gpu():
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(InputError, match=r"model.dtype=int8: must be auto, float32, float16, bfloat16"):
        choose_dtype("int8", torch.device("cpu"))


def test_loading_leaves_the_libraries_as_talkative_as_before(tiny_root, folder):
    def loudness():
        return [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in (of_diffusers, of_transformers)]

    before = loudness()
    StableDiffusion.load(str(tiny_root))
    (folder / UNET).write_bytes(b"")
    refused(folder)
    assert loudness() == before
