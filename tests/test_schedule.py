"""The schedule against diffusers' DDIM, up and down, for every configuration that SD 1.x and 2.x models have."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from masafusion_lab import InputError
from masafusion_lab.schedule import Schedule

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def normal(seed):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("one", [False, True], ids=["abar_0", "alpha_to_one"])
@pytest.mark.parametrize("steps", [20, 50])
def test_every_step_is_diffusers_own(steps, one, prediction):
    config = SD | {"set_alpha_to_one": one, "prediction_type": prediction}
    schedule = Schedule.from_config(config, steps)
    down, up = DDIMScheduler(**config), DDIMInverseScheduler(**config)
    for scheduler in (down, up):
        scheduler.set_timesteps(steps)
    assert list(schedule.timesteps) == down.timesteps.tolist() == up.timesteps.tolist()[::-1]
    for i, t in enumerate(down.timesteps):
        x, out = normal(i), normal(1000 + i)
        expected = down.step(out, t, x).prev_sample
        torch.testing.assert_close(schedule.denoise(x, schedule.eps(x, out, i), i), expected, rtol=1e-5, atol=2e-5)
        expected = up.step(out, t, x).prev_sample
        torch.testing.assert_close(schedule.noise(x, schedule.eps(x, out, i + 1), i), expected, rtol=1e-5, atol=2e-5)


def test_noising_is_diffusers_own():
    schedule, scheduler = Schedule.from_config(SD, 50), DDIMScheduler(**SD)
    for i in (0, 25, 49):
        expected = scheduler.add_noise(normal(0), normal(1), torch.tensor([schedule.timesteps[i]]))
        torch.testing.assert_close(schedule.diffuse(normal(0), normal(1), i), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"beta_schedule": "linear"}, {"trained_betas": [0.001 * k for k in range(1, 1001)]}]
)
def test_other_betas_are_diffusers_own(changes):
    abar = DDIMScheduler(**SD | changes).alphas_cumprod
    schedule = Schedule.from_config(SD | changes, 10)
    torch.testing.assert_close(schedule.abar[:-1], abar[list(schedule.timesteps)])


def test_even_spacing_is_that_of_k_diffusion():
    """Brooks et al.: sigmas of parts of a timestep are interpolated in their logarithm, and the last is 0."""
    schedule, log_sigma = Schedule.from_config(SD, 8, "linspace"), DDIMScheduler(**SD).alphas_cumprod
    log_sigma = ((1 - log_sigma) / log_sigma).sqrt().log()
    for k, t in enumerate(schedule.timesteps):
        assert t == pytest.approx(999 - 999 / 7 * k, abs=1e-3)
        sigma = (log_sigma[int(t)] * (1 - t % 1) + log_sigma[min(int(t) + 1, 999)] * (t % 1)).exp()
        assert schedule.level(k) == pytest.approx(float(1 / (1 + sigma**2)), rel=1e-4)
    assert schedule.level(8) == 1


@pytest.mark.parametrize("saved", [{"steps_offset": 0}, {"timestep_spacing": "trailing"}])
def test_the_timesteps_are_those_of_the_published_edits_whatever_the_folder_was_saved_with(saved):
    """A pipeline overrides an offset of 0, whose last step does nothing; samplers saved in a folder are not DDIM's."""
    assert Schedule.from_config(SD | saved, 50).timesteps == tuple(range(981, 0, -20))


@pytest.mark.parametrize("steps", [1, 7, 999])
def test_any_number_of_steps_ends_at_the_picture(steps):
    schedule = Schedule.from_config(SD, steps)
    assert len(schedule) == len(schedule.abar) - 1 == steps
    assert all(schedule.level(i) < schedule.level(i + 1) for i in range(steps))


@pytest.mark.parametrize(
    ("config", "steps", "says"),
    [
        ({}, 0, "^steps=0: must lie between 1 and 999"),
        ({}, 1000, "steps=1000"),
        ({"prediction_type": "sample"}, 50, "'sample'.*'epsilon' and 'v_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, 50, "squaredcos_cap_v2"),
        ({"rescale_betas_zero_snr": True}, 50, "noise alone are not supported"),
    ],
)
def test_what_no_such_model_has_is_refused(config, steps, says):
    with pytest.raises(InputError, match=says):
        Schedule.from_config(SD | config, steps)
