"""Residual features that rows read of one another."""

import pytest
import torch

from masafusion_lab.attention import Step
from masafusion_lab.fusion import Branch, Span, Take
from masafusion_lab.model import StableDiffusion

ROWS = (("S", "null"), ("T", "null"), ("S", "text"), ("T", "text"))


@pytest.fixture
def batch(tiny):
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, 16, 16, generator=g), tiny.embed(["", "", "a cat", "a red dog"])


def eps(model, batch, feature, i=0):
    branches = {"S": Branch("x", "source"), "T": Branch("x", "target", feature=feature)}
    x, text = batch
    with torch.no_grad():
        return model.eps(x, i, model.schedule(4), text, step=Step(i, ROWS, branches))


def test_the_reader_has_the_features_of_the_other_and_the_other_its_own(tiny, batch):
    plain, shared = eps(tiny, batch, Take()), eps(tiny, batch, Take(v="S", layers={5}))
    torch.testing.assert_close(shared[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-5)
    assert (shared[[1, 3]] - plain[[1, 3]]).abs().amax((1, 2, 3)).min() > 1e-3


def test_both_halves_may_read_the_text_half(tiny, batch):
    each, text = (eps(tiny, batch, Take(v="S", layers={5}, from_text=flag)) for flag in (False, True))
    torch.testing.assert_close(text[3], each[3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(text[1], each[1], atol=1e-4)


@pytest.mark.parametrize("off", [Take(v="S", steps=Span(1)), Take(v="S", layers={99}), Take(v="S", halves=())])
def test_outside_its_window_a_rule_does_nothing_at_all(tiny, batch, off):
    assert torch.equal(eps(tiny, batch, off), eps(tiny, batch, Take()))


def test_no_hook_is_left_even_after_a_failure(tiny, batch):
    with pytest.raises(RuntimeError):
        eps(tiny, (batch[0], batch[1][..., 1:]), Take(v="S"))
    eps(tiny, batch, Take(v="S"))
    assert not any(module._forward_hooks for module in tiny.unet.modules())


@pytest.mark.slow
def test_a_compiled_block_reads_too(tiny, tiny_root, batch):
    compiled = StableDiffusion.load(str(tiny_root))
    compiled.unet.get_submodule("up_blocks.0.resnets.1").compile()
    for feature in (Take(), Take(v="S", layers={5}), Take()):
        torch.testing.assert_close(eps(compiled, batch, feature), eps(tiny, batch, feature), rtol=1e-3, atol=1e-4)
