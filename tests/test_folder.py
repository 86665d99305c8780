"""Folders and manifests, honest, mistaken and hostile."""

import csv
import json
import re
import time

import pytest
import yaml
from PIL import Image

from masafusion_lab import InputError
from masafusion_lab.data.folder import COLUMNS, read_cases

PROMPTS = ["a cat: on a mat", "yes", "007", "null", "${HOME}", "- {x}", "=cmd()", "a, \"b\" 'c'", "🦄\n<script>", " x "]


@pytest.fixture
def root(tmp_path):
    """A folder with three pictures, and a secret beside it."""
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "sub/c.png"):
        Image.new("RGB", (8, 8)).save(root / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    return root


def manifest(root, text, suffix):
    path = root / f"manifest{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(path):
    """What is said of a manifest, by line."""
    with pytest.raises(InputError) as caught:
        read_cases(path)
    return str(caught.value).split("\n  ")[1:]


def written(root, suffix, rows):
    """The rows as people's programs write them."""
    path = root / f"manifest{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        if suffix == ".csv":
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        elif suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            yaml.safe_dump(rows, file, allow_unicode=True)
    return path


def test_each_picture_of_a_folder_is_a_case(root):
    (root / "notes.txt").write_text("x")
    (root / "._a.png").write_text("what another system leaves")
    (root / "a.jpg").write_bytes((root / "b.JPG").read_bytes())
    cases = read_cases(root)
    assert [case.id for case in cases] == ["a.jpg", "a.png", "b"]
    assert cases[1].image == root / "a.png"
    assert cases[1].source == cases[1].target == ""


def test_a_text_file_beside_a_picture_is_what_it_shows(root, tmp_path):
    (root / "a.txt").write_text("\ufeffa cat: on ${HOME}\n", encoding="utf-8")
    (root / "sub.txt").write_text("of no picture")
    assert {case.id: case.source for case in read_cases(root)} == {"a": "a cat: on ${HOME}", "b": ""}
    (root / "a.txt").write_bytes("ä".encode("latin-1"))
    (tmp_path / "secret.txt").write_text("a password")
    (root / "b.txt").symlink_to(tmp_path / "secret.txt")
    assert [re.sub(r" \(.*\)", "", line) for line in problems(root)] == [
        "a.png: caption='a.txt' cannot be read; save it as UTF-8",
        f"b.JPG: caption='b.txt' lies outside {root}; copy it in",
    ]
    (root / "b.txt").unlink()
    (root / "a.txt").write_text("word " * 10_000)
    assert "has more than 10000 bytes" in problems(root)[0]


def test_usual_texts_are_those_of_the_cases_that_have_none(root):
    (root / "a.txt").write_text("a cat")
    usual = {"source": "a picture", "target": "a dog", "instruction": ""}
    a, b = read_cases(root, usual)
    assert (a.source, a.target, b.source, b.target) == ("a cat", "a dog", "a picture", "a dog")
    rows = [{"image": "a.png", "target": "a cow"}, {"image": "b.JPG", "target": ""}]
    for suffix in (".csv", ".jsonl", ".yaml"):
        a, b = read_cases(written(root, suffix, rows), usual)
        assert (a.source, a.target, b.source, b.target) == ("a picture", "a cow", "a picture", "a dog")


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no pictures"):
        read_cases(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".yaml"])
def test_prompts_are_read_verbatim(root, suffix):
    rows = [{"id": f"n{i}", "image": "a.png", "source": p, "target": p[::-1]} for i, p in enumerate(PROMPTS)]
    cases = read_cases(written(root, suffix, rows))
    assert [case.source for case in cases] == PROMPTS
    assert [case.target for case in cases] == [p[::-1] for p in PROMPTS]


def test_plain_yaml_has_no_types(root):
    lines = [
        f"- {{id: n{i}, image: a.png, source: {p}}}" for i, p in enumerate(["yes", "007", "null", "1e3", "2026-01-01"])
    ]
    cases = read_cases(manifest(root, "\n".join(lines), ".yaml"))
    assert [case.source for case in cases] == ["yes", "007", "null", "1e3", "2026-01-01"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".yaml"])
def test_a_row_has_all_that_a_case_has(root, suffix):
    full = {"image": "a.png", "source": "s", "target": "t", "instruction": "i", "mask": "sub/c.png", "truth": "b.JPG"}
    boxed = {"image": "sub/c.png", "box": "0.1, 0.2,0.5,1"}
    a, b = read_cases(written(root, suffix, [{**full, "sketch": "a.png", "canny": "a.png", "pose": "b.JPG"}, boxed]))
    assert (a.id, a.source, a.target, a.instruction) == ("a", "s", "t", "i")
    assert (a.mask, a.truth) == (root / "sub" / "c.png", root / "b.JPG")
    assert a.hints == {"sketch": root / "a.png", "canny": root / "a.png", "pose": root / "b.JPG"}
    assert (b.id, b.mask, b.hints, b.truth) == ("sub/c", (0.1, 0.2, 0.5, 1.0), {}, None)


def test_a_box_may_be_a_list(root):
    for text, suffix in [
        ('{"image": "a.png", "box": [0, 1, 2.5, 3]}', ".jsonl"),
        ("- image: a.png\n  box: [0, 1, 2.5, 3]", ".yaml"),
    ]:
        assert read_cases(manifest(root, text, suffix))[0].mask == (0, 1, 2.5, 3)


def test_all_mistakes_are_listed_at_once_with_their_lines(root):
    text = 'image,source,maks,box\na.png,"two\nlines",,\nnone.png,,,\n,,,\nb.JPG,,,"3,2,1"\na.png,,x,\n'
    assert problems(manifest(root, text, ".csv")) == [
        "line 2: 'maks' is no column; did you mean mask?",
        f"line 4: image='none.png': no such file in {root}",
        "line 5: has no image",
        "line 6: box='3,2,1' is not left,top,right,bottom, in pixels or in fractions of the picture",
        "line 7: id 'a' is that of line 2; give each case its own",
    ]


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        (".csv", "image\na.png\na.png\n", "line 3: id 'a' is that of line 2"),
        (".csv", "image,source\na.png,a, b\n", "line 2: 3 cells under 2 columns"),
        (".csv", "image,image\na.png,b\n", "line 1: columns twice: image"),
        (".csv", 'image,source\na.png,"never closed\n', "line 2: is not CSV"),
        (".jsonl", '{"image": "a.png"}\n{"image": 1}\n', "line 2: image=1 is not text"),
        (".jsonl", '{"image": "a.png"}\n\n{"image": \n', "line 3: is not JSON"),
        (".jsonl", '{"image": "a.png", "id": "\\ud83e"}', "line 1: id='\\ud83e' holds half a character"),
        (".jsonl", '["a.png"]', "line 1: is not a JSON object"),
        (".jsonl", '{"image": "a.png", "image": "b.JPG"}', "line 1: is not JSON ('image' twice)"),
        (".jsonl", "[" * 100_000, "line 1: is not JSON"),
        (".jsonl", '{"image": "a.png", "mask": "a.png", "box": [0, 0, 1, 1]}', "line 1: has a mask and a box"),
        (".jsonl", '{"image": "a.png", "box": [0, 0, NaN, 1]}', "line 1: box=[0, 0, nan, 1] is not"),
        (".yaml", "- image: a.png\n- source: a: b\n", "line 2: is not YAML"),
        (".yaml", "- image: a.png\n  image: b.JPG\n", "line 1: has 'image' twice"),
        (".yaml", "image: a.png\n", "line 1: is not as it should be: a list"),
        (".yaml", "- a.png\n", "line 1: is not as it should be: a list of mappings"),
        (".yaml", "- image: [a.png]\n", "line 1: image=['a.png'] is not text"),
        (".yaml", "- image: a.png\n---\n- image: b.JPG\n", "line 2: is not YAML"),
        (".yaml", "- image: \x00\n", "line 1: is not YAML"),
    ],
)
def test_a_mistake_is_named_by_its_line(root, suffix, text, expected):
    assert any(line.startswith(expected) for line in problems(manifest(root, text, suffix)))


def test_mistakes_before_the_line_that_cannot_be_read_are_listed_too(root):
    found = problems(manifest(root, '{"image": "x.png"}\n{', ".jsonl"))
    assert [line.split(":")[0] for line in sorted(found)] == ["line 1", "line 2"]


def test_of_very_many_mistakes_twenty_are_listed(root):
    found = problems(manifest(root, "image\n" + "none.png\n" * 1000, ".csv"))
    assert len(found) == 21
    assert found[-1] == "and 980 more"


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "link.png", "away/secret.png", "{absolute}"])
@pytest.mark.parametrize("column", ["image", "mask", "sketch", "truth"])
def test_nothing_outside_the_manifests_folder_is_read(root, name, column):
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "away").symlink_to(root.parent)
    name = name.format(absolute=root.parent / "secret.png")
    path = written(root, ".csv", [{"image": "a.png", **{column: name}}])
    assert any("lies outside" in line for line in problems(path))


def test_a_link_out_of_a_folder_of_pictures_is_refused(root):
    (root / "link.png").symlink_to(root.parent / "secret.png")
    assert problems(root) == [f"link.png: image='link.png' lies outside {root}; copy it in"]


def test_a_link_within_the_folder_and_a_folder_under_a_link_are_followed(root, tmp_path):
    (root / "link.png").symlink_to("a.png")
    (tmp_path / "alias").symlink_to(root)
    path = written(root, ".csv", [{"image": "link.png"}])
    assert read_cases(tmp_path / "alias" / path.name)[0].image == root / "a.png"


@pytest.mark.parametrize("name", ["a\\u0000b", "x" * 5000, "ring.png"])
def test_names_that_are_none_are_refused(root, name):
    (root / "ring.png").symlink_to("ring.png")
    assert problems(manifest(root, f'{{"image": "{name}"}}', ".jsonl"))


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
HOSTILE = {
    "tag": "- image: !!python/object/apply:os.system ['touch marker']\n",
    "tag on a mapping": "- !!python/object:os.system\n  image: a.png\n",
    "short tag": "- image: !env HOME\n",
    "alias bomb": BOMB,
    "recursive alias": "&a [*a]\n",
    "merge": "- &x {image: a.png}\n- {<<: *x}\n",
    "depth, flow": "[" * 2000 + "]" * 2000,
    "depth, block": "".join(f"{' ' * i}-\n" for i in range(1500)),
    "depth, mappings": "{a: " * 2000,
    "binary": bytes(range(256)) * 100,
    "large": b"- image: a.png\n" * 2_000_000,
    "wide": "[" + "[]," * 600_000,
    "long key": "? " + "x" * 1_000_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused_at_once(root, text, monkeypatch):
    monkeypatch.chdir(root)
    path = manifest(root, text, ".yaml")
    started = time.process_time()
    with pytest.raises(InputError):
        read_cases(path)
    assert time.process_time() - started < 1, "seconds of CPU; milliseconds in truth"
    assert not (root / "marker").exists()


def test_without_libyaml_it_is_the_same(root, monkeypatch):
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert read_cases(manifest(root, "- image: a.png\n  source: yes\n", ".yaml"))[0].source == "yes"
    for text in HOSTILE.values():
        with pytest.raises(InputError):
            read_cases(manifest(root, text, ".yaml"))


def test_what_is_no_manifest_is_refused(root):
    for name, text, why in [
        ("a.png", b"", "neither a folder nor a manifest"),
        ("empty.csv", b"", "holds no cases; columns are id"),
        ("empty.yaml", b"", "holds no cases"),
        ("latin.csv", "image\nä.png".encode("latin-1"), "line 2: is not UTF-8"),
    ]:
        (root / name).write_bytes(text)
        with pytest.raises(InputError, match=why):
            read_cases(root / name)
    with pytest.raises(InputError, match=r"none\.csv: No such file"):
        read_cases(root / "none.csv")


def test_a_spreadsheets_byte_order_mark_is_skipped(root):
    assert read_cases(manifest(root, "\ufeffimage\r\na.png\r\n", ".csv"))[0].id == "a"


def test_the_columns_are_those_that_the_manual_names():
    assert sorted(COLUMNS) == sorted("id image source target instruction mask box sketch canny pose truth".split())


def test_columns_of_the_method_are_settings_of_a_case(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "cases.csv").write_text("image,target,method.blend_source,method.blend_threshold\na.png,a dog,cat,\n")
    (found,) = read_cases(tmp_path / "cases.csv")
    assert found.settings == {"method.blend_source": "cat"}
