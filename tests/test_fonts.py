"""Labels in any script can be read, or the figure names what cannot."""

import warnings

import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from masafusion_lab import fonts, plots
from masafusion_lab.look import drawn

HAN, CAT = "\u6f22", "\U0001f408"


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these fonts, with these letters, are all that this machine has."""

    def installed(**letters):
        usual = (fonts.USUAL, frozenset(range(32, 0x250)))
        others = [(name.replace("_", " "), frozenset(map(ord, its))) for name, its in letters.items()]
        monkeypatch.setattr(fonts, "_fonts", lambda: iter([usual, *others]))
        fonts.family.cache_clear()

    yield installed
    fonts.family.cache_clear()


def labelled(text):
    figure = Figure()
    return figure, figure.text(0.5, 0.5, text)


def test_a_text_is_in_a_font_that_has_its_letters(installed):
    installed(Han_Sans=HAN, Other="x")
    figure, label = labelled(f"a cat, {HAN}")
    fonts.legible(figure)
    assert label.get_text() == f"a cat, {HAN}"
    assert label.get_fontfamily() == [fonts.USUAL, "Han Sans"]
    assert len(figure.texts) == 1


def test_letters_that_no_font_has_are_squares_and_named(installed):
    installed(Han_Sans=HAN)
    figure, label = labelled(f"{CAT} {HAN} \u00e9")
    fonts.legible(figure)
    assert label.get_text() == f"{fonts.NO_LETTER} {HAN} \u00e9"
    assert figure.texts[-1].get_text() == "no font here has U+1F408 CAT"


def test_what_no_font_has_is_named_within_the_figure(installed):
    installed()
    figure = Figure((3, 2), layout="constrained")
    label = figure.subplots().set_xlabel("\u0915\u092a\u092c\u0930\u0932\u0938\u093f\u0940")
    fonts.legible(figure)
    figure.draw_without_rendering()
    place = figure.texts[-1].get_window_extent()
    assert 0 <= place.x0 < place.x1 <= figure.bbox.x1
    assert place.y1 <= label.get_window_extent().y0
    assert figure.texts[-1].get_text().endswith("and 2 more")


def test_a_font_that_has_a_box_for_every_letter_has_none():
    assert not any("Last Resort" in name for name, _ in fonts._fonts())
    unassigned = "\U0003fff0"  # no font can have it
    figure, label = labelled(unassigned)
    fonts.legible(figure)
    assert label.get_text() == fonts.NO_LETTER


def test_a_font_that_is_gone_has_no_letters(tmp_path):
    assert fonts._letters(str(tmp_path / "gone.ttf")) == frozenset()


def inked(text, anchor="ls"):
    """Where a text that is written over a picture is dark: left, top, right, bottom."""
    picture = Image.new("L", (300, 60), 255)
    fonts.write(ImageDraw.Draw(picture), (150, 30), text, 13, fill="black", anchor=anchor)
    return picture, picture.point(lambda level: 255 * (level < 128)).getbbox()


def test_over_a_picture_each_letter_is_in_a_font_that_has_it():
    letter = "\u23dc"  # a parenthesis on its side: of matplotlib's fonts in STIX alone
    assert fonts.family(letter) != fonts.USUAL
    assert inked(f"a\u00e9{letter}")[0].tobytes() != inked(f"a\u00e9{fonts.NO_LETTER}")[0].tobytes()
    (left, *_), (_, _, right, _) = (inked(f"\u00e9{letter}", anchor)[1] for anchor in ("ls", "rs"))
    assert left >= 150 >= right
    assert inked("two\nlines")[1] == inked("two lines")[1]


def test_letters_that_no_font_has_are_squares_over_a_picture_too(installed):
    installed()
    for anchor in ("ls", "ms", "rm"):
        assert inked(f"{HAN} \u00e9", anchor)[0].tobytes() == inked(f"{fonts.NO_LETTER} \u00e9", anchor)[0].tobytes()


def test_a_sheet_says_which_letters_no_font_has(installed, tmp_path):
    installed()
    picture = Image.new("RGB", (32, 32))
    picture.save(tmp_path / "p.png")
    heights = []
    for target in ("a cat", f"a {CAT}"):
        records = [{"point": "p", "picture": "p.png", "target": target}]
        heights.append(plots.contact_sheet(records, tmp_path, ["target"], picture, "p").height)
    assert heights[1] == heights[0] + 20


def test_no_warning_of_a_font_is_given():
    figure, _ = labelled(f"\u05d0 {HAN} {CAT} \u0928")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(figure)
