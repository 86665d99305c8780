"""The scripts of the paper's figures: their settings exist, and what they draw shows every case under every setting."""

import importlib
import json
import signal
from pathlib import Path

import pytest
from PIL import Image

import experiments
from experiments import (
    attention,
    edit_quality,
    error_budget,
    figures,
    inversion_quality,
    scale,
    speed,
    sweep_cost,
    timing,
)
from masafusion_lab import config, phases
from masafusion_lab.lab import Lab
from masafusion_lab.methods import METHODS
from tests.edits import case as a_case

SCRIPTS = sorted(path.stem for path in Path(experiments.__file__).parent.glob("fig[0-9]*.py"))


@pytest.fixture
def words(tiny_root, tmp_path, monkeypatch):
    """Settings of the tiny model, which reads these captions letter by letter, and no difference near their end."""
    monkeypatch.setattr(phases, "told_apart", lambda *_: None)
    return [f"model.path={tiny_root}", "model.device=cpu", "size=32", "steps=2", f"store={tmp_path / 'store'}"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_figures_variants_have_only_settings_that_their_methods_have(script):
    figure = importlib.import_module(f"experiments.{script}").FIGURE
    assert figure.name == script
    assert {row for row, _ in figure.panels.values()} <= set(figure.variants)
    for text in figure.variants.values():
        of_row = [*figure.words, *text.split()]
        if next(word for word in of_row if word.startswith("method.name=")).partition("=")[2] in METHODS:
            config.load(words=of_row)


def test_a_figure_shows_every_case_under_every_setting_and_leaves_its_table(words, tmp_path, monkeypatch, capsys):
    from experiments.fig04_initial_noise import FIGURE

    made = figures.main("", FIGURE, ["--count", "2", "--out", str(tmp_path / "fig"), *words])
    assert [case.kind for case in made.cases] == ["pose", "replace"]
    drawn = Image.open(tmp_path / "fig" / "fig04_initial_noise.png")
    assert drawn.width / drawn.height == pytest.approx(6 * 1.2 / (2 * 1.45 + 0.35), rel=0.02)
    assert (tmp_path / "fig" / "fig04_initial_noise.pdf").read_bytes()[:5] == b"%PDF-"
    assert "x in A, else x_T^S" in (tmp_path / "fig" / "table.md").read_text()
    shown = [figures.result(made, row, made.cases[0], "intermediate") for row in made.rows]
    assert len({picture.tobytes() for picture in shown}) == 3
    monkeypatch.setattr(figures, "SHOWN", 1)  # of hundreds no picture can be drawn
    first = Image.open(figures.draw(made, FIGURE))
    assert first.width / first.height == pytest.approx(6 * 1.2 / (1.45 + 0.35), rel=0.02)


def test_in_a_figure_what_failed_is_said_in_its_place(words, tmp_path):
    figure = figures.Figure("fig", {"whole": "method.name=masafusion dilate=99"}, ("add",), lead=())
    made = figures.main("", figure, ["--count", "1", "--out", str(tmp_path / "fig"), *words])
    assert "the mask covers the whole picture" in figures.result(made, "whole", made.cases[0], "target")


def test_budget_and_drift_are_measured_from_the_same_first_turn(words, tmp_path, capsys):
    error_budget.main(["--count", "1", "--sessions", "1", "--out", str(tmp_path), *words])
    found = json.loads((tmp_path / "error_budget.json").read_text())
    parts = found["budget"]
    assert parts["inversion"] == 0  # direct inversion replays what it inverted
    assert parts["total"] == pytest.approx(sum(value for name, value in parts.items() if name != "total"))
    pixels, latents = found["drift"]["pixels"], found["drift"]["latents"]
    assert len(pixels) == len(latents) == 4
    assert pixels[:2] == latents[:2]
    assert pixels[2:] != latents[2:]


def test_timing_is_drawn_with_the_papers_ratio_beside_ours(tmp_path, monkeypatch, capsys):
    def command(words):
        seconds = {"invert": 12.0 if "inversion.name=null_text" in words else 1.0, "denoise": 3.0, "decode": 1.0}
        return 20.0, {"seconds": seconds, "rows": 500, "peak_memory_gb": 0.5}

    monkeypatch.setattr(timing, "command", command)
    timing.main(["--out", str(tmp_path)])
    assert Image.open(tmp_path / "timing.png").width > 1000
    found = json.loads((tmp_path / "timing.json").read_text())
    assert [(row["inverted"], row["ratio"]) for row in found.values()] == [(50, 1), (1700, 3.2), (1700, 3.2)]
    assert timing.PAPER["NTI, paper"] / timing.PAPER["DI"] == pytest.approx(4.2, abs=0.01)


def test_the_interference_of_methods_is_told_with_what_follows_from_their_rules(words, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--json", str(tmp_path / "found.json"), "--methods", "masafusion,no_region"]
    attention.main(["--only", "interference", "--count", "2", *out, *words, "batch=2"])
    found = json.loads((tmp_path / "found.json").read_text())
    ours, theirs = found["interference"].values()
    assert ours["interval"][0] <= ours["mean"] <= ours["interval"][1]
    assert ours["mean"] == pytest.approx((ours["inside"]["mean"] + ours["outside"]["mean"]) / 2)
    assert (ours["outside"]["mean"], theirs["inside"]["mean"], theirs["outside"]["mean"]) == pytest.approx((0, 1, 0))
    assert (ours["words_outside"]["mean"], theirs["words_outside"]["mean"] > 0) == (0, True)
    of = {name: its["mean"] for name, its in ours.items() if name.startswith("distance from truth")}
    assert all(0 < of[f"distance from truth, {name}"] < 1 for name in ("source", "intermediate"))
    assert not any(name.startswith("distance") for name in theirs)
    less = found["interference_less"]["no_region"]
    assert less["interference"]["mean"] == pytest.approx(theirs["mean"] - ours["mean"])
    assert "masafusion" in capsys.readouterr().out


def test_a_signal_ends_what_is_measured_after_the_step(words, tmp_path, monkeypatch, capsys):
    prepare = Lab.prepare
    monkeypatch.setattr(Lab, "prepare", lambda *its: signal.raise_signal(signal.SIGTERM) or prepare(*its))
    with pytest.raises(SystemExit) as end:
        error_budget.main(["--count", "1", "--sessions", "1", "--out", str(tmp_path), *words])
    assert end.value.code == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM" in capsys.readouterr().err
    assert not list(tmp_path.glob("error_budget.*"))


@pytest.mark.parametrize(
    ("command", "wrong", "said"),
    [
        (edit_quality, ["--count", "0"], "--count: 0: at least 1"),
        (edit_quality, ["--inversion", "direct,nul_text"], "'nul_text': there are direct, ddim, null_text"),
        (edit_quality, ["stepps=3"], "did you mean steps"),
        (error_budget, ["--sessions", "-2"], "-2: at least 1"),
        (error_budget, ["method.name=masafushion"], "did you mean masafusion"),
        (inversion_quality, ["--count", "x"], "invalid number value: 'x'"),
        (scale, ["--devices", "1,no"], "invalid numbers value: '1,no'"),
        (scale, ["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (speed, ["--only", "nti_raito"], "'nti_raito': there are nti_ratio, "),
        (sweep_cost, ["--cases", "1"], "two workers cannot share it"),
        (sweep_cost, ["--steps", "3", "--grid", "5"], "must have a step of b - a at most"),
        (timing, ["--repeat", "0"], "0: at least 1"),
    ],
)
def test_what_a_command_cannot_use_is_said_before_anything_is_measured(command, wrong, said, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(wrong)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--methods", "masafusion,unmasked"), "there are masafusion, no_region, region_only, plain"),
        (("--only", "overhed"), "there are overhead, word_iou, interference"),
        (("--count", "1"), "1: at least 2"),
        (("--only", "word_iou", "stepps=3"), "did you mean steps"),
    ],
)
def test_numbers_and_methods_that_there_are_not_are_refused(capsys, wrong, said):
    with pytest.raises(SystemExit):
        attention.main([*wrong])
    assert said in capsys.readouterr().err


def test_numbers_of_another_edit_are_not_taken_for_these(words, tmp_path):
    asked = []

    def measure(seen):
        return {"n": len(asked.append(seen) or asked)}

    def numbers():
        over = [a_case(hints={}, target="")]
        return attention.numbers(tmp_path / "n", [*words, "method.name=replay"], over, measure, heads=False)

    assert numbers() == numbers() == [{"n": 1}]
    (tmp_path / "n" / attention.NUMBERS).write_text('{"key": "another", "numbers": {"n": 7}}')
    assert numbers() == [{"n": 2}]


@pytest.mark.slow
def test_word_maps_are_held_against_the_true_regions_of_things(tmp_path, capsys):
    out = ["--out", str(tmp_path), "--json", str(tmp_path / "f"), "model.device=cpu", f"store={tmp_path / 'store'}"]
    attention.main(["--only", "word_iou", "--count", "2", *out, "steps=2"])
    found = json.loads((tmp_path / "f").read_text())
    of = [json.loads(path.read_text())["numbers"] for path in tmp_path.glob("word_iou/*/meters.json")]
    assert found["word_iou"] == pytest.approx(sum(its["iou"] for its in of) / 2)
    assert found["word_iou_by_chance"] == pytest.approx(sum(its["by_chance"] for its in of) / 2)
    assert 0 <= found["word_iou_interval"][0] <= found["word_iou"] <= found["word_iou_interval"][1] < 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_overhead_is_measured_on_a_model_of_any_shape(tmp_path, capsys):
    words = ["size=128", "steps=2", "model.device=cpu", f"store={tmp_path / 'store'}"]
    attention.main(["--only", "overhead", "--repeats", "1", "--shape", "small", "--json", str(tmp_path / "f"), *words])
    found = json.loads((tmp_path / "f").read_text())
    assert found["shape"] == "small"
    assert found["overhead_time"] > -1 < found["overhead_memory"]
