"""Hints and the region drawn from pictures; with real data, PiDiNet against what the published detector drew."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from masafusion_lab import InputError, pidinet
from masafusion_lab.hints import canny, region_from_sketches
from masafusion_lab.pidinet import sketch


def lines(*boxes, size=(160, 120)):
    """A sketch: outlines of boxes, white on black."""
    picture = Image.new("L", size)
    for box in boxes:
        ImageDraw.Draw(picture).rectangle(box, outline=255)
    return picture


def inside(region):
    return np.asarray(region) > 127


def test_canny_is_opencvs_on_blue_green_red():
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)
    edges = canny(picture)
    assert (edges.mode, edges.size) == ("L", (160, 120))
    assert np.array_equal(edges, cv2.Canny(cv2.cvtColor(np.array(picture), cv2.COLOR_RGB2BGR), 100, 200))
    assert set(np.unique(edges)) == {0, 255}
    assert np.sum(inside(canny(picture, 300, 600))) < np.sum(inside(edges))


def test_edges_of_a_large_picture_are_as_strong_as_of_a_small_one():
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((3072, 2048), Image.Resampling.NEAREST)
    edges = canny(large)
    assert edges.size == large.size
    shrunk = np.asarray(edges.resize((768, 512), Image.Resampling.BILINEAR))
    small = inside(canny(large.resize((768, 512), Image.Resampling.LANCZOS)))
    assert small.mean() > 0.005
    assert ((shrunk > 127) == small).mean() > 0.99


def test_the_region_covers_what_moved_and_nothing_else():
    stays, was, now = (5, 5, 30, 30), (90, 40, 110, 60), (100, 40, 130, 70)
    region = inside(region_from_sketches(lines(stays, was), lines(stays, now)))
    assert region[40:61, 90:111].all()
    assert region[40:71, 100:131].all()
    assert not region[:36, :36].any()
    assert 0.04 < region.mean() < 0.15


def test_what_is_new_is_filled_even_at_the_border_of_the_picture():
    region = inside(region_from_sketches(lines(), lines((0, 0, 60, 40))))
    assert region[1:40, 1:60].all()
    assert not region[60:, 80:].any()


def test_a_line_redrawn_a_pixel_aside_has_not_moved():
    far = lines((20, 20, 60, 60), (100, 20, 140, 100), size=(200, 200))
    aside = lines((21, 20, 61, 60), size=(200, 200))
    region = inside(region_from_sketches(far, aside))
    assert not region[:, :70].any()
    assert region[20:100, 100:140].all()


def test_the_hull_holds_the_region_and_is_convex():
    before, after = lines((20, 20, 40, 40)), lines((20, 20, 40, 40), (60, 60, 80, 80), (120, 10, 140, 20))
    plain, hull = (inside(region_from_sketches(before, after, hull=hull)) for hull in (False, True))
    assert (hull | plain == hull).all()
    assert hull.sum() > 2 * plain.sum()


@pytest.mark.parametrize("dilate", [0, 1, 9])
def test_the_region_grows_by_what_is_asked(dilate):
    region = inside(region_from_sketches(lines(), lines((50, 50, 80, 80)), dilate=dilate))
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (50 - dilate, 80 + dilate, 50 - dilate, 80 + dilate)


def test_a_margin_beyond_the_picture_is_all_of_it():
    assert inside(region_from_sketches(lines(), lines((50, 50, 80, 80)), dilate=10**6)).all()


def test_sketches_that_tell_no_region_are_refused():
    with pytest.raises(InputError, match="show the same; give mask=FILE"):
        region_from_sketches(lines((5, 5, 30, 30)), lines((5, 5, 30, 30)))
    with pytest.raises(InputError, match="are 160x120 and 80x60"):
        region_from_sketches(lines(), lines(size=(80, 60)))


@pytest.mark.parametrize("kind", pidinet.KINDS)
def test_a_folded_kernel_convolves_the_pixel_differences(kind):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 2, 9, 9, generator=g), torch.randn(3, 2, 3, 3, generator=g)
    around = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]  # clockwise; (1, 1) is the middle
    at = {(r, c): x[:, :, 1 + r : 6 + r, 1 + c : 6 + c] for r in range(-1, 4) for c in range(-1, 4)}
    if kind == "plain":
        differences = {p: at[p] for p in [*around, (1, 1)]}
    elif kind == "central":
        differences = {p: at[p] - at[1, 1] for p in around}
    elif kind == "angular":
        differences = {p: at[p] - at[q] for p, q in zip(around, [*around[1:], around[0]], strict=True)}
    else:
        differences = {divmod(k, 3): at[2 * r - 1, 2 * c - 1] - at[r, c] for k, (r, c) in enumerate(sorted(around), 1)}
    by_hand = sum(torch.einsum("oi,bihw->bohw", w[:, :, r, c], d) for (r, c), d in differences.items())
    folded = pidinet.fold(kind, w)
    side = folded.shape[-1] // 2
    torch.testing.assert_close(F.conv2d(x, folded)[:, :, 2 - side : 7 - side, 2 - side : 7 - side], by_hand)


def test_a_sketch_without_weights_or_with_others_is_refused(tmp_path):
    picture, file = lines((5, 5, 30, 30)).convert("RGB"), tmp_path / "table5_pidinet.pth"
    with pytest.raises(InputError, match="give pidinet=FILE"):
        sketch(picture, None)
    with pytest.raises(InputError, match=r"no such file; give the table5_pidinet.pth"):
        sketch(picture, file)
    for content in (b"", b"a text", b"PK\x03\x04"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"truncated or of another network"):
            sketch(picture, file)
    torch.save({"state_dict": {"module.init_block.weight": torch.zeros(1)}}, file)
    with pytest.raises(InputError, match=r"truncated or of another network"):
        sketch(picture, file)


def test_pickled_code_in_weights_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": Evil()}, tmp_path / "table5_pidinet.pth")
    with pytest.raises(InputError):
        pidinet.load(tmp_path / "table5_pidinet.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.realdata
def test_the_sketch_of_the_cat_is_the_published_one(realdata):
    """`edge.png` came with the picture, drawn by the published detector; its other port feeds it blue, green, red."""
    weights = realdata / "weights/pidinet_table5.pth"
    cat = Image.open(realdata / "images/t2ia_edit_cat__im.png").convert("RGB")
    published = inside(Image.open(realdata / "images/t2ia_edit_cat__edge.png"))
    assert (inside(sketch(cat, weights)) == published).mean() > 0.9999
    pixels = torch.from_numpy(np.array(cat)).permute(2, 0, 1)[None] / 255
    grey = (pidinet.load(weights)(pixels.flip(1)) * 255).byte().float().mean()
    assert grey == pytest.approx(27.41, abs=0.01)


@pytest.mark.realdata
def test_the_region_from_real_sketches_is_near_to_the_one_drawn_by_hand(realdata):
    before, after, mask = (
        Image.open(realdata / f"images/t2ia_edit_cat__{name}.png").convert("L") for name in ("edge", "edge_2", "mask")
    )
    for hull, least in ((False, 0.7), (True, 0.8)):
        region = inside(region_from_sketches(before, after, hull=hull))
        assert (region & inside(mask)).sum() / (region | inside(mask)).sum() > least
