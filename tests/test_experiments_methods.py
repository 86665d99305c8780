"""The table of all methods: every method is in it, it says what it will take, and nothing is made twice."""

import json
import shutil

import torch

from experiments import methods
from masafusion_lab import bench, config
from masafusion_lab.inversion import Ddim, Direct, EditFriendly, Npi
from masafusion_lab.methods import METHODS
from masafusion_lab.null_text import NullText
from tests.tiny import tiny_network


def test_every_method_has_a_row_of_settings_that_it_has():
    rows = methods.rows_of(METHODS, [])
    assert {name.split(" ")[0] for name in rows} == set(METHODS)
    steps = {name.split(" ")[0]: config.load(words=text.split()).steps for name, text in rows.items()}
    assert {name: n for name, n in steps.items() if n != 50} == {"instruct_pix2pix": 100, "hive": 100}
    assert "steps=" not in "".join(methods.rows_of(METHODS, ["steps=3"]).values())


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


def test_the_table_says_what_is_missing_and_later_makes_that_alone(tiny_root, tmp_path, capsys):
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


def test_what_a_benchmark_edits_at_once_on_the_cpu_is_said():
    one, many = (config.load(words=["model.device=cpu", "batch=8", f"bench.exact={how}"]) for how in ("true", "false"))
    assert (bench._together(one), bench._together(many)) == (1, 8)
