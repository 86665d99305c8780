"""Annotation without a page: what the model sees of a region, sketches and regions by themselves, and whole sets."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from masafusion_lab import InputError, annotate
from masafusion_lab.data import annotated
from masafusion_lab.data.case import Case
from masafusion_lab.data.folder import read_cases
from masafusion_lab.picturebook.judge import keep
from masafusion_lab.picturebook.sketcher import Sketcher
from tests.edits import drawn
from tests.tiny import tiny_tokenizer

MODEL = {"factor": 4, "multiple": 16, "native": 32, "size": "", "dilate": 0}


def region(size, *boxes):
    picture = Image.new("L", size)
    for box in boxes:
        ImageDraw.Draw(picture).rectangle(box, fill=255)
    return picture


@pytest.mark.parametrize(
    ("size", "canvas"),
    [((128, 128), (640, 640)), ((300, 200), (600, 400)), ((900, 600), (900, 600)), ((4000, 3000), (1024, 768)),
     ((10000, 1), (1024, 1))],
)  # fmt: skip
def test_a_picture_is_drawn_upon_at_a_size_that_suits_a_hand(size, canvas):
    assert annotate.canvas_size(*size) == canvas


def test_a_drawing_comes_back_as_it_was_sent():
    drawing = region((640, 640), (10, 20, 30, 40))
    back = annotate.from_url(annotate.to_url(drawing), (640, 640))
    assert np.array_equal(back, drawing)
    assert annotate.from_url(annotate.to_url(Image.new("L", (640, 640))), (640, 640)) is None


def test_a_sketch_that_nobody_redraws_stays_what_it_was():
    picture = drawn(size=(64, 48))
    sketch = drawn("L", size=(64, 48), outline=255)
    assert np.array_equal(annotate.reduced(annotate.over(sketch, picture), picture), sketch)


@pytest.mark.parametrize("sent", ["data:text/html;base64,PGI+", "data:image/png;base64,!", 7, "https://example.org/x.png",
                                  annotate.to_url(Image.new("L", (9, 9), 255))])  # fmt: skip
def test_what_is_no_drawing_of_that_size_is_refused(sent):
    with pytest.raises(InputError, match="not a PNG of 640x480"):
        annotate.from_url(sent, (640, 480))


def test_the_region_is_shown_in_latent_cells_and_what_a_thin_stroke_would_lose_is_told():
    picture = Image.new("RGB", (32, 32), "black")
    shown, said = annotate.seen(picture, region((32, 32), (0, 0, 7, 7), (16, 0, 16, 31)), **MODEL)
    cells = np.asarray(shown.resize((8, 8), Image.Resampling.NEAREST), int)
    edited, grazed = (np.array(annotate.TINTS[name]) * 0.55 for name in ("edited", "grazed"))
    assert "12 of 64 latent cells" in said
    assert "8 of them are painted by less than half" in said
    assert np.abs(cells[:2, :2] - edited).max() <= 1
    assert np.abs(cells[:, 4] - grazed).max() <= 1
    assert (cells[3, :4] == 0).all()


def test_an_unusable_region_says_why():
    with pytest.raises(InputError, match="covers the whole picture"):
        annotate.seen(drawn(), Image.new("L", (48, 32), 255), **MODEL)


def test_only_the_tokens_that_change_are_marked_and_every_character_is_there(tmp_path):
    source, target = "a cat <b>sitting on  grass", "a red cat <b>standing on  grass!"
    before, after = annotate.pieces(tiny_tokenizer(tmp_path), source, target)
    assert "".join(text for text, _ in before) == source
    assert "".join(text for text, _ in after) == target
    assert [text.strip() for text, changed in before if changed] == ["sitting"]
    assert [text.strip() for text, changed in after if changed] == ["red", "standing", "!"]
    assert annotate.pieces(tiny_tokenizer(tmp_path), "", "a") == ([], [("a", True)])


def test_a_sketch_is_drawn_in_every_way_whose_weights_are_there(tmp_path, monkeypatch):
    picture = drawn(size=(128, 96))
    monkeypatch.setattr(annotate, "SKETCHER", tmp_path / "sketcher")
    assert list(annotate.ways("")) == ["canny"]
    given = annotate.ways("table5_pidinet.pth")
    assert list(given) == ["pidinet", "canny"]
    with pytest.raises(InputError, match=r"table5_pidinet\.pth"):
        given["pidinet"](picture)  # which is not there
    torch.manual_seed(0)
    keep(Sketcher(width=8), tmp_path / "sketcher")
    assert list(annotate.ways("")) == ["outlines", "canny"]
    for draw in annotate.ways("").values():
        sketch = draw(picture)
        assert (sketch.mode, sketch.size) == ("L", picture.size)
        assert len(np.unique(sketch)) > 1


def test_a_box_and_a_mask_open_alike():
    picture = drawn(size=(64, 64))
    for box in ((16, 16, 48, 48), (0.25, 0.25, 0.75, 0.75)):
        _, drawings = annotate.opened(Case("x", picture, "", "", mask=box))
        assert drawings["mask"].getbbox()[:2] == (160, 160)
    _, drawings = annotate.opened(Case("x", picture, "", "", mask=region((64, 64), (16, 16, 47, 47))))
    assert drawings["mask"].getbbox() == (160, 160, 480, 480)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg", "c.png"):
        drawn().save(tmp_path / name)
    return tmp_path


def test_a_set_is_annotated_picture_by_picture_and_taken_up_again(folder):
    assert [*annotated.annotated(folder)] == ["a", "b", "c"]
    drawings = {"mask": region((48, 32), (4, 4, 20, 20)), "sketch": drawn("L", outline=255)}
    annotated.annotate(folder, "b", {"source": 'a "cat", on\n<b>grass', "target": "a dog"}, drawings)
    cases = annotated.annotated(folder)
    assert [id for id, case in cases.items() if annotated.is_whole(case)] == ["b"]
    (case,) = read_cases(folder / annotated.MANIFEST)
    assert (case.id, case.source, case.target) == ("b", 'a "cat", on\n<b>grass', "a dog")
    assert np.array_equal(Image.open(case.mask), drawings["mask"])
    assert list(case.hints) == ["sketch"]
    annotated.annotate(folder, "b", {"target": "a hat"}, {"sketch": None})
    (case,) = read_cases(folder / annotated.MANIFEST)
    assert (case.source[:2], case.target, dict(case.hints)) == ("a ", "a hat", {})
    assert case.mask


def test_a_manifest_made_elsewhere_keeps_what_the_annotation_does_not_touch(folder):
    drawn("L", outline=255).save(folder / "truth.bmp")
    rows = [{"id": "one", "image": "a.jpg", "box": [1, 2, 20, 20], "truth": "truth.bmp", "instruction": "go"},
            {"id": "two", "image": "a.jpg", "target": "x"}]  # fmt: skip
    (folder / annotated.MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [*annotated.annotated(folder)] == ["one", "two", "b", "c", "truth"]
    annotated.annotate(folder, "one", {"source": "a cat"}, {})
    lines = (folder / annotated.MANIFEST).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{**rows[0], "source": "a cat"}, rows[1]]
    annotated.annotate(folder, "one", {}, {"mask": region((48, 32), (4, 4, 20, 20))})
    one, _ = read_cases(folder / annotated.MANIFEST)
    assert one.mask.name.startswith("one-")
    (folder / annotated.MANIFEST).write_text('{"id": "b", "image": "a.jpg", "source": "s"}\n')
    assert [*annotated.annotated(folder)] == ["b", "b.png", "c", "truth"]
    annotated.annotate(folder, "b.png", {"source": "t"}, {})
    assert [case.source for case in read_cases(folder / annotated.MANIFEST)] == ["s", "t"]


def test_saying_nothing_leaves_no_row_and_no_manifest_that_cannot_be_read(folder):
    annotated.annotate(folder, "a", {"source": "", "target": ""}, {"mask": None})
    assert not (folder / annotated.MANIFEST).exists()
    with pytest.raises(InputError, match="no picture of"):
        annotated.annotate(folder, "../a", {"source": "x"}, {})


def _annotate_for_ever(folder, started):
    for k in range(10_000):
        annotated.annotate(folder, "b", {"source": f"a cat {k}"}, {"mask": region((48, 32), (4, 4, 20, 20))})
        started.set()


def test_killed_while_it_is_written_a_manifest_is_whole_and_keeps_the_other_pictures(folder):
    annotated.annotate(folder, "a", {"source": "first"}, {})
    context = multiprocessing.get_context("fork")
    for pause in (0.0, 0.013, 0.031):
        started = context.Event()
        process = context.Process(target=_annotate_for_ever, args=(folder, started))
        process.start()
        assert started.wait(20)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        cases = {case.id: case for case in read_cases(folder / annotated.MANIFEST)}
        assert cases["a"].source == "first"
        assert cases["b"].source.startswith("a cat")
        assert Image.open(cases["b"].mask).getbbox()
