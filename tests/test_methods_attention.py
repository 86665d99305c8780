"""Methods that fuse attention: every one with every inversion, every field alive, and what they refuse."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from masafusion_lab import InputError, config, phases
from masafusion_lab.given import Given
from masafusion_lab.inversion import Ddim, Direct, EditFriendly, Inversion, Npi
from masafusion_lab.methods import METHODS
from masafusion_lab.model import StableDiffusion
from tests import edits
from tests.test_latent_methods import OURS

NAMES = ("masafusion_no_adapter", "embctrl", "prompt_to_prompt", "plug_and_play", "masactrl", "t2i_only")
SOURCE = ["a cat sitting on grass", "a red dog in snow"]
TARGET = ["a blue cat running on grass", "a red horse in snow"]
T, SIZE = 3, (8, 12)


def make(model, steps=T, source=SOURCE, target=TARGET, size=SIZE):
    """Two pictures that are not square, with their own prompts, regions and sketches."""
    g = torch.Generator().manual_seed(0)
    height, width = size
    mask = torch.zeros(2, 1, height, width)
    mask[0, :, height // 4 : -2, 4:9] = mask[1, :, : height // 2 + 1, width // 2 :] = 1
    given = Given(
        {"source": model.embed(source), "target": model.embed(target), "empty": model.embed(["", ""])},
        mask,
        model.hint("sketch", torch.rand(2, 1, 4 * height, 4 * width, generator=g)),
        texts={"source": source, "target": target},
    )
    x0, x = torch.randn(2, 2, 4, height, width, generator=g)
    schedule = model.schedule(steps)
    direct = Direct().invert(model, x0, given.prompts["source"], given.prompts["empty"], schedule)
    return SimpleNamespace(model=model, given=given, source=direct, x0=x0, x=x, schedule=schedule)


@pytest.fixture(scope="module")
def case(tiny_root):
    return make(StableDiffusion.load(str(tiny_root)))


def tuned(case):
    """The record of direct inversion with embeddings as null-text inversion leaves them."""
    g = torch.Generator().manual_seed(1)
    empty = case.given.prompts["empty"]
    return Inversion(case.source.states, empty + 0.3 * torch.randn(T, *empty.shape, generator=g))


@pytest.fixture(scope="module")
def records(case):
    """Records of the same two pictures by every inversion."""
    text, empty = case.given.prompts["source"], case.given.prompts["empty"]
    of = (case.model, case.x0, text, empty, case.schedule)
    made = {"ddim": Ddim().invert(*of), "npi": Npi().invert(*of), "edit_friendly": EditFriendly().invert(*of)}
    return {"direct": case.source, "null_text": tuned(case), **made}


def run(case, method, source=None, **changes):
    source = source or case.source
    given = replace(case.given, null=source.null, **changes)
    return list(method(case.model, given, source, case.x, schedule=case.schedule))


def one(case, source, b):
    """The b-th picture of a batch alone, and its record."""
    given = replace(
        case.given,
        prompts={name: c[b : b + 1] for name, c in case.given.prompts.items()},
        mask=case.given.mask[b : b + 1],
        hint=tuple(f[b : b + 1] for f in case.given.hint),
        texts={name: texts[b : b + 1] for name, texts in case.given.texts.items()},
    )
    return SimpleNamespace(**{**vars(case), "given": given, "x": case.x[b : b + 1]}), source.split()[b]


PAIRS = [
    (name, its) for name in NAMES for its in (phases.INVERSIONS if METHODS[name]().needs.inversion else ["direct"])
]


@pytest.mark.parametrize(("name", "inversion"), PAIRS)
def test_a_batch_equals_its_pictures_one_by_one_with_every_inversion(case, records, name, inversion):
    source = records[inversion]
    both = run(case, METHODS[name](), source)
    assert len(both) == T
    assert both[-1].x["target"].shape == case.x.shape
    for b in range(2):
        alone, record = one(case, source, b)
        alone = run(alone, METHODS[name](), record)[-1].x["target"]
        torch.testing.assert_close(alone, both[-1].x["target"][b : b + 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, "") for name in NAMES),
        ("plug_and_play", "method.variant=original"),
        ("plug_and_play", "method.negative=orange"),
        ("masactrl", "method.variant=auto method.source_prompt=source method.auto_source=cat method.auto_target=dog"),
    ],
)
def test_an_edit_runs_from_its_picture_to_its_folder(tiny_root, tmp_path, name, settings):
    words = ["batch=2", f"method.name={name}", *settings.split()]
    cases = [edits.case("a"), edits.case("b", shift=3, target="a dog on grass")]
    folders = phases.edit(edits.lab(tiny_root, tmp_path / "store", *words), cases, tmp_path / "run")
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        assert result["method"]["name"] == name
        assert result["rows"] > 0


def test_outside_its_window_a_method_costs_less(tiny):
    fused = METHODS["masafusion_no_adapter"](fuse_steps=(0, 20)).plan(tiny.sites, 50)
    assert fused.cost(50) == 6 * 20 + 2 * 30
    original = METHODS["plug_and_play"](variant="original", source_prompt="source").plan(tiny.sites, 50)
    assert original.cost(50) == 5 * 41 + 3 * 9


WORDS = {"blend_source": ("cat",), "blend_target": ("cat",)}
AUTO = {"variant": "auto", "source_prompt": "source", "auto_source": ("cat",), "auto_target": ("cat",)}
LIVE = {
    "plain": {"guidance": ({}, 3.0), "null": ({}, "empty")},
    "reconstruction": {"guidance": ({}, 3.0), "null": ({}, "empty")},
    "masafusion_no_adapter": {
        "guidance": ({}, 3.0),
        "fuse_steps": ({}, (0, 1)),
        "fuse_layers": ({}, "decoder"),
        "use_mask": ({}, False),
        "source_null": ({}, "empty"),
        "preserve_null": ({}, "tuned"),
        "edit_null": ({}, "tuned"),
        "init": ({}, "mixed"),
    },
    "embctrl": {
        "guidance": ({}, 3.0),
        "null": ({}, "empty"),
        "align": ({}, "positional"),
        "eos_pad": ({}, "target"),
        "offset_on_target": ({}, True),
    },
    "prompt_to_prompt": {
        "guidance": ({}, 3.0),
        "edit": ({}, "replace"),
        "cross_window": ({}, (0.5, 1.0)),
        "cross_words": ({}, {"cat": (0.0, 0.0)}),
        "self_window": ({}, (0.4, 1.0)),
        "self_resolution": ({}, 16),
        "reweight": ({}, {"cat": 3.0}),
        "null": ({}, "empty"),
        "as_published": ({"edit": "replace"}, True),
        "blend_source": (WORDS | {"blend_threshold": 0.95}, ("grass",)),
        "blend_target": (WORDS | {"blend_threshold": 0.95}, ("grass",)),
        "blend_without": (WORDS, ("grass",)),
        "blend_start": (WORDS | {"blend_threshold": 0.95}, 0.9),
        "blend_threshold": (WORDS, 0.95),
        "blend_resolution": (WORDS | {"blend_threshold": 0.95}, 32),
        "blend_maps": (WORDS | {"blend_threshold": 0.9, "reweight": {"cat": -4.0}}, "own"),
    },
    "plug_and_play": {
        "guidance": ({}, 3.0),
        "variant": ({}, "original"),
        "qk_until": ({}, 1.0),
        "qk_layers": ({}, "decoder"),
        "feature_until": ({}, 0.4),
        "feature_layers": ({}, "8,9"),
        "source_prompt": ({}, "source"),
        "negative": ({}, "orange hat"),
        "negative_fade": ({"variant": "original"}, 0.5),
    },
    "masactrl": {
        "guidance": ({}, 3.0),
        "variant": ({}, "union"),
        "mutual_window": ({}, (0.5, 1.0)),
        "mutual_layers": ({}, "decoder"),
        "source_prompt": ({}, "source"),
        "null": ({}, "tuned"),
        "hint_scale": ({}, 0.3),
        "hint_until": ({}, 0.3),
        "hint_on_null": ({}, False),
        "auto_source": (AUTO, ("grass",)),
        "auto_target": (AUTO, ("red",)),
        "auto_threshold": (AUTO, 0.6),
        "auto_resolution": (AUTO, 32),
    },
    "t2i_only": {
        "guidance": ({}, 3.0),
        "hint_scale": ({}, 0.3),
        "hint_until": ({}, 0.3),
        "hint_on_null": ({}, False),
    },
}
"""By method and field: settings among which it matters, and another value of it."""


@pytest.fixture(scope="module")
def alike(case):
    """Prompts of as many words, of which the first two have as many tokens; latents with room for regions of words."""
    source, target = ["a red cat on grass", "a horse cat on grass"], ["a cat on red grass", "a red cat on grass"]
    return make(case.model, source=source, target=target, size=(16, 24))


def test_every_field_of_every_method_is_in_the_table_below():
    """But background, which changes the picture and not the latents."""
    there = {name: {f.name for f in fields(METHODS[name])} - {"background"} for name in LIVE}
    assert there == {name: set(its) for name, its in LIVE.items()}
    assert {*LIVE, *OURS, "masafusion", "replay"} == set(METHODS)  # the record itself is all that replay gives


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, its in LIVE.items() for field in its])
def test_every_field_is_alive(alike, name, field):
    others, value = LIVE[name][field]
    method, (case, record) = METHODS[name](**others), one(alike, tuned(alike), int(field == "as_published"))
    before = run(case, method, record)[-1].x["target"]
    after = run(case, replace(method, **{field: value}), record)[-1].x["target"]
    assert not torch.allclose(before, after, atol=1e-3)


MASK = {"variant": "auto", "source_prompt": "source", "auto_source": "cat", "auto_target": "dog"}
REFUSED = [
    (
        "prompt_to_prompt",
        {"edit": "replace"},
        {"target": "a big red dog on grass"},
        "replace wants word for word.*refine",
    ),
    ("prompt_to_prompt", {"reweight.hat": 2}, {}, "'hat' is no word of 'a red dog on grass'"),
    ("prompt_to_prompt", {"cross_words.hat": "[0,0.5]"}, {}, "'hat' is no word of 'a red dog on grass'"),
    (
        "prompt_to_prompt",
        {"reweight.hat": 2},
        {"target": f"a red dog {'and grass ' * 12} and a hat"},
        "beyond the 22 tokens",
    ),
    ("prompt_to_prompt", {"blend_source": "cat", "blend_target": "hat"}, {}, "'hat' is no word of"),
    ("prompt_to_prompt", {"blend_source": "cat"}, {}, "wants both"),
    ("prompt_to_prompt", {"blend_threshold": 0.5}, {}, "blend_threshold: local blend wants both"),
    (
        "prompt_to_prompt",
        {"blend_source": "cat", "blend_target": "dog", "blend_resolution": 0},
        {},
        "no layer has such",
    ),
    (
        "prompt_to_prompt",
        {"blend_source": "cat", "blend_target": "dog", "blend_start": 1},
        {},
        r"1: must be in \[0, 1\)",
    ),
    ("prompt_to_prompt", {"reweight.dog": 2, "cross_window": "[0,0]"}, {}, "follows in no step; widen"),
    ("prompt_to_prompt", {"self_window": "[0,0.1]"}, {}, "holds none of the 3 steps"),
    ("prompt_to_prompt", {"self_window": "[0.6,0.2]"}, {}, "0 <= a <= b <= 1"),
    ("prompt_to_prompt", {"self_resolution": 8}, {}, "holds none of the 10 self-attention layers"),
    ("masafusion_no_adapter", {"init": "mixed"}, {"mask": None}, "acts inside a region: give mask=FILE"),
    ("embctrl", {"align": "positional"}, {}, "has 4 tokens and .* 5: no places in common"),
    ("plug_and_play", {"negative_fade": 0.5}, {}, "does nothing in method.variant=diffusers"),
    ("plug_and_play", {"feature_layers": 40}, {}, "layer 40 is not there"),
    ("plug_and_play", {"qk_layers": "upper"}, {}, "names no layers"),
    ("masactrl", {"variant": "masked"}, {"mask": None}, "acts inside a region: give mask=FILE"),
    ("masactrl", {}, {"hints": {}}, "follows a drawn condition: give sketch=FILE"),
    ("masactrl", {"mutual_window": "[0.5,0.5]"}, {}, "holds none of the 3 steps"),
    ("masactrl", MASK | {"auto_target": ""}, {}, "wants words of both prompts"),
    ("masactrl", MASK | {"source_prompt": "empty"}, {}, "source_prompt=source"),
    ("masactrl", {"auto_threshold": 0.2}, {}, "auto_threshold: does nothing in method.variant=plain"),
    ("masactrl", MASK | {"auto_target": "hat"}, {}, "'hat' is no word of 'a red dog on grass'"),
    ("masactrl", MASK | {"auto_resolution": 5}, {}, "auto_resolution=5: no layer has such maps"),
    ("masactrl", MASK | {"mutual_layers": 0}, {}, "mutual_layers=0: all before the first look at words"),
    ("t2i_only", {"hint_until": 1.5}, {}, r"\[0,1.5\] must be \[a,b\], fractions"),
    ("t2i_only", {}, {"hints": {}}, "follows a drawn condition: give sketch=FILE"),
]


@pytest.mark.parametrize(("name", "settings", "changes", "words"), REFUSED)
def test_what_cannot_be_is_said_before_anything_is_computed(tiny_root, tmp_path, name, settings, changes, words):
    keys = [f"method.name={name}", *(f"method.{key}={value}" for key, value in settings.items())]
    lab = edits.lab(tiny_root, tmp_path / "store", *keys)
    calls = edits.Calls(lab.model)
    with pytest.raises(InputError, match=words):
        phases.edit(lab, [edits.case(**changes)], tmp_path / "run")
    assert calls.count == 0


def test_words_and_windows_are_kept_by_the_saved_configuration(tmp_path):
    words = [
        "cross_words.dog=[0,0.4]",
        "reweight.red=2",
        "blend_source=cat,hat",
        "blend_target=dog",
        "cross_window=[0,0.7]",
    ]
    first = config.load(words=["method.name=prompt_to_prompt", *(f"method.{word}" for word in words)])
    (tmp_path / "config.yaml").write_text(config.to_yaml(first))
    assert config.load([tmp_path / "config.yaml"]) == first
    method = config.method(first)
    assert (method.cross_words, method.reweight) == ({"dog": (0, 0.4)}, {"red": 2})
    assert (method.blend_source, method.blend_target) == (("cat", "hat"), ("dog",))


def test_without_a_region_the_paper_fuses_everywhere(case):
    method = METHODS["masafusion_no_adapter"]()
    without, with_one = run(case, method, mask=None)[-1], run(case, method)[-1]
    assert (without.rows, with_one.rows) == (4 * T, 6 * T)
    assert torch.equal(without.x["target"], run(case, replace(method, use_mask=False))[-1].x["target"])


def test_embctrl_says_where_nothing_ties_it_to_the_source(case, caplog):
    run(case, METHODS["embctrl"](), tuned(case))
    run(case, METHODS["embctrl"](offset_on_target=True))
    assert not caplog.records
    run(case, METHODS["embctrl"]())
    assert "take inversion.name=null_text" in caplog.text


def test_prompts_that_are_the_same_edit_nothing(case):
    """Replace, refine and EmbCtrl under the source prompt: what guided sampling makes of it."""
    same = make(case.model, target=SOURCE)
    plain = run(same, METHODS["reconstruction"]())[-1].x["target"]
    windows = {"self_window": (0, 0)}
    for method in (METHODS["embctrl"](), METHODS["prompt_to_prompt"](cross_window=(0, 0), **windows)):
        torch.testing.assert_close(run(same, method)[-1].x["target"], plain, rtol=1e-3, atol=1e-3)
    one, two = (METHODS["prompt_to_prompt"](edit=edit) for edit in ("refine", "replace"))
    torch.testing.assert_close(run(same, one)[-1].x["target"], run(same, two)[-1].x["target"], rtol=1e-3, atol=1e-3)
