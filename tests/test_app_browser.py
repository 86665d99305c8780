"""The annotation lab in Chromium, as a person uses it, at two widths."""

import json
import re
import threading

import pytest
from PIL import Image, ImageDraw

from masafusion_lab import app

pytestmark = pytest.mark.slow
CANVAS = ".draw canvas:visible"


class Lab:
    """The lab at an address, on a page of Chromium."""

    def __init__(self, page, url):
        from playwright.sync_api import expect

        self.page, self.url, self.expect = page, url, expect

    def arrive(self, width, height):
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.goto(self.url)
        self.page.locator(CANVAS).wait_for()
        self.says("latent cells are edited")

    def says(self, text):
        self.expect(self.page.locator("body")).to_contain_text(text, use_inner_text=True)

    def press(self, label, role="button"):
        self.page.get_by_role(role, name=label, exact=True).click()

    def stroke(self, *points):
        """Draw with the mouse through points, in fractions of the picture."""
        self.page.locator(CANVAS).scroll_into_view_if_needed()
        box = self.page.locator(CANVAS).bounding_box()
        for k, (x, y) in enumerate(points):
            self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if k == 0:
                self.page.mouse.down()
        self.page.mouse.up()

    def drawn(self):
        return self.page.locator(CANVAS).evaluate("canvas => canvas.toDataURL()")

    def shoot(self, path):
        self.page.screenshot(path=path)
        size = self.page.viewport_size
        assert Image.open(path).size == (size["width"], size["height"])


@pytest.fixture
def url(studio):
    demo = app.launch(studio)
    yield demo.local_url
    demo.close(verbose=False)


@pytest.fixture
def lab(url, chromium):  # whose page is gone before its server
    return Lab(chromium, url)


def test_paint_redraw_run_cancel_and_find_it_again(lab, studio, tmp_path):
    lab.arrive(1280, 800)
    edited = re.search(r"(\d+) of \d+ latent cells are edited", lab.page.inner_text("body"))[0]
    lab.stroke((0.6, 0.5), (0.8, 0.5), (0.8, 0.8))
    lab.expect(lab.page.locator("body")).not_to_contain_text(edited, use_inner_text=True)
    lab.says("latent cells are edited")
    lab.press("Sketch")
    lab.press("Clear")
    lab.stroke((0.2, 0.2), (0.5, 0.6), (0.8, 0.2))
    drawn = lab.drawn()
    lab.stroke((0.1, 0.9), (0.9, 0.9))
    assert lab.drawn() != drawn
    lab.press("Undo")
    assert lab.drawn() == drawn
    lab.press("Run")
    lab.says("UNet rows")
    pictures = lab.page.locator(".result img")  # before and after, and four pictures
    pictures.nth(5).wait_for()
    lab.page.wait_for_function("[...document.querySelectorAll('.result img')].every(img => img.naturalWidth)")
    lab.shoot(tmp_path / "wide.png")
    (past,) = studio.past(token := studio_token(studio))
    assert past.result["files"].count("sketch.png") == 1
    lab.press("Word maps and interference")
    lab.expect(lab.page.locator(".result .figures img")).to_have_count(3)
    assert (past.folder / "attention.html").is_file()

    gate, begun = threading.Event(), threading.Event()

    def hold(*_):
        begun.set()
        gate.wait(30)

    hook = studio.model.unet.register_forward_pre_hook(hold)
    lab.press("Run")
    assert begun.wait(60)
    lab.press("Cancel")
    lab.says("stopping at the end of this step")
    gate.set()
    lab.says("Cancelled")
    hook.remove()
    assert [past.state["state"] for past in studio.past(token)] == ["interrupted", "done"]

    lab.arrive(390, 844)
    assert lab.page.evaluate("document.documentElement.scrollWidth") <= 390
    lab.press("Your runs", "tab")
    lab.says(past.folder.name)
    lab.says("UNet rows")
    lab.shoot(tmp_path / "narrow.png")


def studio_token(studio):
    """A token's stand-in: the only person there is."""
    (folder,) = [path for path in studio.root.iterdir() if (path / "runs").is_dir()]
    studio.person = lambda token: folder
    return ""


def test_run_waits_for_the_picture_and_what_is_pressed_then_for_the_model(lab, studio, monkeypatch):
    opened, loaded = threading.Event(), threading.Event()
    load, load_model = studio.load, studio._load
    monkeypatch.setattr(studio, "load", lambda: opened.wait(60) and load())
    monkeypatch.setattr(studio, "_load", lambda *of: loaded.wait(60) and load_model(*of))
    lab.page.goto(lab.url)
    lab.says("opening the picture")
    lab.expect(lab.page.get_by_role("button", name="Run", exact=True)).to_be_disabled()
    opened.set()
    lab.press("Sketch")
    lab.stroke((0.2, 0.2), (0.8, 0.8))
    lab.press("Run")
    lab.says("loading the model")
    loaded.set()
    lab.says("UNet rows")


def test_a_prompt_with_markup_is_shown_as_it_was_typed(lab, studio):
    studio.experiment.target = "<img src=x onerror=alert(1)> a dog"
    lab.arrive(1280, 800)
    lab.says("onerror")
    lab.press("Sketch")
    lab.stroke((0.2, 0.2), (0.8, 0.8))
    lab.press("Run")
    lab.says("UNet rows")
    lab.press("Your runs", "tab")
    lab.says("<img src=x")


def test_a_set_is_kept_stroke_by_stroke(lab, studio, tmp_path):
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / f"{name}.png").write_bytes((tmp_path / "cat.png").read_bytes())
    studio.experiment.cases = str(tmp_path / "set")
    lab.arrive(1280, 800)
    lab.press("Annotate a set", "tab")
    lab.says("Picture 1 of 2")
    lab.says("Nothing is painted yet")
    lab.stroke((0.3, 0.3), (0.6, 0.6))
    lab.says("latent cells are edited")
    manifest = tmp_path / "set" / "manifest.jsonl"
    lab.press("Next")
    lab.says("Picture 2 of 2")
    assert '"id": "a"' in manifest.read_text()
    negative = Image.new("L", (96, 64), 255)
    ImageDraw.Draw(negative).rectangle((20, 20, 60, 50), outline=0)
    negative.save(tmp_path / "sketch.png")
    lab.press("Sketch")
    lab.page.locator(".many .layer input").set_input_files(tmp_path / "sketch.png")
    lab.says("black lines on white: it is inverted")
    lab.says("Nothing is painted yet")
    lab.press("Back")
    lab.says("Picture 1 of 2")
    lab.says("latent cells are edited")
    rows = {row["id"]: sorted(row) for row in map(json.loads, manifest.read_text().splitlines())}
    assert rows == {"a": ["id", "image", "mask"], "b": ["id", "image", "sketch"]}
