"""The annotation lab in Chromium, as a person uses it, at two widths."""

import json
import threading

import pytest

from masafusion_lab import app
from tests.browser import CHROMIUM, browser

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")]
TEXT = "document.querySelector('.gradio-container').innerText"
CANVAS = ".draw canvas"
NEGATIVE = """(async () => {  // a sketch in black on white, brought in as a file
  document.querySelector('.many [data-layer=sketch]').click();
  const canvas = Object.assign(document.createElement('canvas'), { width: 96, height: 64 });
  const pen = canvas.getContext('2d');
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, 96, 64);
  pen.strokeRect(20, 20, 40, 30);
  const files = new DataTransfer(), input = document.querySelector('.many .layer input');
  files.items.add(new File([await new Promise((done) => canvas.toBlob(done))], 'sketch.png', { type: 'image/png' }));
  input.files = files.files;
  input.dispatchEvent(new Event('change'));
})()"""
SENT = "document.querySelector('.draw canvas').toDataURL()"


@pytest.fixture
def page(studio, tmp_path):
    demo = app.launch(studio)
    with browser(tmp_path) as page:
        page.url = demo.local_url
        yield page
    demo.close(verbose=False)


def arrive(page, width, height):
    page.go(page.url, width, height)
    page.wait(f"!!document.querySelector('.draw canvas') && {TEXT}.includes('latent cells are edited')")


def test_paint_redraw_run_cancel_and_find_it_again(page, studio, tmp_path):
    arrive(page, 1280, 800)
    before = page.js(TEXT).partition(" latent cells")[0].split()[-3]
    page.stroke(CANVAS, (0.6, 0.5), (0.8, 0.5), (0.8, 0.8))
    page.wait(f"{TEXT}.includes('latent cells are edited') && !{TEXT}.includes('{before} of')")
    page.click("[data-layer=sketch]")
    page.click("[data-act=clear]")
    page.stroke(CANVAS, (0.2, 0.2), (0.5, 0.6), (0.8, 0.2))
    drawn = page.js(SENT)
    page.stroke(CANVAS, (0.1, 0.9), (0.9, 0.9))
    assert page.js(SENT) != drawn
    page.click("[data-act=undo]")
    assert page.js(SENT) == drawn
    page.press("Run")
    page.wait(f"{TEXT}.includes('UNet rows')")
    page.wait("document.querySelectorAll('.result img').length >= 6")  # before and after, and four pictures
    page.shoot(tmp_path / "wide.png")
    (past,) = studio.past(token := studio_token(studio))
    assert past.result["files"].count("sketch.png") == 1
    page.press("Word maps and interference")
    page.wait("document.querySelectorAll('.result .figures img').length === 3")
    assert (past.folder / "attention.html").is_file()

    gate, begun = threading.Event(), threading.Event()

    def hold(*_):
        begun.set()
        gate.wait(30)

    hook = studio.model.unet.register_forward_pre_hook(hold)
    page.press("Run")
    assert begun.wait(60)
    page.press("Cancel")
    page.wait(f"{TEXT}.includes('stopping at the end of this step')")
    gate.set()
    page.wait(f"{TEXT}.includes('Cancelled')")
    hook.remove()
    assert [past.state["state"] for past in studio.past(token)] == ["interrupted", "done"]

    arrive(page, 390, 844)
    assert page.js("document.documentElement.scrollWidth") <= 390
    page.tab("Your runs")
    page.wait(f"{TEXT}.includes({past.folder.name!r}) && {TEXT}.includes('UNet rows')")
    page.shoot(tmp_path / "narrow.png")
    assert page.errors == []
    strangers = [url for url in page.requests if not url.startswith((page.url, "data:", "blob:", "about:"))]
    assert strangers == []


def studio_token(studio):
    """A token's stand-in: the only person there is."""
    (folder,) = [path for path in studio.root.iterdir() if (path / "runs").is_dir()]
    studio.person = lambda token: folder
    return ""


def test_a_prompt_with_markup_is_shown_as_it_was_typed(page, studio):
    studio.experiment.target = "<img src=x onerror=alert(1)> a dog"
    arrive(page, 1280, 800)
    page.wait(f"{TEXT}.includes('onerror')")
    page.click("[data-layer=sketch]")
    page.stroke(CANVAS, (0.2, 0.2), (0.8, 0.8))
    page.press("Run")
    page.wait(f"{TEXT}.includes('UNet rows')")
    page.tab("Your runs")
    page.wait(f"{TEXT}.includes('<img src=x')")
    assert page.errors == []


def test_a_set_is_kept_stroke_by_stroke(page, studio, tmp_path):
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / f"{name}.png").write_bytes((tmp_path / "cat.png").read_bytes())
    studio.experiment.cases = str(tmp_path / "set")
    arrive(page, 1280, 800)
    page.tab("Annotate a set")
    page.wait(f"{TEXT}.includes('Picture 1 of 2')")
    page.wait(f"{TEXT}.includes('Nothing is painted yet')")
    page.stroke(".many canvas", (0.3, 0.3), (0.6, 0.6))
    page.wait(f"{TEXT}.includes('latent cells are edited')")
    manifest = tmp_path / "set" / "manifest.jsonl"
    page.press("Next")
    page.wait(f"{TEXT}.includes('Picture 2 of 2')")
    assert '"id": "a"' in manifest.read_text()
    page.js(NEGATIVE)
    page.wait(f"{TEXT}.includes('black lines on white: it is inverted')")
    page.wait(f"{TEXT}.includes('Nothing is painted yet')")
    page.press("Back")
    page.wait(f"{TEXT}.includes('Picture 1 of 2') && {TEXT}.includes('latent cells are edited')")
    rows = {row["id"]: sorted(row) for row in map(json.loads, manifest.read_text().splitlines())}
    assert rows == {"a": ["id", "image", "mask"], "b": ["id", "image", "sketch"]}
    assert page.errors == []
