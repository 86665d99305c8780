"""The networks of metrics: from folders in the hub's layout, shown what their authors show them, or said to lack."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, ViTConfig, ViTModel

from masafusion_lab import InputError
from masafusion_lab.encoders import VIEWS, Networks
from tests.tiny import tiny_tokenizer

VIEW = {"clip": "clip", "dino": "dino", "keys": "structure"}


def noise(seed, size=(200, 300)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, *size), generator=generator) / 255


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Tiny random CLIP and DINO in the layout of their hub repositories."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    vision = tower | {"image_size": 224, "patch_size": 56}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(root / "clip")
    ViTModel(ViTConfig(**tower, image_size=224, patch_size=56), add_pooling_layer=False).save_pretrained(root / "dino")
    return {"clip": str(root / "clip"), "dino": str(root / "dino")}


@pytest.fixture(scope="module")
def networks(places):
    return Networks(places, VIEW)


def test_clip_is_shown_what_its_own_processor_makes(places, networks):
    picture = noise(1)
    image = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
    pixels = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(VIEWS["clip"](picture, 224), pixels, atol=1e-5, rtol=0)
    model = CLIPModel.from_pretrained(places["clip"])
    with torch.no_grad():
        want = model.get_image_features(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(networks.clip(picture), want, atol=1e-4, rtol=1e-4)


def test_dino_is_shown_the_middle_224_pixels_of_a_short_side_of_256():
    picture = noise(2)
    image = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).resize(
        (384, 256), Image.Resampling.BICUBIC
    )
    crop = np.asarray(image.crop((80, 16, 304, 240)), np.float32) / 255
    want = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(VIEWS["dino"](picture, 224)[0].permute(1, 2, 0), want, atol=1e-5)


def test_the_class_token_and_the_keys_are_those_of_the_last_layer(places, networks):
    model = ViTModel.from_pretrained(places["dino"], add_pooling_layer=False)
    picture = noise(3, (224, 224))
    pixels = VIEWS["structure"].normal(255 * picture)[None]
    with torch.no_grad():
        before = model(pixels, output_hidden_states=True).hidden_states[-2]
        last = model.layers[-1]
        keys = last.attention.k_proj(last.layernorm_before(before))[0]
        token = model(VIEWS["dino"](picture, 224)).last_hidden_state[0, 0]
    torch.testing.assert_close(networks.keys(255 * picture), keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(networks.dino(picture), token, atol=1e-4, rtol=1e-4)
    assert networks.keys(picture).shape == (17, 32)
    assert networks.keys(noise(3, (224, 336))).shape == (1 + 4 * 6, 32)
    fine, coarse = noise(4, (448, 448)), networks.keys
    mean = torch.nn.functional.avg_pool2d(fine, 2)  # bilinear, not antialiased, at half the size
    torch.testing.assert_close(coarse(fine), coarse(mean), atol=1e-4, rtol=1e-4)
    assert all(networks.keys(noise(5, (side, side))).shape == (17, 32) for side in (107, 277))


def test_texts_differ_are_cut_at_the_towers_length_and_ignore_their_padding(networks):
    a, b = networks.text("a cat on grass"), networks.text("a dog on grass")
    assert a.shape == (16,)
    assert not torch.allclose(a, b)
    long = "a cat " * 40
    assert torch.equal(networks.text(long), networks.text(long + "and a dog"))


def test_the_built_in_encoders_tell_a_picture_from_another():
    from masafusion_lab.picturebook.edits import edit

    networks = Networks({"clip": "picturebook/clip", "judge": "picturebook/judge"}, {"clip": "picturebook"})
    example = edit("test", 3, "background")
    source, target = (
        torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in (example.source_picture, example.target_picture)
    )
    text = networks.text(example.target_prompt)
    near, far = (torch.cosine_similarity(networks.clip(p), text, 0) for p in (target, source))
    assert near > far
    assert (networks.done(target, example), networks.done(source, example)) == (1, 0)


def test_what_cannot_be_had_is_said_each_time_and_in_the_facts(places, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text("{}")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "vit"}')
    (broken / "model.safetensors").write_bytes(b"\xff" * 40)
    for place, why in (
        (str(tmp_path / "none"), "no such folder"),
        ("owner/name", "the hub cannot be reached"),
        (str(half), "has no model.safetensors"),
        (str(broken), "truncated or no safetensors file"),
        (places["clip"], "config.json is of another model"),
    ):
        networks = Networks({"dino": place}, VIEW)
        for _ in range(2):
            with pytest.raises(InputError, match=why):
                networks.dino(noise(1))
        assert networks.facts()["dino"].startswith("n/a: ")


def test_the_facts_of_a_network_are_its_weights(places, networks):
    assert Networks(places, VIEW).facts() == networks.facts()
    assert all(len(digest) == 64 for digest in networks.facts().values())


def test_a_network_that_the_built_in_model_has_not_is_said_to_lack():
    with pytest.raises(InputError, match="built-in model has no dinov3"):
        Networks({"dino": "picturebook/dinov3"}, {"dino": "picturebook"}).dino(noise(1))


def test_a_picture_book_without_its_lpips_backbone_names_the_reason():
    with pytest.raises(InputError, match="LPIPS: its backbone cannot be had"):
        Networks({"lpips": "squeeze"}, {}).lpips(noise(1), noise(2))
