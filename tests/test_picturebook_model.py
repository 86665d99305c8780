"""The model that ships, and the judge and sketcher that say how good its pictures are."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from experiments import edit_quality
from experiments.picturebook import evaluate, painted
from experiments.picturebook.data import pixels
from experiments.picturebook.dino import Dino, trained
from experiments.picturebook.judge import around, worn
from experiments.picturebook.training import as_told
from masafusion_lab import InputError
from masafusion_lab.data.picturebook import cases
from masafusion_lab.hub import PICTUREBOOK, SUMS, damaged
from masafusion_lab.picturebook import ALL_POSES, KINDS, POSES, Scene, Thing, scene
from masafusion_lab.picturebook.draw import draw
from masafusion_lab.picturebook.edits import EDITS, edit
from masafusion_lab.picturebook.judge import Judge, Verdict, answers, centre, done, follows, keep
from masafusion_lab.picturebook.sketch import sketch
from masafusion_lab.picturebook.sketcher import Sketcher, agreement
from tests.tiny import tiny_folder


def told(described: Scene) -> Verdict:
    """What a judge that is always right says of the scene's picture."""
    background, table = answers(described)
    table = torch.from_numpy(table)[None]
    looks = [F.one_hot(table[..., k].long(), n).float() for k, n in ((1, 8), (2, 4), (3, 8))]
    return Verdict(F.one_hot(torch.tensor([background]), 6).float(), table[..., 0], *looks, table[..., 4:])


def within(x: torch.Tensor) -> bool:
    return bool(((x >= 0) & (x <= 1)).all())


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(width=32, blocks=1).eval()


@pytest.fixture(scope="module")
def drawn():
    return pixels(np.stack([draw(scene("test", k)) for k in range(3)]))


@pytest.fixture
def shipped():
    """The folder of the trained model."""
    if not (PICTUREBOOK / "model_index.json").exists():
        pytest.skip("the trained model is not in this checkout: python -m experiments.picturebook.all makes it")
    return PICTUREBOOK


# The judge ------------------------------------------------------------------------------------------------------------


def test_a_verdict_is_probabilities_and_places_in_the_picture(judge, drawn):
    seen = judge(drawn)
    for part in (seen.background, seen.colour, seen.pattern, seen.pose):
        torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:-1]))
    assert (seen.background.shape, seen.presence.shape, seen.place.shape) == ((3, 6), (3, 12), (3, 12, 2))
    assert within(seen.presence)
    assert within(seen.place)


def test_no_kind_has_a_pose_that_it_cannot_have(judge, drawn):
    pose = judge(drawn).pose
    for k, kind in enumerate(KINDS):
        assert {ALL_POSES[p] for p in pose[:, k].nonzero()[:, 1].tolist()} == set(POSES.get(kind, ("",)))


def test_a_picture_is_judged_alike_alone_among_others_and_twice_as_large(judge, drawn):
    among, larger = judge(drawn), judge(F.interpolate(drawn, scale_factor=2.0, mode="nearest"))
    for k in range(len(drawn)):
        torch.testing.assert_close(judge(drawn[k : k + 1]).colour, among[k : k + 1].colour)
    torch.testing.assert_close(larger.background, among.background, atol=0.05, rtol=0)


def test_a_thing_is_read_where_its_map_peaks(judge, drawn):
    _, maps = judge.look(drawn)
    assert maps.shape == (3, 12, 16, 16)
    place = torch.tensor([[0.1, 0.9], [0.52, 0.5], [0.999, 0.001]])
    weight = around(place, 16).view(3, 16, 16)
    torch.testing.assert_close(weight.sum((1, 2)), torch.ones(3))
    cells = (torch.arange(16) + 0.5) / 16
    found = torch.stack([(weight.sum(1) * cells).sum(1), (weight.sum(2) * cells).sum(1)], 1)
    torch.testing.assert_close(found, place.clamp(0.5 / 16, 1 - 0.5 / 16))


def test_the_right_verdict_follows_every_scene():
    for k in range(100):
        described = scene("test", k)
        assert all(value.all() for value in follows(told(described), described).values())


@pytest.mark.parametrize(("changes", "wrong"), [
    ({"kind": "cat", "pose": "lying"}, {"kind", "alone"}),
    ({"colour": "blue"}, {"colour"}),
    ({"pattern": "dotted"}, {"pattern"}),
    ({"pose": "running"}, {"pose"}),
    ({"x": 0.35}, {"place"}),
])  # fmt: skip
def test_a_wrong_attribute_is_told_from_the_right_ones(changes, wrong):
    asked = Thing("horse", "red", pose="standing", size=0.4, x=0.6)
    other = replace(asked, **changes)
    said = follows(told(Scene("snow", (other,))), Scene("snow", (asked,)))
    missed = {name for name, value in said.items() if not value.all()}
    assert wrong <= missed
    assert missed <= wrong | {"place"} | ({"colour", "pattern", "pose"} if "kind" in wrong else set())
    assert not follows(told(Scene("city", (asked,))), Scene("snow", (asked,)))["background"].any()


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_is_done_in_its_target_and_not_in_its_source(kind):
    for k in range(40):
        example = edit("test", k, kind)
        assert done(told(example.target), example).all(), example.id
        assert not done(told(example.source), example).any(), example.id


def test_two_things_of_one_kind_are_refused_and_never_sampled():
    cats = tuple(Thing("cat", colour, pose="sitting", size=0.3, x=x) for colour, x in (("red", 0.2), ("blue", 0.7)))
    with pytest.raises(InputError, match="more than one cat"):
        answers(Scene("snow", cats))
    assert centre(cats[0])[0] == pytest.approx(0.2)


def test_a_kept_judge_is_the_same_judge(judge, drawn, tmp_path):
    keep(judge, tmp_path)
    assert torch.equal(Judge.load(tmp_path)(drawn).presence, judge(drawn).presence)


def test_a_judge_that_is_not_whole_is_one_clear_line(judge, tmp_path):
    with pytest.raises(InputError, match=r"config\.json: missing.*python -m experiments\.picturebook\.judge"):
        Judge.load(tmp_path / "nowhere")
    keep(judge, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged") as raised:
        Judge.load(tmp_path)
    assert "\n" not in str(raised.value)
    weights.unlink()
    with pytest.raises(InputError, match="missing"):
        Judge.load(tmp_path)


def test_training_pictures_are_worn_alike_for_one_seed_and_stay_pictures(drawn):
    one, two, other = (worn(drawn, np.random.default_rng(seed), 0.05, 0.08) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert within(one)
    assert (one - drawn).abs().mean() < 0.08


# The sketcher ---------------------------------------------------------------------------------------------------------


def test_a_sketch_has_the_pictures_size(drawn):
    lines = Sketcher(width=8).eval()(drawn)
    assert lines.shape == (3, 1, 128, 128)
    assert within(lines)


def test_lines_agree_up_to_two_pixels():
    lines = sketch(scene("test", 0))
    assert agreement(lines, lines) == 1
    assert agreement(np.roll(lines, 2, 1) / 255, lines) > 0.97
    assert agreement(np.roll(lines, 12, 0), lines) < 0.7
    assert agreement(np.zeros_like(lines), lines) == 0
    assert agreement(np.zeros_like(lines), np.zeros_like(lines)) == 1


# The evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A folder with everything that is evaluated, all of it with random weights."""
    root = tiny_folder(tmp_path_factory.mktemp("untrained"))
    keep(Judge(width=32, blocks=1), root / "judge")
    keep(Sketcher(width=8), root / "judge" / "sketcher")
    words = json.loads((root / "text_encoder" / "config.json").read_text())
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=words, vision_config=eyes, projection_dim=16)).save_pretrained(root / "clip")
    shutil.copytree(root / "tokenizer", root / "clip", dirs_exist_ok=True)
    ViTModel(ViTConfig(**eyes), add_pooling_layer=False).save_pretrained(root / "dino")
    return root


def test_every_measure_is_taken_of_an_untrained_model_which_passes_none(untrained):
    taken = evaluate.evaluate(evaluate.Bench(untrained, count=2, steps=2))
    assert list(taken) == list(evaluate.MEASURES)
    assert not [result for result in taken.values() if "error" in result]
    assert not any(
        result["passed"] for key, result in taken.items() if key not in ("clip_retrieval", "dino")
    )  # by chance
    assert set(taken["judge"]["parts"]) >= {"kind", "colour", "pattern", "pose", "background", "place"}


def test_figures_are_the_same_in_a_second_run_and_for_any_batch(untrained, monkeypatch):
    def made():
        bench = painted.Bench(untrained, steps=2)
        return torch.cat([pictures for _, pictures in bench.painted(painted.told(3), sketched=True)])

    first = made()
    monkeypatch.setattr(painted, "BATCH", 2)
    torch.testing.assert_close(made(), first, atol=1e-4, rtol=0)


def test_what_is_missing_is_one_line_a_measure(tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["--model", str(tmp_path / "nowhere"), "--only", "vae_psnr,clip_retrieval,judge", "--json", str(file)]
    assert evaluate.main(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["vae_psnr", "clip_retrieval", "judge"]
    assert all("missing" in line or "no such folder" in line for line in said)
    assert all("error" in result for result in json.loads(file.read_text())["measures"].values())


@pytest.mark.parametrize(("wrong", "said"), [(["--only", "beauty"], "'beauty': there are vae_psnr"),
                                             (["--count", "0"], "0: at least 1")])  # fmt: skip
def test_a_measure_that_there_is_not_and_no_prompts_are_refused(wrong, said, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(wrong)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_part_whose_forerunner_is_missing_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["instruct", f"root={tmp_path}"])
    with (
        pytest.raises(SystemExit, match=r"dino/last\.ckpt: missing; python -m experiments\.picturebook\.all"),
        as_told(Dino, None) as s,
    ):
        trained(s)


def test_a_network_that_is_damaged_costs_its_own_measure_alone(untrained, tmp_path):
    for part in ("judge", "dino"):
        shutil.copytree(untrained / part, tmp_path / part)
    (tmp_path / "dino" / "model.safetensors").write_bytes(b"cut off")
    taken = evaluate.evaluate(evaluate.Bench(tmp_path, count=2), ["dino", "sketch_ceiling"])
    assert "SafetensorError: " in taken["dino"]["error"]
    assert "value" in taken["sketch_ceiling"]


def test_edits_of_another_size_are_measured_at_that_of_their_sources(judge):
    true = [case.truth for case in cases("test", 2)]
    assert edit_quality.measure(true, judge)["kept_db"] == [100, 100]
    small = edit_quality.measure([picture.resize((64, 64)) for picture in true], judge)
    assert all(20 < kept < 100 for kept in small["kept_db"])


# The shipped model ----------------------------------------------------------------------------------------------------


def test_only_safetensors_ship_and_at_most_45_megabytes_90_with_the_networks_of_other_methods(shipped):
    files = [file for file in shipped.rglob("*") if file.is_file()]
    assert {file.suffix for file in files if file.name != SUMS} <= {".json", ".txt", ".safetensors", ".md"}
    assert not damaged(shipped)
    size = {file: file.stat().st_size for file in files}
    assert sum(n for file, n in size.items() if "unet_" not in file.parent.name) <= 45e6
    assert sum(size.values()) <= 90e6


def test_diffusers_paints_with_the_folder_as_it_is(shipped):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(shipped, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red horse running on a meadow", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 128, 128, 3)
    assert np.isfinite(picture).all()


def test_diffusers_adapter_pipeline_paints_with_the_folder_and_its_adapter(shipped):
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter
    from PIL import Image

    adapter = T2IAdapter.from_pretrained(shipped / "t2iadapter_sketch")
    pipe = StableDiffusionAdapterPipeline.from_pretrained(shipped, adapter=adapter, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    hint = Image.fromarray(sketch(scene("test", 0)))
    picture = pipe("a red horse", image=hint, num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 128, 128, 3)
    assert np.isfinite(picture).all()


def test_a_word_that_the_model_does_not_know_is_named(shipped):
    from masafusion_lab.model import StableDiffusion

    with pytest.raises(InputError, match="dragon"):
        StableDiffusion.load().embed(["a red dragon on a meadow"])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights_are_one_clear_line(shipped, tmp_path, part):
    from masafusion_lab.model import StableDiffusion

    folder = shutil.copytree(shipped, tmp_path / "model")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="truncated") as raised:
        StableDiffusion.load(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.xfail(strict=True, reason="two things at once are not painted yet: MODEL_CARD.md")
def test_the_shipped_model_passes_the_bars_on_a_few_prompts(shipped):
    """A tenth below the bars of shares, as 25 prompts scatter by that much."""
    taken = evaluate.evaluate(evaluate.Bench(shipped, count=25))
    missed = {
        key: result for key, result in taken.items()
        if "error" in result or result["value"] < result["bar"] - (0.1 if result["bar"] <= 1 else 0)
    }  # fmt: skip
    assert not missed
