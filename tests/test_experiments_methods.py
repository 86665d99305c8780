"""The table of all methods: every method is in it, it says what it will take, and nothing is made twice."""

import json
import shutil

import pytest
import torch

from experiments import methods
from masafusion_lab import bench, config, phases
from masafusion_lab.data import picturebook
from masafusion_lab.inversion import Ddim, Direct, EditFriendly, Npi
from masafusion_lab.methods import METHODS
from masafusion_lab.null_text import NullText
from tests.tiny import tiny_network


def test_every_method_has_a_row_of_settings_that_it_has():
    rows = methods.rows_of(METHODS, [])
    assert {name.split(" ")[0] for name in rows} == {*METHODS, "glide_inpaint", "no_adapter_first_20"}
    steps = {name.split(" ")[0]: config.load(words=text.split()).steps for name, text in rows.items()}
    assert {name: n for name, n in steps.items() if n != 50} == {"instruct_pix2pix": 100, "hive": 100}
    assert " steps=" not in "".join(methods.rows_of(METHODS, ["steps=3"]).values())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which inversions are found again."""
    return tmp_path_factory.mktemp("picturebook")


PAIRS = [(n, its) for n in METHODS for its in (phases.INVERSIONS if METHODS[n]().needs.inversion else ["none"])]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "inversion"), PAIRS)
def test_every_method_runs_on_the_picture_book_model_with_every_inversion(place, name, inversion):
    words = [f"method.name={name}", "model.device=cpu", "steps=3", "batch=2", f"store={place / 'store'}"]
    words += [f"inversion.name={inversion}"] if inversion != "none" else []
    words += ["inversion.inner_steps=1"] if inversion == "null_text" else []
    cases, lab = list(picturebook.cases("test", 2)), phases.build(config.load(words=words))
    for folder in phases.edit(lab, cases, place / f"{name} {inversion}"):
        result = json.loads((folder / "result.json").read_text())
        assert (result["method"]["name"], result["inversion"]["name"]) == (name, inversion)


def test_the_rows_of_an_inversion_are_those_that_it_asks_for(tiny):
    asked, eps = [], tiny.eps
    tiny.eps = lambda x, *args, **how: asked.append(len(x)) or eps(x, *args, **how)
    x0, schedule = torch.randn(1, 4, 8, 8), tiny.schedule(3)
    for inversion, rows in (
        (Direct(), 3),
        (Direct(inverse_guidance=2), 6),
        (Ddim(), 3 + 6),
        (Npi(), 3 + 3),
        (Npi(interpolation=0.5), 3 + 6),
        (EditFriendly(), 0),
    ):
        asked.clear()
        inversion.invert(tiny, x0, tiny.embed(["a cat"]), tiny.embed([""]), schedule)
        assert methods.inversion_rows(inversion, 3) == sum(asked) == rows
    assert methods.inversion_rows(NullText(), 50) == 1700  # as the paper's own timing bears out


def test_the_table_says_what_is_missing_and_later_makes_that_alone(tiny_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(phases, "told_apart", lambda *_: None)  # the tiny model reads these captions letter by letter
    root = shutil.copytree(tiny_root, tmp_path / "model")
    words = [f"model.path={root}", "model.device=cpu", "size=32", "steps=2", f"store={tmp_path / 'store'}"]
    places = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json")]

    def table():
        methods.main(["--cases", "2", "--only", "sdedit,hive", *places, *words])
        made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("result.json")}
        return json.loads((tmp_path / "rows.json").read_text()), made, capsys.readouterr().out

    (sdedit, hive), made, said = table()
    assert "4 edits of 2 rows x 2 cases are left: 16 UNet rows" in said
    assert "hive none: 2 of 2 edits are missing: " in said
    assert list(sdedit) == list(hive) == "method inversion l1 edit_success keep_psnr seconds rows".split()
    assert (sdedit["rows"], hive["rows"], len(made)) == (2, None, 2)
    tiny_network(root, "hive", 8)
    (again, hive), both, said = table()
    assert "2 edits of 2 rows x 2 cases are left: 12 UNet rows" in said
    assert (again, hive["rows"], len(both)) == (sdedit, 6, 4)
    assert both.items() >= made.items()


def test_an_edit_without_a_value_is_left_out_and_said():
    """Pasted pixels outside the region are the source's own: their PSNR is infinite."""
    usual = {"l1": 0.1, "done": 1.0, "psnr_area": 20.0, "missing": ""}
    pasted = usual | {"psnr_area": float("nan"), "missing": "psnr_area: is inf"}
    values, left_out = methods.measured([usual, pasted])
    assert values == {"l1": [0.1, 0.1], "edit_success": [1.0, 1.0], "keep_psnr": [20.0]}
    assert left_out == ["keep_psnr of 1 of 2 edits is left out: psnr_area: is inf"]


def test_a_setting_that_is_none_is_one_line(capsys):
    with pytest.raises(SystemExit):
        methods.main(["stepz=3"])
    assert "unknown key; did you mean steps" in capsys.readouterr().err


def test_what_a_benchmark_edits_at_once_on_the_cpu_is_said():
    one, many = (config.load(words=["model.device=cpu", "batch=8", f"bench.exact={how}"]) for how in ("true", "false"))
    assert (bench._together(one), bench._together(many)) == (1, 8)
