"""The annotation lab without a browser: what each press does, what goes over the wire, and attacks on both."""

import asyncio
import base64
import json
import threading
import time
import zipfile
import zlib
from dataclasses import fields as fields_of
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageOps, ImageStat

from masafusion_lab import InputError, cli, config, phases, request
from masafusion_lab.annotate import canvas_size, from_url, read_drawings, to_url
from masafusion_lab.data.annotated import MANIFEST
from masafusion_lab.maps import Attention
from masafusion_lab.methods import METHODS
from masafusion_lab.region import Region
from masafusion_lab.runs import read_json
from masafusion_lab.web import album, form, handlers, views
from masafusion_lab.web.desk import Job
from masafusion_lab.web.studio import Studio, brought
from tests.edits import SIZE, Calls, drawn, sent, upload
from tests.test_results import flip

EVIL = '<img src=x onerror=alert(1)>"${1}{{2}}'


def heard(asynchronous):
    """All that comes of it."""

    async def all_of_it():
        return [news async for news in asynchronous]

    return asyncio.run(all_of_it())


def ran(studio, token, picture, drawing, *texts, **changes):
    """All that the page is told of a run."""
    fields = list(form.fields(studio.experiment))
    values = [changes.get(field.key.name.replace(".", "_"), field.value) for field in fields]

    said = (*texts, *[""] * (3 - len(texts)))
    return heard(handlers.run(studio, fields, token, picture, drawing, "sketch", *said, *values))


def test_who_comes_finds_the_picture_that_the_lab_was_started_with_ready_to_run(studio):
    token, picture, drawing, source, target, _, kind, cards, _ = handlers.arrive(studio, "")
    assert len(token) > 20
    assert Path(picture).name == "cat.png"
    assert Path(picture).is_relative_to(studio.person(token))
    assert (source, target, kind) == ("a cat on grass", "a red dog on grass", "sketch")
    assert drawing["put"]["region"]
    assert "No runs yet" in cards
    assert handlers.arrive(studio, token)[0] == token


def test_a_run_that_was_damaged_shows_no_pictures_but_what_is_damaged(studio):
    token, picture, *_ = handlers.arrive(studio, "")
    ran(studio, token, picture, sent(), "a cat on grass", "a red dog on grass")
    (past,) = studio.past(token)
    flip(past.folder / "target.png")
    (past,) = studio.past(token)
    assert not past.done
    assert studio.finished(token, past.folder.name) is None
    assert "target.png: is damaged: not what was written" in views.cards([past])


def test_a_run_is_a_folder_like_the_command_lines_that_can_be_run_again_to_the_same_bytes(
    studio, tmp_path, monkeypatch
):
    token, picture, *_ = handlers.arrive(studio, "")
    news = ran(studio, token, picture, sent(), "a cat on grass", "a red dog on grass")
    *_, facts, download, name, figures, _, cards, chosen = news[-1]
    (past,) = studio.past(token)
    assert past.state["state"] == "done"
    assert past.result["case"] == "cat"
    assert past.result["size"] == [48, 32]
    again = phases.build(config.load([past.folder / "config.yaml"]))
    (folder,) = phases.edit(again, request.cases_of(config.load([past.folder / "config.yaml"])), tmp_path / "again")
    assert (folder / "target.png").read_bytes() == (past.folder / "target.png").read_bytes()
    assert (folder / "mask.png").read_bytes() == (past.folder / "mask.png").read_bytes()
    assert {path.name for path in folder.iterdir()} <= {path.name for path in past.folder.iterdir()}
    assert "reconstruction" in facts
    assert past.folder.name in cards
    assert chosen["value"] == name == past.folder.name
    assert not figures["visible"]
    with zipfile.ZipFile(download["value"]) as archive:
        assert f"{past.folder.name}/target.png" in archive.namelist()


def test_the_inversion_is_reused_when_only_the_rest_changes_and_progress_is_told(studio):
    token, picture, *_ = handlers.arrive(studio, "")
    first = ran(studio, token, picture, sent(), "a cat on grass", "a red dog on grass")
    second = ran(studio, token, picture, sent((6, 6, 20, 20)), "a cat on grass", "a hat on grass", seed="1")
    assert "<progress" in first[0][0]
    assert "which was there already" not in first[-1][6]
    assert "which was there already" in second[-1][6]
    names = [past.folder.name for past in studio.past(token)]
    assert len(names) == 2
    assert handlers.look(studio, token, names[1])[0]["visible"]
    assert not handlers.look(studio, token, f"../{names[1]}")[0]["visible"]
    assert not handlers.look(studio, "another", names[1])[0]["visible"]


def test_null_text_inversion_tells_how_far_it_is(studio, monkeypatch):
    token, picture, *_ = handlers.arrive(studio, "")
    said = []
    monkeypatch.setattr(Job, "tell", lambda job, *news: said.append(news))
    news = ran(studio, token, picture, sent(), "a cat", "a dog", inversion_name="null_text", inversion_inner_steps="3")
    assert "null_text inversion" in news[-1][6]
    assert [done for what, done, total in said if (what, total) == ("null-text inversion", 6)] == [1, 2, 3, 4, 5, 6]


def test_the_attention_of_a_run_is_looked_at_when_that_is_asked_for_and_changes_nothing_else_of_it(studio):
    token, picture, *_ = handlers.arrive(studio, "")
    ran(studio, token, picture, sent(), "a cat", "a red dog")
    folder = studio.past(token)[0].folder
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}
    news = heard(handlers.attend(studio, token, folder.name))
    assert "<progress" in news[0][-1]
    *_, download, name, figures, said = news[-1]
    assert said.strip() == ""
    assert (name, len(figures["value"])) == (folder.name, 3)
    assert Attention.load(folder / "maps.safetensors").words().word("red dog").name == "red dog"
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}
    assert before.items() <= after.items()
    with zipfile.ZipFile(download["value"]) as archive:
        assert f"{folder.name}/attention.html" in archive.namelist()
    calls = Calls(studio.model)
    assert heard(handlers.attend(studio, token, folder.name))[-1][-2]["visible"]  # there already
    assert calls.count == 0
    assert "is no finished run" in heard(handlers.attend(studio, "another", folder.name))[-1][-1]


def test_looking_at_attention_is_called_off_like_a_run_and_refused_if_another_model_made_it(studio, monkeypatch):
    token, picture, *_ = handlers.arrive(studio, "")
    ran(studio, token, picture, sent(), "a cat", "a dog")
    past = studio.past(token)[0]
    step = studio.model.unet.register_forward_pre_hook(lambda *_: handlers.cancel(studio, token))
    assert "Cancelled" in heard(handlers.attend(studio, token, past.folder.name))[-1][-1]
    step.remove()
    assert (studio.past(token)[0].state, studio.past(token)[0].result) == (past.state, past.result)
    assert not (past.folder / "attention.html").exists()
    monkeypatch.setattr(studio.model, "digest", lambda parts=(): "another")
    assert "another model" in heard(handlers.attend(studio, token, past.folder.name))[-1][-1]
    assert studio.past(token)[0].result == past.result


def test_two_people_do_not_see_each_others_runs_and_hear_the_warnings_of_their_own(studio):
    one, picture, *_ = handlers.arrive(studio, "")
    assert "not read: " in ran(studio, one, picture, sent(), "a cat", "a dog " * 60)[-1][0]
    other, *_, cards, chosen = handlers.arrive(studio, "")
    assert other != one
    assert "No runs yet" in cards
    assert chosen["choices"] == []
    assert studio.person(one) != studio.person(other)
    assert studio.person("../../x").parent == studio.root


def test_a_cancelled_run_stops_within_a_step_and_says_so_in_its_folder(studio):
    token, picture, *_ = handlers.arrive(studio, "")
    studio.load().future.result()
    stopped = []
    step = studio.model.unet.register_forward_pre_hook(lambda *_: stopped.append(handlers.cancel(studio, token)))
    news = ran(studio, token, picture, sent(), "a cat", "a dog", steps="40")
    step.remove()
    assert "Cancelled" in news[-1][0]
    assert len(stopped) == 1
    (past,) = studio.past(token)
    assert (past.state["state"], past.done) == ("interrupted", False)
    assert "interrupted" in news[-1][-2]
    assert ran(studio, token, picture, sent(), "a cat", "a dog")[-1][3]["visible"]


@pytest.mark.parametrize(
    ("drawing", "texts", "changes", "said"),
    [
        (sent(), ("a cat", ""), {}, "target: missing"),
        (sent(region=None), ("a cat", "a dog"), {}, "acts inside a region"),
        (sent(), ("a cat", "a dog"), {"steps": "0"}, "steps=0: must be 1 to 999"),
        (sent(), ("a cat", "a dog"), {"method_preserve_layers": "x"}, "names no layers"),
        (sent(), ("a cat", "a dog"), {"size": "50"}, "50 is not a multiple"),
        ({"region": "x", "sketch": "y"}, ("a cat", "a dog"), {}, "not a PNG"),
    ],
)
def test_what_cannot_be_run_is_said_in_place_and_leaves_no_run(studio, drawing, texts, changes, said):
    token, picture, *_ = handlers.arrive(studio, "")
    news = ran(studio, token, picture, drawing, *texts, **changes)
    assert said in news[-1][0]
    assert news[-1][1]["interactive"]
    assert studio.past(token) == []


def test_the_form_has_every_method_with_every_field_and_gives_the_words_of_those_chosen():
    experiment = config.load(words=["method.guidance=3", "steps=7", "inversion.name=null_text", "inversion.lr=0.1"])
    fields = list(form.fields(experiment))
    for name, cls in METHODS.items():
        its = {field.key.name: field for field in fields if field.of == f"method.name={name}"}
        assert set(its) == {f"method.{field.name}" for field in fields_of(cls)}
        assert all(field.key.doc for field in its.values())
    words = form.words(fields, [field.value for field in fields])
    assert config.load(words=words) == config.load(words=[*words])
    again = config.load(words=words)
    assert (again.method, again.inversion, again.steps) == (experiment.method, experiment.inversion, 7)
    values = ["plain" if field.key.name == "method.name" else field.value for field in fields]
    assert config.load(words=form.words(fields, values)).method == {"name": "plain", "guidance": 7.5, "null": "tuned"}


def test_region_and_sketch_come_from_the_picture_and_from_what_was_redrawn(studio):
    _, picture, *_ = handlers.arrive(studio, "")
    drawn_anew = handlers.outline(studio, picture, "canny")
    assert set(drawn_anew["put"]) == {"sketch"}
    redrawn = {"region": sent()["region"], "sketch": to_url(drawn("L", 8, canvas_size(*SIZE), outline=255))}
    assert handlers.compare(studio, picture, redrawn, "canny")["put"]["region"]
    same = {"region": redrawn["region"], "sketch": drawn_anew["put"]["sketch"]}
    with pytest.raises(gr.Error, match="show the same"):
        handlers.compare(studio, picture, same, "canny")
    shown, said = handlers.see(studio, picture, redrawn, "48x32", 0)
    assert "latent cells" in said
    assert shown["value"].size[0] % SIZE[0] == 0
    assert "Nothing is painted" in handlers.see(studio, picture, sent(region=None), "48x32", 0)[1]


def test_a_file_is_read_by_what_the_lab_was_told_and_a_drawing_as_it_is_drawn(studio):
    _, picture, *_ = handlers.arrive(studio, "")
    studio.experiment.region = Region(by="colour:#ff0000")
    red = Image.effect_noise(SIZE, 90).convert("RGB")
    red.paste((255, 0, 0), (4, 4, 20, 20))
    brought_in = {"as": "region", "uploads": [{"name": "red.png", "data": to_url(red)}]}
    laid = handlers.lay(studio, picture, brought_in)["put"]["region"]
    both = {"region": laid, "sketch": ""}
    assert "latent cells" in handlers.see(studio, picture, both, "48x32", 0)[1]


def test_text_with_markup_stays_text(studio):
    token, picture, *_ = handlers.arrive(studio, "")
    assert "<img" not in handlers.difference(studio, EVIL, "a cat")
    news = ran(studio, token, picture, sent(), EVIL, f"a dog {EVIL}")
    assert all("<img src=x" not in str(part) for part in news[-1])
    assert studio.past(token)[0].result["prompts"]["source"] == EVIL
    assert "<script" not in views.cards(studio.past(token))


def bomb(side=20_000):
    """A PNG of side x side pixels, a few dozen kB."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + b"\1\0\0\0\0"
    rows = zlib.compress(b"\0" * (side // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bomb(), "more than 50,000,000 pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "is not a picture"),
        (b"<html><script>alert(1)</script>", "is not a picture"),
        (b"", "is empty"),
        (b"x" * 20_000_100, "more than 20 MB"),
        (upload(drawn())["data"].encode()[40:400], "is not a picture"),
    ],
    ids=["400 megapixels", "SVG", "HTML", "empty", "too many bytes", "cut"],
)
def test_only_pictures_of_a_bearable_size_are_taken(studio, data, said):
    with pytest.raises(InputError, match=said) as error:
        brought({"name": "../../etc/cat.png", "data": "data:image/png;base64," + base64.b64encode(data).decode()})
    assert str(error.value).startswith("cat.png: ")
    with pytest.raises(gr.Error):
        handlers.bring(studio, "t", "", {"uploads": [{"name": "x", "data": "," + base64.b64encode(data).decode()}]})
    assert not studio.person("t").exists()


@pytest.mark.parametrize(
    "nonsense", [None, 3, "x", {}, {"uploads": 3}, {"uploads": [3]}, {"uploads": [{"name": 4, "data": "%"}]}]
)
def test_nonsense_is_refused_in_words(studio, nonsense):
    with pytest.raises(gr.Error):
        handlers.bring(studio, "t", "", nonsense)


def test_a_picture_is_kept_under_a_name_that_leads_nowhere(studio):
    for name in ("../../../etc/passwd", "/abs/x", "CON", ".hidden", "a" * 400, "\0", "", "käfer <b>.png"):
        path = Path(handlers.bring(studio, "t", "", {"uploads": [upload(drawn(), name)]})[0])
        assert path.is_relative_to(studio.person("t") / "pictures")
        assert path.is_file()


def test_a_set_is_annotated_and_goes_through_invert_and_bench(studio, tmp_path, tiny_root, monkeypatch, capsys):
    token, *_ = handlers.arrive(studio, "")
    assert "No pictures yet" in album.open_set(studio, token)[-2]
    two = [upload(drawn(shift=k), f"cat {k}.png") for k in (0, 4)]
    shown = album.add(studio, token, "", {"uploads": two})
    ids = shown[-1]["choices"]
    assert len(ids) == 2
    state = album.keep(studio, token, ids[0], sent(), "sketch", "a cat on grass", "a dog on grass", "")
    assert "1 done" in state
    assert album.open_set(studio, token)[0] == ids[1]  # taken up where it was left
    shown = album.turn(studio, token, 1, ids[1], sent(sketch=False), "sketch", "a cat", "a hat", "")
    assert shown[0] == ids[0]
    assert shown[3:5] == ("a cat on grass", "a dog on grass")
    assert "2 done" in shown[-2]
    manifest = studio.set_folder(token) / MANIFEST
    assert [sorted(json.loads(line)) for line in manifest.read_text().splitlines()] == [
        ["id", "image", "mask", "sketch", "source", "target"],
        ["id", "image", "mask", "source", "target"],
    ]
    words = f"model.path={tiny_root} size=48x32 steps=2 tracking.mode=off store={tmp_path / 'store'}".split()
    rows = "bench.rows.ours=method.hint_until=0"
    for command in (["invert", f"cases={manifest}"], ["bench", "bench.data=folder", f"bench.root={manifest}", rows]):
        monkeypatch.setattr("sys.argv", ["masafusion", *command, *words, f"out={tmp_path / command[0]}"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert end.value.code == 0, said.err
        if command[0] == "invert":
            assert said.out.count(": inverted") == 2
    results = [read_json(path) for path in (tmp_path / "bench").rglob("result.json")]
    assert [(result["case"] in ids, result["from_store"]) for result in results] == [(True, True)] * 2
    assert (tmp_path / "bench" / "table.md").is_file()
    with zipfile.ZipFile(album.download(studio, token)) as archive:
        assert f"set/{MANIFEST}" in archive.namelist()


def test_a_set_of_the_command_line_takes_no_pictures_from_the_page_and_no_foreign_names(studio, tmp_path):
    (tmp_path / "set").mkdir()
    drawn().save(tmp_path / "set" / "a.png")
    studio.experiment.cases = str(tmp_path / "set")
    assert album.open_set(studio, "t")[0] == "a"
    with pytest.raises(gr.Error, match="put pictures there"):
        album.add(studio, "t", "", {"uploads": [upload(drawn())]})
    for id in ("../../x", "b"):
        with pytest.raises(gr.Error, match="no picture of"):
            album.keep(studio, "t", id, sent(), "sketch", "a", "b", "")
    assert album.jump(studio, "t", 0, "../../x")[0] == "a"


def test_the_lab_starts_only_on_what_it_can_work_with(tmp_path):
    with pytest.raises(InputError, match="annotates a folder"):
        Studio(config.load(words=[f"cases={tmp_path / 'm.csv'}"]), [], [], tmp_path)


def test_what_is_only_looked_at_stays_as_it_was_in_a_set(studio, tmp_path):
    (tmp_path / "set").mkdir()
    drawn().save(tmp_path / "set" / "a.png")
    row = {"id": "a", "image": "a.png", "source": "a cat", "target": "a dog", "box": [4, 4, 20, 20]}
    manifest = tmp_path / "set" / MANIFEST
    manifest.write_text(json.dumps(row) + "\n")
    studio.experiment.cases = str(tmp_path / "set")
    looked, before = {**sent(sketch=False), "touched": []}, manifest.read_text()
    album.keep(studio, "t", "a", looked, "sketch", "a cat", "a dog", "")
    assert manifest.read_text() == before
    album.keep(studio, "t", "a", looked, "sketch", "a cat", "a hat", "")
    assert json.loads(manifest.read_text()) == {**row, "target": "a hat"}
    album.keep(studio, "t", "a", {**sent(), "touched": ["sketch"]}, "canny", "a cat", "a hat", "")
    assert set(json.loads(manifest.read_text())) == {*row, "canny"}
    album.keep(studio, "t", "a", {**sent(), "touched": ["region"]}, "canny", "a cat", "a hat", "")
    assert set(json.loads(manifest.read_text())) == {*row, "canny", "mask"} - {"box"}


def test_a_layer_from_a_file_is_brought_to_polarity_and_size_and_that_is_told(studio):
    _, picture, *_ = handlers.arrive(studio, "")
    negative = ImageOps.invert(drawn("L", size=(96, 64), outline=255))
    *_, laid = (part for part in handlers.bring(studio, "t", picture, {"as": "sketch", "uploads": [upload(negative)]})
                if isinstance(part, dict) and "put" in part)  # fmt: skip
    assert laid["said"] == (
        "the sketch is mostly white, so black lines on white: it is inverted. "
        "what is drawn is 96x64, the picture 48x32; it is brought to the picture's size"
    )
    lines = from_url(laid["put"]["sketch"], canvas_size(*SIZE))
    assert ImageStat.Stat(lines).mean[0] < 50
    shown = album.add(studio, "t", picture, {"as": "region", "uploads": [upload(drawn("L", fill=255))]})
    assert set(shown[2]["put"]) == {"region"}
    assert shown[2]["said"] == ""
    with pytest.raises(gr.Error, match="is not a picture"):
        handlers.bring(studio, "t", picture, {"as": "pose", "uploads": [{"name": "x", "data": ",PGI+"}]})


def test_a_pose_is_a_hint_where_the_model_has_its_adapter(studio, tmp_path):
    skeleton = drawn(fill="red", outline="green").convert("RGB")
    ImageDraw.floodfill(skeleton, (0, 0), (0, 0, 0))
    skeleton.save(tmp_path / "pose.png")
    studio.experiment.pose = str(tmp_path / "pose.png")
    token, picture, drawing, *_ = handlers.arrive(studio, "")
    drawings = {**sent(sketch=False), "pose": drawing["put"]["pose"]}
    kinds, shown, _ = handlers.able(studio, "sketch")
    assert shown["pose"]
    assert kinds["choices"] == ["sketch"]
    assert handlers.able(studio, "canny")[0]["choices"] == ["sketch", "canny"]  # refused in words where it is run
    ran(studio, token, picture, drawings, "a cat", "a dog")
    (past,) = studio.past(token)
    assert "pose.png" in past.result["files"]
    kept = Path(config.load([past.folder / "config.yaml"]).pose)
    assert ImageChops.difference(Image.open(kept), skeleton).getbbox() is None
    assert not config.load([past.folder / "config.yaml"]).sketch


def test_a_method_finds_its_own_network(tiny_networks, tmp_path):
    drawn().save(tmp_path / "cat.png")
    words = f"image={tmp_path / 'cat.png'} model.path={tiny_networks} size=48x32 steps=2 tracking.mode=offline".split()
    words += ["tracking.logger=csv", f"store={tmp_path / 'store'}", "source=a cat"]
    studio = Studio(request.read(words, [], edits=False), words, [], tmp_path / "kept")
    token, picture, *_ = handlers.arrive(studio, "")
    for method, texts in (("masafusion_no_adapter", ("a cat", "a dog")), ("instruct_pix2pix", ("a cat", "", "a dog!"))):
        news = ran(studio, token, picture, sent(sketch=False), *texts, method_name=method)
        assert news[-1][3]["visible"], news[-1][0]
    runs = studio.past(token)
    assert [past.result["method"]["name"] for past in runs] == ["instruct_pix2pix", "masafusion_no_adapter"]
    assert all(list(past.folder.rglob("metrics.csv")) for past in runs)  # recorded as configured
    studio.desk.close()


def test_whoever_waits_is_told_for_what(studio):
    gate = threading.Event()
    studio.desk.submit("", lambda job: gate.wait(10))
    waiting = studio.desk.submit("a", lambda job: None)
    last = studio.desk.submit("b", lambda job: None)
    assert "loading the model" in views.progress(studio.desk, waiting)
    assert "waiting: 1 run before yours" in views.progress(studio.desk, last)
    job = Job("c", what="editing", done=5, total=20, began=time.monotonic() - 10)
    assert "step 5 of 20 · about 30 s left" in views.progress(studio.desk, job)
    gate.set()


def test_no_kind_of_hint_leads_out_of_the_folder(studio):
    _, picture, *_ = handlers.arrive(studio, "")
    with pytest.raises(InputError, match="is no hint of lines"):
        read_drawings(sent(), Image.open(picture), "../../x")
