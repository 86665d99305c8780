"""Pictures, masks and hints in every shape that people have them in."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from masafusion_lab import InputError
from masafusion_lab.data.case import Case
from masafusion_lab.data.pictures import open_hint, open_mask, open_picture
from masafusion_lab.data.prepared import prepare, working_size
from masafusion_lab.region import Region

MODEL = {"factor": 4, "multiple": 16, "native": 64}
RED, WHITE = (255, 0, 0), (255, 255, 255)


def png(width, height, data=b""):
    """A one-bit PNG of this size, with these compressed rows."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(width=64, height=48):
    out = io.BytesIO()
    Image.effect_noise((width, height), 90).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def case(image, **fields):
    return Case("horse", image, "a horse", "a dog", **fields)


def grey(width, height, *white, level=255):
    """A black picture with white rectangles."""
    image = Image.new("L", (width, height))
    for box in white:
        ImageDraw.Draw(image).rectangle(box, fill=level)
    return image


# what is no picture


@pytest.mark.parametrize("side", [7072, 10_000, 20_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, zlib.compress(bytes(side // 8 * 1000), 9)))  # to decode it would fail otherwise
    assert path.stat().st_size < 10_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (open_picture, open_mask, open_hint):
            with pytest.raises(InputError, match=r"bomb\.png.*more than 50,000,000 pixels") as caught:
                read(path)
            assert "\n" not in str(caught.value)


BROKEN = {
    "truncated.jpg": (jpeg()[:-300], "damaged or cut short"),
    "half.png": (png(100, 100), "damaged or cut short"),
    "empty.png": (b"", "is empty"),
    "text.png": (b"I am no picture\n", "is not a picture"),
    "page.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
    "pickle.png": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "is not a picture"),
}


@pytest.mark.parametrize(("name", "content", "why"), [(k, *v) for k, v in BROKEN.items()], ids=BROKEN)
def test_what_is_no_picture_is_refused_by_name(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    for read in (open_picture, open_mask, open_hint):
        with pytest.raises(InputError, match=rf"{name}: .*{why}") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, why in [
        (".", "is a folder"),
        ("none.png", "no such file"),
        ("a\0b", "no such file"),
        ("pipe", "ordinary"),
    ]:
        with pytest.raises(InputError, match=why):
            open_picture(tmp_path / name)
    with pytest.raises(InputError, match="damaged or cut short"):
        open_picture(tmp_path / ("a" * 300))


def test_a_picture_in_memory_may_be_damaged_too():
    with pytest.raises(InputError, match="picture of 64x48: is damaged"):
        open_picture(Image.open(io.BytesIO(jpeg()[:-300])))


# modes and orientation


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (5, 3)), (6, (3, 0)), (8, (0, 5))])
def test_exif_turns_a_picture_upright(tmp_path, orientation, corner):
    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    image.putpixel((0, 0), RED)
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_picture(tmp_path / "a.png")
    assert upright.size == ((6, 4) if orientation in (1, 3) else (4, 6))
    assert upright.getpixel(corner) == RED


def test_sixteen_bits_keep_their_greys(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).repeat(2).reshape(16, 32) * 257
    for name in ("a.png", "a.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert np.array_equal(np.asarray(open_picture(tmp_path / name))[..., 1], ramp // 257)
        assert np.array_equal(np.asarray(open_mask(tmp_path / name, "light")), ramp // 257)
    (tmp_path / "a.pgm").write_bytes(b"P5 32 16 65535\n" + ramp.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.pgm"))[..., 1], ramp // 257)


def test_transparency_is_white_in_a_picture_and_outside_in_a_mask(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 1
    lucid = Image.new("LA", (4, 4), (255, 0))
    lucid.putpixel((0, 0), (255, 255))
    for name, source in {"rgba": image, "p": palette, "la": lucid}.items():
        source.save(tmp_path / f"{name}.png")
        picture, mask = open_picture(tmp_path / f"{name}.png"), open_mask(tmp_path / f"{name}.png")
        assert (picture.mode, mask.mode) == ("RGB", "L")
        assert picture.getpixel((0, 0)) == (WHITE if name == "la" else RED)
        assert picture.getpixel((3, 3)) == WHITE
        assert mask.getpixel((0, 0)) > 0
        assert mask.getpixel((3, 3)) == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new("RGB", (8, 8), WHITE).convert(mode)
    assert open_picture(image).getpixel((4, 4)) == WHITE
    if mode in ("CMYK", "YCbCr"):
        image.save(tmp_path / "a.jpg")
        assert min(open_picture(tmp_path / "a.jpg").getpixel((4, 4))) > 250


def test_floating_point_pictures_are_refused():
    with pytest.raises(InputError, match="save it with 8 or 16 bits"):
        open_picture(Image.new("F", (4, 4)))


def test_of_an_animation_the_first_frame_is_taken_with_a_warning(tmp_path, caplog):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert open_picture(tmp_path / name).getpixel((0, 0)) == RED
    assert sum("has 3 frames" in message for message in caplog.messages) == 3


def test_a_telephones_photograph_with_its_preview_is_no_animation(tmp_path, caplog):
    Image.new("RGB", (8, 8), RED).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]
    )
    assert open_picture(tmp_path / "a.jpg").size == (8, 8)
    assert not caplog.messages


def test_opening_leaves_the_callers_picture_alone():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    open_picture(image), open_mask(image), open_hint(image)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (255, 0, 0, 0))


# sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (64, 64)), ((7, 513), (64, 256)), ((10_000, 8), (256, 64)), ((730, 487), (96, 64)), ((64, 64), (64, 64))],
)
def test_any_size_becomes_one_that_the_model_takes(size, expected):
    prepared = prepare(case(Image.new("RGB", size, RED)), **MODEL)
    assert prepared.pixels.shape == (3, expected[1], expected[0])
    assert prepared.pixels.dtype == torch.float32
    assert prepared.pixels.amax((1, 2)).tolist() == [1, 0, 0]
    assert prepared.original == size
    assert working_size(*size, multiple=16, native=64) == expected


def test_working_sizes_are_multiples_with_the_short_side_native():
    for width in range(1, 400, 13):
        for height in range(1, 400, 17):
            w, h = working_size(width, height, multiple=64, native=512)
            assert w % 64 == h % 64 == 0
            assert min(w, h) == 512
            assert max(w, h) <= 2048
            if max(width, height) <= 4 * min(width, height):
                assert abs(max(w, h) - 512 * max(width, height) / min(width, height)) <= 32


def test_a_picture_of_extreme_aspect_is_squeezed_with_a_warning(caplog):
    working_size(300, 100, multiple=64, native=512)
    assert not caplog.messages
    working_size(10_000, 8, multiple=64, native=512)
    assert "10000x8 is squeezed to 4:1" in caplog.text


def test_a_given_size_wins():
    assert working_size(730, 487, multiple=64, native=512, size="768x512") == (768, 512)
    assert working_size(730, 487, multiple=64, native=512, size="256") == (384, 256)
    assert working_size(487, 730, multiple=64, native=512, size="256") == (256, 384)
    assert working_size(730, 487, multiple=64, native=512, size="") == (768, 512)


@pytest.mark.parametrize(
    ("size", "why"),
    [
        ("500", "500 is not a multiple of 64, as this model needs; take 448 or 512"),
        ("512x500", "take 448 or 512"),
        ("0", "take 64"),
        ("31", "take 64"),
        ("-64", "give the short side"),
        ("big", "give the short side"),
        ("512x", "give the short side"),
        ("64000x64000", "more than 50,000,000 pixels"),
        ("64000", "more than 50,000,000 pixels"),
    ],
)
def test_a_size_that_cannot_be_is_explained(size, why):
    with pytest.raises(InputError, match=why):
        working_size(730, 487, multiple=64, native=512, size=size)


def test_a_picture_of_the_working_size_is_not_resampled():
    levels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    pixels = prepare(case(Image.fromarray(levels)), **MODEL).pixels
    assert np.array_equal((pixels * 255).round().byte().permute(1, 2, 0).numpy(), levels)


# masks


def masked(mask, width=64, height=64, **options):
    return prepare(case(Image.new("RGB", (width, height)), mask=mask), **MODEL, **options)


def test_a_latent_cell_is_inside_if_the_mask_touches_it():
    prepared = masked(grey(64, 64, (8, 12, 15, 16)))
    expected = torch.zeros(1, 16, 16)
    expected[0, 3:5, 2:4] = 1
    assert torch.equal(prepared.mask, expected)
    assert prepared.mask_full.sum() == 8 * 5
    assert prepared.mask.dtype == prepared.mask_full.dtype == torch.float32


def test_a_thin_region_survives_with_a_warning(caplog):
    prepared = masked(grey(640, 640, (101, 0, 101, 639)), 640, 640)
    assert prepared.mask_full[0].any(1).all(), "a line of one pixel in ten"
    assert prepared.mask.sum() == 16
    assert "thinner than a latent cell" in caplog.text
    caplog.clear()
    masked(grey(64, 64, (8, 8, 30, 30)))
    assert not caplog.messages


def test_dilation_is_in_latent_cells():
    mask = grey(64, 64, (20, 20, 23, 23))
    assert [int(masked(mask, dilate=d).mask.sum()) for d in range(3)] == [1, 9, 25]
    assert masked(mask, dilate=2).mask_full.sum() == 16, "as given"
    with pytest.raises(InputError, match="dilate=-1"):
        masked(mask, dilate=-1)


def test_a_soft_mask_is_cut_at_half_grey_unless_it_is_to_stay_soft():
    mask = Image.linear_gradient("L").resize((64, 64))
    light = masked(mask, how=Region(by="light")).mask
    assert set(light.unique().tolist()) == {0, 1}
    assert light.mean() == pytest.approx(0.5, abs=0.07)
    soft = masked(mask, how=Region(soft=True))
    assert len(soft.mask.unique()) > 10
    assert torch.equal(soft.mask_full * 255, (soft.mask_full * 255).round())
    with pytest.raises(InputError, match=r"above region\.threshold"):
        masked(grey(64, 64, (8, 8, 30, 30), level=100), how=Region(by="light"))
    assert masked(grey(64, 64, (8, 8, 30, 30), level=100), how=Region(soft=True)).mask.max() == pytest.approx(100 / 255)


def photograph(size=(96, 64), seed=0):
    """Many colours, smooth as a photograph's."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


INSIDE = Image.new("L", (96, 64))
ImageDraw.Draw(INSIDE).ellipse((20, 12, 60, 50), fill=255)
SMOOTH = INSIDE.resize((384, 256), Image.Resampling.NEAREST).resize((96, 64), Image.Resampling.BOX)


def put(inside, outside, mask=INSIDE):
    """One picture or colour inside the region, another outside."""
    both = [Image.new("RGB", INSIDE.size, each) if isinstance(each, tuple) else each for each in (inside, outside)]
    return Image.composite(*both, mask)


def holed(picture, alpha):
    picture = picture.convert("RGB")
    picture.putalpha(alpha)
    return picture


def palette():
    picture = INSIDE.point(lambda level: level // 255).convert("P")
    picture.putpalette([10, 10, 10, 200, 40, 30])
    return picture


def compressed(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return Image.open(file)


GREEN, BLACK = (0, 160, 60), (0, 0, 0)
MEANT = {
    "a hole in a photograph": (holed(photograph(), ImageChops.invert(INSIDE)), "auto"),
    "a soft hole in a photograph": (holed(photograph(), ImageChops.invert(SMOOTH)), "auto"),
    "white drawn on nothing": (holed(put(WHITE, WHITE), INSIDE), "auto"),
    "black drawn on nothing": (holed(put(BLACK, BLACK), INSIDE), "auto"),
    "labels 0 and 1": (INSIDE.point(lambda level: level // 255), "auto"),
    "two greys": (put((140,) * 3, (90,) * 3), "auto"),
    "red on black": (put(RED, BLACK), "auto"),
    "black beside red": (put(RED, WHITE), "auto"),
    "a palette": (palette(), "auto"),
    "a palette's number": (palette(), "label:1"),
    "antialiased red on black": (put(RED, BLACK, SMOOTH), "auto"),
    "white on black as JPEG": (compressed(put(WHITE, BLACK)), "auto"),
    "soft white on black": (SMOOTH.filter(ImageFilter.GaussianBlur(2)), "auto"),
    "a photograph painted red": (put(RED, photograph()), "colour:#ff0000"),
    "two colours, one of them named": (put(RED, GREEN), "colour:#ff0000"),
    "one of three labels": (put((2, 2, 2), palette().convert("L").point(lambda level: level % 2)), "label:2"),
    "what is dark": (put(BLACK, WHITE), "dark"),
    "a half erased hole": (holed(photograph(), INSIDE.point(lambda level: 255 - level // 3)), "auto"),
    "thin paint on nothing": (holed(put(RED, RED), INSIDE.point(lambda level: level // 3)), "auto"),
    "labels in 16 bits": (Image.fromarray((np.asarray(INSIDE) // 255).astype(np.uint16)), "auto"),
}


@pytest.mark.parametrize("what", MEANT)
def test_the_region_is_what_was_meant(what, tmp_path):
    picture, by = MEANT[what]
    picture.save(tmp_path / "mask.png")
    found = np.asarray(open_mask(tmp_path / "mask.png", by)) > 127
    truth = np.asarray(INSIDE) > 127
    assert (found & truth).sum() / (found | truth).sum() > 0.97


def voided():
    """Labels 0 and 1, and few pixels of 255, which are of neither."""
    labels = INSIDE.point(lambda level: level // 255)
    ImageDraw.Draw(labels).line((70, 60, 90, 60), fill=255, width=2)
    return labels


def spotted():
    """Black, but for five small spots of as many colours."""
    spots = Image.new("RGB", (96, 64))
    for k, colour in enumerate(["red", "green", "blue", "yellow", "white"]):
        ImageDraw.Draw(spots).rectangle((12 * k, 10, 12 * k + 3, 12), fill=colour)
    return spots


@pytest.mark.parametrize(
    ("picture", "by", "said"),
    [
        (photograph(), "auto", "is a photograph, .* and no mask; say which part is meant: region.by=light"),
        (put(RED, photograph()), "auto", r"\(#ff0000 2\d%, .*region.by=.*colour:#ff0000"),
        (put(RED, GREEN), "auto", "is of two colours, #00a03c and #ff0000; say which"),
        (
            Image.fromarray(np.arange(4, dtype=np.uint8).repeat(16).reshape(8, 8)),
            "auto",
            "a map of 4 labels, 0 25%, 1 25%",
        ),
        (photograph(), "alpha", "nothing of it is transparent"),
        (INSIDE, "label:7", "nothing of it is of that value; it has 0 8"),
        (photograph(), "label:128", "has colours, .* and no labels"),
        (voided(), "auto", "a map of 3 labels, 0 79%, 1 20%, 255 1%"),
        (spotted(), "auto", "a drawing in many colours .#000000 99%"),
        (
            holed(photograph(), Image.effect_noise((96, 64), 9).point(lambda level: 254 + level % 2)),
            "auto",
            "photograph",
        ),
    ],
    ids=[
        "photograph",
        "painted",
        "two colours",
        "labels",
        "opaque",
        "no such label",
        "a photograph's label",
        "few pixels of no label",
        "few pixels of many colours",
        "nearly opaque",
    ],
)
def test_what_is_no_mask_is_refused_with_what_was_found(tmp_path, picture, by, said):
    picture.save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=said):
        open_mask(tmp_path / "mask.png", by)


@pytest.mark.parametrize("ground", [BLACK, WHITE])
def test_a_grey_photograph_that_is_cut_out_is_no_mask(ground):
    grain = Image.fromarray(np.random.default_rng(0).normal(200, 60, (64, 96)).clip(0, 255).astype(np.uint8))
    with pytest.raises(InputError, match="is a photograph"):
        open_mask(put(grain.filter(ImageFilter.BoxBlur(1)), ground))


def test_a_hole_in_a_drawing_of_two_colours_may_be_either(tmp_path):
    lines = Image.fromarray(np.where(np.arange(64) % 8 < 2, np.uint8(0), np.uint8(255))[:, None].repeat(96, 1))
    holed(lines, ImageChops.invert(INSIDE)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="is transparent in part, and black and white or of two"):
        open_mask(tmp_path / "mask.png")
    assert open_mask(tmp_path / "mask.png", "alpha").tobytes() == INSIDE.tobytes()


def test_a_border_of_few_greys_is_no_map_of_labels():
    disc = Image.new("L", (64, 64))
    ImageDraw.Draw(disc).ellipse((16, 16, 40, 48), fill=255)
    small = disc.resize((32, 32), Image.Resampling.BOX)
    assert open_mask(small).tobytes() == small.tobytes()


@pytest.mark.parametrize("kind", ["sketch", "canny", "pose"])
def test_a_photograph_is_no_hint(tmp_path, kind):
    photograph().save(tmp_path / "a.png")
    with pytest.raises(InputError, match=f"is a photograph, .*no {kind}; "):
        open_hint(tmp_path / "a.png", kind)


@pytest.mark.parametrize("kind", ["sketch", "pose"])
def test_a_photograph_in_memory_or_on_an_even_ground_is_no_hint(kind):
    for picture in (photograph(), put(photograph().convert("L").convert("RGB"), WHITE)):
        with pytest.raises(InputError, match=f"picture of 96x64: is a photograph, .*no {kind}; "):
            open_hint(picture, kind)


def test_a_pose_and_a_map_of_depth_are_no_sketch(tmp_path):
    pose = Image.new("RGB", (96, 64))
    for k, colour in enumerate(["red", "green", "blue", "yellow"]):
        ImageDraw.Draw(pose).line((20 * k, 8, 20 * k + 18, 40), fill=colour, width=2)
    pose.save(tmp_path / "pose.png")
    Image.linear_gradient("L").point(lambda level: max(level - 100, 30)).save(tmp_path / "depth.png")
    assert open_hint(tmp_path / "pose.png", "pose").tobytes() == pose.tobytes()
    for name in ("pose.png", "depth.png"):
        with pytest.raises(InputError, match=f"{name}: .*no sketch; canny=auto"):
            open_hint(tmp_path / name, "sketch")


def test_a_soft_mask_keeps_its_greys_but_is_no_photograph():
    with pytest.raises(InputError, match="is a photograph"):
        masked(photograph(), 96, 64, how=Region(soft=True))
    faded = holed(photograph(), SMOOTH.filter(ImageFilter.GaussianBlur(3)).point(lambda level: 255 - level))
    assert len(masked(faded, 96, 64, how=Region(soft=True)).mask.unique()) > 10, "of a hole too"


def test_the_region_comes_from_the_mask_as_it_is_asked():
    """A line of one pixel, two pixels beside it, and a cell and a half: of cells of four."""
    mask = grey(64, 64, (8, 8, 13, 11), level=153)
    got = {how: masked(mask, how=Region(how)).mask for how in ("max", "area", "nearest")}
    assert [int(A.sum()) for A in got.values()] == [2, 2, 1]
    assert masked(mask, how=Region("area", soft=True)).mask.unique().tolist() == pytest.approx([0, 0.3, 0.6])
    with pytest.raises(InputError, match="the mask is empty"):
        masked(mask, how=Region(threshold=0.7, by="light"))
    with pytest.raises(InputError, match=r"no latent cell; .* take region\.downsample=max"):
        masked(grey(64, 64, (9, 9, 9, 40)), how=Region("area"))
    faded = masked(grey(64, 64, (16, 0, 63, 63)), how=Region(feather=1)).mask[0, 3]
    assert faded[2:7].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


def test_a_mask_of_another_size_lies_over_the_picture():
    small, large = grey(24, 16, (6, 4, 11, 7)), grey(960, 640, (240, 160, 479, 319))
    a, b = masked(small, 96, 64), masked(large, 96, 64)
    assert torch.equal(a.mask, b.mask)
    assert a.mask.sum() == 6 * 4
    assert masked(grey(96, 64, (6, 4, 30, 30)), 730, 487).mask is not None, "drawn over the picture at working size"
    assert masked(grey(183, 122, (6, 4, 90, 90)), 730, 487).mask is not None, "a quarter of it, rounded"


def test_a_mask_of_another_aspect_is_refused_with_both_sizes(tmp_path):
    grey(64, 64, (8, 8, 20, 20)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"m\.png: the mask of 64x64 does not lie over the picture of 96x64"):
        masked(tmp_path / "m.png", 96, 64)


def test_a_mask_that_is_empty_or_full_is_refused():
    with pytest.raises(InputError, match="the mask is empty"):
        masked(grey(64, 64))
    with pytest.raises(InputError, match="covers the whole picture"):
        masked(grey(64, 64, (0, 0, 63, 63)))
    with pytest.raises(InputError, match="covers the whole picture"):
        masked(grey(64, 64, (8, 8, 55, 55)), dilate=2)
    with pytest.raises(InputError, match="covers the whole picture"):
        masked(Image.new("L", (1, 1), 255), 1, 1)


def test_a_mask_that_seems_inverted_is_warned_of_unless_the_true_result_is_known(caplog):
    background = Image.eval(grey(64, 64, (20, 20, 40, 40)), lambda level: 255 - level)
    picture = Image.new("RGB", (64, 64))
    prepare(case(picture, mask=background, truth=picture), **MODEL)
    assert "is the mask inverted?" not in caplog.text
    masked(background)
    assert "is the mask inverted?" in caplog.text


def test_a_mask_painted_on_transparency_is_its_paint():
    paint = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    ImageDraw.Draw(paint).rectangle((8, 8, 15, 15), fill=WHITE)
    assert masked(paint).mask.sum() == 4


def test_a_box_is_in_pixels_or_in_fractions():
    pixels = masked((16.5, 8, 40, 32), 128, 64)
    assert torch.equal(pixels.mask, masked((16.5 / 128, 8 / 64, 40 / 128, 0.5), 128, 64).mask)
    assert pixels.mask.sum() == 6 * 6
    assert pixels.mask_full.sum() == 24 * 24


@pytest.mark.parametrize("box", [(8, 8, 8, 20), (20, 8, 8, 20), (-1, 0, 9, 9), (0, 0, 65, 9), (0, 0, float("nan"), 9)])
def test_a_box_outside_the_picture_is_refused(box):
    with pytest.raises(InputError, match=r"box .*: is not left,top,right,bottom within the picture of 64x64"):
        masked(box)


# hints


def drawn(paper, ink, mode="L"):
    image = Image.new(mode, (64, 64), paper)
    ImageDraw.Draw(image).line((8, 8, 50, 40), fill=ink, width=2)
    return image


def test_black_lines_on_white_are_inverted_with_a_warning(caplog):
    expected = drawn(0, 255)
    assert open_hint(expected).tobytes() == expected.tobytes()
    assert not caplog.messages
    for kind in ("sketch", "canny"):
        assert open_hint(drawn(255, 0), kind).tobytes() == expected.tobytes()
    assert sum("it is inverted" in message for message in caplog.messages) == 2


def test_lines_on_transparency_are_white_on_black_whatever_their_ink():
    for ink in (0, 255):
        image = drawn((ink, ink, ink, 0), (ink, ink, ink, 255), "RGBA")
        assert open_hint(image).tobytes() == drawn(0, 255).tobytes()


@pytest.mark.parametrize("blank", [("L", 0), ("L", 255), ("RGBA", (0, 0, 0, 0)), ("RGB", (0, 0, 0))])
def test_a_blank_hint_is_warned_of(caplog, blank):
    assert open_hint(Image.new(blank[0], (8, 8), blank[1])).getextrema() == (0, 0)
    assert "is blank" in caplog.text


def test_a_pose_keeps_its_colours_and_its_ground(caplog):
    assert open_hint(drawn(WHITE, RED, "RGB"), "pose").getpixel((0, 0)) == WHITE
    assert open_hint(drawn((0, 0, 0, 0), (*RED, 255), "RGBA"), "pose").getpixel((0, 0)) == (0, 0, 0)
    assert not caplog.messages


def test_hints_come_at_working_size():
    hints = {"sketch": drawn(0, 255), "pose": drawn((0, 0, 0), RED, "RGB").resize((640, 640))}
    prepared = prepare(case(Image.new("RGB", (640, 640)), hints=hints), **MODEL)
    assert {kind: tuple(hint.shape) for kind, hint in prepared.hints.items()} == {
        "sketch": (1, 64, 64),
        "pose": (3, 64, 64),
    }
    assert all(hint.min() >= 0 and hint.max() <= 1 and hint.dtype == torch.float32 for hint in prepared.hints.values())
    assert prepared.hints["sketch"].max() == 1
    with pytest.raises(InputError, match="the sketch of 64x64 does not lie over the picture of 64x40"):
        prepare(case(Image.new("RGB", (64, 40)), hints=hints), **MODEL)


def test_lines_that_fade_when_they_are_shrunk_are_warned_of(caplog):
    for thick, faded in ((1, True), (20, False)):
        caplog.clear()
        hint = Image.new("L", (640, 640))
        ImageDraw.Draw(hint).line((320, 0, 320, 639), fill=255, width=thick)
        prepare(case(Image.new("RGB", (640, 640)), hints={"sketch": hint}), **MODEL)
        assert ("lines this thin fade at 64x64" in caplog.text) == faded


# real ones


@pytest.mark.realdata
def test_real_masks_and_sketches_of_every_mode(realdata, caplog):
    images = realdata / "images"
    cat = case(
        images / "t2ia_edit_cat__im.png",
        mask=images / "t2ia_edit_cat__mask.png",
        hints={"sketch": images / "t2ia_edit_cat__edge_2.png"},
    )
    prepared = prepare(cat, factor=8, multiple=64, native=512)
    assert prepared.pixels.shape == (3, 512, 512)
    assert prepared.mask_full.mean() == pytest.approx(0.1365, abs=0.002), "48 levels of grey, RGBA"
    assert prepared.mask.shape == (1, 64, 64)
    assert 0.1365 < prepared.mask.mean() < 0.17
    edge = open_hint(images / "t2ia_edit_cat__edge.png")
    both = np.stack([np.asarray(edge), np.asarray(open_hint(images / "t2ia_edit_cat__edge_2.png"))]) > 127
    assert 0.005 < both.mean() < 0.2, "few pixels of a sketch are white"
    assert np.corrcoef(both[0, 300:].ravel(), both[1, 300:].ravel())[0, 1] > 0.5, "redrawn at the head alone"
    dog = case(images / "ldm_bench_dog.png", mask=images / "ldm_bench_dog_mask.png")
    assert prepare(dog, factor=8, multiple=64, native=512).mask_full.mean() == pytest.approx(0.132, abs=0.003)
    assert not caplog.messages


@pytest.mark.realdata
def test_real_photographs_of_odd_sizes(realdata):
    for name, size, working in [
        ("t2ia_sketch__scenery.jpg", (730, 487), (768, 512)),
        ("t2ia_room.jpg", (512, 512), (512, 512)),
        ("masactrl_tshirt.png", (1024, 1024), (512, 512)),
        ("t2ia_canny__toy_canny.png", (512, 768), (512, 768)),
    ]:
        prepared = prepare(case(realdata / "images" / name), factor=8, multiple=64, native=512)
        assert prepared.original == size
        assert prepared.pixels.shape == (3, *working[::-1])
        small = open_picture(realdata / "images" / name).resize((16, 16), Image.Resampling.BOX)
        again = torch.nn.functional.adaptive_avg_pool2d(prepared.pixels, 16).permute(1, 2, 0) * 255
        assert np.abs(again.numpy() - np.asarray(small)).mean() < 2, "the same picture"


@pytest.mark.realdata
def test_real_conditions_of_every_kind(realdata):
    for name, kind in [
        ("canny__toy_canny", "canny"),
        ("keypose__person_keypose", "pose"),
        ("seg_sketch__edge", "sketch"),
    ]:
        hint = open_hint(realdata / "images" / f"t2ia_{name}.png", kind)
        assert hint.mode == ("RGB" if kind == "pose" else "L")
        assert 0 < np.asarray(hint).mean() < 64
