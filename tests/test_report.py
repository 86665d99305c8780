"""The strip and the page: what is shown, that it stays where it is, and that no prompt or id becomes markup."""

import json
import math
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from masafusion_lab.report import decibels, difference, report, strip

HOSTILE = "<script>alert(\"1\")</script><img src=http://example.com/x.png onerror=alert(1)> & 'quoted'"

RESULT = {
    "case": "cat",
    "prompts": {"source": "a cat on the grass", "target": "a red dog on the grass", "instruction": ""},
    "files": ["source.png", "target.png", "target_original_size.png", "strip.png", "report.html"],
    "seconds": {"invert": 1.5, "denoise": 2.25},
    "changed": {"steps": 4},
    "steps": 4,
    "rows": 40,
    "method": {"name": "masafusion"},
    "inversion": {"name": "direct"},
    "device": "cpu",
    "dtype": "float32",
    "size": [48, 32],
    "original_size": [96, 64],
    "from_store": True,
    "reconstruction_psnr": 31.234,
    "roundtrip_psnr": math.inf,
    "peak_memory_gb": 0.5,
}


class Page(HTMLParser):
    """A page's elements, references and words."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.attributes, self.marked, self.text = [], [], [], {"del": "", "ins": ""}, ""
        self.open = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in self.marked:
            self.marked[self.open[-1]] += data


def test_a_strip_has_its_panels_in_a_row_under_their_names():
    panels = {name: Image.new("RGB", (64, 48), colour) for name, colour in (("source", "red"), ("target", "blue"))}
    panels["mask"] = Image.new("L", (64, 48), 255)
    sheet = strip(panels)
    row = [sheet.getpixel((x, sheet.height // 2)) for x in range(sheet.width)]
    seen = [colour for colour, before in zip(row, [None, *row], strict=False) if colour != before]
    assert [c for c in seen if c in ((255, 0, 0), (0, 0, 255))] == [(255, 0, 0), (0, 0, 255)]
    assert sheet.crop((0, 0, sheet.width, 40)).getextrema()[0][0] < 100


@pytest.mark.parametrize(("side", "shown"), [(64, 256), (128, 256), (256, 256), (512, 512), (1024, 512)])
def test_the_panels_of_a_strip_are_neither_too_small_nor_too_large(side, shown):
    sheet = strip({"source": Image.new("RGB", (side, side), "red")})
    reds = sum(sheet.getpixel((sheet.width // 2, y)) == (255, 0, 0) for y in range(sheet.height))
    assert reds == pytest.approx(shown, abs=1)


def test_the_difference_of_two_prompts_is_by_words():
    before, after = difference("a cat on the grass", "a red dog on the grass today")
    assert before == [("a", False), ("cat", True), ("on the grass", False)]
    assert after == [("a", False), ("red dog", True), ("on the grass", False), ("today", True)]
    assert difference("", "a dog") == ([], [("a dog", True)])


def test_a_psnr_is_told_before_and_after_it_went_through_json():
    assert decibels(31.234) == "31.23 dB"
    assert decibels(math.inf) == decibels("inf") == "identical"


def test_the_page_shows_pictures_prompts_numbers_and_the_command_that_runs_it_again(tmp_path):
    folder = tmp_path / "a run"
    page = Page(report(folder, RESULT))
    assert page.tags.count("img") == 2
    assert set(page.links) == {"source.png", "target.png"}
    assert page.marked == {"del": "cat", "ins": "red dog"}
    for said in ("31.23 dB", "identical", "3.75", "48×32, of 96×64", "direct, from the store", "steps"):
        assert said in page.text
    line = next(line for line in page.text.splitlines() if line.startswith("masafusion edit"))
    assert shlex.split(line) == ["masafusion", "edit", "--config", str(folder / "config.yaml"), f"out={folder}-again"]


def test_of_one_case_of_several_it_is_the_run_that_can_be_run_again(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert f"--config {tmp_path / 'config.yaml'} out={tmp_path}-again" in Page(report(tmp_path / "cat-1", RESULT)).text
    own = tmp_path / "cat-1"
    (own / "config.yaml").touch()  # a run of its own, in a folder where someone keeps a config.yaml
    assert f"--config {own / 'config.yaml'} out={own}-again" in Page(report(own, RESULT)).text


def test_the_page_can_be_made_anew_from_what_is_on_record(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | {"roundtrip_psnr": "inf"}))
    assert "identical" in Page(report(tmp_path)).text


def test_no_text_becomes_markup_and_nothing_is_loaded_from_elsewhere(tmp_path):
    plain = Page(report(tmp_path / "plain", RESULT))
    hostile = RESULT | {
        "case": HOSTILE,
        "prompts": dict.fromkeys(("source", "target", "instruction"), HOSTILE),
        "changed": {"image": f"/{HOSTILE}.png", HOSTILE: HOSTILE},
        "device": HOSTILE,
    }
    page = Page(report(tmp_path / HOSTILE.replace("/", "_"), hostile))
    assert set(page.tags) <= {*plain.tags}
    assert set(page.attributes) == set(plain.attributes)
    assert page.links == plain.links
    assert page.text.count(HOSTILE) >= 7
    assert not [link for link in page.links if ":" in link or link.startswith("/")]
    assert "url(" not in Path(tmp_path / "plain" / "report.html").read_text()
