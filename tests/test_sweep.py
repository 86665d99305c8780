"""Sweeps: every point ends as an edit of its own, what is done stays done, what fails stands on record."""

import io
import json
import random
import shutil
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from masafusion_lab import InputError, cli, config, forecast, phases, runner, survey, surveypage, tracking
from masafusion_lab.forecast import Forecast
from masafusion_lab.memory import held
from masafusion_lab.protocol import PROTOCOLS
from masafusion_lab.request import cases_of
from masafusion_lab.runs import read_json
from masafusion_lab.scoring import Scorer
from masafusion_lab.sweep import sweep
from tests.edits import Calls, case, drawn
from tests.kills import survive
from tests.test_results import flip
from tests.test_tracking import on_record

pytestmark = pytest.mark.usefixtures("unplotted")
WINDOWS = "axes.method.fusion_steps=windows(0,3,1)"


@pytest.fixture(scope="session")
def model(tiny_root):
    from masafusion_lab.model import StableDiffusion

    return StableDiffusion.load(str(tiny_root))


@pytest.fixture
def unplotted(request, monkeypatch):
    """Without the plots, which are slow to draw, but in the test that looks at them."""
    if "plotted" not in request.node.name:
        monkeypatch.setattr(surveypage, "figures", lambda findings: ())


@pytest.fixture
def run(tmp_path, tiny_root, model):
    """Sweep the usual case in a folder `out`; the findings, and what was said of the plan."""

    def run(*words, out="out", cases=None, **options):
        usual = f"model.path={tiny_root} model.device=cpu store={tmp_path}/store size=48x32 steps=3 sweep.rows=8"
        experiment = config.load(words=[*usual.split(), *words])
        run.lab, said = phases.build(experiment, model=model), []
        folder = tmp_path / out
        found = sweep(experiment, cases or [case()], folder, lab=run.lab, told=said.append, **options)
        return found, said[0]

    return run


def pictures(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("target.png"))}


def test_every_point_is_the_edit_that_it_is_alone(run, tmp_path, model):
    axes = ["axes.method.background=none,paste", "axes.region.feather=0,1"]
    found, planned = run(*axes)
    assert len(found.records) == planned.points == 4
    assert planned.shared < 0.9 * planned.alone  # the source's rows are shared whatever differs
    surveyed = survey.read(config.load(words=["steps=3", "size=48x32", *axes]), [case()], tmp_path / "out")
    for n, point in enumerate(surveyed.points):
        lab = phases.build(point.experiment, model=model)
        lab.store = run.lab.store
        (folder,) = phases.edit(lab, [case()], tmp_path / f"alone-{n}")
        (alone, point) = (
            np.asarray(Image.open(f / "target.png"), int) for f in (folder, surveyed.place(case(), point))
        )
        assert np.abs(alone - point).max() <= 1


def test_results_are_in_one_table_with_pictures_and_plotted(run, tmp_path):
    found, _ = run(WINDOWS, "axes.method.guidance=3,7.5", cases=[case(truth=drawn(fill="red")), case("dog", 4)])
    rows = parquet.read_table(tmp_path / "out/results.parquet").to_pylist()
    assert len(rows) == 2 * 6 * 2
    assert {"method.fusion_steps.start", "method.fusion_steps.stop", "method.guidance", "psnr_area", "hit", "l1"} <= {
        *rows[0]
    }
    assert all((tmp_path / "out" / row["picture"]).is_file() for row in rows)
    assert found.best.point in {row["point"] for row in rows}
    assert sum(found.best.share.values()) == pytest.approx(1)
    for name in ("map-psnr_area", "map-hit", "trade-off", "importance", "parallel", "sheet-0", "sheet-1"):
        assert (tmp_path / f"out/{name}.png").is_file()


def test_its_measures_are_a_benchmarks_and_each_or_two_of_them_may_be_the_objective(run, tmp_path):
    drawn = list(cases_of(config.load(words=["cases=picturebook:1"])))
    words = ["axes.method.guidance=3,7.5", "size=32"]
    found, _ = run(*words, "sweep.objective=done,clip_t", cases=drawn)
    scorer = Scorer.of(PROTOCOLS["picturebook"], {})
    for record in found.records:
        taken, _ = scorer.score(drawn[0], (tmp_path / "out" / record["picture"]).parent, again=True)
        shared = taken.keys() & record.keys()
        assert {"done", "clip_t", "psnr_area", "l1"} <= shared
        assert {name: record[name] for name in shared} == {name: taken[name] for name in shared}
    best = max(found.records, key=lambda record: record["clip_t"])
    assert run(*words, "sweep.objective=clip_t", cases=drawn)[0].best.point == best["point"]


def test_where_nothing_says_what_is_best_nothing_is_recommended(run, tmp_path, caplog):
    found, _ = run("axes.method.guidance=3,7.5", "method.name=plain", cases=[case(mask=None, hints={})])
    assert found.best is None
    assert "psnr_whole" in found.records[0]
    assert "clip_t has no value, so nothing is recommended" in caplog.text
    assert "Nothing is recommended: clip_t has no value" in (tmp_path / "out/report.html").read_text()


def test_each_axis_is_proven_alive_and_the_proof_is_kept(run, tmp_path):
    _, planned = run(WINDOWS, "axes.seed=0,1")
    kept = read_json(tmp_path / "out/plan.json")
    assert [proof["axis"] for proof in kept["proofs"]] == ["method.fusion_steps", "seed"]
    assert all(proof.state == 1 and proof.difference > 0 for proof in planned.proofs)


def test_a_dead_axis_stops_the_sweep_with_the_reason(run, tmp_path):
    run("axes.method.hint_scale=1,2")  # of which the proof, in this folder, is none of other settings
    shutil.rmtree(tmp_path / "out/cases")
    with pytest.raises(InputError, match=r"hint_scale: changes nothing on case 'cat'.*equal to the end, bit by bit"):
        run("axes.method.hint_scale=1,2", "method.hint_until=0")
    assert not pictures(tmp_path / "out")


def test_axes_of_a_list_between_whose_points_nothing_can_be_are_not_called_dead(run):
    found, planned = run("axes.steps=1,2", "axes.method.fusion_steps=[0,1],[1,2]", "sweep.kind=list")
    assert len(found.records) == 2
    assert not found.failures
    assert [proof.axis for proof in planned.proofs] == ["steps"]


@pytest.mark.parametrize(
    ("of_a_row", "rows"), [(0, forecast.MOST["cpu"]), (1 / 4, 1), (1 / 16, 4), (1 / 20, 4), (2, 1)]
)
def test_rows_at_once_follow_from_the_machine_and_not_from_how_busy_it_is(run, monkeypatch, of_a_row, rows):
    memory = iter([float("inf") if not of_a_row else 1000.0])
    monkeypatch.setattr(forecast, "total", lambda device: next(memory))
    monkeypatch.setattr(forecast, "held", lambda call: of_a_row * 1000 or 1)
    monkeypatch.setattr(forecast, "speed", lambda *_: random.random())
    assert run("axes.seed=0,1", "sweep.rows=auto")[1].rows == rows


def test_a_call_holds_twice_as_much_for_twice_the_rows_whatever_was_held_before(model):
    def call(n):
        text = model.embed([""]).expand(n, -1, -1)
        return lambda: model.eps(torch.zeros(n, 4, 8, 8), 0, model.schedule(3), text)

    one = held(call(1))
    ballast = torch.zeros(10**7)
    assert held(call(2)) == pytest.approx(2 * one, rel=0.02)
    assert held(call(1)) == one > 3 * 4 * 4 * 8 * 8
    assert held(lambda: ballast.view(-1)[:2]) == 0
    assert held(lambda: [torch.zeros(1000) for _ in range(3)]) == 12000


def test_what_is_done_is_not_done_again(run, tmp_path):
    first, _ = run(WINDOWS)
    before = pictures(tmp_path / "out"), (tmp_path / "out/results.parquet").read_bytes()
    calls = Calls(run.lab.model)
    second, _ = run(WINDOWS)
    calls.hook.remove()
    assert calls.count == 0
    assert (pictures(tmp_path / "out"), (tmp_path / "out/results.parquet").read_bytes()) == before
    assert first == second


def test_a_damaged_point_is_found_and_made_again(run, tmp_path, caplog):
    run("axes.seed=0,1")
    before = pictures(tmp_path / "out")
    damaged = tmp_path / "out" / next(iter(before))
    flip(damaged)
    experiment = config.load(words=["size=48x32", "steps=3", "axes.seed=0,1"])
    records = survey.read(experiment, [case()], tmp_path / "out").records(Scorer.of(PROTOCOLS["picturebook"], {}))
    assert sorted(record["error"] for record in records) == ["", "target.png: is damaged: not what was written"]
    run("axes.seed=0,1")
    assert caplog.text.count("is damaged: not what was written; the case is made again") == 1
    for path, whole in before.items():  # alone it is computed in smaller calls, which round otherwise
        again, then = (np.asarray(Image.open(file), int) for file in (tmp_path / "out" / path, io.BytesIO(whole)))
        assert np.abs(again - then).max() <= 1


def test_pictures_that_changed_since_are_refused_before_anything_is_computed(run, tmp_path):
    drawn().save(tmp_path / "image.png")
    cases = [case(image=tmp_path / "image.png")]
    run("axes.seed=0,1", cases=cases)
    before = pictures(tmp_path / "out")
    drawn(shift=5).save(tmp_path / "image.png")
    with pytest.raises(InputError, match=r"^cat: image: changed since .*out=FOLDER, or force=true"):
        run("axes.seed=0,1", cases=cases)
    assert pictures(tmp_path / "out") == before
    run("axes.seed=0,1", "force=true", cases=cases)
    assert not pictures(tmp_path / "out").items() & before.items()


def test_cut_short_anywhere_it_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch):
    run(WINDOWS, out="whole")
    model, write = run.lab.model, runner.write_picture
    monkeypatch.setattr(runner, "SAVED_EVERY", 0.0)

    def die(calls):
        def count(*_):
            calls[0] -= 1
            if calls[0] < 0:
                raise KeyboardInterrupt

        return count

    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole/plan.json", tmp_path / "cut")
    for calls in (1, 2, 2):  # each time within another step
        hook = model.unet.register_forward_pre_hook(die([calls]))
        with pytest.raises(KeyboardInterrupt):
            run(WINDOWS, out="cut")
        hook.remove()
    monkeypatch.setattr(runner, "write_picture", lambda path, x: 1 / 0 if "2-3" in str(path) else write(path, x))
    with pytest.raises(ZeroDivisionError):
        run(WINDOWS, out="cut")
    monkeypatch.setattr(runner, "write_picture", write)
    calls = Calls(model)
    run(WINDOWS, out="cut")
    calls.hook.remove()
    assert calls.count == 0  # the last state was on record
    assert pictures(tmp_path / "cut") == pictures(tmp_path / "whole")
    assert (tmp_path / "cut/results.parquet").read_bytes() == (tmp_path / "whole/results.parquet").read_bytes()
    assert not list((tmp_path / "cut").rglob("*.safetensors"))


def test_more_points_than_before_run_alone(run, tmp_path):
    words = ["axes.method.guidance=uniform(2,9)", "sweep.kind=random"]
    run(*words, "sweep.points=3")
    before, calls = pictures(tmp_path / "out"), Calls(run.lab.model)
    _, planned = run(*words, "sweep.points=4")
    calls.hook.remove()
    assert planned.points == 4
    assert pictures(tmp_path / "out").items() > before.items()
    assert calls.count <= 3 + 2 + 2 * 3  # the new point's steps, the speed, and the proof of the axis


def test_points_that_were_added_and_cut_short_among_their_results_are_not_computed_again(run, monkeypatch, tmp_path):
    words = ["axes.method.guidance=uniform(2,9)", "sweep.kind=random"]
    run(*words, "sweep.points=2")
    write, made = runner.write_picture, []
    monkeypatch.setattr(runner, "write_picture", lambda *its: 1 / 0 if made else made.append(write(*its)))
    with pytest.raises(ZeroDivisionError):
        run(*words, "sweep.points=5")
    monkeypatch.setattr(runner, "write_picture", write)
    calls = Calls(run.lab.model)
    assert not run(*words, "sweep.points=5")[0].failures
    calls.hook.remove()
    assert calls.count == 0
    assert len(pictures(tmp_path / "out")) == 5
    assert not list(tmp_path.rglob("out/**/*.safetensors"))


def test_a_point_that_fails_is_on_record_and_stops_no_other(run, tmp_path):
    found, _ = run("axes.method.guidance=3,1e38,5")
    assert [record["point"] for record in found.failures] == ["method.guidance=1e38"]
    assert len(pictures(tmp_path / "out")) == 2
    assert "1 of 3 points failed" in found.lost
    (one,) = (read_json(path) for path in sorted(tmp_path.rglob("error.json")))
    assert "not finite" in one["error"]
    assert "Traceback" in one["traceback"]
    calls = Calls(run.lab.model)
    assert run("axes.method.guidance=3,1e38,5")[0].failures == found.failures
    assert calls.count == 0
    run("axes.method.guidance=3,1e38,5", "sweep.retry=true")
    assert calls.count > 0
    calls.hook.remove()


def test_a_case_that_cannot_be_read_is_on_record_and_the_rest_is_recommended_by(run, tmp_path):
    found, _ = run("axes.seed=0,1", cases=[case(), case("gone", image=tmp_path / "gone.png")])
    assert {record["case"] for record in found.failures} == {"gone"}
    assert found.best.by_case.keys() == {"cat"}
    assert [path.name for path in sorted((tmp_path / "out").glob("sheet-*"))] == ["sheet-0.png"]


def test_methods_inversions_sizes_and_steps_may_be_varied(run, tmp_path):
    found, _ = run("axes.method.name=masafusion,plain", "axes.inversion.prompt=source,empty", "steps=2")
    assert not found.failures
    assert len(set(pictures(tmp_path / "out").values())) == 4
    found, planned = run("axes.size=48x32,96x64", "axes.steps=1,2", out="sizes")
    assert {Image.open(tmp_path / "sizes" / r["picture"]).size for r in found.records} == {(48, 32), (96, 64)}
    assert planned.points == 4


def test_a_method_that_gives_no_course_runs_by_itself(run, monkeypatch, tmp_path):
    run("axes.method.guidance=3,5", out="shared")
    monkeypatch.setattr(runner, "is_shareable", lambda course: False)
    _, planned = run("axes.method.guidance=3,5", out="apart")
    for one, other in zip(pictures(tmp_path / "shared").values(), pictures(tmp_path / "apart").values(), strict=True):
        assert len(one) == pytest.approx(len(other), abs=40)
    assert planned.shared == planned.alone


@pytest.mark.parametrize("timed", [False, True], ids=["while it runs", "before it runs"])
def test_memory_that_does_not_suffice_halves_the_rows(run, monkeypatch, tmp_path, caplog, timed):
    run(WINDOWS, out="whole")
    eps = run.lab.model.eps

    def small(x, *args, **options):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return eps(x, *args, **options)

    if not timed:
        monkeypatch.setattr(forecast, "speed", lambda *_: 0.1)
    monkeypatch.setattr(forecast, "alive", lambda *args: [])
    monkeypatch.setattr(run.lab.model, "eps", small)
    found, planned = run(WINDOWS, out="small")
    assert not found.failures
    assert caplog.text.count("4 rows at once from here on") == 1
    assert planned.rows == (4 if timed else 8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["axes.method.fusion_steps=[2,2],[0,1]"], r"axes.method.fusion_steps=\[2,2\]: must be \[a,b\]"),
        (["axes.method.guidence=3,4"], r"axes.method.guidence: unknown key; did you mean method.guidance"),
        (["axes.method.guidance=3,x"], "method.guidance=x: must be number"),
        (["axes.method.preserve_layers=all,99"], r"1 points cannot be run .*\n.*=99: .* layer 99 is not there"),
        (["axes.seed=1,2", "sweep.rows=0"], "sweep.rows=0: must be auto"),
        (["axes.seed=1,2", "sweep.objective=quality"], "quality is not one of"),
        (["axes.inversion.preset=paper,reference"], "is a key of inversion.name=null_text"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(run, words, said, tmp_path):
    with pytest.raises(InputError, match=said):
        run(*words)
    assert not pictures(tmp_path)


def test_a_tracker_is_told_of_points_pictures_and_plots_as_plotted(run, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    experiment = config.load(words=["axes.seed=0,1", "tracking.mode=offline"])
    with tracking.recording(experiment, tmp_path / "out") as loggers:
        run("axes.seed=0,1", loggers=loggers)
    told = json.dumps(on_record(tmp_path / "out"))
    for name in ("sweep/points", "sweep/map-psnr_area", "sweep/trade-off", "sweep/best/psnr_area"):
        assert name in told
    (table,) = (tmp_path / "out").glob("wandb/offline-run-*/files/media/table/**/*.json")
    assert {"case", "point", "seed", "psnr_area", "picture"} <= set(json.loads(table.read_text())["columns"])


class Page(HTMLParser):
    """A page's elements and references."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_no_id_becomes_markup_and_all_that_the_page_shows_is_there(run, tmp_path):
    run(WINDOWS, cases=[case('<script>alert(1)</script> "../../x" & =cmd()')])
    page = Page(tmp_path / "out/report.html")
    assert "script" not in page.tags
    assert len(page.links) > 12
    for link in page.links:
        assert (tmp_path / "out" / link).resolve().is_relative_to(tmp_path / "out")
        assert (tmp_path / "out" / link).is_file()


def test_what_is_planned_is_said_in_a_line():
    said = Forecast(55, 2, 19140, 3138, 32, 4000.0, ()).said
    assert said == (
        "55 points on 2 cases; UNet rows a case: 19,140 one by one, 3,138 shared (6.1 times fewer), 32 at once; "
        "about 1 h 6 min"
    )


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, tiny_root):
    """A sweep on the command line: its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, picture in {
        "cat": drawn(),
        "mask": drawn("L", fill=255),
        "sketch": drawn("L", 4, outline=255),
    }.items():
        picture.save(tmp_path / f"{name}.png")
    usual = ["image=cat.png", "mask=mask.png", "sketch=sketch.png", "source=a cat", "target=a dog", "size=48x32"]
    usual += [f"model.path={tiny_root}", "model.device=cpu", "steps=2", "tracking.mode=off", "sweep.rows=4", "out=out"]

    def command(*words, name="sweep"):
        monkeypatch.setattr(sys, "argv", ["masafusion", name, *usual, *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return command


def test_the_command_says_what_is_planned_and_what_to_take(command, tmp_path):
    code, out, _ = command("axes.method.fusion_steps=windows(0,2,1)")
    planned, recommended, page = out.splitlines()
    assert code == 0
    assert planned.startswith("3 points on 1 case; UNet rows a case: 45 one by one, 27 shared (1.7 times fewer), 4 at")
    assert recommended.startswith("recommended: method.fusion_steps=[")
    assert page == "out/report.html"
    assert command("axes.method.fusion_steps=windows(0,2,1)")[1] == out
    code, _, err = command("axes.seed=1,2")
    assert code == 2
    assert "begun under another configuration" in err
    code, out, _ = command("--config", "out/config.yaml", "method.fusion_steps=[0,1]", "out=again", name="edit")
    assert code == 0
    assert (tmp_path / "again/target.png").is_file()


def test_the_command_exits_with_1_if_a_point_failed_and_with_2_if_nothing_can_run(command, tmp_path):
    code, out, err = command("axes.method.guidance=3,1e38")
    assert code == 1
    assert "recommended: method.guidance=3" in out
    assert "1 of 2 points failed" in err
    code, _, err = command("axes.method.hint_scale=1,2", "method.hint_until=0", "out=dead")
    assert code == 2
    assert "hint_scale: changes nothing" in err
    assert not (tmp_path / "dead").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_moments_it_loses_nothing_and_ends_in_the_same_bytes(command, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SAVED_EVERY", 0.2)
    words = ["axes.method.fusion_steps=windows(0,12,1)", "steps=12"]
    began = time.monotonic()
    command(*words, "out=whole")
    seconds = time.monotonic() - began

    def ended():
        assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")
        whole, out = ((tmp_path / name / "results.parquet").read_bytes() for name in ("whole", "out"))
        assert out == whole

    survive(lambda: command(*words, "out=out"), tmp_path / "out", seconds, ended)
