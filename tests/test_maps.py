"""What was seen of a case: how it is asked for, by whom it is refused, and its file."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from masafusion_lab import InputError
from masafusion_lab.attention import install
from masafusion_lab.figures import figures
from masafusion_lab.fusion import Span
from masafusion_lab.heat import SPECIALS, Heat, PixelMaps, WordMaps
from masafusion_lab.maps import Attention
from masafusion_lab.methods import METHODS
from masafusion_lab.watch import Watch, denoisers, span
from tests.edits import STEPS, case, drawn, watched
from tests.edits import lab as make_lab

PICTURES = {x: drawn(shift=k) for k, x in enumerate(("source", "t2i", "target"))}
GENERATION = "t2i_only method.hint_until=0"
"""Text to image: nothing is inverted, and nothing read."""


@pytest.fixture(scope="module")
def attention(tiny_root, tmp_path_factory):
    """Of a MaSaFusion edit, in a bin a step."""
    lab = make_lab(tiny_root, tmp_path_factory.mktemp("store"))
    return watched(lab, case(target="a red dog on Red grass"), watch=Watch(bins=STEPS))[1][0]


def test_words_are_found_wherever_they_stand_and_phrases_as_one(attention):
    maps = attention.words("T_in")
    assert maps.places("red") == [2, 5]
    assert maps.places("red  DOG") == [2, 3]
    assert WordMaps([], [("a", [1]), ("t", [2]), ("-", [3]), ("shirt", [4])], (8, 8)).places("T-shirt") == [2, 3, 4]
    torch.testing.assert_close(maps.word("red").values, (maps.tokens[2] + maps.tokens[5]) / 2)
    assert list(maps.all()) == ["⟨start⟩", "a", "red", "dog", "on", "Red", "grass", "⟨end⟩", "⟨padding⟩"]
    assert attention.facts["prompts"]["target"]["edited"] == [1, 2, 4]


def test_a_prompt_may_say_end_and_start_without_meaning_its_own():
    maps = WordMaps([torch.rand(6, 4, 4)], [("start", [1]), ("to", [2]), ("end", [3])], (4, 4))
    assert [maps.tokens.eq(heat.values).all((1, 2)).nonzero().item() for heat in maps.all().values()] == list(range(6))
    torch.testing.assert_close(maps.word("end").values, maps.tokens[3])


def test_a_word_of_several_tokens_is_one_word(tiny_root, tmp_path):
    _, (attention,) = watched(make_lab(tiny_root, tmp_path), case(target="a dogcat on grass"))
    assert [word for word, _ in attention.words().words] == ["a", "dogcat", "on", "grass"]
    assert len(attention.words().places("dogcat")) > 1


def test_maps_are_narrowed_by_steps_layers_and_heads(attention):
    whole = attention.words("S", layers=[0, 8])
    parts = [attention.words("S", steps=(i, i + 1), layers=[d], head=h).raw
             for i in range(STEPS) for d in (0, 8) for h in (0, 1)]  # fmt: skip
    assert all(len(raw) == 1 for raw in parts)
    torch.testing.assert_close(sum(raw[0] for raw in parts), sum(whole.raw))
    middle = next(d for d, site in enumerate(attention.facts["layers"]["cross"]) if site["name"].startswith("mid"))
    assert len(attention.words("S", layers=[middle]).raw) == 2
    assert len(attention.words("S").raw) == 2 * (len(attention.facts["layers"]["cross"]) - 1)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda a: a.words("T_in").word("snow"), "'snow' is not in the prompt, whose words are: a, red, dog, on, Red"),
        (lambda a: a.words("T_in").word(" "), "is not in the prompt"),
        (lambda a: a.words("T_in").word("reddog"), "'reddog' is not in the prompt"),
        (lambda a: a.words("T"), "branch 'T' was not seen; there are S, I_out, I_in, T_out, T_in, source, t2i, target"),
        (lambda a: a.words(layers=[10]), "cross-attention layer 10: was not seen; there are 0, 1, 2"),
        (lambda a: a.pixels(layers=[-1]), "self-attention layer -1: was not seen"),
        (lambda a: a.words(head=2), "head 2: layer 0 has heads 0 to 1"),
        (lambda a: a.words(steps=(0, 4)), "steps 0:4: maps are kept for steps that begin and end at 0, 1, 2, 3"),
        (lambda a: a.words(steps=(2, 2)), "steps 2:2"),
        (lambda a: a.words(half="null"), "words of target, null half: was not recorded"),
        (lambda a: a.pixels("I_out"), "pixels of I_out, text half: was not recorded"),
        (lambda a: a.pixels().pixel(1.5, 0), "parts of the picture's width and height"),
    ],
)
def test_what_was_not_seen_is_refused_and_what_was_is_named(attention, ask, said):
    with pytest.raises(InputError, match=re.escape(said)):
        ask(attention)


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        (Watch(steps=Span(3)), "steps 3:: the run has steps 0 to 2"),
        (Watch(layers=Span(10, 12)), "layers 10:12: the model has layers 0 to 9"),
        (Watch(limit_gb=1e-6), r"maps of 1 picture would take 0.00 GB, but 1e-06 are allowed: take fewer bins"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_anything_is_denoised(tiny_root, tmp_path, watch, said):
    with pytest.raises(InputError, match=said):
        watched(make_lab(tiny_root, tmp_path), case(), watch=watch)


def test_steps_that_a_method_leaves_out_are_not_watched(tiny_root, tmp_path):
    lab = make_lab(tiny_root, tmp_path, "method.name=sdedit", "method.strength=0.7")
    with pytest.raises(InputError, match="steps 0:1: the run has steps 1 to 2"):
        watched(lab, case(hints={}), watch=Watch(Span(0, 1)))
    _, (attention,) = watched(lab, case(hints={}), watch=Watch(bins=1))
    assert attention.facts["bins"] == [[1, 3]]
    assert attention.words().steps == pytest.approx(2)


def test_a_branch_may_not_be_there_in_the_steps_that_are_watched(tiny_root, tmp_path):
    lab = make_lab(tiny_root, tmp_path, "method.fusion_steps=[1,2]", "method.fusion_of=both")
    _, (whole,) = watched(lab, case(), watch=Watch(bins=1))  # looks at self-attention in step 0
    assert not whole.seen("pixels", "S")
    assert set(figures(whole, PICTURES)) == {"words", "self_attention", "interference"}
    assert not whole.spilled()[:, 0].isnan().any()
    _, (late,) = watched(lab, case(), watch=Watch(Span(2)))
    its = {"t2i": {"inside": "I_in", "outside": "I_in"}, "target": {"inside": "T_in", "outside": "T_in"}}
    assert late.facts["latents"] == its
    assert torch.equal(late.interference("target", "flow")[:, 2], late.curves("flow", "T_in")[:, 2])


def test_the_null_half_of_guidance_is_watched_where_that_is_asked_for(tiny_root, tmp_path):
    _, (attention,) = watched(make_lab(tiny_root, tmp_path), case(), watch=Watch(bins=1, halves=("null", "text")))
    assert attention.words("S", half="null").all().keys() == set(SPECIALS)  # of ""
    mixed = attention.curves("mixed", "T_in", half="null")
    assert not torch.equal(mixed, attention.curves("mixed", "T_in"))
    assert attention.curves("spill", "T_in", half="null").nansum() == 0


def test_maps_take_the_memory_that_was_reckoned(tiny_root, tmp_path):
    lab = make_lab(tiny_root, tmp_path)
    _, seen = watched(lab, case(), watch=Watch(bins=2))
    kept = sum(x.numel() * 4 for name, x in seen[0].tensors.items() if name.startswith(("words/", "pixels/")))
    with pytest.raises(InputError, match="would take"):
        watched(lab, case(), watch=Watch(bins=2, limit_gb=(kept - 1) / 2**30))
    watched(lab, case(), watch=Watch(bins=2, limit_gb=1.2 * kept / 2**30))  # prompts of unlike length: reckoned alike


def test_only_chosen_steps_and_layers_are_watched(tiny_root, tmp_path):
    _, (attention,) = watched(
        make_lab(tiny_root, tmp_path), case(), watch=Watch(Span(1), Span(0, 2), bins=5, heads=False)
    )
    assert attention.facts["bins"] == [[1, 2], [2, 3]]
    assert {name.split("/")[3] for name in attention.tensors if name != "mask"} == {"0", "1"}
    assert attention.tensors["words/S/text/0"].shape[1] == 1
    assert attention.curves("flow", "S")[:, 0].isnan().all()


@pytest.mark.parametrize("text", ["x", "1:y", "1.5", "", "-3:"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="give a range"):
        span(text, "--steps")
    assert (span("3", ""), span("2:", ""), span(":", "")) == (Span(3, 4), Span(2), Span())


@pytest.mark.parametrize("name", [*METHODS, GENERATION])
def test_the_attention_of_every_method_is_seen(tiny_networks, tmp_path, name):
    lab = make_lab(tiny_networks, tmp_path, *f"method.name={name}".split())
    changes = {"replay": {"hints": {}, "target": ""}, GENERATION: {"hints": {}, "source": ""}}
    (edited,), (attention,) = watched(lab, case(**changes.get(name, {"instruction": "make it grass"})))
    latent = "source" if name == "replay" else "target"
    assert attention.words(latent).word("grass").values.shape == (8, 12)
    assert attention.pixels(latent).components().shape == (3, 8, 12)
    assert 0 < attention.interference(attention.main, "flow").nanmean() < 1
    if name == "replay":
        assert torch.equal(edited.pictures["target"], edited.pictures["reconstruction"])


def test_latents_are_told_by_the_branches_that_denoise_them(tiny):
    plan = METHODS["masafusion"]().plan(tiny.sites, 3)
    assert denoisers(plan) == {"source": ("S", "S"), "t2i": ("I_in", "I_out"), "target": ("T_in", "T_out")}


def test_the_interference_of_a_target_is_that_of_the_branches_that_denoise_it(attention):
    flow, mixed = attention.interference(kind="flow"), attention.interference()
    assert torch.equal(flow[..., 0], attention.curves("flow", "T_in")[..., 0])
    assert torch.equal(flow[..., 0], attention.curves("flow", "I_in")[..., 0])  # whose map T_in takes
    assert torch.equal(flow[..., 1], attention.curves("flow", "S")[..., 1])  # whose attention T_out takes
    seen = ~flow[..., 0].isnan()
    torch.testing.assert_close(mixed[..., 0][seen], flow[..., 0][seen])  # T_in reads its own values
    assert (mixed[..., 1][seen] == 0).all()  # T_out reads the source's alone
    assert (attention.curves("spill", "T_in")[..., 1][:, 0] > 0).all()
    assert (attention.spilled() == 0).all()  # T_out's prompt does not have the edited words


def test_without_a_region_all_that_is_read_is_the_sources_and_the_edited_words_act_everywhere(tiny_root, tmp_path):
    lab = make_lab(tiny_root, tmp_path, "method.name=masafusion_no_adapter", "method.use_mask=false")
    _, (attention,) = watched(lab, case(), watch=Watch(bins=1))
    mixed = attention.interference().nanmean((0, 1))
    torch.testing.assert_close(mixed, torch.tensor([1.0, 0.0]))  # (13)
    spill = attention.curves("spill", "T_in")
    torch.testing.assert_close(attention.spilled(), spill[..., 1] / spill.sum(-1), equal_nan=True)
    assert attention.spilled().nanmean() > 0.1


def test_an_edit_in_parts_for_want_of_memory_is_not_counted_twice(tiny_root, tmp_path):
    lab, rows = make_lab(tiny_root, tmp_path), []

    def full(module, args, output):
        rows.append(len(args[0]))
        if rows[-1] == 20 and rows.count(20) == 2:  # in the middle of the edit of both
            raise torch.OutOfMemoryError("CUDA out of memory.")

    lab.model.unet.register_forward_hook(full)
    _, seen = watched(lab, case("a"), case("b", shift=3))
    assert (rows.count(20), rows.count(10)) == (2, 2 * STEPS)
    for attention in seen:
        maps = attention.tensors["words/T_in/text/0"]
        torch.testing.assert_close(maps.sum((0, 2)), torch.full_like(maps[0, :, 0], STEPS))


def test_what_was_seen_is_kept_in_a_file(attention, tmp_path):
    attention.save(tmp_path / "maps.safetensors")
    again = Attention.load(tmp_path / "maps.safetensors")
    assert again.tensors.keys() == attention.tensors.keys()
    for name, x in attention.tensors.items():
        torch.testing.assert_close(again.tensors[name].float(), x, rtol=1e-3, atol=1e-4, equal_nan=True)
    a, b = (seen.words("T_in", steps=(0, 2)).word("red").values for seen in (attention, again))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x10" + bytes(7) + b'{"a":1}'])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    (tmp_path / "maps.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="holds no attention maps"):
        Attention.load(tmp_path / "maps.safetensors")
    with pytest.raises(InputError, match="holds no attention maps"):
        Attention.load(tmp_path / "none.safetensors")


def test_a_map_lies_over_a_picture_of_any_shape_as_it_is():
    values = torch.zeros(4, 8)
    values[0, 7] = 1  # top right
    overlay = np.asarray(Heat("x", values).overlay(Image.new("RGB", (80, 40))))
    assert overlay.shape == (40, 80, 3)
    assert np.unravel_index(overlay.sum(2).argmax(), (40, 80)) > (0, 60)
    assert overlay[:8, 72:].mean() > 3 * overlay[20:, :40].mean()
    mask = Heat("x", values).mask(40, 80)
    assert mask[4, 75]
    assert mask.float().mean() < 0.1


def test_pixels_and_regions_are_asked_by_their_place():
    raw = torch.zeros(2, 4, 2, 4)
    for y in range(2):
        for x in range(4):
            raw[y, x, y, x] = 1  # each attends to itself
    maps = PixelMaps([raw])
    assert maps.pixel(0.9, 0.1).values.argmax() == 3
    torch.testing.assert_close(maps.mean.mean((2, 3)), torch.ones(2, 4))
    mask = torch.zeros(2, 4)
    mask[:, :2] = 1
    torch.testing.assert_close(maps.region(mask).values, 2 * mask)
    assert maps.components().unique(dim=None).numel() > 2


def test_sites_know_heads_and_level(tiny):
    assert {(s.name.split(".attentions")[0], s.heads, s.level) for s in install(tiny.unet)} == {
        ("down_blocks.0", 2, 0), ("down_blocks.1", 2, 1), ("down_blocks.2", 2, 2), ("mid_block", 2, 2),
        ("up_blocks.0", 2, 2), ("up_blocks.1", 2, 1), ("up_blocks.2", 2, 0),
    }  # fmt: skip


def test_a_branch_that_reads_another_is_told_from_it_by_its_own_maps(attention):
    """The target inside A attends by the intermediate image's Q and K, (10); its own map is another."""
    apart = attention.curves("distance", "I_in:T_in")[..., 0]
    assert (apart.nanmean() > 0.01) & (apart.nanmean() < attention.curves("distance", "S:T_in")[..., 0].nanmean())
