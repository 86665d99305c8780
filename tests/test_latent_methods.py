"""Methods that change latents, fill regions or follow instructions: they run, every setting counts, faults are told."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from masafusion_lab import InputError, config, phases
from masafusion_lab.editor import Editor, Item
from masafusion_lab.hub import fingerprint
from masafusion_lab.inversion import Direct, EditFriendly, Inversion, Npi, retrace, slerp
from masafusion_lab.methods import METHODS
from masafusion_lab.model import StableDiffusion
from masafusion_lab.network import BASE, TAUGHT
from tests.edits import Calls, case, drawn, lab

STEPS = 4
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
OURS = {
    "sdedit": {"guidance": 3.0, "strength": 0.5},
    "diffedit": {
        "guidance": 3.0,
        "mask": "given",
        "maps": 2,
        "map_strength": 0.8,
        "threshold": 1.0,
        "strength": 0.5,
        "negative": "empty",
        "lag": False,
    },
    "sde_diffedit": {
        "guidance": 3.0,
        "mask": "given",
        "maps": 2,
        "map_strength": 0.8,
        "threshold": 1.0,
        "strength": 0.9,
    },
    "blended": {"guidance": 3.0, "start": 0.5, "init": "source", "lag": False, "shrink": 1, "background": "paste"},
    "glide": {"backend": "inpaint", "guidance": 3.0, "background": "none"},
    "instruct_pix2pix": {"guidance": 3.0, "image_guidance": 3.0, "eta": 0.0},
    "hive": {"guidance": 3.0, "image_guidance": 3.0, "eta": 0.0, "suffix": " in snow"},
    "edit_friendly": {"guidance": 3.0, "source_guidance": 3.0, "start": 0.5, "eta": 0.0},
}
"""Our methods, and for every one of their fields another value."""
SHIPPED = [
    path for path in CONFIGS if not {"\nbench:", "\nsweep:", "\naxes:"} & {*re.findall(r"\n\w+:", path.read_text())}
]
"""Configurations of an edit."""
READING = [name for name in OURS if METHODS[name]().needs.inversion]
SETTINGS = [*((name, {}) for name in OURS), ("glide", {"backend": "inpaint"})]


@pytest.fixture(scope="module")
def models(tiny_networks):
    """The tiny model by the kind of UNet."""
    return {
        kind: StableDiffusion.load(str(tiny_networks), network=kind) for kind in ("", "instruct", "hive", "inpaint")
    }


@pytest.fixture(scope="module")
def items():
    """Two cases that are not square, with regions, and records of noise."""
    made = []
    for k, id in enumerate(("dog", "horse")):
        g = torch.Generator().manual_seed(k)
        mask = torch.zeros(1, 8, 12)
        mask[:, 2:6, 3 : 6 + k] = 1
        states = torch.randn(STEPS + 1, 1, 4, 8, 12, generator=g)
        picture = torch.rand(3, 32, 48, generator=g)
        made.append(
            Item(id, "a cat on grass", f"a red {id} on grass", picture, Inversion(states), mask, {}, f"red {id}")
        )
    return made


def edited(models, items, name, **settings):
    """What the method makes of the cases together."""
    method = METHODS[name](**settings)
    model = models[method.needs.network]
    return Editor(model, method, model.schedule(STEPS)).predict_step(items)


@pytest.mark.parametrize(
    ("name", "settings"), SETTINGS, ids=lambda s: s if isinstance(s, str) else "-".join(s.values())
)
def test_a_batch_equals_its_cases_one_by_one(models, items, name, settings):
    together = edited(models, items, name, **settings)
    assert together[0].rows == METHODS[name](**settings).plan(models[""].sites, STEPS).cost(STEPS)
    for item, of_batch in zip(items, together, strict=True):
        (alone,) = edited(models, [item], name, **settings)
        assert of_batch.rows == alone.rows
        torch.testing.assert_close(of_batch.pictures["target"], alone.pictures["target"], rtol=0, atol=2e-4)


def test_every_field_of_ours_has_another_value_to_be_tried():
    for name, changes in OURS.items():
        assert set(changes) == {field.name for field in dataclasses.fields(METHODS[name])}, name


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, changes in OURS.items() for field in changes], ids=str
)
def test_every_field_counts(models, items, name, field):
    (usual,), (other,) = (edited(models, items[:1], name, **s) for s in ({}, {field: OURS[name][field]}))
    assert not torch.allclose(usual.pictures["target"], other.pictures["target"], atol=1e-3)


@pytest.mark.parametrize("inversion", ["direct", "ddim", "null_text", "npi", "edit_friendly"])
@pytest.mark.parametrize("name", READING)
def test_what_reads_an_inversion_works_with_all(tiny_networks, tmp_path, name, inversion):
    words = [f"method.name={name}", f"inversion.name={inversion}"]
    words += ["inversion.inner_steps=1"] if inversion == "null_text" else []
    (folder,) = phases.edit(lab(tiny_networks, tmp_path / "store", *words), [case(hints={})], tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    assert (result["inversion"]["name"], result["method"]["name"]) == (inversion, name)


def test_what_reads_no_inversion_gets_none_and_costs_none(tiny_networks, tmp_path):
    built = lab(tiny_networks, tmp_path / "store", "method.name=hive", "inversion.name=null_text")
    calls = Calls(built.model)
    (folder,) = phases.edit(built, [case(hints={}, mask=None, instruction="red dog")], tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    assert result["inversion"] == {"name": "none"}
    assert (calls.count, result["rows"]) == (3, 9)
    assert result["reconstruction_psnr"] == result["roundtrip_psnr"]


def test_an_instruction_alone_is_enough_of_a_prompt(tiny_networks, tmp_path):
    built = lab(tiny_networks, tmp_path / "store", "method.name=instruct_pix2pix")
    (folder,) = phases.edit(built, [case(hints={}, target="", instruction="red dog")], tmp_path / "run")
    assert (folder / "target.png").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_edit_with_a_configuration_that_ships_can_begin(tiny_networks, tmp_path, path):
    model = config.Model(path=str(tiny_networks), device="cpu")
    built = phases.build(
        dataclasses.replace(config.load([path]), model=model, store=str(tmp_path), size="48x32", trainer={})
    )
    assert phases.job(built, case(instruction="red dog"), tmp_path / "run").key


@pytest.mark.parametrize(
    ("word", "changed", "message"),
    [
        (
            "sde_diffedit method.mask=given method.strength=1 steps=1",
            {},
            "cat: this method runs none of 1 step; take more",
        ),
        ("sdedit method.strength=0.1", {}, "cat: method.strength=0.1: is 0 of 3 steps"),
        ("instruct_pix2pix", {}, 'cat: this method follows an instruction: give instruction="'),
        ("hive", {}, "cat: this method follows an instruction"),
        ("blended", {"mask": None}, "cat: this method acts inside a region: give mask=FILE"),
        ("glide", {"mask": None}, "cat: this method acts inside a region"),
        ("diffedit method.mask=given", {"mask": None}, "cat: this method acts inside a region"),
        ("sde_diffedit method.mask=given", {"mask": None}, "cat: this method acts inside a region"),
        ("sdedit", {"target": "", "instruction": "red"}, "cat: this method follows a target prompt"),
    ],
)
def test_what_a_case_lacks_is_said_before_anything_is_computed(tiny_networks, tmp_path, word, changed, message):
    built = lab(tiny_networks, tmp_path / "store", *f"method.name={word}".split())
    calls = Calls(built.model)
    with pytest.raises(InputError, match=message):
        phases.edit(built, [case(hints={}, **changed)], tmp_path / "run")
    assert calls.count == 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sdedit", {"strength": 0.1}, "strength=0.1: is 0 of 4 steps"),
        ("sdedit", {"strength": 1.5}, "strength=1.5: is 6 of 4 steps"),
        ("diffedit", {"map_strength": 0.0}, "map_strength=0: is 0 of 4 steps"),
        ("diffedit", {"strength": float("nan")}, "strength=nan"),
        ("sde_diffedit", {"strength": 0.0}, "strength=0: is 0 of 4 steps"),
        ("diffedit", {"maps": 0}, "maps=0: must be at least 1"),
        ("blended", {"start": 1.0}, r"start=1, shrink=0: must be in \[0, 1\)"),
        ("blended", {"shrink": -1}, "shrink=-1"),
        ("blended", {"shrink": 3}, "shrink=3: none of 3 steps is left for the region itself"),
        ("edit_friendly", {"eta": 1.5}, r"eta=1.5: must be in \[0, 1\) and \[0, 1\]"),
        ("hive", {"eta": -0.5}, "eta=-0.5"),
        ("edit_friendly", {"start": -0.1}, r"start=-0.1, eta=1: must be in \[0, 1\)"),
    ],
)
def test_a_setting_that_touches_no_step_is_refused_by_its_plan(models, name, settings, message):
    with pytest.raises(InputError, match=message):
        METHODS[name](**settings).plan(models[""].sites, STEPS)


class TestNetworks:
    """Which UNet a method gets, and what is said of one that is not made for it."""

    @pytest.fixture
    def folder(self, tiny_networks, tmp_path):
        return shutil.copytree(tiny_networks, tmp_path / "model")

    @pytest.mark.parametrize(("kind", "channels"), [("", 4), ("instruct", 8), ("hive", 8), ("inpaint", 9)])
    def test_each_kind_is_found_beside_the_models_own(self, models, kind, channels):
        assert models[kind].unet.config.in_channels == channels

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("instruct_pix2pix", "in_channels=4; this method needs 8: give model.unet=.* timbrooks/instruct-pix2pix"),
            ("hive", "in_channels=4; this method needs 8: .* experiments.convert_hive"),
            ("glide method.backend=inpaint", "in_channels=4; this method needs 9: give model.unet="),
            ("instruct_pix2pix model.unet={}/unet_inpaint", "in_channels=9, an inpainting .*; this method needs 8"),
            ("sdedit model.unet={}/unet_hive", "in_channels=8, an instruction.*; the autoencoder's latents have 4"),
            ("sdedit model.unet=/nowhere", "model.unet=/nowhere: no such folder"),
        ],
    )
    def test_of_another_width_none_is_loaded(self, folder, tmp_path, words, message):
        for kind in ("instruct", "hive", "inpaint"):
            (folder / f"unet_{kind}").rename(tmp_path / f"unet_{kind}")
        with pytest.raises(InputError, match=message):
            lab(folder, tmp_path, *f"method.name={words}".format(tmp_path).split())

    @pytest.mark.parametrize("whole", [True, False], ids=["a whole model", "a UNet's folder"])
    def test_another_may_be_named(self, models, tiny_root, folder, whole):
        if whole:
            shutil.rmtree(folder / "unet")
            (folder / "unet_hive").rename(folder / "unet")
        named = StableDiffusion.load(
            str(tiny_root), network="instruct", unet=str(folder if whole else folder / "unet_hive")
        )
        assert named.digest(["unet"]) == models["hive"].digest(["unet"])

    def test_a_model_that_is_one_needs_no_other(self, models, folder):
        shutil.rmtree(folder / "unet")
        (folder / "unet_instruct").rename(folder / "unet")
        whole = StableDiffusion.load(str(folder), network="instruct")
        assert whole.digest(["unet"]) == models["instruct"].digest(["unet"])

    def test_one_that_predicts_something_else_is_refused(self, tiny_root, folder):
        shutil.rmtree(folder / "unet")
        (folder / "unet_instruct").rename(folder / "unet")
        scheduler = folder / "scheduler/scheduler_config.json"
        scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
        with pytest.raises(InputError, match="predicts v_prediction, this model's schedule is for epsilon"):
            StableDiffusion.load(str(tiny_root), network="instruct", unet=str(folder))

    def test_it_never_runs_on_other_channels(self, models, items):
        model = models["instruct"]
        with pytest.raises(InputError, match="8 input channels and is given 4"):
            Editor(model, METHODS["sdedit"](), model.schedule(STEPS)).edit(items)
        model = models[""]
        with pytest.raises(InputError, match="4 input channels and is given 8"):
            Editor(model, METHODS["hive"](), model.schedule(STEPS)).edit(items)

    def test_one_that_is_told_by_its_changes_is_the_whole(self, models, folder):
        whole = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        file = folder / "unet_hive/diffusion_pytorch_model.safetensors"
        changes = {name: w for name, w in load_file(file).items() if "attn" in name or name.startswith("conv_in")}
        save_file(changes, file)
        settings = json.loads((folder / "unet_hive/config.json").read_text())
        print_of = fingerprint([folder / "unet/diffusion_pytorch_model.safetensors"])
        (folder / "unet_hive/config.json").write_text(json.dumps({**settings, BASE: print_of, TAUGHT: ", 5 of 5"}))
        merged = StableDiffusion.load(str(folder), network="hive")
        for name, w in merged.unet.state_dict().items():
            assert torch.equal(w, changes.get(name, whole.get(name))), name
        assert merged.suffix == ", 5 of 5"
        assert isinstance(merged.unet, UNet2DConditionModel)
        save_file({name: w + 1 for name, w in whole.items()}, folder / "unet/diffusion_pytorch_model.safetensors")
        with pytest.raises(InputError, match="unet_hive: changes another UNet than"):
            StableDiffusion.load(str(folder), network="hive")

    def test_what_changes_a_network_must_fit_it(self, folder):
        file = folder / "unet_hive/diffusion_pytorch_model.safetensors"
        save_file({name: w for name, w in load_file(file).items() if "attn" in name}, file)  # conv_in of 4 channels
        settings = json.loads((folder / "unet_hive/config.json").read_text())
        print_of = fingerprint([folder / "unet/diffusion_pytorch_model.safetensors"])
        (folder / "unet_hive/config.json").write_text(json.dumps({**settings, BASE: print_of}))
        with pytest.raises(InputError, match="unet_hive: does not fit"):
            StableDiffusion.load(str(folder), network="hive")


def test_glides_own_networks_are_plainly_not_supported():
    with pytest.raises(InputError, match="backend=glide: the published GLIDE networks are not supported"):
        config.method(config.load(words=["method.name=glide", "method.backend=glide"]))


def test_hive_asks_for_the_best_as_its_network_was_taught(models, items):
    model, asked = models["hive"], []
    embed = model.embed
    try:
        model.embed = lambda prompts: asked.append(list(prompts)) or embed(prompts)
        edited(models, items[:1], "hive")
        model.suffix = ", 5 of 5"
        edited(models, items[:1], "hive")
        edited(models, items[:1], "hive", suffix=" in snow")
    finally:
        del model.embed
        model.suffix = StableDiffusion.suffix
    assert [prompts[2] for prompts in asked] == [
        "red dog, image quality is five out of five",
        "red dog, 5 of 5",
        "red dog in snow",
    ]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("glide", {}), ("blended", {}), ("masafusion", {"hint_until": 0}), ("masafusion_no_adapter", {})],
)
def test_outside_the_region_a_paste_leaves_the_pixels_as_they_are(models, items, name, settings):
    (of,) = edited(models, items[:1], name, background="paste", **settings)
    mask = torch.nn.functional.interpolate(items[0].mask[None], (32, 48))[0]
    assert torch.equal((1 - mask) * of.pictures["target"], (1 - mask) * items[0].pixels)
    assert not torch.allclose(mask * of.pictures["target"], mask * items[0].pixels, atol=0.05)


@pytest.fixture
def batch(tiny):
    """Two pictures' latents, source and empty embeddings, and the schedule."""
    g = torch.Generator().manual_seed(0)
    text, empty = tiny.embed(["a cat on grass", "a red dog in snow"]), tiny.embed(["", ""])
    return torch.randn(2, 4, 8, 12, generator=g), text, empty, tiny.schedule(STEPS)


def test_negative_prompt_inversion_resimulates_alike_under_any_guidance(tiny, batch):
    _, text, _, schedule = batch
    record = Npi().invert(tiny, *batch)
    assert torch.equal(record.states[0], Direct().invert(tiny, *batch).states[0])
    for i in range(STEPS):
        assert torch.equal(record.null[i], text)
    again = retrace(tiny, record.states[0], text, record.null, schedule, w=7.5)
    torch.testing.assert_close(again, record.states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_negative_prompt_inversion_may_go_part_of_the_way_to_the_empty_prompt(tiny, batch):
    """Along the sphere, all of a prompt's embedding as one vector; its resimulation is guided sampling under that."""
    _, text, empty, schedule = batch
    part, w, other = 0.3, 3.0, Npi(interpolation=0.3, guidance=3.0).invert(tiny, *batch)
    for b in range(2):
        s, e = text[b].flatten().double(), empty[b].flatten().double()
        angle = torch.arccos(s @ e / (s.norm() * e.norm()))
        null = (torch.sin((1 - part) * angle) * s + torch.sin(part * angle) * e) / torch.sin(angle)
        torch.testing.assert_close(other.null[0, b].flatten().double(), null, rtol=1e-4, atol=1e-5)
    again = retrace(tiny, other.states[0], text, other.null, schedule, w=w)
    torch.testing.assert_close(again, other.states, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        Npi(interpolation=0.0, guidance=w).invert(tiny, *batch).states, Npi().invert(tiny, *batch).states
    )
    torch.testing.assert_close(slerp(text, text, part), text)
    with pytest.raises(InputError, match=r"interpolation=1.5: must be in \[0, 1\]"):
        Npi(interpolation=1.5)


def test_edit_friendly_states_are_the_picture_under_noises_of_their_own(tiny, batch):
    x0, *_, schedule = batch
    record = EditFriendly().invert(tiny, *batch)
    assert torch.equal(record.states[-1], x0)
    noises = []
    for i in range(STEPS):
        a = schedule.level(i)
        noises.append((record.states[i] - a**0.5 * x0) / (1 - a) ** 0.5)
        torch.testing.assert_close(noises[i][0], noises[i][1], rtol=1e-3, atol=1e-4)
    correlation = torch.corrcoef(torch.stack(noises)[:, 0].flatten(1))
    torch.testing.assert_close(correlation, torch.eye(STEPS), rtol=0, atol=0.2)
    assert not torch.equal(EditFriendly(seed=1).invert(tiny, *batch).states[0], record.states[0])


def test_along_its_own_noise_maps_the_source_comes_back(tiny, batch):
    """But for the last step, in which none is added."""
    from masafusion_lab.given import Given
    from masafusion_lab.methods.edit_friendly import NoiseMaps

    x0, text, empty, schedule = batch
    for record, eta in ((EditFriendly().invert(tiny, *batch), 1.0), (Direct().invert(tiny, *batch), 0.0)):
        method = NoiseMaps(guidance=1.0, eta=eta, start=0.0)
        given = Given({"source": text, "target": text, "empty": empty})
        states = list(method(tiny, given, record, x0, schedule=schedule))
        for state in states[:-1]:
            torch.testing.assert_close(state.x["target"], record.states[state.i], rtol=1e-3, atol=1e-4)


def test_a_mask_of_another_case_does_not_leak(models, items):
    """Own regions are found image by image."""
    (alone,) = edited(models, items[:1], "diffedit")
    together = edited(models, [items[0], dataclasses.replace(items[1], pixels=0 * items[1].pixels)], "diffedit")
    torch.testing.assert_close(together[0].pictures["target"], alone.pictures["target"], rtol=0, atol=2e-4)


def test_pictures_of_any_size_are_read(tiny_networks, tmp_path):
    built = lab(tiny_networks, tmp_path / "store", "method.name=glide", "method.backend=inpaint", "size=32x64")
    tall = {"image": drawn(size=(32, 64)), "mask": drawn("L", size=(32, 64), fill=255)}
    (folder,) = phases.edit(built, [case(hints={}, **tall)], tmp_path / "run")
    assert (folder / "target.png").exists()
