"""Methods against their published rules: diffusers' pipelines, or a literal transcription, in float32, to 1e-4.

A random network multiplies rounding errors at each guided step, so that there are few steps and little guidance.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.models.attention_processor import AttnProcessor

from masafusion_lab.editor import noise_for
from masafusion_lab.given import Given
from masafusion_lab.inversion import Direct, EditFriendly, Inversion
from masafusion_lab.methods import METHODS
from masafusion_lab.model import StableDiffusion

SOURCE, TARGET, INSTRUCTION = "a cat on grass", "a red dog on grass", "red dog"
SHAPE = (4, 8, 12)
T, W = 10, 2.0
THRESHOLD = 2.2
"""Of DiffEdit's region: at the published 3 there is none, because a random network's differences are too even."""


def noise(purpose):
    """Noise of one case, by purpose."""
    return noise_for(0, "case", SHAPE, purpose)[None]


def case_of(root, network=""):
    """A model with one case that is not square, in T steps."""
    model = StableDiffusion.load(str(root), network=network)
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., 2:6, 3:9] = 1
    prompts = {"source": SOURCE, "target": TARGET, "instruction": INSTRUCTION, "empty": ""}
    given = Given(
        {name: model.embed([text]) for name, text in prompts.items()},
        mask,
        pixels=torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)),
        noise=noise,
    )
    x0, schedule = model.encode(given.pixels), model.schedule(T)
    return SimpleNamespace(model=model, given=given, x0=x0, x=noise("x"), schedule=schedule, mask=mask)


@pytest.fixture
def case(tiny_networks):
    return case_of(tiny_networks)


def result(case, name, source=None, schedule=None, **settings):
    """The method's x_0."""
    method, schedule = METHODS[name](**{"guidance": W, **settings}), schedule or case.schedule
    *_, last = method(case.model, case.given, source or Inversion(case.x0[None]), case.x, schedule=schedule)
    return last.x["target"]


def pipeline(kind, case, scheduler=DDIMScheduler, **more):
    """A pipeline of diffusers' with the case's model, and diffusers' own attention."""
    model = case.model
    unet = type(model.unet).from_config(model.unet.config)
    unet.load_state_dict(model.unet.state_dict())
    unet.set_attn_processor(AttnProcessor())
    pipe = kind(
        model.vae, model.text_encoder, model.tokenizer, unet, scheduler.from_config(dict(model.config)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **more,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(ours, theirs, bound=1e-4):
    """Within the bound of one another, relative to the size of theirs."""
    assert (ours - theirs).norm() / theirs.norm() < bound


class Drawn:
    """In place of diffusers' noise: the listed tensors, one after the other."""

    def __init__(self, monkeypatch, *modules):
        self.left = []
        for module in modules:
            monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: self.left.pop(0).reshape(shape))


# Against diffusers' pipelines -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_sdedit_is_image_to_image(case, monkeypatch):
    drawn = Drawn(monkeypatch, "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img")
    drawn.left = [case.x]
    pipe = pipeline(StableDiffusionImg2ImgPipeline, case)
    theirs = pipe(
        TARGET, image=case.x0, strength=0.8, num_inference_steps=T, guidance_scale=W, output_type="latent"
    ).images
    same(result(case, "sdedit"), theirs)


@torch.no_grad()
def test_diffedit_is_its_pipeline_from_region_to_result(case, monkeypatch):
    drawn = Drawn(
        monkeypatch, "diffusers.pipelines.deprecated.stable_diffusion_diffedit.pipeline_stable_diffusion_diffedit"
    )
    inverse = DDIMInverseScheduler.from_config(dict(case.model.config))
    pipe = pipeline(StableDiffusionDiffEditPipeline, case, inverse_scheduler=inverse)
    drawn.left = [torch.cat([noise(f"map {k}") for k in range(10)])]
    region = pipe.generate_mask(
        image=case.x0, source_prompt=SOURCE, target_prompt=TARGET, num_inference_steps=T, guidance_scale=W,
        mask_thresholding_ratio=THRESHOLD,
    )  # fmt: skip
    assert 0 < region.mean() < 1
    latents = pipe.invert(SOURCE, image=case.x0, num_inference_steps=T, inpaint_strength=0.8, guidance_scale=W).latents
    theirs = pipe(
        TARGET, mask_image=torch.from_numpy(region)[None].float(), image_latents=latents, negative_prompt=SOURCE,
        num_inference_steps=T, inpaint_strength=0.8, guidance_scale=W, output_type="latent",
    ).images  # fmt: skip
    text, empty = case.given.prompts["source"], case.given.prompts["empty"]
    ours = Direct(inverse_guidance=W).invert(case.model, case.x0, text, empty, case.schedule)
    same(ours.states[6], latents[:, 4])  # four steps up; to the top rounding grows beyond
    record = Inversion(torch.stack([case.x, case.x, *latents.unbind(1), case.x0]))
    same(result(case, "diffedit", record, threshold=THRESHOLD), theirs)


@torch.no_grad()
def test_glide_by_inpainting_is_the_inpainting_pipeline(tiny_networks):
    case = case_of(tiny_networks, "inpaint")
    pipe = pipeline(StableDiffusionInpaintPipeline, case)
    full = torch.nn.functional.interpolate(case.mask, (32, 48))
    pixels = 2 * case.given.pixels - 1
    masked = pipe.vae.encode(pixels * (full < 0.5)).latent_dist.mean * pipe.vae.config.scaling_factor
    theirs = pipe(
        TARGET, image=pixels, mask_image=full, masked_image_latents=masked, height=32, width=48, strength=1.0,
        num_inference_steps=T, guidance_scale=W, latents=case.x, output_type="latent",
    ).images  # fmt: skip
    same(result(case, "glide", backend="inpaint"), theirs)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
@torch.no_grad()
def test_instruct_pix2pix_is_its_pipeline(tiny_networks, monkeypatch, kind):
    """Spaced as in its authors' code; in ten steps every timestep is a whole one."""
    case = case_of(tiny_networks, "instruct")
    pipe = pipeline(StableDiffusionInstructPix2PixPipeline, case)
    pipe.scheduler = kind.from_config(dict(case.model.config), timestep_spacing="linspace")
    drawn = Drawn(monkeypatch, "diffusers.schedulers.scheduling_euler_ancestral_discrete")
    drawn.left = [noise(f"target {i}") for i in range(T)]
    theirs = pipe(
        INSTRUCTION, image=case.x0 / pipe.vae.config.scaling_factor, num_inference_steps=T, guidance_scale=W,
        image_guidance_scale=1.5, latents=case.x, output_type="latent",
    ).images  # fmt: skip
    same(result(case, "instruct_pix2pix", eta=float(kind is EulerAncestralDiscreteScheduler)), theirs)


# Against their rules, transcribed -------------------------------------------------------------------------------------


class Plainly:
    """Noise predictions and levels as a paper writes them: by timestep, each UNet call of one row."""

    def __init__(self, case):
        self.case, self.steps = case, list(case.schedule.timesteps)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.abar = (1 - betas).cumprod(0).tolist()

    def eps(self, x, t, prompt, w=W, null="empty", beside=None):
        x = x if beside is None else torch.cat([x, beside], 1)
        unet, prompts = self.case.model.unet, self.case.given.prompts
        text, none = (unet(x, t, prompts[name]).sample for name in (prompt, null))
        return none + w * (text - none)

    def before(self, t):
        """The level that a step from timestep t leads to."""
        k = self.steps.index(t) + 1
        return self.abar[self.steps[k]] if k < len(self.steps) else self.abar[0]


@torch.no_grad()
def test_blended_is_its_script(case):
    p = Plainly(case)
    mask, x0 = case.mask, case.x0
    grown = torch.zeros_like(mask)
    grown[..., 1:7, 2:10] = 1
    for shrink, masks in ((0, [mask]), (1, [grown, mask])):
        x, run = case.x, p.steps[2:]
        for k, t in enumerate(run):
            at, after = p.abar[t], p.before(t)
            e = p.eps(x, t, "target")
            clean = (x - (1 - at) ** 0.5 * e) / at**0.5
            x = after**0.5 * clean + (1 - after) ** 0.5 * e
            m = masks[min(k + 1, len(run) - 1) // (len(run) // len(masks) + 1)]  # the next step sees its own region
            noised = at**0.5 * x0 + (1 - at) ** 0.5 * noise(f"outside {2 + k + 1}")
            x = m * x + (1 - m) * noised
        same(result(case, "blended", start=0.25, shrink=shrink), x)


@torch.no_grad()
def test_glide_on_latents_replaces_the_predicted_picture_outside(case):
    p, x = Plainly(case), case.x
    for t in p.steps:
        at, after = p.abar[t], p.before(t)
        e = p.eps(x, t, "target")
        clean = (x - (1 - at) ** 0.5 * e) / at**0.5
        clean = case.mask * clean + (1 - case.mask) * case.x0
        e = (x - at**0.5 * clean) / (1 - at) ** 0.5
        x = after**0.5 * clean + (1 - after) ** 0.5 * e
    x = case.mask * x + (1 - case.mask) * case.x0  # the last level is not quite 1
    same(result(case, "glide"), x)


@torch.no_grad()
def test_sde_diffedit_repeats_the_noise_of_the_source(case):
    p, x0 = Plainly(case), case.x0
    n, last = 7, len(p.steps) - 1
    kept = {p.steps[last]: x0}  # the picture is taken for the state at the last timestep
    for k in range(last - 1, last - n - 1, -1):
        lower, t = p.steps[k + 1], p.steps[k]
        r = p.abar[t] / p.abar[lower]
        kept[t] = r**0.5 * kept[lower] + (1 - r) ** 0.5 * noise(f"chain {k}")
    differences = []
    t = p.steps[T // 2]
    for k in range(10):
        noised = p.abar[t] ** 0.5 * x0 + (1 - p.abar[t]) ** 0.5 * noise(f"map {k}")
        differences.append((p.eps(noised, t, "target") - p.eps(noised, t, "source")).abs())
    heat = torch.stack(differences).mean(0).mean(1, keepdim=True)
    mask = ((heat.clamp(0, THRESHOLD * heat.mean()) / (THRESHOLD * heat.mean())) > 0.5).float()
    x = kept[p.steps[last - n]]
    for k in range(last - n, last):
        t, lower = p.steps[k], p.steps[k + 1]
        a, b = p.abar[t], p.abar[lower]
        sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5

        def mean(x, e, a=a, b=b, sigma=sigma):
            return b**0.5 * (x - (1 - a) ** 0.5 * e) / a**0.5 + (1 - b - sigma**2) ** 0.5 * e

        w = (kept[lower] - mean(kept[t], p.eps(kept[t], t, "source"))) / sigma
        x = mean(x, p.eps(x, t, "target")) + sigma * w
        x = mask * x + (1 - mask) * kept[lower]
    assert 0 < mask.mean() < 1
    same(result(case, "sde_diffedit", threshold=THRESHOLD), x)


@torch.no_grad()
def test_edit_friendly_editing_adds_the_noise_maps_of_the_source(case):
    p, x0 = Plainly(case), case.x0
    text, empty = case.given.prompts["source"], case.given.prompts["empty"]
    record = EditFriendly().invert(case.model, x0, text, empty, case.schedule)
    xs = {t: record.states[k] for k, t in enumerate(p.steps)}
    skip = 2
    x = xs[p.steps[skip]]
    for k in range(skip, T):
        t = p.steps[k]
        a, b = p.abar[t], p.before(t)
        alpha = a / b
        variance = (1 - b) / (1 - a) * (1 - alpha)

        def mu(x, e, a=a, b=b, alpha=alpha):  # the posterior's mean, Ho et al. 2020, (7)
            clean = (x - (1 - a) ** 0.5 * e) / a**0.5
            return b**0.5 * (1 - alpha) / (1 - a) * clean + alpha**0.5 * (1 - b) / (1 - a) * x

        target = mu(x, p.eps(x, t, "target"))
        if k < T - 1:
            z = (xs[p.steps[k + 1]] - mu(xs[t], p.eps(xs[t], t, "source", w=1))) / variance**0.5
            target = target + variance**0.5 * z
        x = target
    same(result(case, "edit_friendly", record), x)


@torch.no_grad()
def test_without_noise_the_offsets_of_direct_inversion_lead_the_source_back_to_its_picture(case):
    """In few steps: where a state is added to and not replaced, rounding grows from step to step."""
    prompts, schedule = case.given.prompts, case.model.schedule(3)
    record = Direct().invert(case.model, case.x0, prompts["source"], prompts["empty"], schedule)
    case.given = replace(case.given, prompts={**prompts, "target": prompts["source"]})
    same(result(case, "edit_friendly", record, schedule, eta=0.0, source_guidance=W, start=0.0), case.x0)


def test_hive_is_instruct_pix2pix_with_another_network_and_words(tiny_networks):
    case = case_of(tiny_networks, "hive")
    assert torch.equal(result(case, "hive"), result(case, "instruct_pix2pix"))
    assert METHODS["hive"]().needs == replace(METHODS["instruct_pix2pix"]().needs, network="hive", suffix=None)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_stochastic_steps_are_diffusers_own(tmp_path, prediction):
    from tests.tiny import tiny_model

    model = tiny_model(tmp_path, prediction=prediction)
    schedule, text = model.schedule(6), model.embed([TARGET])
    scheduler = DDIMScheduler.from_config(dict(model.config))
    scheduler.set_timesteps(6)
    x, z = noise("x"), noise("z")
    for i, t in enumerate(scheduler.timesteps):
        out = model.unet(x, t, text).sample
        theirs = scheduler.step(out, t, x, eta=0.7, variance_noise=z).prev_sample
        ours = schedule.denoise(x, schedule.eps(x, out, i), i, 0.7) + schedule.sigma(i, 0.7) * z
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        x = theirs
