"""The picture-book world: the same everywhere, true to its word, in correct English."""

from __future__ import annotations

import hashlib
import itertools
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import cv2
import numpy as np
import pytest
from PIL import Image

from experiments import example
from masafusion_lab import InputError
from masafusion_lab.picturebook import KINDS, POSES, Scene, Thing, labels, picture, scene, sheet
from masafusion_lab.picturebook.captions import WORDINGS, caption, check, words
from masafusion_lab.picturebook.changes import change
from masafusion_lab.picturebook.draw import coverage, draw
from masafusion_lab.picturebook.edits import EDITS, edit, session
from masafusion_lab.picturebook.scene import HELD_BACK, SPLITS, dice
from masafusion_lab.picturebook.sketch import canny, posemap, sketch
from masafusion_lab.request import EXAMPLE

DIGEST = """
import hashlib
from masafusion_lab.picturebook import picture
from masafusion_lab.picturebook.edits import edit, session
h = hashlib.sha256()
for i in range(6):
    s, text, pixels = picture("test", i)
    e = edit("train", i)
    for part in (repr(s).encode(), text.encode(), pixels.tobytes(), repr(e).encode(), e.target_picture.tobytes(),
                 e.sketch.tobytes(), e.pose.tobytes(), e.loose.tobytes(), repr(session("validation", i)).encode()):
        h.update(part)
print(h.hexdigest())
"""


def fresh() -> str:
    return subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout


def alone(kind: str, pose: str = "", **changes) -> Scene:
    t = Thing(kind, "red", pose=pose, size=0.5, y=0.68 if pose == "flying" or kind == "balloon" else 0.86)
    return Scene("meadow", (replace(t, **changes),), seed=3)


def test_the_same_bytes_on_two_calls_and_in_fresh_processes():
    assert fresh() == fresh()
    assert np.array_equal(picture("train", 5)[2], picture("train", 5)[2])


def test_the_pictures_that_the_model_was_trained_on_are_still_drawn():
    pictures = b"".join(picture("train", i)[2].tobytes() for i in range(200))
    assert hashlib.sha256(pictures).hexdigest().startswith("91fa393037cf")


def test_splits_share_no_scene_and_order_does_not_matter():
    seeds = [scene(split, i).seed for split in SPLITS for i in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert scene("test", 7) == [scene("test", i) for i in (9, 8, 7)][2]


def test_training_never_shows_what_is_held_back_and_the_test_split_can():
    assert 0.08 < len(HELD_BACK) / (12 * 8 * 6) < 0.12
    for split in ("train", "validation"):
        assert not any(scene(split, i).unseen for i in range(300))
        assert not any(edit(split, i).target.unseen or edit(split, i).source.unseen for i in range(120))
        assert not any(e.target.unseen for i in range(15) for e in session(split, i))
    assert all(scene("test", i, things=1, unseen=True).unseen for i in range(40))
    assert not any(scene("test", i, unseen=False).unseen for i in range(100))
    assert any(scene("test", i).unseen for i in range(100))


def test_every_pair_of_kind_colour_and_background_is_seen_in_training():
    for pair in ((0, 1), (0, 2), (1, 2)):
        full = {0: 12, 1: 8, 2: 6}
        other = full[({0, 1, 2} - set(pair)).pop()]
        held: dict[tuple[str, ...], int] = {}
        for combination in HELD_BACK:
            key = tuple(combination[k] for k in pair)
            held[key] = held.get(key, 0) + 1
        assert max(held.values()) < other / 2


def test_captions_are_correct_short_and_in_the_vocabulary():
    for i in range(150):
        s = scene("train", i)
        for wording in range(WORDINGS):
            text = caption(s, wording)
            assert len(check(text)) <= 24
            assert not re.search(r"\ba [aeiou]", text)
            assert not re.search(r"\ban [^aeiou]", text)
            for t in s.things:
                assert {t.kind, t.colour} <= set(words(text))
    assert caption(alone("cat", "lying", colour="orange")) == "an orange cat lying on a meadow"


def test_instructions_are_in_the_vocabulary_and_correct():
    for i in range(80):
        text = edit("test", i).instruction
        check(text)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
    horse = alone("horse", "running")
    assert change(horse, "pose", dice("test", 0, "x")).instruction == "make the horse stand"


@pytest.mark.parametrize("size", [16, 64, 100, 128, 256])
def test_any_size_works(size):
    s = scene("test", 3)
    assert draw(s, size).shape == (size, size, 3)
    assert draw(s, size).dtype == np.uint8
    assert sketch(s, size).shape == (size, size)
    e = edit("test", 5, size=size)
    assert e.loose.shape == e.exact.shape == e.canny.shape == (size, size)
    assert e.pose.shape == (size, size, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_large_bold_and_inside(kind):
    for pose in POSES.get(kind, ("",)):
        s = alone(kind, pose)
        cover = coverage(s, 0)
        assert 0.08 < cover.mean() < 0.6
        assert cover[0].max() == cover[:, 0].max() == cover[:, -1].max() == 0
        assert sketch(s, background=False).max() == 255
        assert (posemap(s).max() > 0) == (kind in POSES)


@pytest.mark.parametrize("kind", POSES)
def test_two_poses_have_clearly_different_outlines(kind):
    one, two = (coverage(alone(kind, pose), 0) > 0.5 for pose in POSES[kind])
    assert (one & two).sum() / (one | two).sum() < 0.7


def test_labels_are_indices_of_what_the_scene_says():
    label = labels(alone("cat", "lying"))
    assert (label.background, label.things) == (0, ((1, 0, 0, 4),))


@pytest.mark.parametrize("kind", EDITS)
def test_outside_the_region_an_edit_keeps_every_pixel(kind):
    for i in range(12):
        e = edit("test", i, kind)
        same = np.all(e.source_picture == e.target_picture, axis=2)
        assert same[~e.exact].all()
        assert e.exact.any()
        assert e.loose[e.exact].all()
        assert e.boxed[e.loose].all()
        if kind == "background":
            assert e.source.things == e.target.things
            assert (coverage(e.source, 0) == 1)[e.exact].mean() < 0.05
            continue
        near = np.zeros_like(e.exact)
        for s, t in ((e.source, e.before), (e.target, e.after)):
            if t is not None:
                near |= coverage(s, s.things.index(t), shadow=True) > 0
        around = cv2.dilate(near.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        assert around[e.exact].all()  # only the changed thing and its shadow


def attributes(t: Thing) -> dict[str, str]:
    return {name: getattr(t, name) for name in ("kind", "colour", "pattern", "pose")}


@pytest.mark.parametrize("kind", EDITS)
def test_prompts_differ_only_in_what_the_edit_changes(kind):
    for i in range(20):
        e = edit("test", i, kind)
        before, after = words(e.source_prompt), words(e.target_prompt)
        lost, won = set(before) - set(after), set(after) - set(before)
        assert before != after
        if kind in ("recolour", "pattern", "replace", "pose"):
            changed = {name for name, value in attributes(e.before).items() if attributes(e.after)[name] != value}
            allowed = {"a", "an", "over", "on", "in", "the"} | {
                w for t in (e.before, e.after) for n, w in attributes(t).items() if n in changed or n == "pose"
            }
            assert lost | won <= allowed
            assert e.attribute in changed
        elif kind == "add":
            assert not lost - {"a", "an"}
        elif kind == "remove":
            assert not won - {"a", "an"}
        elif kind == "move":
            assert {*lost, *won} == {"left", "right"}
        else:
            assert e.target.background != e.source.background


def test_a_pose_edit_changes_the_sketch_inside_the_region_only():
    for i in range(12):
        e = edit("test", i, "pose")
        differ = e.sketch != e.source_sketch
        assert differ[e.loose].any()
        assert not differ[~e.loose].any()
        assert np.array_equal(e.canny, canny(e.target_picture))


def test_a_recolour_edit_leaves_the_sketch_alone():
    e = edit("test", 1, "recolour")
    assert np.array_equal(e.sketch, e.source_sketch)


def test_the_target_of_one_turn_is_the_source_of_the_next():
    for i in range(10):
        turns = session("test", i)
        assert [e.turn for e in turns] == [1, 2, 3]
        for one, two in itertools.pairwise(turns):
            assert one.target == two.source
            assert one.target_prompt == two.source_prompt
    assert len(session("test", 0, 2)) == 2


def test_cases_carry_the_ground_truth():
    pytest.importorskip("masafusion_lab.data.case")
    from masafusion_lab.data.picturebook import cases, sessions

    first, second = cases("test", [3, 4], size=64)
    assert first.image.size == first.truth.size == first.mask.size == (64, 64)
    assert first.hints["sketch"].mode == "L"
    assert first.source != first.target
    assert second.id == "test-00004-pattern"
    turns = list(sessions("test", 1, turns=2, size=64))
    assert turns[0].truth.tobytes() == turns[1].image.tobytes()
    assert [c.turn for c in turns] == [1, 2]
    assert turns[0].session == turns[1].session


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: check("a red hrse on a meadow"), "'hrse' .* horse"),
        (lambda: scene("training", 0), "'training' is not one of 'train'"),
        (lambda: scene("train", -1), "-1 is negative"),
        (lambda: scene("train", 0, unseen=True), "only the test split"),
        (lambda: scene("train", 0, things=4), "4 is not 1, 2 or 3"),
        (lambda: Thing("cow", "red"), "kind: 'cow' is not one of 'horse'"),
        (lambda: Thing("house", "red", pose="running"), "pose of a house: 'running'"),
        (lambda: Scene("moon", ()), "background: 'moon'"),
        (lambda: draw(Scene("meadow", ())), "0 in a scene"),
        (lambda: draw(alone("house", x=0.05)), "house: its box .* leaves the picture"),
        (lambda: draw(replace(alone("ball"), things=(*alone("ball").things, *alone("cup").things))), "hides the ball"),
        (lambda: draw(alone("ball"), 4), "4 pixels; at least 8"),
        (lambda: edit("test", 0, "paint"), "'paint' is not one of add"),
        (lambda: session("test", 0, 4), "turns: 4"),
    ],
)
def test_bad_input_is_one_clear_line(act, says):
    with pytest.raises(InputError, match=says) as told:
        act()
    assert "\n" not in str(told.value)


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        sheet.main(["--size", "16", "--out", str(tmp_path / "sheet.pgn")])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: unknown file extension: .pgn")


def test_the_built_in_example_is_drawn_as_it_ships(tmp_path):
    example.main([str(tmp_path)])
    for name in ("horse.png", "mask.png", "sketch.png"):
        made, ships = (np.asarray(Image.open(folder / name)) for folder in (tmp_path, EXAMPLE.parent))
        assert np.array_equal(made, ships)
    assert (tmp_path / EXAMPLE.name).read_text() == EXAMPLE.read_text()


def test_descriptions_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        alone("cup").background = "snow"
