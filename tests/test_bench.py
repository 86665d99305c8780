"""A benchmark: the same numbers however it was interrupted, ordered or divided, and nothing hidden that failed."""

import csv
import dataclasses
import errno
import io
import json
import random
import re
import shlex
import shutil
import signal
import sys
import time
import weakref
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from masafusion_lab import InputError, bench, benchpage, cli, config, interrupt, launch, phases, publish, tables
from masafusion_lab.data import sets
from masafusion_lab.launch import Worker
from masafusion_lab.methods import METHODS
from masafusion_lab.model import StableDiffusion
from masafusion_lab.protocol import PROTOCOLS
from masafusion_lab.results import fail_case
from masafusion_lab.runs import explained, replacing, write_parquet, write_text
from masafusion_lab.scoring import Scorer
from tests.kills import survive
from tests.test_report import Page
from tests.test_results import flip

CONFIGS = Path(__file__).parents[1] / "configs"
TURNS = 3


@pytest.fixture(scope="module")
def yaml(tmp_path_factory, tiny_root):
    """A configuration of two rows over one edit and one session of the picture-book world, with the tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "bench.yaml"
    path.write_text(
        f"""
model: {{path: {tiny_root}, device: cpu}}
size: "32"
steps: 2
store: {folder / "store"}
tracking: {{mode: "off"}}
bench:
  count: 1
  sessions: 1
  rows:
    plain: method.name=plain inversion.name=ddim
    ours (DI): method.name=masafusion inversion.name=direct
"""
    )
    return path


@pytest.fixture(scope="module")
def whole(yaml):
    """That benchmark, edited once."""
    _, made = bench.read([yaml], [f"out={yaml.with_name('whole')}"])
    bench.edit(made)
    return made


@pytest.fixture
def run(yaml, whole, tmp_path):
    """Edit, from where `whole` ended or `fresh`, and score a benchmark with these words; it and its records."""

    def run(name, *words, scorer=None, fresh=False):
        _, made = bench.read([yaml], [*words, f"out={tmp_path / name}"])
        if not fresh and not made.folder.exists():
            shutil.copytree(whole.folder, made.folder)
        bench.edit(made)
        return made, bench.score(made, scorer or Scorer.of(made.protocol, {}))

    return run


def pictures(made):
    """The bytes of all results, by row, setting and case."""
    found = {}
    for row in made.rows:
        for cell in made.cells(row):
            found[row, cell.setting, cell.case.id] = (made.at(cell) / "target.png").read_bytes()
    return found


def test_every_case_is_edited_by_itself_and_the_sessions_turn_by_turn(run):
    made, records = run("a")
    single, multi = ([r for r in records if r["setting"] == setting] for setting in ("single", "multi"))
    assert (len(single), len(multi)) == (2 * (1 + TURNS), 2 * TURNS)
    assert [(r["turn"], r["final"]) for r in multi[:TURNS]] == [(1, False), (2, False), (3, True)]
    assert not any(r["error"] for r in records)
    assert all(np.isfinite(r["l1"]) for r in records)
    turns = [cell for cell in made.cells("plain") if cell.setting == "multi"]
    assert made.at(turns[0]).parent.name == "single"  # a first turn is made once
    for before, cell in pairwise(turns):
        own = Image.open(made.at(before) / "target_original_size.png")
        assert own.size == (128, 128)
        own = own.resize((32, 32), Image.Resampling.LANCZOS)
        assert np.array_equal(Image.open(made.at(cell) / "source.png"), own)
        alone = made.place("plain", "single", cell.case) / "source.png"
        assert not np.array_equal(Image.open(alone), own)


def test_what_is_done_is_not_done_again_and_rows_of_one_model_share_it(run, yaml, monkeypatch):
    made, want = run("a")
    labs = []
    build = bench.build
    monkeypatch.setattr(bench, "build", lambda *a, **k: labs.append(build(*a, **k)) or labs[-1])
    monkeypatch.setattr("masafusion_lab.model.StableDiffusion.eps", None)
    bench.edit(made)
    assert len(labs) == 2
    assert len({id(lab.model) for lab in labs}) == 1
    assert repr(bench.score(made, Scorer.of(made.protocol, {}))) == repr(want)


def test_the_model_of_a_row_is_gone_before_another_is_read(run, monkeypatch):
    load, held, alive = StableDiffusion.load, [], []

    def counted(*args, **options):
        alive.append(sum(model() is not None for model in held))
        held.append(weakref.ref(model := load(*args, **options)))
        return model

    monkeypatch.setattr(StableDiffusion, "load", counted)
    run("one by one", "bench.rows.exact=method.name=plain model.compile=false model.tiling=true", fresh=True)
    assert alive == [0, 0]


def test_neither_order_nor_division_nor_batch_changes_a_pixel(run, yaml, whole, tmp_path):
    want = pictures(whole)
    _, other = bench.read([yaml], [f"out={tmp_path / 'reversed'}", f"store={tmp_path / 'store'}"])
    other = dataclasses.replace(other, cases=other.cases[::-1], rows=dict(reversed(other.rows.items())))
    bench.edit(other)
    assert pictures(other) == want
    shard, _ = run("shard", "bench.sessions=0", fresh=True)
    assert len(pictures(shard)) == 2
    assert pictures(shard).items() <= want.items()
    batch, _ = run("batch", "bench.only=ours (DI)", "batch=4", f"store={tmp_path / 'other'}", fresh=True)
    assert len(pictures(batch)) == 1 + 2 * TURNS
    assert pictures(batch).items() <= want.items()


def test_a_worker_edits_all_parts_to_the_same_pixels_wherever_it_runs(yaml, whole, tmp_path):
    experiment, made = bench.read([yaml], [f"out={tmp_path / 'out'}", "model.device=auto"])
    write_text(made.folder / "config.yaml", config.to_yaml(experiment))
    Worker("bench", str(made.folder), "cpu", 1)()
    assert pictures(made) == pictures(whole)
    assert not any(record["error"] for record in bench.score(made, Scorer.of(made.protocol, {})))


def test_cut_short_anywhere_it_goes_on_to_the_same_parquet(run, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    _, records = run("a", "bench.only=plain")
    write_parquet(tmp_path / "whole.parquet", records)
    dice, cuts = random.Random(0), 0
    for _ in range(4):
        left = [dice.randrange(40)]

        def fragile(*args, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise interrupt.Interrupted(signal.SIGTERM)
            return replacing(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr("masafusion_lab.runs.replacing", fragile)
            try:
                run("cut", "bench.only=plain", fresh=True)
            except interrupt.Interrupted:
                cuts += 1
    assert cuts >= 3
    _, again = run("cut", "bench.only=plain", fresh=True)
    write_parquet(tmp_path / "cut.parquet", again)
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_case_that_fails_is_on_record_and_stops_no_other(run, yaml, monkeypatch):
    edit, fails = phases.edit, {"on": True}

    def fragile(lab, cases, folder, **options):
        if fails["on"] and any(case.id.endswith("-1-" + case.kind) and case.session for case in cases):
            raise ArithmeticError("not finite")
        return edit(lab, cases, folder, **options)

    monkeypatch.setattr(phases, "edit", fragile)
    monkeypatch.setattr(bench, "_together", lambda row: 2)  # as on a GPU
    made, records = run("a", fresh=True)
    failed = {(r["row"], r["turn"], r["setting"]): r["error"] for r in records if r["error"]}
    assert failed == {
        (row, turn, setting): why
        for row in made.rows
        for turn, setting, why in (
            (1, "single", "ArithmeticError: not finite"),
            (1, "multi", "ArithmeticError: not finite"),
            (2, "multi", "turn 1 of its session has given no picture"),
            (3, "multi", "turn 2 of its session has given no picture"),
        )
    }
    assert all(np.isnan(r["l1"]) for r in records if r["error"])
    found = tables.tables(records, made.protocol)
    assert found[0].failed == dict.fromkeys(made.rows, 1)
    assert "Not edited: plain 1" in tables.caption(found[0])
    assert {p.failed for p in publish.progress(made).values()} == {3}
    fails["on"] = False
    _, again = run("a")
    assert not any(r["error"] for r in again)
    assert not list(made.folder.rglob("error.json"))


def test_a_row_whose_model_is_not_there_is_na_with_the_reason(run):
    words = "bench.rows.gone=model.path=/nowhere/at/all method.name=plain"
    made, records = run("a", words)
    gone = [r for r in records if r["row"] == "gone"]
    assert all("no such folder" in r["error"] for r in gone)
    (text,) = [row for name, row in zip(made.rows, tables.cells(tables.tables(records, made.protocol)[0]), strict=True)
               if name == "gone"]  # fmt: skip
    assert {cell for cell, _ in text} == {"n/a"}


def test_what_is_done_is_kept_though_its_model_cannot_be_read_any_more(run, monkeypatch):
    def gone(*args, **options):
        raise InputError("model.path: the hub cannot be reached")

    monkeypatch.setattr(bench, "build", gone)
    _, records = run("a", "bench.sessions=2")
    assert {record["error"] for record in records} == {"", "model.path: the hub cannot be reached"}
    assert sum(not record["error"] for record in records) == 2 * (1 + 2 * TURNS)


def test_a_full_disk_ends_the_run_instead_of_failing_every_case(run, monkeypatch):
    def full(*args, **options):
        with explained(Path("/tmp/x")):
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(phases, "edit", full)
    with pytest.raises(InputError, match="disk is full"):
        run("a", fresh=True)


def test_other_settings_are_never_mixed_with_what_is_there(run, yaml, tmp_path):
    made, before = run("a")
    guided = "bench.rows.plain=method.name=plain inversion.name=ddim method.guidance=2"
    _, other = bench.read([yaml], [guided, f"out={made.folder}"])
    scorer = Scorer.of(other.protocol, {})
    stale = [r for r in bench.score(other, scorer) if r["row"] == "plain"]
    assert {r["error"] for r in stale} == {"edited under other settings; run the benchmark again"}
    _, again = run("a", guided)
    assert not any(r["error"] for r in again)
    assert [r["l1"] for r in again if r["row"] == "plain"] != [r["l1"] for r in before if r["row"] == "plain"]
    assert [r["l1"] for r in again if r["row"] != "plain"] == [r["l1"] for r in before if r["row"] != "plain"]


def test_an_encoder_that_cannot_be_had_makes_its_columns_na_and_no_other(run, tmp_path):
    scorer = Scorer.of(PROTOCOLS["picturebook"], {"clip": str(tmp_path / "none"), "dino": str(tmp_path / "none")})
    made, records = run("a", "bench.only=plain", scorer=scorer)
    assert all(np.isnan(r["clip_i"]) and np.isnan(r["dino"]) and np.isfinite(r["l1"]) for r in records)
    (table, *_) = tables.tables(records, made.protocol)
    ((*_, (rank, _)),) = tables.cells(table)
    assert rank == "1.00 [1.0, 1.0]"
    assert "CLIP-I is missing where: encoder" in tables.caption(table)
    line = tables.as_markdown([table]).splitlines()[4]
    assert line.count("n/a") == 3
    _, back = run("a", "bench.only=plain")
    assert all(np.isfinite(r["clip_i"]) for r in back)  # the numbers are filed under what made them


def test_a_target_picture_that_cannot_be_read_is_a_reason_and_not_the_end(run, tmp_path):
    made, before = run("a", "bench.only=plain")
    kept = {path: path.read_bytes() for path in made.folder.rglob("scores.json")}
    cases = [dataclasses.replace(case, truth=tmp_path / "it.png") for case in made.cases]
    made = dataclasses.replace(made, cases=cases)
    scorer = Scorer.of(made.protocol, {})
    records = bench.score(made, scorer)
    assert all(np.isnan(record["l1"]) and "it.png" in record["missing"] for record in records)
    assert "n/a" in tables.as_markdown(publish.publish(made, records, scorer))
    assert {path: path.read_bytes() for path in made.folder.rglob("scores.json")} == kept
    values = [[record["l1"] for record in before]]
    for shade in ("black", "white"):  # of a target picture that is another now no number is kept
        Image.new("RGB", (128, 128), shade).save(tmp_path / "it.png")
        values.append([record["l1"] for record in bench.score(made, scorer)])
    assert all(len(set(of_case)) == 3 for of_case in zip(*values, strict=True))


def test_rows_that_cannot_be_are_all_named_before_anything_is_made(yaml, tmp_path):
    words = ["bench.rows.a=method.name=plian", "bench.rows.b=method.gidance=3", "bench.rows.c='x"]
    words += ["bench.rows.d=bench.count=3"]
    with pytest.raises(InputError) as error:
        bench.read([yaml], [*words, f"out={tmp_path / 'out'}"])
    said = str(error.value)
    assert "4 of 6 rows cannot be used" in said
    assert "row 'd': bench.count=3: holds for all rows" in said
    assert "did you mean plain?" in said
    assert "did you mean method.guidance?" in said
    assert "No closing quotation" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"'nobody' is no row; they are plain, ours \(DI\)"):
        bench.read([yaml], ["bench.only=nobody"])
    with pytest.raises(InputError, match=r"bench\.turns=multi: there are no sessions"):
        bench.read([yaml], ["bench.turns=multi", "bench.sessions=0"])
    with pytest.raises(InputError, match=r"bench\.rows: missing"):
        bench.read([], ["bench.count=1", "bench.sessions=0"])


def test_the_tables_say_what_the_records_do(run):
    made, records = run("a")
    found = tables.tables(records, made.protocol)
    assert [t.title for t in found] == list(tables.BLOCKS)
    assert [t.cases for t in found] == [1 + TURNS, 1, TURNS]
    lines = list(csv.DictReader(tables.as_csv(found).splitlines()))
    for line in lines:
        if line["block"] == "single-turn" and line["measure"] == "l1":
            want = [r["l1"] for r in records if r["row"] == line["row"] and r["setting"] == "single"]
            assert float(line["mean"]) == pytest.approx(np.mean(want))
    final = [r for r in records if r["setting"] == "multi" and r["final"]]
    means = [
        float(line["mean"]) for line in lines if line["block"] == "multi-turn, final turn" and line["measure"] == "l2"
    ]
    assert means == pytest.approx([r["l2"] for r in final])
    markdown = tables.as_markdown(found)
    assert markdown.count("### ") == 3
    assert "ours (DI)" in markdown
    assert re.search(r"\*\*\d+\.\d{4}±", markdown)
    for width in (60, 80, 200):
        console = Console(width=width, file=StringIO())
        console.print(*tables.as_rich(found[0], width))
        text = console.file.getvalue()
        assert "…" not in text
        for row in tables.cells(found[0]):
            assert all(re.split("(?=±)| ", cell)[0] in text for cell, _ in row)


def test_the_page_shows_tables_plots_and_every_case_in_every_row_and_loads_nothing_else(run, monkeypatch):
    made, records = run("a")
    publish.publish(made, records, Scorer.of(made.protocol, {}))
    page = Page(made.folder / "report.html")
    cells = 2 * (1 + TURNS)
    assert sum(link.startswith("thumbs/") for link in page.links) == cells + 2 * (1 + TURNS)  # source and truth
    cases = [link for link in page.links if link.endswith("report.html")]
    assert len(cases) == cells
    assert all((made.folder / link).is_file() for link in page.links)
    assert not [link for link in page.links if ":" in link or link.startswith(("/", ".."))]
    apart = [float(number) for number in re.findall(r"test-\S+?[a-z]\D* → \D*?(\d+\.\d)\s", page.text)]
    assert apart == sorted(apart, reverse=True)
    assert len(apart) == 1 + TURNS
    monkeypatch.setattr(benchpage, "SHOWN", 1)
    monkeypatch.setattr(benchpage, "_plot", lambda *args: None)
    publish.publish(made, records, Scorer.of(made.protocol, {}))
    page = Page(made.folder / "report.html")
    assert len([link for link in page.links if link.endswith("report.html")]) == 2
    assert f"{TURNS} more cases are in the folder" in page.text


def test_what_a_row_costs_counts_inversions_that_another_row_left_in_the_store(run):
    made, _ = run(
        "a", "bench.rows.too=method.name=masafusion method.guidance=3 inversion.name=direct", "bench.sessions=0"
    )
    found = publish.cost(made)
    result = json.loads((made.place("ours (DI)", "single", made.cases[0]) / "result.json").read_text())
    other = json.loads((made.place("too", "single", made.cases[0]) / "result.json").read_text())
    assert (result["from_store"], other["from_store"]) == (False, True)
    edit = sum(spent for phase, spent in other["seconds"].items() if phase != "invert")
    assert found["too"] == pytest.approx(edit + result["seconds"]["invert"])
    assert found["ours (DI)"] == pytest.approx(sum(result["seconds"].values()))
    for row in ("ours (DI)", "too"):  # as an earlier version left them, with the inversion in the store before
        path = made.place(row, "single", made.cases[0]) / "result.json"
        result = json.loads(path.read_text()) | {"from_store": True}
        del result["inversion_seconds"]
        path.write_text(json.dumps(result))
    assert publish.cost(made).keys() == {"plain"}  # nobody timed that inversion


def test_what_a_row_costs_is_known_though_it_was_killed_between_inversion_and_edit(yaml, tmp_path, monkeypatch):
    _, made = bench.read([yaml], [f"out={tmp_path / 'a'}", f"store={tmp_path / 'store'}", "bench.sessions=0"])

    def killed(*args, **options):
        raise interrupt.Interrupted(signal.SIGKILL)

    for name in made.rows:
        with monkeypatch.context() as patch:
            patch.setattr(phases, "make", killed)  # the trainer
            with pytest.raises(interrupt.Interrupted):
                bench.edit(dataclasses.replace(made, rows={name: made.rows[name]}))
    bench.edit(made)
    for name in made.rows:
        result = json.loads((made.place(name, "single", made.cases[0]) / "result.json").read_text())
        assert result["from_store"]
        assert result["seconds"]["invert"] == 0
        edit = sum(result["seconds"].values())
        assert publish.cost(made)[name] == pytest.approx(edit + result["inversion_seconds"])
        assert publish.cost(made)[name] > edit
    publish.publish(made, bench.score(made, Scorer.of(made.protocol, {})), Scorer.of(made.protocol, {}))
    assert (made.folder / "plots/cost.png").is_file()


def test_a_damaged_result_is_missing_when_scored_and_made_again(run, caplog):
    made, _ = run("a")
    place = made.place("plain", "single", made.cases[0])
    whole = pictures(made)
    flip(place / "target.png")
    records = bench.score(made, Scorer.of(made.protocol, {}))
    assert [r["error"] for r in records if r["error"]] == [
        "target.png: is damaged: not what was written; run the benchmark again"
    ]
    assert publish.progress(made)["plain"].left == 1
    caplog.clear()
    bench.edit(made)
    assert [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()] == [
        f"{place / 'target.png'}: is damaged: not what was written; the case is made again"
    ]
    assert pictures(made) == whole


@pytest.fixture
def photographs(tmp_path):
    """A set of two files with a configuration of two rows over it."""
    from tests.edits import drawn

    (tmp_path / "set").mkdir()
    for n in range(2):
        drawn(shift=n).save(tmp_path / f"set/{n}.png")
    (tmp_path / "set/cases.csv").write_text("image,source,target\n0.png,a cat,a dog\n1.png,a cat,a red dog\n")
    words = ["bench.data=folder", f"bench.root={tmp_path / 'set/cases.csv'}", f"out={tmp_path / 'out'}", "size=48x32"]
    return [*words, "bench.count=2", "bench.turns=single", "bench.only=plain", f"store={tmp_path / 'store'}"]


def test_pictures_that_changed_since_are_refused_before_anything_is_computed(yaml, photographs, tmp_path):
    from tests.edits import drawn

    words = photographs
    _, made = bench.read([yaml], words)
    bench.edit(made)
    before = pictures(made)
    drawn(shift=9).save(tmp_path / "set/1.png")
    with pytest.raises(InputError, match=r"^1: image: changed since .*; write elsewhere .*force=true"):
        bench.read([yaml], words)
    with pytest.raises(InputError, match="image: changed since"):  # nor is it put on record as a failure
        bench.edit(made)
    assert pictures(made) == before
    assert not list(tmp_path.rglob("error.json"))
    _, forced = bench.read([yaml], [*words, "force=true"])
    bench.edit(forced)
    after = pictures(forced)
    assert [after[cell] == before[cell] for cell in before] == [True, False]
    bench.read([yaml], words)
    _, other = bench.read([yaml], [*words, "bench.rows.plain=method.name=plain method.guidance=2"])
    bench.edit(other)


def test_hostile_names_become_neither_markup_nor_formulas_nor_paths(yaml, tmp_path):
    text = yaml.read_text().replace("ours (DI)", "'=x<script>alert(1)</script>|/'")
    (tmp_path / "hostile.yaml").write_text(text)
    _, made = bench.read([tmp_path / "hostile.yaml"], [f"out={tmp_path / 'a'}", "bench.sessions=0"])
    bench.edit(made)
    records = bench.score(made, Scorer.of(made.protocol, {}))
    found = publish.publish(made, records, Scorer.of(made.protocol, {}))
    assert "script" not in Page(made.folder / "report.html").tags
    assert tables.as_csv(found).count("'=x") == (len(made.protocol.columns) + 1)
    assert {p.parent for p in (made.folder / "edits").iterdir()} == {made.folder / "edits"}


@pytest.fixture(scope="module")
def table(whole):
    """Its first table."""
    return tables.tables(bench.score(whole, Scorer.of(whole.protocol, {})), whole.protocol)[0]


@pytest.mark.parametrize("name", ["=1+1", "\t=1+1", "\r=1+1", "\n=1", "@x", "-1", "\uff1d1+1", "", "ours"])
def test_no_name_is_a_formula_in_the_table(table, name):
    table = dataclasses.replace(table, names=[name, *table.names[1:]])
    cells = {line[1] for line in csv.reader(io.StringIO(tables.as_csv([table]), newline=""))}
    assert (name if name in ("", "ours") else f"'{name.strip()}") in cells


@pytest.mark.parametrize(
    "name", ["a | b", "<img src=x>", "**bold**", "[x](y)", "`a`", "&lt;", "new\nline", "a\\", "_i_"]
)
def test_no_name_is_markup_in_the_table(table, name):
    table = dataclasses.replace(table, names=[name, *table.names[1:]], failed={name: 1})
    head, _, line, *rest = tables.as_markdown([table]).splitlines()[2:]
    bars = [re.sub(r"\\.", "", text).count("|") for text in (head, line)]
    assert bars[0] == bars[1]
    shown = re.sub(r"\\(.)", r"\1", line.split(" | ", 1)[0].removeprefix("| ")) if "|" not in name else name
    assert shown == " ".join(name.split())
    assert not re.search(r"(?<!\\)[<`]", line + "".join(rest).partition(tables.NOTE)[0])


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command in this process; its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["masafusion", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return command


def test_the_command_runs_reports_and_scores_anew(command, yaml, whole, tmp_path):
    words = ["bench", "--config", yaml, "out=b", "bench.sessions=0"]
    assert "not begun: plain, ours (DI)" in command(*words, "--status")[1]
    assert not (tmp_path / "b").exists()
    code, out, err = command(*words, "tracking.mode=offline")
    assert code == 0
    assert "single-turn" in out
    assert "given up" not in err
    (table,) = (tmp_path / "b" / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["columns"] == list(tables.FIELDS)
    for name in ("results.parquet", "table.md", "table.csv", "report.html", "config.yaml"):
        assert (tmp_path / "b" / name).is_file() or name == "results.parquet"
    status = command(*words, "--status")[1]
    assert re.search(r"ours \(DI\) +1 +0 +0", status)
    for path in (tmp_path / "b").rglob("scores.json"):
        path.unlink()
    before = (tmp_path / "b" / "table.csv").read_text()
    (tmp_path / "b" / "table.csv").unlink()
    code, out, err = command("score", "b")
    assert (code, (tmp_path / "b" / "table.csv").read_text()) == (0, before), err
    assert command("score", "nowhere")[0] == 2
    code, _, err = command(*words, "steps=1")
    assert code == 2
    assert "was begun under another configuration (steps: 2 there, 1 now)" in err
    assert command(*words, "bench.only=plain")[0] == 0  # a selection mixes nothing


def test_the_command_says_what_failed_and_ends_with_one(command, yaml, tmp_path):
    words = [
        "bench",
        "--config",
        yaml,
        "bench.sessions=0",
        "bench.only=plain",
        "bench.rows.plain=method.name=masafusion dilate=99",
    ]
    code, out, err = command(*words, "out=b")
    assert code == 1
    assert "1 edits are missing: " in err
    assert "the mask covers the whole picture" in err
    assert "n/a" in out


def test_quick_is_ten_cases_in_a_folder_of_its_own(yaml):
    experiment, made = bench.read([yaml], ["out=b"], quick=True)
    assert len(made.cases) == 10
    assert experiment.out == "b-quick"
    assert bench.read([yaml], [], quick=True)[0].out == "runs/bench-quick"


def test_two_benchmarks_in_one_folder_are_one_too_many(command, yaml, tmp_path):
    from filelock import FileLock

    (tmp_path / "b").mkdir()
    with FileLock(tmp_path / "b" / ".lock"):
        code, _, err = command("bench", "--config", yaml, "out=b")
    assert code == 2
    assert "is being written by process" in err


def rows_of(path):
    """The rows of a configuration, as words, and the methods that they name."""
    read = config.read_yaml(path)
    rows = {
        key.removeprefix("bench.rows."): shlex.split(text) for key, (_, text) in read.items() if "bench.rows." in key
    }
    methods = {name: next(word for word in words if word.startswith("method.name=")) for name, words in rows.items()}
    return rows, {name: word.partition("=")[2] for name, word in methods.items()}


BENCHMARKS = sorted(path for path in CONFIGS.glob("*.yaml") if "\nbench:" in path.read_text())


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_the_rows_of_a_benchmark_that_ships_have_only_settings_that_their_methods_have(path):
    rows, methods = rows_of(path)
    assert len(rows) == 10
    assert path.read_text().startswith(f"# masafusion bench --config configs/{path.name}")
    for name, words in rows.items():
        if methods[name] in METHODS:
            inversion = config.inversion(config.load([path], words))
            if methods[name] in ("plug_and_play", "masactrl"):  # whose source, as published, no guidance moves
                assert getattr(inversion, "guidance", 1) == 1


def test_table_1_of_the_picture_book_runs_on_a_case(tiny_networks, tmp_path):
    path = CONFIGS / "table1_picturebook.yaml"
    there = [name for name, method in rows_of(path)[1].items() if method in METHODS]
    words = [f"model.path={tiny_networks}", "model.device=cpu", "size=32", "steps=3"]
    words += ["bench.count=1", "bench.sessions=0"]
    places = [f"out={tmp_path / 'out'}", f"store={tmp_path / 'store'}", f"bench.only={','.join(there)}"]
    _, made = bench.read([path], [*words, *places])
    bench.edit(made)
    records = bench.score(made, Scorer.of(made.protocol, {}))
    assert [record["error"] for record in records] == [""] * len(there)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_leave_what_one_process_does(command, yaml, tmp_path):
    assert command("bench", "--config", yaml, "out=one")[0] == 0
    assert command("bench", "--config", yaml, "out=two", "launch.by=local", "launch.workers=2")[0] == 0
    one, two = ((tmp_path / name / "results.parquet").read_bytes() for name in ("one", "two"))
    assert one == two
    assert {path.name for path in (tmp_path / "two").glob("worker-*.log")} == {"worker-0.log", "worker-1.log"}


def test_what_no_worker_edits_is_missed(command, yaml, monkeypatch):
    monkeypatch.setitem(launch.LAUNCHERS, "local", lambda *args: (_ for _ in ()))
    code, _, err = command("bench", "--config", yaml, "out=b", "launch.by=local", "bench.sessions=0")
    assert code == 1
    assert "2 edits are missing: not edited yet" in err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_moments_it_loses_nothing_and_ends_with_the_same_bytes(command, yaml, tmp_path):
    began = time.monotonic()
    assert command("bench", "--config", yaml, "out=whole", "store=whole-store")[0] == 0
    seconds = time.monotonic() - began

    def ended():
        whole, cut = ((tmp_path / name / "results.parquet").read_bytes() for name in ("whole", "cut"))
        assert cut == whole

    survive(lambda: command("bench", "--config", yaml, "out=cut", "store=cut/store"), tmp_path / "cut", seconds, ended)


def test_the_cases_of_a_benchmark_are_the_sets(yaml):
    experiment, made = bench.read([yaml], [])
    assert [case.id for case in made.cases] == [case.id for case in sets.cases(experiment.bench, made.folder)]


def test_magicbrushs_own_script_finds_the_pictures_where_it_looks(run):
    made, _ = run("a", "bench.protocol=magicbrush", "bench.only=plain")
    publish.as_magicbrush(made)
    publish.as_magicbrush(made)
    ((name, turns),) = made.sessions.items()
    (folder,) = (made.folder / "magicbrush").iterdir()
    assert {p.name for p in (folder / name).iterdir()} == {
        f"{name}_{how}.png" for how in ("1", "inde_2", "inde_3", "iter_2", "iter_3")
    }
    for how, setting, turn in (("1", "single", 1), ("inde_2", "single", 2), ("iter_3", "multi", 3)):
        want = made.place("plain", setting, turns[turn - 1]) / "target.png"
        assert (folder / name / f"{name}_{how}.png").read_bytes() == want.read_bytes()
    fail_case(made.place("plain", "multi", turns[2]), "not finite", made.folder)  # its older picture lies there yet
    made.place("plain", "single", turns[1]).joinpath("target.png").unlink()
    publish.as_magicbrush(made)
    assert {p.stem.removeprefix(f"{name}_") for p in (folder / name).iterdir()} == {"1", "inde_3", "iter_2"}
    why = bench.error_of(made.place("plain", "single", turns[1]), made.rows["plain"])
    assert why == "target.png: is missing; run the benchmark again"


def test_a_network_that_no_measure_looks_through_is_refused(yaml):
    with pytest.raises(InputError, match=r"bench\.encoders\.klip: must be one of clip, dino, judge, lpips"):
        bench.read([yaml], ["bench.encoders.klip=somewhere"])
