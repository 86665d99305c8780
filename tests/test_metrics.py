"""Metrics against independent arithmetic: the scripts of MagicBrush and PIE-Bench, and closed forms between modes."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine as scipy_cosine
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.regression import MeanSquaredError

from masafusion_lab import InputError
from masafusion_lab.metrics import IDENTICAL, MEASURES, Mean, Pair, budget, cut_out, measure, structure
from masafusion_lab.protocol import of_sweep

PUBLISHED, AREA = ("psnr", "mse", "ssim"), ("psnr_area", "mse_area", "ssim_area")


class Eyes:
    """Encoders whose features can be computed by hand; some are not to be had."""

    def clip(self, picture):
        return picture.mean((1, 2)) - 0.3

    def text(self, words):
        return torch.tensor([float(len(words)), 1.0, -0.5])

    def dino(self, picture):
        return picture[:, ::3, ::5].flatten()

    def keys(self, picture):
        return picture.flatten(1).T[::7]

    def lpips(self, a, b):
        raise InputError("LPIPS: its backbone cannot be had")

    def done(self, picture, drawn):
        return torch.tensor(1.0)


SEE = Eyes()


def noise(seed, size=(40, 56)):
    """A picture with 8-bit levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, *size), generator=generator) / 255


def box(share, size=(40, 56)):
    """A mask of the left part of a picture."""
    mask = torch.zeros(1, *size)
    mask[:, :, : round(share * size[1])] = 1
    return mask


def pair(edited=None, source=None, mask=None, **more):
    edited, source = noise(1) if edited is None else edited, noise(2) if source is None else source
    facts = {"truth": noise(3), "at_truth": edited, "target": "a dog", "local": "dog", "mask": box(0.25)}
    return Pair(edited, source, edited, **facts | {} | more | ({} if mask is None else {"mask": mask}))


def value(name, which):
    found, why = measure(name, which, SEE)
    assert why == ""
    return found


def test_magicbrushs_metrics_equal_the_arithmetic_of_its_script():
    p = pair()
    assert value("l1", p) == pytest.approx(torch.nn.L1Loss()(p.at_truth, p.truth).item(), abs=1e-6)
    assert value("l2", p) == pytest.approx(torch.nn.MSELoss()(p.at_truth, p.truth).item(), abs=1e-6)
    for name, a, b in (
        ("clip_i", SEE.clip(p.edited), SEE.clip(p.truth)),
        ("dino", SEE.dino(p.edited), SEE.dino(p.truth)),
        ("clip_t", SEE.clip(p.edited), SEE.text("dog")),
        ("clip_t_global", SEE.clip(p.edited), SEE.text("a dog")),
    ):
        assert value(name, p) == pytest.approx(1 - scipy_cosine(a.numpy(), b.numpy()), abs=1e-6)


def test_piebenchs_metrics_equal_the_arithmetic_of_its_script():
    p = pair()
    keep = 1 - p.mask.numpy()
    a, b = (torch.tensor(np.array(x) * keep)[None].float() for x in (p.edited, p.source))
    assert value("psnr", p) == pytest.approx(PeakSignalNoiseRatio(data_range=1.0)(a, b).item(), abs=1e-5)
    assert value("ssim", p) == pytest.approx(StructuralSimilarityIndexMeasure(data_range=1.0)(a, b).item(), abs=1e-6)
    assert value("mse", p) == pytest.approx(MeanSquaredError()(a[0].contiguous(), b[0].contiguous()).item(), abs=1e-6)
    much = pair(mask=box(0.9))
    for name, of, shown in (("clip_edited", much, much.edited * much.mask), ("clip_whole", p, p.edited)):
        want = 100 * (1 - scipy_cosine(SEE.clip(shown).numpy(), SEE.text("a dog").numpy()))
        assert value(name, of) == pytest.approx(want, abs=1e-4)
    assert value("clip_edited", p) == 0  # where the cosine is negative


def test_what_a_sweep_trades_off_equals_its_formula_over_the_pixels_of_the_region():
    p = pair()
    inside = p.mask[0].bool()
    a, b, truth = (x[:, inside].numpy() for x in (p.at_source, p.source, p.truth))
    assert value("changed", p) == pytest.approx(np.abs(a - b).mean(), abs=1e-6)
    assert value("hit", p) == pytest.approx(-10 * math.log10(((a - truth) ** 2).mean()), abs=1e-4)
    whole = PeakSignalNoiseRatio(data_range=1.0)(p.at_source, p.source).item()
    assert value("psnr_whole", p) == pytest.approx(whole, abs=1e-5)
    large = pair(truth=noise(3, (80, 112)), at_truth=noise(4, (80, 112)))
    twice = large.mask[0].repeat_interleave(2, 0).repeat_interleave(2, 1).bool()
    error = (large.at_truth - large.truth)[:, twice].square().mean().item()
    assert value("hit", large) == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert measure("hit", pair(truth=None), SEE)[1] == "no target picture is known"


class Watched:
    """The same eyes, which remember what was looked through."""

    def __init__(self):
        self.seen = set()

    def __getattr__(self, name):
        self.seen.add({"text": "clip", "keys": "dino", "done": "judge"}.get(name, name))
        return getattr(SEE, name)


@pytest.mark.parametrize("name", MEASURES)
def test_a_sweep_loads_the_networks_that_its_measures_look_through(name):
    see = Watched()
    measure(name, pair(), see)
    assert see.seen == set(of_sweep([name], [name], built_in=True).encoders)


def test_the_structure_distance_equals_its_formula_written_out_token_by_token():
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    total = 0.0
    for i in range(6):
        for j in range(6):
            of = [1 - scipy_cosine(keys[i].numpy(), keys[j].numpy()) for keys in (a, b)]
            total += (of[0] - of[1]) ** 2 / 36
    assert structure(a, b).item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("share", [0.125, 0.5, 0.875])
def test_between_published_and_area_correct_stands_a_closed_form(share):
    p = pair(mask=box(share))
    kept = 1 - p.mask.mean().item()
    assert value("mse", p) == pytest.approx(kept * value("mse_area", p), rel=1e-6)
    assert value("psnr", p) == pytest.approx(value("psnr_area", p) - 10 * math.log10(kept), abs=1e-6)


def test_at_a_tenth_of_the_picture_kept_the_published_psnr_gains_ten_decibels():
    p = pair(noise(1, (40, 60)), noise(2, (40, 60)), box(0.9, (40, 60)))
    assert value("psnr", p) - value("psnr_area", p) == pytest.approx(10, abs=1e-6)


def test_the_published_ssim_is_the_area_correct_one_diluted_by_the_edited_area():
    p = pair(mask=box(0.5))
    kept = 1 - p.mask.mean().item()
    rest = (value("ssim", p) - kept * value("ssim_area", p)) / (1 - kept)
    assert 0.7 < rest <= 1  # black beside black, but for windows that reach over the border
    assert value("ssim_area", p) < 0.2 < value("ssim", p)


def test_area_correct_metrics_do_not_change_with_the_size_of_the_region():
    source = noise(2)
    edited = (source + 0.1).clamp(max=2)  # the same error everywhere
    small, large = (pair(edited, source, box(share)) for share in (0.1, 0.8))
    for published, area in (("psnr", "psnr_area"), ("mse", "mse_area")):
        assert value(area, small) == pytest.approx(value(area, large), rel=1e-5)
        assert value(published, small) != pytest.approx(value(published, large), rel=1e-2)


def test_a_perfect_edit_has_the_best_values():
    p = pair(noise(3), noise(3))
    assert value("l1", p) == value("l2", p) == value("mse", p) == value("structure", p) == 0
    assert value("clip_i", p) == pytest.approx(1)
    assert value("dino", p) == pytest.approx(1)
    assert value("psnr", p) == value("psnr_area", p) == IDENTICAL
    assert value("ssim", p) == pytest.approx(1, abs=1e-3)


SEEN_BY_OTHERS = ("clip", "done", "lpips", "structure")


@pytest.mark.parametrize("name", [n for n in MEASURES if not n.startswith(("changed", *SEEN_BY_OTHERS))])
def test_the_direction_of_a_metric_is_that_in_which_less_damage_lies(name):
    source = noise(3)
    near, far = ((1 - t) * source + t * noise(9) for t in (0.1, 0.6))
    good, bad = (value(name, pair(x, source, truth=source, at_truth=x)) for x in (near, far))
    assert (good > bad) == MEASURES[name].higher_is_better


THIN = {"mask": box(0.5, (5, 56))}
SMALL = "the picture is smaller than half of SSIM's window of 11 pixels"


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("l1", {"truth": None}, "no target picture is known"),
        ("psnr", {"mask": box(1)}, "the mask leaves nothing outside"),
        ("ssim_area", {"mask": box(1)}, "the mask leaves nothing outside"),
        ("ssim", {name: noise(k, (5, 56)) for k, name in enumerate(("edited", "source"))} | THIN, SMALL),
        ("clip_edited", {"mask": box(0)}, "the mask is empty"),
        ("clip_cut", {"mask": box(0)}, "the mask is empty"),
        ("lpips", {}, "LPIPS: its backbone cannot be had"),
        ("clip_i", {"truth": torch.full((3, 4, 4), torch.nan)}, "is nan"),
    ],
)
def test_what_has_no_value_is_missing_with_its_reason_and_never_zero(name, changes, why):
    found, said = measure(name, pair(**changes), SEE)
    assert math.isnan(found)
    assert said == why


def test_the_cut_out_is_the_smallest_box_around_the_mask():
    mask = torch.zeros(1, 40, 56)
    mask[0, 3:9, 10:20] = 1
    p = pair(mask=mask)
    want = 100 * (1 - scipy_cosine(SEE.clip(p.edited[:, 3:9, 10:20]).numpy(), SEE.text("a dog").numpy()))
    assert value("clip_cut", p) == pytest.approx(want, abs=1e-4)
    mask[:, [0, -1]], mask[..., [0, -1]] = 1, 1  # as PIE-Bench's are, all of them
    assert torch.equal(cut_out(p.edited, mask), p.edited[:, 3:9, 10:20])


def test_the_budget_of_what_is_kept_puts_each_error_where_it_was_made():
    source, mask = noise(2), box(0.5)
    seam, far = torch.zeros_like(source), torch.zeros_like(source)
    seam[:, :, 28:31], far[:, :, 31:] = 0.2, 0.1  # the mask ends at column 28
    roundtrip = source + 0.05
    found = budget(source, roundtrip, roundtrip - 0.05, roundtrip - 0.05 + seam + far + mask, mask, 3)
    want = {"autoencoder": 0.0025, "inversion": 0.0025, "fusion": 0.01 * 25 / 28, "seam": 0.04 * 3 / 28}
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-4)
    assert found["total"] == pytest.approx(found["fusion"] + found["seam"], rel=1e-4)  # the first two cancelled
    assert found["total"] == pytest.approx(sum(v for k, v in found.items() if k != "total"))
    none = budget(source, source, source, source + mask, mask, 3)
    assert set(none.values()) == {0.0}


def test_the_torchmetrics_form_is_the_mean_of_those_that_have_a_value_and_counts_the_others():
    mean = Mean("l1", SEE)
    pairs = [pair(noise(4)), pair(noise(5)), pair(truth=None)]
    for p in pairs:
        mean.update(p)
    assert mean.compute().item() == pytest.approx(np.mean([value("l1", p) for p in pairs[:2]]))
    assert (mean.count.item(), mean.missing.item(), mean.higher_is_better) == (2, 1, False)
    assert math.isnan(Mean("l1", SEE).compute())
