"""Labels in any script can be read, or the figure names what cannot."""

import warnings

import pytest
from matplotlib.figure import Figure

from masafusion_lab import fonts
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


def test_no_warning_of_a_font_is_given():
    figure, _ = labelled(f"\u05d0 {HAN} {CAT} \u0928")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(figure)
