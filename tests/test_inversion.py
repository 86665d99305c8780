"""DDIM inversion against diffusers, and what the record of a picture must hold."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from masafusion_lab import InputError
from masafusion_lab.inversion import Ddim, Direct, Inversion, invert, retrace
from masafusion_lab.lockstep import NotFinite
from tests.tiny import tiny_model

T = 6


@pytest.fixture
def batch(tiny):
    """Two pictures' latents, source and empty embeddings, and the schedule."""
    g = torch.Generator().manual_seed(0)
    text, empty = tiny.embed(["a cat on grass", "a red dog in snow"]), tiny.embed(["", ""])
    return torch.randn(2, 4, 16, 16, generator=g), text, empty, tiny.schedule(T)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_every_step_up_and_down_is_diffusers_own(prediction, tmp_path):
    model = tiny_model(tmp_path, prediction=prediction)
    schedule, text = model.schedule(T), model.embed(["a cat on grass"])
    x0 = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    up = DDIMInverseScheduler.from_config(dict(model.config))
    down = DDIMScheduler.from_config(dict(model.config))
    for scheduler in (up, down):
        scheduler.set_timesteps(T)

    states = invert(model, x0, text, schedule)
    assert up.timesteps.tolist() == list(schedule.timesteps[::-1])
    for i, t in zip(range(T - 1, -1, -1), up.timesteps, strict=True):
        expected = up.step(model.unet(states[i + 1], t, text).sample, t, states[i + 1]).prev_sample
        torch.testing.assert_close(states[i], expected, rtol=1e-4, atol=1e-4)

    states = retrace(model, states[0], text, text, schedule, w=1)
    for i, t in enumerate(down.timesteps):
        expected = down.step(model.unet(states[i], t, text).sample, t, states[i]).prev_sample
        torch.testing.assert_close(states[i + 1], expected, rtol=1e-4, atol=1e-4)


def test_up_and_down_again_along_the_same_eps_is_the_identity(batch):
    x0, _, _, schedule = batch
    for i in range(T):
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(schedule.denoise(schedule.noise(x0, eps, i), eps, i), x0, rtol=1e-5, atol=1e-5)


def test_direct_inversion_reconstructs_without_error(tiny, batch):
    record = Direct().invert(tiny, *batch)
    assert record.states.shape == (T + 1, 2, 4, 16, 16)
    assert record.null is None
    assert torch.equal(record.states[-1], batch[0])


def test_plain_ddim_inversion_starts_where_direct_inversion_does_and_drifts(tiny, batch):
    direct, ddim = Direct().invert(tiny, *batch), Ddim().invert(tiny, *batch)
    assert torch.equal(ddim.states[0], direct.states[0])
    torch.testing.assert_close(ddim.states, retrace(tiny, direct.states[0], *batch[1:]))
    errors = [(Ddim(guidance=w).invert(tiny, *batch).states[-1] - batch[0]).square().mean() for w in (1.0, 7.5)]
    assert errors[0] < errors[1]


def test_an_embedding_for_each_step_is_read_at_its_step(tiny, batch):
    x, text, empty, schedule = batch
    null = torch.stack([empty + 0.01 * i for i in range(T)])
    states = retrace(tiny, x, text, null, schedule, w=2.0)
    for i in range(T):
        a, b = tiny.eps(states[i], i, schedule, null[i]), tiny.eps(states[i], i, schedule, text)
        expected = schedule.denoise(states[i], a + 2.0 * (b - a), i)
        torch.testing.assert_close(states[i + 1], expected, rtol=1e-4, atol=1e-4)


def test_the_empty_prompt_and_guided_inversion_are_what_they_say(tiny, batch):
    x0, text, empty, schedule = batch
    states = Direct(prompt="empty").invert(tiny, *batch).states
    assert torch.equal(states, invert(tiny, x0, empty, schedule))
    again = Ddim(prompt="empty").invert(tiny, *batch).states  # as MasaCtrl's source is, which guidance cannot move
    torch.testing.assert_close(again, retrace(tiny, states[0], empty, empty, schedule, w=1), rtol=1e-4, atol=1e-4)
    states = Direct(inverse_guidance=3.0).invert(tiny, *batch).states
    a, b = (tiny.eps(states[3], 2, schedule, c, level=3) for c in (empty, text))
    torch.testing.assert_close(states[2], schedule.noise(states[3], a + 3.0 * (b - a), 2), rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_pictures_one_by_one(tiny, batch):
    x0, text, empty, schedule = batch
    both = Ddim(guidance=1.5).invert(tiny, *batch)
    ones = [
        Ddim(guidance=1.5).invert(tiny, x0[b : b + 1], text[b : b + 1], empty[b : b + 1], schedule) for b in range(2)
    ]
    torch.testing.assert_close(both.states, Inversion.stack(ones).states, rtol=1e-3, atol=1e-3)


def test_records_split_and_stack():
    record = Inversion(torch.rand(4, 3, 2, 5, 5), torch.rand(3, 3, 7, 8))
    again = Inversion.stack(record.split())
    assert torch.equal(again.states, record.states)
    assert torch.equal(again.null, record.null)
    assert Inversion.stack(Inversion(record.states).split()).null is None
    with pytest.raises(InputError, match="invert them alike"):
        Inversion.stack([record, Inversion(record.states)])
    with pytest.raises(InputError, match="a record's states: is "):
        Inversion.stack([record, Inversion(record.states[1:], record.null)])


def test_progress_names_both_passes_and_counts_their_steps(tiny, batch):
    seen = []

    def track(items, what):
        seen.append((what, len(items)))
        return items

    Ddim().invert(tiny, *batch, track=track)
    assert seen == [("DDIM inversion", T), ("resimulation", T)]


@pytest.mark.parametrize(("settings", "step"), [(Direct(), 3), (Ddim(), 2)])
def test_a_prediction_that_is_not_finite_stops_at_once_and_names_the_step(tiny, batch, settings, step):
    calls = iter(range(100))
    stop = T - 1 - step if type(settings) is Direct else T + step
    tiny.unet.conv_out.register_forward_hook(lambda _, args, out: out * torch.nan if next(calls) == stop else out)
    with pytest.raises(NotFinite, match=f"step {step} of {T}"):
        settings.invert(tiny, *batch)
    assert next(calls) == stop + 1


def test_what_cannot_be_is_refused(tiny, batch):
    x0, text, _, schedule = batch
    with pytest.raises(InputError, match="prompt='target'"):
        Direct(prompt="target").invert(tiny, *batch)
    with pytest.raises(InputError, match="guidance 2"):
        invert(tiny, x0, text, schedule, w=2)
