"""`masafusion attend` and its callback: what is left in a case's folder, what loggers are told, and when it is done."""

import json
import logging
import sys
from pathlib import Path

import pytest
from PIL import Image

from masafusion_lab import cli, phases, tracking
from masafusion_lab.callbacks import Attend
from masafusion_lab.maps import Attention
from masafusion_lab.watch import Watch
from tests.edits import case, drawn
from tests.edits import lab as make_lab
from tests.test_tracking import no_key, settings  # noqa: F401

FIGURES = ("attention_words.png", "attention_self_attention.png", "attention_interference.png")


@pytest.fixture
def attend(monkeypatch, capsys, tmp_path, tiny_root):
    """Run `masafusion attend` on a small picture; its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    drawn().save("pic.png")
    words = [
        f"model.path={tiny_root}",
        "image=pic.png",
        "size=48x32",
        "steps=2",
        "tracking.mode=off",
        "out=run",
        "store=store",
    ]

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["masafusion", "attend", *words, *argv])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


EDIT = ("source=a cat", "target=a red dog", "box=6,6,30,26", "method.hint_until=0")


def test_figures_maps_and_page_are_left_beside_the_edit(attend, tmp_path):
    code, out, err = attend(*EDIT, "--bins", "1")
    assert (code, out) == (0, "run/attention.html\n"), err
    for name in ("target.png", "result.json", "attention.html", *FIGURES):
        assert (tmp_path / "run" / name).is_file()
    assert Image.open(tmp_path / "run" / FIGURES[0]).width == 1440
    assert Attention.load(tmp_path / "run/maps.safetensors").words().word("red dog").name == "red dog"
    assert (tmp_path / "run/attention.html").stat().st_size < 15e6


def test_what_was_seen_already_is_not_looked_at_again_but_under_other_settings(attend, tmp_path):
    attend(*EDIT, "--bins", "1")
    before = (tmp_path / "run/target.png").read_bytes()
    assert "done already" in attend(*EDIT, "--bins", "1")[2]
    assert "done already" not in attend(*EDIT, "--bins", "2")[2]
    assert Attention.load(tmp_path / "run/maps.safetensors").facts["bins"] == [[0, 1], [1, 2]]
    assert (tmp_path / "run/target.png").read_bytes() == before


@pytest.mark.parametrize("region", [(), ("box=6,6,30,26",)], ids=["no region", "region"])
def test_a_picture_that_is_only_inverted_needs_no_target(attend, tmp_path, region):
    code, _, err = attend("source=a cat on grass", "method.name=replay", *region)
    assert code == 0, err
    assert (tmp_path / "run" / FIGURES[2]).exists() == bool(region)
    assert list(Attention.load(tmp_path / "run/maps.safetensors").facts["latents"]) == ["source"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--steps", "5:"), "steps 5:: the run has steps 0 to 1"),
        (("--layers", "40"), "layers 40:41: the model has layers 0 to 9"),
        (("--layers", "mid"), "--layers mid: give a range"),
        (("--limit-gb", "0"), "GB, but 0 are allowed"),
    ],
)
def test_what_cannot_be_watched_is_one_line_and_leaves_nothing(attend, tmp_path, wrong, said):
    code, _, err = attend(*EDIT, *wrong)
    assert code == 2
    assert said in err
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "store").rglob("*.safetensors"))  # nothing was inverted


def test_wandb_is_told_figures_a_table_of_words_and_curves(tiny_root, tmp_path):
    folder, cases = tmp_path / "run", [case("a"), case("b", shift=2), case("c", shift=4)]
    lab = make_lab(tiny_root, tmp_path / "store")
    with tracking.recording(settings(), folder) as loggers:
        folders = phases.edit(lab, cases, folder, loggers=loggers, callbacks=[Attend(Watch(bins=1), every=2)])
        tracking.log_curves(loggers[0], "none", [], {"a": []}, step=0)
        assert not loggers[0].broken
    assert [(f / FIGURES[0]).exists() for f in folders] == [True, False, True]
    media = next(folder.glob("wandb/offline-run-*")) / "files/media"
    for name in FIGURES:
        assert len(list(media.glob(f"images/attention/{Path(name).stem.removeprefix('attention_')}_*.png"))) == 2
    tables = [json.loads(path.read_text()) for path in media.rglob("*.table.json")]
    words = next(table for table in tables if "word" in table["columns"])
    assert words["columns"] == ["case", "branch", "word", "map", "highest share", "share outside A"]
    assert {row[1] for row in words["data"]} == {"S", "I_out", "I_in", "T_out", "T_in"}
    assert {"⟨start⟩", "cat", "grass", "⟨padding⟩"} <= {row[2] for row in words["data"]}
    assert all(0 < row[4] <= 1 and 0 < row[5] < 1 for row in words["data"])
    curves = next(table for table in tables if "word" not in table["columns"])
    assert len(curves["data"]) == 4  # four curves of one look


def test_attention_is_off_unless_asked_for(tiny_root, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        (folder,) = phases.edit(make_lab(tiny_root, tmp_path / "store"), [case()], tmp_path / "run")
    assert not list(folder.glob("attention*"))
    assert settings().tracking.attention == 0
