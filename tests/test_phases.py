"""The phases: what is inverted once is never inverted again, and what was cut short goes on to the same bytes."""

import json
import logging
import os
import signal
import threading

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image

from masafusion_lab import InputError, interrupt, phases
from masafusion_lab.results import Changed
from masafusion_lab.runs import case_folder
from tests.edits import SIZE, STEPS, Calls, case, drawn
from tests.edits import lab as make_lab
from tests.test_editor import Full
from tests.test_null_text import Curve

NTI = ("inversion.name=null_text", "inversion.inner_steps=3", "inversion.lr=0.002")
PICTURES = ("source", "mask", "sketch", "reconstruction", "intermediate", "target", "strip")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def lab(tiny_root, store):
    return make_lab(tiny_root, store)


def targets(folders):
    return [(folder / "target.png").read_bytes() for folder in folders]


class At(L.Callback):
    """Sends this process a signal after so many gradient steps."""

    def __init__(self, step, signum):
        self.step, self.signum = step, signum

    def on_train_batch_end(self, *args):
        self.step -= 1
        if self.step == 0:
            os.kill(os.getpid(), self.signum)


def test_what_is_in_the_store_is_not_inverted_again(lab, caplog):
    ((_, record, found),) = phases.invert(lab, [case()])
    calls = Calls(lab.model)
    with caplog.at_level(logging.INFO):
        ((_, again, found_again),) = phases.invert(lab, [case()])
    assert (found, found_again, calls.count) == (False, True, 0)
    assert torch.equal(record.states, again.states)
    assert "cat: its inversion was found in the store, not inverted again" in caplog.text


def test_cases_of_one_picture_and_prompt_share_their_inversion(lab):
    calls = Calls(lab.model)
    lab.batch = 2
    cases = [case("a"), case("b", target="a blue hat"), case("c", shift=3)]
    records = {c.id: r for c, r, _ in phases.invert(lab, cases)}
    assert calls.count == STEPS
    assert records["a"] is records["b"]
    assert not torch.equal(records["a"].states, records["c"].states)


def test_a_batch_of_records_equals_those_made_alone(tiny_root, tmp_path):
    cases = [case("a"), case("tall", size=(32, 48)), case("b", shift=5)]
    words = ("size=32",)
    alone = {c.id: r for c, r, _ in phases.invert(make_lab(tiny_root, tmp_path / "one", *words), cases)}
    both = {c.id: r for c, r, _ in phases.invert(make_lab(tiny_root, tmp_path / "two", "batch=3", *words), cases)}
    assert both["tall"].states.shape[-2:] == (12, 8)
    for id, record in alone.items():
        torch.testing.assert_close(record.states, both[id].states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "changed", "again"),
    [
        ((), {"target": "a blue hat"}, False),
        (("seed=4", "method.guidance=3"), {}, False),
        ((), {"source": "a dog on grass"}, True),
        ((), {"image": drawn(shift=1)}, True),
        (("inversion.prompt=empty",), {}, True),
        (("steps=2",), {}, True),
    ],
    ids=["target", "edit settings", "prompt", "picture", "inversion settings", "schedule"],
)
def test_a_record_is_addressed_by_what_it_depends_on(lab, tiny_root, store, words, changed, again):
    list(phases.invert(lab, [case()]))
    ((_, _, found),) = phases.invert(make_lab(tiny_root, store, *words), [case(**changed)])
    assert found != again


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_null_text_inversion_goes_on_after_a_signal_to_the_same_bits(tiny_root, tmp_path, signum):
    ((_, want, _),) = phases.invert(make_lab(tiny_root, tmp_path / "whole", *NTI), [case()])
    lab = make_lab(tiny_root, tmp_path / "cut", *NTI)
    before = signal.getsignal(signum)
    with pytest.raises(interrupt.Interrupted) as stop, interrupt.handled():
        list(phases.invert(lab, [case()], callbacks=[At(5, signum)]))
    assert stop.value.code == 128 + signum
    assert signal.getsignal(signum) == before
    calls = Calls(lab.model)
    ((_, record, found),) = phases.invert(lab, [case()])
    assert torch.equal(record.states, want.states)
    assert torch.equal(record.null, want.null)
    assert not found
    whole = STEPS + STEPS * (1 + 3 + 1)  # inversion; under the prompt, three gradient steps, the state after them
    assert 0 < calls.count < whole - STEPS
    assert not list((tmp_path / "cut" / "progress").iterdir())


def test_the_seconds_of_an_inversion_that_was_cut_short_are_all_counted(tiny_root, store, monkeypatch):
    lab = make_lab(tiny_root, store, *NTI)
    seconds = [100.0]
    monkeypatch.setattr("masafusion_lab.algorithm2.time.monotonic", lambda: seconds[0])

    class Slow(At):
        def on_train_batch_end(self, *args):
            seconds[0] += 1000
            super().on_train_batch_end(*args)

    with pytest.raises(interrupt.Interrupted), interrupt.handled():
        list(phases.invert(lab, [case()], callbacks=[Slow(5, signal.SIGTERM)]))
    ((_, _, found),) = phases.invert(lab, [case()])
    ((entry),) = lab.store.entries()
    assert not found
    assert 3000 <= lab.store.seconds(entry.key) < 4000, "of three steps that were kept, and of the second process"


def test_every_case_has_a_place_of_its_own_in_what_is_logged_however_the_run_was_cut(tiny_root, store, tmp_path):
    lab = make_lab(tiny_root, store, "inversion.name=null_text", "inversion.inner_steps=1")
    cases, logs = [case("a"), case("b", shift=3)], [Curve() for _ in range(3)]
    list(phases.invert(lab, cases[:1], loggers=logs[:1]))
    phases.edit(lab, cases, tmp_path / "run", loggers=logs[1:2])
    steps = [[step for step, facts in log.rows if "nti/step" in facts] for log in logs[:2]]
    assert steps == [list(range(STEPS)), list(range(STEPS, 2 * STEPS))]
    (case_folder(tmp_path / "run", "b") / "result.json").unlink()
    phases.edit(lab, cases, tmp_path / "run", loggers=logs[2:])
    assert [[step for step, facts in log.rows if "edit/rows" in facts] for log in logs[1:]] == [[0, 1], [1]]


def test_out_of_memory_while_inverting_goes_one_by_one(tiny_root, tmp_path, caplog):
    lab = make_lab(tiny_root, tmp_path / "store", "batch=2")
    full = Full(1)
    handle = lab.model.unet.register_forward_hook(full)
    assert [hit for _, _, hit in phases.invert(lab, [case("a"), case("b", shift=3)])] == [False, False]
    handle.remove()
    assert full.rows == [2] + 2 * STEPS * [1]
    assert "out of memory inverting 2 pictures at once: one by one" in caplog.text
    lab.model.unet.register_forward_hook(Full(9))
    with pytest.raises(InputError, match=r"out of memory while inverting one picture: take a smaller size="):
        list(phases.invert(lab, [case(shift=5)]))


def test_an_edit_leaves_pictures_page_and_facts_in_its_folder(lab, tmp_path):
    (folder,) = phases.edit(lab, [case(instruction="make it a dog")], tmp_path / "run")
    assert folder == tmp_path / "run"
    for name in PICTURES[:-1]:
        assert Image.open(folder / f"{name}.png").size == SIZE
    result = json.loads((folder / "result.json").read_text())
    assert set(result["files"]) == {"report.html", *(f"{name}.png" for name in PICTURES)}
    assert result["prompts"]["instruction"] == "make it a dog"
    assert result["rows"] == 10 * STEPS
    assert set(result["seconds"]) == {"invert", "prepare", "denoise", "decode"}
    assert result["reconstruction_psnr"] == result["roundtrip_psnr"]
    assert result["changed"]["steps"] == STEPS
    assert not result["from_store"]


def test_the_target_comes_at_the_pictures_own_size_too_if_that_was_another(lab, tmp_path):
    parts = {"image": drawn(size=(96, 64)), "mask": (0.1, 0.1, 0.5, 0.9)}
    (folder,) = phases.edit(lab, [case(**parts)], tmp_path / "run")
    assert Image.open(folder / "target_original_size.png").size == (96, 64)
    assert Image.open(folder / "target.png").size == SIZE


def test_what_is_done_is_not_done_again_and_what_changed_is(lab, tiny_root, store, tmp_path, caplog):
    phases.edit(lab, [case()], tmp_path / "run")
    calls = Calls(lab.model)
    with caplog.at_level(logging.INFO):
        phases.edit(lab, [case()], tmp_path / "run")
    assert calls.count == 0
    assert "1 of 1 cases are done already" in caplog.text
    other = make_lab(tiny_root, store, "seed=1")
    calls = Calls(other.model)
    phases.edit(other, [case()], tmp_path / "run")
    assert calls.count == STEPS
    assert json.loads((tmp_path / "run" / "result.json").read_text())["from_store"]


def test_order_and_sharding_do_not_change_an_image_and_a_batch_not_visibly(tiny_root, store, tmp_path):
    cases = [case("a"), case("b", shift=2), case("c", shift=7)]
    lab = make_lab(tiny_root, store)
    want = targets(phases.edit(lab, cases, tmp_path / "together"))
    assert targets(phases.edit(lab, cases[::-1], tmp_path / "reversed")) == want[::-1]
    assert targets(phases.edit(lab, cases[1:2], tmp_path / "shard")) == want[1:2]
    folders = phases.edit(make_lab(tiny_root, store, "batch=2"), cases, tmp_path / "batch")
    for one, many in zip(cases, folders, strict=True):
        a, b = (
            torch.tensor(list(Image.open(folder / "target.png").tobytes()))
            for folder in (case_folder(tmp_path / "together", one.id), many)
        )
        assert (a - b).abs().max() <= 1


def test_a_run_again_gives_the_same_bytes(tiny_root, tmp_path):
    one, two = (phases.edit(make_lab(tiny_root, tmp_path / f"{k}"), [case()], tmp_path / f"run{k}") for k in range(2))
    for name in PICTURES:
        assert (one[0] / f"{name}.png").read_bytes() == (two[0] / f"{name}.png").read_bytes()


def test_a_wish_to_stop_is_heeded_though_nothing_is_left_to_compute(lab, tmp_path):
    phases.edit(lab, [case()], tmp_path / "run")
    stop = threading.Event()
    stop.set()
    for work in (lambda: phases.edit(lab, [case()], tmp_path / "run"), lambda: list(phases.invert(lab, [case()]))):
        with interrupt.heeding(stop), pytest.raises(interrupt.Cancelled):
            work()


class Stop(L.Callback):
    """Raises what a signal raises, once a batch is done."""

    def on_predict_batch_end(self, *args):
        raise interrupt.Interrupted(signal.SIGTERM)


def test_cases_are_written_when_their_batch_is_done_and_the_others_follow_later(lab, tmp_path):
    cases = [case("a"), case("b", shift=2), case("c", shift=7)]
    want = targets(phases.edit(lab, cases, tmp_path / "whole"))
    with pytest.raises(interrupt.Interrupted):
        phases.edit(lab, cases, tmp_path / "cut", callbacks=[Stop()])
    assert [case_folder(tmp_path / "cut", c.id).exists() for c in cases] == [True, False, False]
    first = case_folder(tmp_path / "cut", "a") / "result.json"
    written = first.stat().st_mtime_ns
    calls = Calls(lab.model)
    assert targets(phases.edit(lab, cases, tmp_path / "cut")) == want
    assert calls.count == 2 * STEPS
    assert first.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": None}, "cat: this method acts inside a region: give mask=FILE"),
        ({"hints": {}}, "cat: this method follows a drawn condition"),
        ({"mask": None, "hints": {}}, "region: give mask=FILE .*; and this .* give sketch=FILE"),
        ({"hints": {"canny": drawn("L", outline=255)}}, "no canny adapter"),
        ({"mask": drawn("L", size=(32, 64), fill=255)}, "32x64"),
    ],
    ids=["no mask", "no hint", "neither", "no adapter", "mask of another shape"],
)
def test_a_case_that_cannot_be_edited_is_found_before_anything_is_computed(lab, tmp_path, changed, message):
    calls = Calls(lab.model)
    with pytest.raises(InputError, match=message):
        phases.edit(lab, [case("good", shift=1), case(**changed)], tmp_path / "run")
    assert calls.count == 0
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_set_is_refused_when_the_lab_is_built(tiny_root, store):
    for word, message in (
        ("trainer.devices=2", "one run has one device"),
        ("trainer.precision=bf16-true", "set model.dtype"),
        ("steps=1000", "1 to 999"),
    ):
        with pytest.raises(InputError, match=message):
            make_lab(tiny_root, store, word)


def test_two_cases_with_one_id_are_refused(lab, tmp_path):
    with pytest.raises(InputError, match="'cat' is there twice"):
        phases.edit(lab, [case(), case(shift=1)], tmp_path)


def test_a_limit_of_the_trainer_that_leaves_cases_out_is_an_error(tiny_root, store, tmp_path):
    lab = make_lab(tiny_root, store, "trainer.limit_predict_batches=1")
    with pytest.raises(InputError, match="left out 1 of 2 cases"):
        phases.edit(lab, [case("a"), case("b")], tmp_path / "run")


def test_words_beyond_the_encoders_length_are_named(lab, tmp_path, caplog):
    long = "a red dog on grass with " + "and ".join(["a hat "] * 12)
    phases.edit(lab, [case(target=long)], tmp_path / "run")
    assert "cat: the text encoder reads 24 tokens; not read: " in caplog.text


def test_a_picture_of_which_nothing_is_said_is_told(lab, tmp_path, caplog):
    for source, told in (("a cat", False), ("", True)):
        caplog.clear()
        phases.job(lab, case(source=source), tmp_path)
        assert ("cat: is kept under an empty prompt" in caplog.text) == told


LONG = "a cat on grass and " * 8
"""More words than the tiny model's encoder reads."""


@pytest.mark.parametrize("name", ["plain", "prompt_to_prompt", "embctrl", "plug_and_play", "sdedit"])
def test_prompts_that_differ_only_in_what_is_not_read_edit_nothing_and_are_refused(tiny_root, store, tmp_path, name):
    words = [f"method.name={name}"]
    long = case(source=f"{LONG}running", target=f"{LONG}standing", hints={})
    with pytest.raises(InputError, match=r"cat: source and target are the same in the 22 tokens .* changes first"):
        phases.edit(make_lab(tiny_root, store, *words), [long], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_prompts_are_told_and_a_sketch_may_be_all_that_edits(tiny_root, store, tmp_path, caplog):
    plain = make_lab(tiny_root, store, "method.name=plain")
    phases.job(plain, case(target="a cat on grass", hints={}), tmp_path)
    assert "no words say what to edit" in caplog.text
    caplog.clear()
    phases.job(make_lab(tiny_root, store), case(source=f"{LONG}running", target=f"{LONG}standing"), tmp_path)
    phases.job(make_lab(tiny_root, store), case(target="a cat on grass"), tmp_path)
    assert "no words say" not in caplog.text


@pytest.mark.parametrize("name", ["plain", "prompt_to_prompt", "reconstruction", "plug_and_play", "sdedit"])
def test_a_hint_that_a_method_does_not_read_is_not_opened_and_changes_nothing(tiny_root, store, tmp_path, name):
    lab = make_lab(tiny_root, store, f"method.name={name}")
    without = phases.job(lab, case(hints={}), tmp_path)
    for hints in ({"canny": drawn("L", outline=255)}, {"sketch": tmp_path / "not there.png"}):  # it has no such adapter
        assert phases.job(lab, case(hints=hints), tmp_path).key == without.key
    with pytest.raises(InputError, match="no canny adapter"):
        phases.job(make_lab(tiny_root, store), case(hints={"canny": drawn("L", outline=255)}), tmp_path)


def test_a_case_may_have_settings_of_its_own_and_one_that_does_not_fit_stops_no_other(tiny_root, store, tmp_path):
    lab = make_lab(
        tiny_root, store, "method.name=prompt_to_prompt", "method.blend_source=cat", "method.blend_target=dog"
    )
    horse = {"source": "a horse on grass", "target": "a red horse on grass"}
    own = {"method.blend_source": "horse", "method.blend_target": "horse", "method.blend_threshold": "0.5"}
    cases = [
        case("a"),
        case("b", **horse, settings=own),
        case("c", **horse),
        case("d", settings={"method.edit": "all"}),
    ]
    lost = []
    folders = phases.edit(lab, cases, tmp_path / "run", lost=lambda case, error: lost.append(str(error)))
    methods = [json.loads((folder / "result.json").read_text())["method"] for folder in folders]
    assert [method["blend_source"] for method in methods] == [["cat"], ["horse"]]
    assert [method["blend_threshold"] for method in methods] == [0.3, 0.5]
    assert "c: 'cat' is no word of 'a horse on grass'" in lost[0]
    assert "d: method.edit=all: must be refine | replace" in lost[1]
    alone = phases.edit(lab, [cases[1]], tmp_path / "alone")[0]
    assert (alone / "target.png").read_bytes() == (folders[1] / "target.png").read_bytes()


def test_a_setting_of_another_method_is_not_read_and_one_of_none_refused(lab, tmp_path):
    plain = phases.job(lab, case(), tmp_path).key
    assert phases.job(lab.of(case(settings={"method.blend_source": "cat"})), case(), tmp_path).key == plain
    with pytest.raises(InputError, match=r"cat: method\.blend_sorce: unknown key; did you mean method\.blend_source"):
        lab.of(case(settings={"method.blend_sorce": "cat"}))


@pytest.mark.parametrize(
    ("column", "text", "said"),
    [
        ("method.name", "plain", "cat: method.name=plain: all cases have one method"),
        ("method.guidance.cat", "2", "cat: method.guidance.cat: unknown key"),
        ("method.strength", "half", "cat: method.strength=half: must be number"),
    ],
)
def test_a_column_that_is_no_setting_of_a_case_is_refused_by_name(tiny_root, store, column, text, said):
    lab = make_lab(tiny_root, store, "method.name=sdedit")
    with pytest.raises(InputError, match=said):
        lab.of(case(settings={column: text}))


def test_what_a_method_does_not_read_of_a_case_may_change_after_its_edit(tiny_root, store, tmp_path):
    lab, read = make_lab(tiny_root, store, "method.name=plain"), make_lab(tiny_root, store)
    words, sketch, other = {"method.blend_source": "cat"}, drawn("L", outline=255), drawn("L", 3, outline=255)
    for n, (before, after) in enumerate(
        [
            ({"hints": {"sketch": sketch}}, {"hints": {"sketch": other}}),
            ({"hints": {}}, {"hints": {"sketch": sketch}}),
            ({"settings": words}, {"settings": {"method.blend_source": "dog"}}),
            ({}, {"settings": words}),
        ]
    ):
        (folder,) = phases.edit(lab, [case(**before)], tmp_path / f"{n}")
        made = (folder / "result.json").stat().st_mtime_ns
        phases.edit(lab, [case(**after)], folder)
        assert (folder / "result.json").stat().st_mtime_ns == made
    (folder,) = phases.edit(read, [case()], tmp_path / "read")
    with pytest.raises(Changed, match="sketch: changed since"):
        phases.edit(read, [case(hints={"sketch": other})], folder)
    phases.edit(lab, [case()], tmp_path / "own")
    with pytest.raises(Changed, match=r"method\.guidance: changed since"):
        phases.edit(lab, [case(settings={"method.guidance": "2"})], tmp_path / "own")


def test_settings_that_a_method_does_not_read_part_no_batch(tiny_root, store, tmp_path):
    cases = [case(f"{n}", settings={"method.blend_source": f"word{n}"}) for n in range(3)]
    lab = make_lab(tiny_root, store, "method.name=plain", "batch=3")
    list(phases.invert(lab, cases))
    calls = Calls(lab.model)
    phases.edit(lab, cases, tmp_path / "run")
    assert calls.count == STEPS


def test_pasted_back_nothing_changes_outside_the_mask_as_drawn(tiny_root, store, tmp_path):
    lab = make_lab(tiny_root, store, "method.background=paste")
    inside = np.zeros((SIZE[1], SIZE[0]), bool)
    inside[5:19, 7:22] = True  # of no whole latent cells
    mask = Image.fromarray(inside.astype(np.uint8) * 255)
    (folder,) = phases.edit(lab, [case(mask=mask)], tmp_path / "run")
    source, target = (np.asarray(Image.open(folder / f"{name}.png"), int) for name in ("source", "target"))
    assert (source == target)[~inside].all()
    assert (source != target)[inside].any()
    other = Image.fromarray((inside | np.roll(inside, 1, 1)).astype(np.uint8) * 255)  # of the same cells
    assert torch.equal(lab.prepare(case(mask=other)).mask, lab.prepare(case(mask=mask)).mask)
    assert phases.job(lab, case(mask=other), tmp_path).key != phases.job(lab, case(mask=mask), tmp_path).key
