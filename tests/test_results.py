"""Results that can be relied on: damage is found, and nothing made of other inputs is replaced without a word."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from masafusion_lab import InputError, phases
from masafusion_lab.data.case import Made
from masafusion_lab.data.digests import digest
from masafusion_lab.hub import fingerprint, fingerprints
from masafusion_lab.results import fail_case
from masafusion_lab.runs import case_folder, read_json, write_json
from tests.edits import STEPS, Calls, case, drawn
from tests.edits import lab as make_lab


@pytest.fixture
def lab(tiny_root, tmp_path):
    return make_lab(tiny_root, tmp_path / "store")


def flip(path, at=-20):
    """Flip a bit of a file, which keeps its size and time."""
    data, then = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(then, then))


@pytest.mark.parametrize("name", ["target.png", "report.html"])
def test_a_flipped_byte_of_a_finished_case_is_found_and_the_case_made_again(lab, tmp_path, caplog, name):
    cases = [case("a"), case("b", shift=3)]
    folders = phases.edit(lab, cases, tmp_path / "run")
    whole = (folders[0] / "target.png").read_bytes()
    flip(folders[0] / name)
    calls = Calls(lab.model)
    phases.edit(lab, cases, tmp_path / "run")
    assert calls.count == STEPS, "the other case is whole"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == f"{folders[0] / name}: is damaged: not what was written; the case is made again"
    assert (folders[0] / "target.png").read_bytes() == whole


def test_results_without_digests_are_taken_as_they_are_which_is_said_once(lab, tmp_path, caplog):
    cases = [case("a"), case("b", shift=3)]
    for folder in phases.edit(lab, cases, tmp_path / "run"):
        old = read_json(folder / "result.json")
        write_json(folder / "result.json", {key: old[key] for key in old if key not in ("sha256", "inputs", "weights")})
    calls = Calls(lab.model)
    phases.edit(lab, cases, tmp_path / "run")
    assert calls.count == 0
    assert caplog.text.count("of an earlier version, without digests: whether they are damaged is not known") == 1
    (case_folder(tmp_path / "run", "a") / "target.png").unlink()
    phases.edit(lab, cases, tmp_path / "run")
    assert calls.count == STEPS


@pytest.fixture
def files(tmp_path):
    """A case whose pictures are files."""
    for name, picture in (("image", drawn()), ("mask", drawn("L", fill=255)), ("sketch", drawn("L", 4, outline=255))):
        picture.save(tmp_path / f"{name}.png")
    return case(image=tmp_path / "image.png", mask=tmp_path / "mask.png", hints={"sketch": tmp_path / "sketch.png"})


@pytest.mark.parametrize("name", ["image", "mask", "sketch"])
def test_a_picture_that_changed_since_is_refused_before_anything_is_computed(lab, tmp_path, files, name):
    phases.edit(lab, [files], tmp_path / "run")
    before = (tmp_path / "run/target.png").read_bytes()
    mode, style = ("RGB", {}) if name == "image" else ("L", {"fill": 255} if name == "mask" else {"outline": 255})
    drawn(mode, 9, **style).save(tmp_path / f"{name}.png")
    calls = Calls(lab.model)
    with pytest.raises(InputError, match=rf"^cat: {name}: changed since .*run was made; .* out=FOLDER, or force=true"):
        phases.edit(lab, [files], tmp_path / "run")
    assert calls.count == 0
    assert (tmp_path / "run/target.png").read_bytes() == before
    phases.edit(lab, [files], tmp_path / "run", force=True)
    assert (tmp_path / "run/target.png").read_bytes() != before
    calls = Calls(lab.model)
    phases.edit(lab, [files], tmp_path / "run")
    assert calls.count == 0


def test_other_prompts_of_a_case_are_refused_and_other_settings_made(lab, tiny_root, tmp_path):
    phases.edit(lab, [case()], tmp_path / "run")
    with pytest.raises(InputError, match=r"^cat: target: changed since"):
        phases.edit(lab, [case(target="a red horse on grass")], tmp_path / "run")
    with pytest.raises(InputError, match=r"^cat: method\.guidance: changed since"):
        phases.edit(lab, [case(settings={"method.guidance": "3"})], tmp_path / "run")
    seeded = make_lab(tiny_root, tmp_path / "store", "seed=1")
    phases.edit(seeded, [case(target="a red horse on grass")], tmp_path / "run")
    assert read_json(tmp_path / "run/result.json")["prompts"]["target"] == "a red horse on grass"


def test_what_a_killed_run_left_goes_on_though_a_picture_of_no_result_changed(lab, tmp_path, files):
    phases.edit(lab, [files], tmp_path / "run")
    (tmp_path / "run/result.json").unlink()  # as between begin_case and finish_case
    drawn(shift=9).save(tmp_path / "image.png")
    phases.edit(lab, [files], tmp_path / "run")
    assert read_json(tmp_path / "run/result.json")["inputs"]["image"] == digest(tmp_path / "image.png")


@pytest.mark.parametrize("words", [(), ("model.dtype=bfloat16",)], ids=["float32", "bfloat16"])
def test_a_flipped_byte_of_the_weights_is_found_though_it_is_rounded_away(tiny_root, tmp_path, words):
    root = shutil.copytree(tiny_root, tmp_path / "model")
    phases.edit(make_lab(root, tmp_path / "store", *words), [case()], tmp_path / "run")
    flip(root / "unet/diffusion_pytorch_model.safetensors", -4)
    lab = make_lab(root, tmp_path / "store", *words)
    with pytest.raises(InputError, match=r"cat: .*unet/.*\.safetensors: changed since .*force=true"):
        phases.edit(lab, [case()], tmp_path / "run")


def test_a_download_that_is_not_what_it_is_called_is_refused(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "plain").write_bytes(b"weights")
    blob = tmp_path / "blobs" / fingerprint([tmp_path / "plain"])
    blob.write_bytes(b"weights")
    (tmp_path / "unet.safetensors").symlink_to(blob)
    files = {"unet": tmp_path / "unet.safetensors"}
    assert fingerprints(files) == {"unet": blob.name}
    blob.write_bytes(b"weighty")
    with pytest.raises(InputError, match=r"unet\.safetensors: is damaged, not what was downloaded; remove .*blobs"):
        fingerprints(files)


def test_pictures_are_known_by_their_bytes_or_pixels(tmp_path):
    drawn().save(tmp_path / "a.png")
    drawn().save(tmp_path / "b.png")
    drawn(shift=1).save(tmp_path / "c.png")
    same, other = {digest(tmp_path / f"{name}.png") for name in "ab"}, digest(tmp_path / "c.png")
    assert len(same) == 1
    assert other not in same
    assert digest(drawn()) == digest(Made("x", drawn)) != digest(drawn(shift=1))
    assert digest((0, 0, 4, 8)) == "box 0,0,4,8"
    assert digest(tmp_path / "none.png") == ""


def test_a_case_of_several_that_a_setting_does_not_fit_is_on_record_and_stops_no_other(lab, tmp_path):
    cases, told = [case("a"), case("b", shift=3, hints={"canny": drawn("L", outline=255)}), case("c", shift=5)], []
    folders = phases.edit(lab, cases, tmp_path / "run", lost=lambda case, error: told.append((case.id, str(error))))
    assert [read_json(folder / "result.json")["case"] for folder in folders] == ["a", "c"]
    (failed,) = (tmp_path / "run").rglob("error.json")
    assert failed.parent == case_folder(tmp_path / "run", "b")
    assert told == [("b", json.loads(failed.read_text())["error"])]
    assert "canny" in told[0][1]
    phases.edit(lab, [*cases[::2], case("b", shift=3)], tmp_path / "run", lost=told.append)
    assert not failed.exists()


def test_where_no_case_can_be_edited_that_is_said_at_once(lab, tmp_path):
    cases = [case(name, hints={"canny": drawn("L", outline=255)}) for name in "ab"]
    with pytest.raises(InputError, match=r"none of the 2 cases can be edited:\n  .*canny.*\n  .*canny"):
        phases.edit(lab, cases, tmp_path / "run", lost=lambda *_: None)
    with pytest.raises(InputError, match="canny"):
        phases.edit(lab, cases[:1], tmp_path / "run", lost=lambda *_: None)
    assert not (tmp_path / "run").exists()


def test_the_reason_of_a_failure_names_no_place_and_keeps_its_letters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root, why in (("a", "a/hints/cat.png: a banana/x is damaged"), (f"{tmp_path}/a", f"({tmp_path}/a/cat.png)")):
        fail_case(Path(root, "case"), why, Path(root))
        said = read_json(Path(root, "case", "error.json"))["error"]
        assert said == {"a": "hints/cat.png: a banana/x is damaged"}.get(root, "(cat.png)")
