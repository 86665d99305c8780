"""The explorer: one page that needs nothing else, says what the maps say, and is driven by keys, in a real browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from masafusion_lab.explorer import DETAILS, explorer, is_kept, keep
from masafusion_lab.watch import Watch
from tests.edits import STEPS, case, drawn, watched
from tests.edits import lab as make_lab

HOSTILE = "</script><script>document.title='run'</script><img src=http://example.com/x onerror=alert(1)> & 'q'"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
DRIVER = """<script>
const frame = document.body.appendChild(document.createElement("iframe"));
frame.contentDocument.open();  // as long as this is open the page is not loaded, and the browser waits
const close = () => frame.contentDocument.close();
setTimeout(close, 60000);
const drive = () => {
  if (!document.body.dataset.ready) return setTimeout(drive, 50);
  for (const key of KEYS) {
    ELEMENT.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  }
  setTimeout(close, 500);
};
drive();
</script>"""
PICTURES = {x: drawn(shift=k) for k, x in enumerate(("source", "t2i", "target"))}


@pytest.fixture(scope="module")
def attention(tiny_root, tmp_path_factory):
    lab = make_lab(tiny_root, tmp_path_factory.mktemp("store"))
    return watched(lab, case(HOSTILE, target="a red dog on grass"), watch=Watch(bins=STEPS))[1][0]


@pytest.fixture(scope="module")
def page(attention):
    return explorer(attention, PICTURES)


@pytest.fixture
def shown(page, tmp_path):
    """The page as the browser leaves it, opened at a hash, after some keys on an element."""

    def shown(hash="", keys=(), on="document"):
        script = DRIVER.replace("KEYS", json.dumps(keys)).replace("ELEMENT", on)
        path = tmp_path / "page.html"
        path.write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
        words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
                 f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}#{hash}"]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=100)
        assert 'data-ready="true"' in done.stdout, done.stderr[-2000:]
        return Dom(done.stdout)

    return shown


class Dom(HTMLParser):
    """The texts of elements by id, the pressed word, and the table of what a pixel reads."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.chosen, self.cells, self.title, self.open = {}, None, [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "input", "br"):
            self.open.append((tag, attrs))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not self.open:
            return
        tag, attrs = self.open[-1]
        if "id" in attrs:
            self.ids[attrs["id"]] = self.ids.get(attrs["id"], "") + data
        if attrs.get("aria-checked") == "true":
            self.chosen = data
        if tag == "td":
            self.cells.append(data)
        if tag == "title":
            self.title = data

    @property
    def said(self):
        return self.ids["said"]

    def percent(self, pattern):
        return float(re.search(pattern.replace("%", r"([\d.]+) %"), self.said)[1]) / 100


def test_the_page_is_one_file_that_asks_for_nothing(page):
    assert "default-src 'none'; img-src data:" in page
    assert page.count("http") == page.count("http-equiv") + page.count("http://example.com/x")  # in the case's name
    assert not re.search(r"<(link|iframe|object|embed|img|base|form)\b|\bimport\b|\bfetch\(|url\(", page)


def test_no_text_becomes_markup(page):
    assert HOSTILE not in page
    assert html.escape(HOSTILE, quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page
    assert page.count("<script") == 3
    assert "<img" not in page


def test_maps_are_shown_less_finely_where_a_page_would_be_too_large(attention):
    fine, coarse = explorer(attention, PICTURES), explorer(attention, PICTURES, largest=100_000)
    assert len(coarse) < len(fine)
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
    (tmp_path / "attention.html").unlink()
    assert not is_kept(tmp_path, Watch(bins=STEPS))


@browser
@pytest.mark.parametrize(("branch", "bin", "head"), [(4, 1, 1), (0, -1, -1)])
def test_the_page_says_what_the_maps_say(attention, shown, branch, bin, head):
    name = attention.facts["latents"]["target"]["inside"] if branch == 4 else "S"
    dom = shown(f"branch={branch}&bin={bin}&layer=8&head={head}&word=2&x=7&y=3")
    steps = {} if bin < 0 else {"steps": (bin, bin + 1)}
    maps = attention.words(name, layers=[8], head=None if head < 0 else head, **steps)
    word = maps.words[1][0]
    heat = maps.word(word).values / (STEPS if bin < 0 else 1)
    assert dom.chosen == word
    assert dom.said.startswith(f"“{word}” has ")
    assert dom.percent("has %") == pytest.approx(float(heat[3, 7]), rel=0.06)
    assert dom.percent("at most %") == pytest.approx(float(heat.max()), rel=0.06)
    inside = float((heat * attention.tensors["mask"]).sum() / heat.sum())
    assert dom.percent("; %") == pytest.approx(inside, rel=0.06)
    assert "The pixel is inside A." in dom.said if attention.tensors["mask"][3, 7] else "outside A." in dom.said
    shares = [float(cell.removesuffix(" %")) for cell in dom.cells[1::2]]
    assert sum(shares) == pytest.approx(100, abs=3)
    assert dom.title == f"attention: {HOSTILE}"  # which did not run
    assert dom.ids["right-title"].startswith("what pixel 7, 3 attends to")


@browser
def test_keys_move_the_pixel_and_choose_word_branch_and_steps(shown):
    start = "branch=0&bin=0&word=1&x=2&y=2&layer=0"
    dom = shown(start, ["ArrowRight", "ArrowDown", "ArrowDown"], on="document.getElementById('left')")
    assert "pixel 3, 4," in dom.said
    dom = shown(start, ["w", "w", "b", "s"])
    assert dom.chosen == "on"
    assert dom.ids["prompt"].startswith("I_out reads")
    assert "was not kept" in dom.ids["right-title"] or "not kept" in dom.ids["right-title"]


@browser
def test_a_nonsensical_link_opens_the_page_all_the_same(shown):
    dom = shown("branch=99&bin=7&layer=-5&head=50&word=1000&x=-3&y=900&__proto__=1&said=x")
    assert dom.said.startswith("“⟨padding⟩” has ")
    assert "pixel 0, 7," in dom.said
