"""The Editor: noise by case, batches that equal their cases, and the ways round too little memory and precision."""

import logging

import pytest
import torch

from masafusion_lab import InputError
from masafusion_lab.editor import Editor, Item, in_float32, noise_for, precisely, psnr
from masafusion_lab.inversion import Inversion
from masafusion_lab.lockstep import NotFinite
from masafusion_lab.methods import MaSaFusion, Plain

STEPS = 3


@pytest.fixture
def items():
    """Three cases of random pictures and records, as an edit reads them."""
    made = []
    for k, id in enumerate(("cat", "dog", "horse")):
        g = torch.Generator().manual_seed(k)
        mask = torch.zeros(1, 8, 12)
        mask[:, 2:6, 3 : 6 + k] = 1
        made.append(
            Item(
                id,
                "a cat on grass",
                f"a red {id} on grass",
                torch.rand(3, 32, 48, generator=g),
                Inversion(torch.randn(STEPS + 1, 1, 4, 8, 12, generator=g)),
                mask,
                {"sketch": torch.rand(1, 32, 48, generator=g)},
            )
        )
    return made


@pytest.fixture
def editor(tiny):
    return Editor(tiny, MaSaFusion(), tiny.schedule(STEPS), seed=5)


def test_noise_is_a_function_of_seed_case_and_purpose_alone():
    a = noise_for(0, "cat", (4, 8, 8))
    torch.rand(7)
    assert torch.equal(a, noise_for(0, "cat", (4, 8, 8)))
    for other in (noise_for(1, "cat", (4, 8, 8)), noise_for(0, "dog", (4, 8, 8)), noise_for(0, "cat", (4, 8, 8), "y")):
        assert not torch.equal(a, other)
    assert abs(a.mean()) < 0.2
    assert a.std() == pytest.approx(1, abs=0.2)


def test_a_batch_of_cases_equals_them_one_by_one(editor, items):
    together = editor.predict_step(items)
    for item, of_batch in zip(items, together, strict=True):
        (alone,) = editor.predict_step([item])
        assert (of_batch.id, of_batch.rows) == (alone.id, alone.rows)
        for name, picture in alone.pictures.items():
            torch.testing.assert_close(of_batch.pictures[name], picture, rtol=0, atol=2e-4)


def test_an_edit_shows_autoencoder_reconstruction_intermediate_and_target(editor, items):
    (edited,) = editor.predict_step(items[:1])
    assert set(edited.pictures) == {"roundtrip", "reconstruction", "intermediate", "target"}
    assert edited.rows == 10 * STEPS
    assert edited.psnr["roundtrip"] == pytest.approx(psnr(edited.pictures["roundtrip"], items[0].pixels))
    assert set(edited.seconds) == {"prepare", "denoise", "decode"}


def test_denoising_and_decoding_show_how_far_they_are(tiny, items):
    seen = []

    def track(steps, what):
        seen.append((what, len(steps)))
        return steps

    Editor(tiny, MaSaFusion(), tiny.schedule(STEPS), track=track).predict_step(items[:1])
    assert seen == [("editing cat", STEPS), ("decoding", 4)]


def test_a_method_without_intermediate_image_has_none(tiny, items):
    (edited,) = Editor(tiny, Plain(), tiny.schedule(STEPS)).predict_step(items[:1])
    assert "intermediate" not in edited.pictures


def test_a_record_that_ends_at_the_picture_reconstructs_as_the_autoencoder_does(editor, items):
    x0 = editor.model.encode(items[0].pixels[None])
    items[0].record.states[-1] = x0
    (edited,) = editor.predict_step(items[:1])
    assert torch.equal(edited.pictures["reconstruction"], edited.pictures["roundtrip"])


def test_psnr_of_equal_pictures_is_infinite():
    a = torch.rand(3, 4, 4)
    assert psnr(a, a) == float("inf")
    assert psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20)


class Full:
    """Runs out of memory a number of times, as a forward hook."""

    def __init__(self, times, error=None):
        self.times, self.error, self.rows = times, error or torch.OutOfMemoryError("CUDA out of memory."), []

    def __call__(self, module, args, output):
        self.rows.append(len(args[0]))
        if len(self.rows) <= self.times:
            raise self.error


def test_out_of_memory_twice_goes_one_by_one_then_by_tiles(editor, items, caplog):
    want = [editor.predict_step([item])[0] for item in items[:2]]
    full = Full(2)
    handle = editor.model.unet.register_forward_hook(full)
    with caplog.at_level(logging.WARNING):
        got = editor.predict_step(items[:2])
    handle.remove()
    assert full.rows[:3] == [20, 10, 10]
    assert editor.model.vae.use_tiling
    assert [edited.id for edited in got] == ["cat", "dog"]
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a.pictures["target"], b.pictures["target"], rtol=0, atol=2e-4)
    assert "one by one" in caplog.text
    assert "by tiles" in caplog.text


def test_too_little_memory_for_one_picture_says_what_to_do(editor, items):
    error = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
    editor.model.unet.register_forward_hook(Full(9, error))
    with pytest.raises(InputError, match=r"48x32: take a smaller size=.*model\.offload=model"):
        editor.predict_step(items[:1])


def test_another_error_is_not_taken_for_one_of_memory(editor, items):
    editor.model.unet.register_forward_hook(Full(9, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1"):
        editor.predict_step(items[:1])


def test_float32_for_a_while_gives_half_precision_its_bits_back(tiny):
    tiny.unet.half()
    before = {name: p.clone() for name, p in tiny.unet.named_parameters()}
    with in_float32(tiny):
        assert tiny.dtype == torch.float32
    assert tiny.dtype == torch.float16
    assert tiny.vae.dtype == torch.float32
    assert all(torch.equal(p, before[name]) for name, p in tiny.unet.named_parameters())


def test_an_overflow_is_tried_again_in_float32_only_from_lower_precision(tiny, caplog):
    def run():
        if tiny.dtype != torch.float32:
            raise ArithmeticError("too large")
        return "done"

    tiny.unet.half()
    assert precisely(tiny, "editing cat", run) == "done"
    assert "editing cat in torch.float16: too large; again in float32" in caplog.text

    def always():
        raise ArithmeticError("too large")

    with pytest.raises(NotFinite, match="editing cat, in float32 too: too large"):
        precisely(tiny, "editing cat", always)
    tiny.unet.float()
    with pytest.raises(NotFinite, match="editing cat: too large"):
        precisely(tiny, "editing cat", always)
