"""MagicBrush and PIE-Bench on small replicas in their published layouts, whole and damaged."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from experiments import figures
from masafusion_lab import InputError
from masafusion_lab.data import magicbrush, piebench
from masafusion_lab.data.case import Made
from masafusion_lab.data.pictures import open_mask, open_picture
from masafusion_lab.data.prepared import prepare
from masafusion_lab.data.sets import cases
from masafusion_lab.protocol import Bench
from masafusion_lab.scoring import pair

SIZE = (96, 64)
SESSIONS = {"30": 1, "139": 3}
SIZES = {"factor": 4, "multiple": 16, "native": 64}


def picture(shade):
    image = Image.new("RGB", SIZE, (shade, 90, 120))
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill=(200, shade, 30))
    return image


def mask(size=SIZE):
    """As MagicBrush's: the picture, transparent where the edit takes place."""
    image = picture(40).resize(size).convert("RGBA")
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 2 - 1, size[1] // 2 - 1), fill=(0, 0, 0, 0))
    return image


@pytest.fixture
def brush(tmp_path):
    """A test archive of two sessions, of one and of three turns."""
    root = tmp_path / "test"
    sessions, whole, local = {}, {}, {}
    for name, turns in SESSIONS.items():
        folder = root / "images" / name
        folder.mkdir(parents=True)
        picture(10).save(folder / f"{name}-input.png")
        whole[name] = {f"{name}-input.png": f"scene {name}"}
        local[name] = {}
        sessions[name] = []
        for k in range(1, turns + 1):
            picture(10 + 40 * k).save(folder / f"{name}-output{k}.png")
            mask((192, 128) if k == 2 else SIZE).save(folder / f"{name}-mask{k}.png")
            before = f"{name}-output{k - 1}.png" if k > 1 else f"{name}-input.png"
            sessions[name].append(
                {
                    "input": before,
                    "mask": f"{name}-mask{k}.png",
                    "output": f"{name}-output{k}.png",
                    "instruction": f"do {k}",
                }
            )
            whole[name][f"{name}-output{k}.png"] = f"scene {name} after {k}"
            local[name][f"{name}-output{k}.png"] = "" if k == 3 else f"thing {k}"
    for file, table in (("edit_sessions", sessions), ("global_descriptions", whole), ("local_descriptions", local)):
        (root / f"{file}.json").write_text(json.dumps(table))
    (root / "edit_turns.json").write_text(json.dumps([turn for turns in sessions.values() for turn in turns]))
    return root


@pytest.fixture
def pie(tmp_path):
    """A PIE-Bench of three pictures."""
    root, mapping = tmp_path / "pie", {}
    for k, (kind, runs) in enumerate((("1", [0, 1000]), ("9", [0, 512 * 512]), ("0", [262143, 9, 5000, 30]))):
        id = f"00000000000{k}"
        place = root / "annotation_images" / "0_random" / f"{id}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(50 * k).resize((512, 512)).save(place)
        mapping[id] = {
            "image_path": f"0_random/{id}.jpg",
            "original_prompt": "a [round] cat: on grass",
            "editing_prompt": "a [square] cat: on grass",
            "editing_instruction": "make it square",
            "editing_type_id": kind,
            "blended_word": "cat cat",
            "mask": runs,
        }
    (root / "mapping_file.json").write_text(json.dumps(mapping))
    return root


def change(path, edit):
    """Change a JSON file."""
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


def test_magicbrushs_turns_are_cases_with_the_descriptions_of_their_files(brush):
    found = magicbrush.read_sessions(brush)
    assert [(c.id, c.session, c.turn) for c in found] == [
        ("30-1", "30", 1), ("139-1", "139", 1), ("139-2", "139", 2), ("139-3", "139", 3)
    ]  # fmt: skip
    second = found[2]
    assert (second.source, second.target) == ("scene 139 after 1", "scene 139 after 2")
    assert (second.instruction, second.caption, found[3].caption) == ("do 2", "thing 2", "")
    assert second.image == found[1].truth
    assert np.array_equal(open_picture(second.truth), picture(90))


def test_the_region_is_where_magicbrushs_mask_is_transparent_at_whatever_size(brush):
    found = magicbrush.read_sessions(brush)
    for case in found:
        full = prepare(case, **SIZES).mask_full
        height, width = full.shape[-2:]
        want = torch.zeros_like(full)
        want[:, : height // 2, : width // 2] = 1
        assert torch.equal(full, want)


def test_what_a_score_reads_of_a_turn(brush, tmp_path):
    case = magicbrush.read_sessions(brush)[3]
    small = picture(200).resize((48, 32))
    small.save(tmp_path / "target.png")
    both = pair(case, tmp_path / "target.png")
    want = np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC), np.float32) / 255
    np.testing.assert_array_equal(both.at_truth.permute(1, 2, 0), want)
    assert both.edited.shape == (3, 32, 48)
    assert both.local == ""
    assert both.mask.mean() == 0.25


def test_magicbrushs_parquet_becomes_the_archives_layout(brush, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def stored(path):
        return {"bytes": path.read_bytes(), "path": path.name}

    rows = [
        {
            "img_id": name,
            "turn_index": k,
            "source_img": stored(brush / "images" / name / turn["input"]),
            "mask_img": stored(brush / "images" / name / turn["mask"]),
            "instruction": turn["instruction"],
            "target_img": stored(brush / "images" / name / turn["output"]),
        }
        for name, turns in json.loads((brush / "edit_sessions.json").read_text()).items()
        for k, turn in enumerate(turns, 1)
    ]
    rows[1:] = rows[:0:-1]  # the turns of a session in any order
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), hub / "data" / "dev-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"global_descriptions\.json: missing"):
        cases(Bench(data="magicbrush", root=str(hub)), tmp_path / "out")
    for name in ("global_descriptions.json", "local_descriptions.json"):
        (hub / name).write_bytes((brush / name).read_bytes())
    found = cases(Bench(data="magicbrush", root=str(hub)), tmp_path / "other")
    for one, other in zip(found, magicbrush.read_sessions(brush), strict=True):
        assert (one.id, one.source, one.target, one.caption) == (other.id, other.source, other.target, other.caption)
        for a, b in ((one.image, other.image), (one.truth, other.truth)):
            assert np.array_equal(open_picture(a), open_picture(b))
        assert np.array_equal(one.mask.make(), other.mask.make())


def test_all_that_is_missing_of_a_half_unpacked_archive_is_said_at_once(brush):
    (brush / "images" / "139" / "139-mask2.png").unlink()
    (brush / "images" / "30" / "30-output1.png").unlink()
    change(brush / "global_descriptions.json", lambda table: table["139"].pop("139-output3.png"))
    change(brush / "local_descriptions.json", lambda table: table.pop("30"))
    with pytest.raises(InputError) as error:
        magicbrush.read_sessions(brush)
    said = str(error.value)
    for part in (
        "30, turn 1: output='30/30-output1.png': no such file",
        "30, turn 1: has no local description of 30-output1.png",
        "139, turn 2: mask='139/139-mask2.png': no such file",
        "139, turn 3: has no global description of 139-output3.png",
    ):
        assert part in said


@pytest.mark.parametrize("name", ["edit_sessions.json", "global_descriptions.json", "local_descriptions.json"])
def test_a_missing_or_damaged_table_is_named_with_the_remedy(brush, name):
    (brush / name).write_text("{")
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        magicbrush.read_sessions(brush)
    (brush / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing; give bench.root=FOLDER"):
        magicbrush.read_sessions(brush)


def test_names_that_lead_out_of_the_set_are_refused(brush, pie):
    change(brush / "edit_sessions.json", lambda table: table["30"][0].update(input="../../../secret.png"))
    with pytest.raises(InputError, match="lies outside"):
        magicbrush.read_sessions(brush)
    change(brush / "edit_sessions.json", lambda table: table.update({str(brush / "images" / "30"): table.pop("30")}))
    with pytest.raises(InputError, match=r"images/30': is no name of a session"):  # a folder of results will have it
        magicbrush.read_sessions(brush)
    change(pie / "mapping_file.json", lambda table: table["000000000000"].update(image_path="/etc/hostname"))
    with pytest.raises(InputError, match="lies outside"):
        piebench.read_cases(pie)


def test_a_mask_without_transparency_is_an_error_when_it_is_read(brush):
    picture(10).save(brush / "images" / "30" / "30-mask1.png")
    case = magicbrush.read_sessions(brush)[0]
    with pytest.raises(InputError, match="has no transparency"):
        prepare(case, **SIZES)


def test_piebenchs_cases_have_plain_prompts_a_kind_and_their_mask(pie):
    found = piebench.read_cases(pie)
    assert [c.kind for c in found] == ["change object", "change style", "random"]
    assert (found[0].source, found[0].target) == ("a round cat: on grass", "a square cat: on grass")
    assert (found[0].instruction, found[0].truth, found[0].session) == ("make it square", None, None)
    assert open_picture(found[0].mask).size == (512, 512)


@pytest.mark.parametrize(
    ("entry", "words", "told"),
    [("cat dog", ["cat", "dog"], False), ("[cat] cat", ["cat", "cat"], False), ("", [], False), (None, [], False),
     ("cat", [], True), ("a cat dog", [], True)],
)  # fmt: skip
def test_piebenchs_blended_word_sets_the_local_blend_of_a_case(pie, caplog, entry, words, told):
    change(pie / "mapping_file.json", lambda table: table["000000000001"].update(blended_word=entry))
    case = piebench.read_cases(pie)[1]
    assert case.settings == dict(zip(("method.blend_source", "method.blend_target"), words, strict=False))
    assert ("000000000001: blended_word=" in caplog.text) == told


def test_what_piebench_edits_is_what_was_drawn_and_what_it_scores_has_the_border(pie, tmp_path):
    part, style, ends = piebench.read_cases(pie)
    assert style.mask is None  # nothing to keep: left to the method
    assert prepare(part, **SIZES).mask_full[0, -1].sum() == 0
    picture(3).resize((512, 512)).save(tmp_path / "target.png")
    found = [pair(case, tmp_path / "target.png").mask[0] for case in (part, style, ends)]
    assert [int(mask.sum()) for mask in found] == [4 * 511 + 1000 - 512 - 1, 512 * 512, 4 * 511 + 30]
    assert all(mask[-1].all() for mask in found)


def test_a_run_length_mask_is_decoded_as_published():
    def published(runs):  # their loop, one pixel after the other
        flat = [0] * (512 * 512)
        for i in range(0, len(runs), 2):
            for j in range(min(runs[i + 1], 512 * 512 - runs[i])):
                flat[runs[i] + j] = 1
        mask = np.array(flat).reshape(512, 512)
        mask[0, :] = mask[-1, :] = mask[:, 0] = mask[:, -1] = 1
        return mask

    for runs in ([], [600, 40, 5000, 3], [262143, 90], [1030, 0, 1029, 2]):
        assert np.array_equal(piebench.decode(runs), published(runs))


def test_encoded_again_a_mask_is_the_same_but_for_its_border():
    inside = np.zeros((512, 512), np.uint8)
    inside[100:140, 200:260] = 1
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.ravel(), [0]])))
    runs = [int(n) for start, end in zip(edges[::2], edges[1::2], strict=True) for n in (start, end - start)]
    found = piebench.decode(runs)
    assert np.array_equal(found[1:-1, 1:-1], inside[1:-1, 1:-1])
    assert found.sum() == inside.sum() + 4 * 511


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda e: e.pop("editing_prompt"), "has no editing_prompt"),
        (lambda e: e.update(mask=[1, 2, 3]), "mask is no list of starts and lengths"),
        (lambda e: e.update(mask=[-1, 2]), "mask is no list of starts and lengths"),
        (lambda e: e.update(editing_type_id="12"), "editing_type_id=12"),
        (lambda e: e.update(image_path="0_random/none.jpg"), "no such file"),
    ],
)
def test_what_is_wrong_with_a_case_of_piebench_is_said_with_its_id(pie, edit, said):
    change(pie / "mapping_file.json", lambda table: edit(table["000000000001"]))
    with pytest.raises(InputError, match="000000000001: .*" + said):
        piebench.read_cases(pie)


def test_an_id_that_is_there_twice_is_refused(pie, brush):
    text = (pie / "mapping_file.json").read_text()
    (pie / "mapping_file.json").write_text(text.replace("000000000001", "000000000000"))
    with pytest.raises(InputError, match="'000000000000' twice"):
        piebench.read_cases(pie)
    text = (brush / "edit_sessions.json").read_text()
    (brush / "edit_sessions.json").write_text(text.replace('"139"', '"30"'))
    with pytest.raises(InputError, match="'30' twice"):
        magicbrush.read_sessions(brush)


def test_of_a_set_the_first_cases_sessions_and_kinds_are_taken(brush, pie, tmp_path):
    some = cases(Bench(data="magicbrush", root=str(brush), sessions=1), tmp_path)
    assert [case.id for case in some] == ["30-1"]
    some = cases(Bench(data="piebench", root=str(pie), count=1, kinds=["random"]), tmp_path)
    assert [case.id for case in some] == ["000000000002"]
    with pytest.raises(InputError, match=r"'style' is none of change object, change style, random"):
        cases(Bench(data="piebench", root=str(pie), kinds=["random", "style"]), tmp_path)
    with pytest.raises(InputError, match=r"'pose' is none of this set, which has none"):
        cases(Bench(data="magicbrush", root=str(brush), kinds=["pose"]), tmp_path)
    figure = figures.Figure("fig", {"a": "method.name=plain"}, kinds=("pose",))
    for data, root, last in (("magicbrush", brush, "139-1"), ("piebench", pie, "000000000001")):
        made = figures.read(figure, tmp_path, 2, [f"bench.data={data}", f"bench.root={root}"])
        assert (len(made.cases), made.cases[-1].id) == (2, last)
    book = cases(Bench(count=9, sessions=2), tmp_path)
    assert len(book) == 9 + 6
    assert {case.kind for case in book[:8]} == {
        "add", "replace", "remove", "move", "recolour", "pattern", "pose", "background"
    }  # fmt: skip
    assert all(case.drawn is not None for case in book)


@pytest.mark.parametrize(
    ("bench", "said"),
    [
        (Bench(), "bench.count, bench.sessions: the picture-book world has no end"),
        (Bench(count=1, sessions=0, kinds=["grow"]), "'grow' is none of"),
        (Bench(count=0, sessions=0), "no cases are left"),
        (Bench(data="magicbrush"), "bench.root=: no such folder"),
        (Bench(data="piebench", root="nowhere"), "bench.root=nowhere: no such folder"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(bench, said, tmp_path):
    with pytest.raises(InputError, match=said):
        cases(bench, tmp_path)


def test_a_condition_is_drawn_from_the_target_picture_once(brush, tmp_path):
    found = cases(Bench(data="magicbrush", root=str(brush), hint="canny"), tmp_path)
    drawn = prepare(found[1], **SIZES).hints["canny"]
    assert drawn.max() == 1
    (file,) = (tmp_path / "hints").iterdir()
    Image.new("L", SIZE, 77).save(file)
    assert prepare(found[1], **SIZES).hints["canny"].mean().item() == pytest.approx(77 / 255, abs=1e-3)
    moved = cases(Bench(data="magicbrush", root=str(brush.rename(tmp_path / "moved")), hint="canny"), tmp_path)
    assert torch.equal(prepare(moved[1], **SIZES).hints["canny"], drawn)  # of another set's pictures it is another
    brush = tmp_path / "moved"
    with pytest.raises(InputError, match=r"bench.hint=sketch: .*pidinet=FILE"):
        cases(Bench(data="magicbrush", root=str(brush), hint="sketch"), tmp_path)


def test_bytes_stored_as_a_picture_of_another_kind_are_not_opened(tmp_path):
    path = tmp_path / "mask.png"
    out = io.BytesIO()
    picture(3).save(out, "BMP")
    path.write_bytes(out.getvalue())
    with pytest.raises(InputError, match=r"mask.png: is not a picture"):
        open_mask(Made(str(path), lambda: magicbrush.transparent(path)))
