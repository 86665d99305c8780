"""The explorer: one page that needs nothing else, says what the maps say, and is driven by keys, in a real browser."""

import html
import json
import re
from dataclasses import replace

import pytest
import torch

from masafusion_lab.callbacks import word_table
from masafusion_lab.explorer import DETAILS, explorer, is_kept, keep
from masafusion_lab.watch import Watch
from tests.edits import STEPS, case, drawn, watched
from tests.edits import lab as make_lab

HOSTILE = "</script><script>document.title='run'</script><img src=http://example.com/x onerror=alert(1)> & 'q'"
PICTURES = {x: drawn(shift=k) for k, x in enumerate(("source", "t2i", "target"))}


@pytest.fixture(scope="module")
def attention(tiny_root, tmp_path_factory):
    lab, edit = make_lab(tiny_root, tmp_path_factory.mktemp("store")), case(HOSTILE, source="a cat on grass $_$ <b>")
    return watched(lab, edit, watch=Watch(bins=STEPS))[1][0]


@pytest.fixture(scope="module")
def partly(tiny_root, tmp_path_factory):
    """What was seen of an edit that reads the source in its first step alone, A being everything."""
    lab = make_lab(tiny_root, tmp_path_factory.mktemp("store"), "method.fusion_steps=[0,1]", "method.fusion_of=both")
    seen = watched(lab, case(), watch=Watch(bins=STEPS))[1][0]
    return replace(seen, tensors={**seen.tensors, "mask": torch.ones(8, 12)})


@pytest.fixture(scope="module")
def page(attention):
    return explorer(attention, PICTURES)


@pytest.fixture
def shown(page, chromium, tmp_path):
    """What elements of the page say in Chromium, once opened at a hash, and some keys pressed on an element."""
    path = tmp_path / "page.html"

    def shown(hash="", keys=(), on="body", page=page):
        path.write_text(page, encoding="utf-8")
        chromium.goto("about:blank")  # from the page itself another hash would not load it anew
        chromium.goto(f"{path.as_uri()}#{hash}")
        chromium.locator("body[data-ready=true]").wait_for()
        for key in keys:
            chromium.locator(on).press(key)
        chromium.evaluate("new Promise(requestAnimationFrame)")  # in which it is drawn
        return lambda selector: chromium.locator(selector).text_content()

    return shown


def percent(said, pattern):
    return float(re.search(pattern.replace("%", r"([\d.]+) %"), said)[1]) / 100


def test_the_page_is_one_file_that_asks_for_nothing(page):
    assert "default-src 'none'; img-src data:" in page
    assert page.count("http") == page.count("http-equiv") + page.count("http://example.com/x")  # in the case's name
    assert not re.search(r"<(link|iframe|object|embed|img|base|form)\b|\bimport\b|\bfetch\(|url\(", page)


def test_no_text_becomes_markup(page):
    assert HOSTILE not in page
    assert html.escape(HOSTILE, quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page
    assert page.count("<script") == 3
    assert "<img" not in page
    assert "<b>" not in page


def test_maps_are_shown_less_finely_where_a_page_would_be_too_large(attention, page, caplog):
    coarse = explorer(attention, PICTURES, largest=100_000)
    assert len(coarse) < len(page)
    assert not caplog.records
    explorer(attention, PICTURES, largest=1)
    assert "as coarse as can be; fewer --layers take less" in caplog.text
    facts = json.loads(re.search(r'id="facts" type="application/json">(.*?)</script>', coarse)[1])
    assert facts["bins"] == [[0, STEPS]]
    shown = facts["branches"][facts["first"]]
    assert (shown["name"], shown["latent"]) == ("T_in", "target, inside A")
    assert shown["words"][facts["word"]]["text"] == "red"  # the first that the edit changes
    assert [d.words for d in DETAILS] == sorted((d.words for d in DETAILS), reverse=True)


def test_what_is_kept_is_of_the_settings_it_was_seen_under(attention, tmp_path):
    assert not is_kept(tmp_path, Watch(bins=STEPS))
    keep(tmp_path, PICTURES, attention)
    assert is_kept(tmp_path, Watch(bins=STEPS))
    assert is_kept(tmp_path, Watch(bins=STEPS, limit_gb=2))
    assert not is_kept(tmp_path, Watch(bins=STEPS, every=3))
    (tmp_path / "result.json").write_text('{"key": "another"}')  # the case was edited otherwise, and that cut short
    assert not is_kept(tmp_path, Watch(bins=STEPS))
    (tmp_path / "result.json").unlink()
    (tmp_path / "attention.html").unlink()
    assert not is_kept(tmp_path, Watch(bins=STEPS))


def test_a_branch_counts_in_the_steps_in_which_it_was_there(partly):
    rows = {(row["branch"], row["word"]): row["highest share"] for row in word_table(partly, PICTURES)}
    for name, steps in (("S", (0, 1)), ("T_in", (0, STEPS))):
        maps = partly.words(name, steps=steps)
        assert maps.steps == pytest.approx(len(range(*steps)))
        assert rows[name, "grass"] == pytest.approx(float(maps.word("grass").values.max()) / maps.steps)
    facts = json.loads(re.search(r'id="facts" type="application/json">(.*?)</script>', explorer(partly, PICTURES))[1])
    assert facts["maps"]["index"]["words/S/0"]["seen"] == [1, 0, 0]
    assert facts["maps"]["index"]["pixels/T_in/0"]["seen"] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "bin", "head"), [(4, 1, 1), (0, -1, -1)])
def test_the_page_says_what_the_maps_say(attention, shown, chromium, branch, bin, head):
    name = attention.facts["latents"]["target"]["inside"] if branch == 4 else "S"
    text = shown(f"branch={branch}&bin={bin}&layer=8&head={head}&word=2&x=7&y=3")
    steps = {} if bin < 0 else {"steps": (bin, bin + 1)}
    maps = attention.words(name, layers=[8], head=None if head < 0 else head, **steps)
    word = maps.words[1][0]
    heat = maps.word(word).values / (STEPS if bin < 0 else 1)
    assert text("[aria-checked=true]") == word
    said = text("#said")
    assert said.startswith(f"“{word}” has ")
    assert percent(said, "has %") == pytest.approx(float(heat[3, 7]), rel=0.06)
    assert percent(said, "at most %") == pytest.approx(float(heat.max()), rel=0.06)
    inside = float((heat * attention.tensors["mask"]).sum() / heat.sum())
    assert percent(said, "; %") == pytest.approx(inside, rel=0.06)
    assert "The pixel is inside A." in said if attention.tensors["mask"][3, 7] else "outside A." in said
    shares = [float(cell.removesuffix(" %")) for cell in chromium.locator("td:last-child").all_text_contents()]
    assert sum(shares) == pytest.approx(100, abs=3)
    assert chromium.title() == f"attention: {HOSTILE}"  # which did not run
    assert text("#right-title").startswith("what pixel 7, 3 attends to")


@pytest.mark.slow
def test_keys_move_the_pixel_and_choose_word_branch_and_steps(shown):
    start = "branch=0&bin=0&word=1&x=2&y=2&layer=0"
    text = shown(start, ["ArrowRight", "ArrowDown", "ArrowDown"], on="#left")
    assert "pixel 3, 4," in text("#said")
    text = shown(start, ["w", "w", "b", "s"])
    assert text("[aria-checked=true]") == "on"
    assert text("#prompt").startswith("I_out reads")
    assert "was not kept" in text("#right-title") or "not kept" in text("#right-title")


@pytest.mark.slow
def test_what_was_not_seen_is_not_shown_as_nothing(partly, shown, chromium):
    page = explorer(partly, PICTURES)
    text = shown("branch=0&word=1&x=7&y=3", page=page)
    assert "; 100 % of its attention is inside A" in text("#said")
    shares = [float(cell.removesuffix(" %")) for cell in chromium.locator("td:last-child").all_text_contents()]
    assert sum(shares) == pytest.approx(100, abs=3)
    text = shown("branch=0&bin=2&word=1&x=7&y=3", page=page)
    assert text("#said").startswith("Nothing was seen of S in these steps")
    assert text("#right-title") == "self-attention of S was not kept here"
    assert chromium.locator("td").count() == 0


@pytest.mark.slow
def test_a_nonsensical_link_opens_the_page_all_the_same(shown):
    text = shown("branch=99&bin=7&layer=-5&head=50&word=1000&x=-3&y=900&__proto__=1&said=x")
    assert text("#said").startswith("“⟨padding⟩” has ")
    assert "pixel 0, 7," in text("#said")
