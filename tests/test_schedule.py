"""The schedule against diffusers' DDIM, up and down, for every configuration that SD 1.x and 2.x models have."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, EulerDiscreteScheduler

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
    "changes", [{"beta_schedule": "linear"}, {"trained_betas": [0.00001 * k for k in range(1, 1001)]}]
)
def test_other_betas_are_diffusers_own(changes):
    abar = DDIMScheduler(**SD | changes).alphas_cumprod
    schedule = Schedule.from_config(SD | changes, 10)
    torch.testing.assert_close(schedule.abar[:-1], abar[list(schedule.timesteps)])


def test_even_spacing_is_that_of_k_diffusion():
    """Brooks et al.: sigmas of parts of a timestep are interpolated in their logarithm, and the last is 0."""
    schedule, log_sigma = Schedule.from_config(SD, 8, even=True), DDIMScheduler(**SD).alphas_cumprod
    log_sigma = ((1 - log_sigma) / log_sigma).sqrt().log()
    for k, t in enumerate(schedule.timesteps):
        assert t == pytest.approx(999 - 999 / 7 * k, abs=1e-3)
        sigma = (log_sigma[int(t)] * (1 - t % 1) + log_sigma[min(int(t) + 1, 999)] * (t % 1)).exp()
        assert schedule.level(k) == pytest.approx(float(1 / (1 + sigma**2)), rel=1e-4)
    assert schedule.level(8) == 1


@pytest.mark.parametrize("saved", [{}, {"_class_name": "PNDMScheduler", "skip_prk_steps": True}])
def test_the_timesteps_of_sd_1_4_are_those_of_the_published_edits(saved):
    assert Schedule.from_config(SD | saved, 50).timesteps == tuple(range(981, 0, -20))
    unsaid = {key: value for key, value in SD.items() if key not in ("steps_offset", "set_alpha_to_one")}
    assert torch.equal(Schedule.from_config(unsaid | saved, 50).abar, Schedule.from_config(SD, 50).abar)


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "LMSDiscrete", "DDPM", "UniPCMultistep"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_folders_spacing_gives_the_timesteps_of_diffusers_ddim(name, spacing, offset):
    config = SD | {"_class_name": f"{name}Scheduler", "timestep_spacing": spacing, "steps_offset": offset}
    scheduler = DDIMScheduler.from_config(config)
    for steps in (2, 3, 7, 24, 50, 77, 100, 333, 640):
        scheduler.set_timesteps(steps)
        assert list(Schedule.from_config(config, steps).timesteps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("one", [False, True], ids=["abar_0", "alpha_to_one"])
@pytest.mark.parametrize(
    "saved",
    [
        {"timestep_spacing": "trailing"},
        {"steps_offset": 0},
        {"steps_offset": 5},
        {"num_train_timesteps": 500},
        {"num_train_timesteps": 500, "timestep_spacing": "trailing"},
        {"trained_betas": [0.00001 * k for k in range(1, 1001)]},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "num_train_timesteps": 400},
    ],
)
def test_the_steps_of_a_folder_are_those_of_diffusers_ddim(saved, one):
    config = SD | saved | {"set_alpha_to_one": one}
    schedule, scheduler = Schedule.from_config(config, 20), DDIMScheduler.from_config(config)
    scheduler.set_timesteps(20)
    for i, t in enumerate(scheduler.timesteps):
        x, out = normal(i), normal(1000 + i)
        expected = scheduler.step(out, t, x).prev_sample
        torch.testing.assert_close(schedule.denoise(x, schedule.eps(x, out, i), i), expected, rtol=1e-4, atol=2e-4)
    assert schedule.level(20) == pytest.approx(1 if one else float(scheduler.alphas_cumprod[0]), rel=1e-6)


@pytest.mark.parametrize("steps", [7, 50])
def test_where_steps_do_not_divide_they_still_meet(steps):
    """diffusers' own Euler steps, which are DDIM's in x / sqrt(abar), go from each timestep to the next."""
    config = SD | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    schedule, scheduler = Schedule.from_config(config, steps), EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        x, out, a, b = normal(i), normal(1000 + i), schedule.level(i), schedule.level(i + 1)
        expected = b**0.5 * scheduler.step(out, t, x / a**0.5).prev_sample
        torch.testing.assert_close(schedule.denoise(x, out, i), expected, rtol=1e-4, atol=1e-4)


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
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 50, "timestep 999 is noise alone"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "linspace"}, 50, "timestep 999 is noise alone"),
        ({"rescale_betas_zero_snr": True}, 999, "timestep 999 is noise alone"),
        ({"steps_offset": 2}, 500, "steps_offset=2: must lie between 0 and 1 for steps=500"),
        ({"steps_offset": -1}, 50, "steps_offset=-1: must lie between 0 and 19"),
        ({"_class_name": "EDMEulerScheduler"}, 50, "EDMEulerScheduler is for networks that were distilled"),
    ],
)
def test_what_no_such_model_has_is_refused(config, steps, says):
    with pytest.raises(InputError, match=says):
        Schedule.from_config(SD | config, steps)


def test_even_steps_do_not_begin_at_noise_alone():
    with pytest.raises(InputError, match="timestep 999 is noise alone"):
        Schedule.from_config(SD | {"rescale_betas_zero_snr": True}, 8, even=True)
