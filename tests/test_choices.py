"""A setting that is one of a few words is none other, whoever sets it, and wherever."""

from dataclasses import fields
from typing import get_args

import pytest

from masafusion_lab import InputError, config, keys
from masafusion_lab.axes import Launch, Sweep
from masafusion_lab.choices import Checked
from masafusion_lab.fusion import Take
from masafusion_lab.methods import METHODS, MaSaFusion
from masafusion_lab.null_text import NullText
from masafusion_lab.phases import INVERSIONS
from masafusion_lab.protocol import Bench
from masafusion_lab.region import Region

CLASSES = {*METHODS.values(), *INVERSIONS.values(), config.Model, config.Tracking, Sweep, Launch, Bench, Region}
LISTED = [
    (cls, key)
    for cls in sorted(CLASSES, key=lambda cls: cls.__name__)
    for key in keys.fields(cls.__module__, cls.__name__)
    if key.choices and bool not in (key.type, *get_args(key.type))
]
"""The classes of settings with their keys of a few words, as `masafusion --help` lists them."""


@pytest.mark.parametrize(("cls", "key"), LISTED, ids=lambda x: getattr(x, "__name__", None) or x.name)
def test_another_word_is_refused_in_every_setting_of_every_class(cls, key):
    said = ".*".join(map(repr, key.choices))
    with pytest.raises(InputError, match=f"^{cls.__name__}: {key.name}='insid' must be one of {said}"):
        cls(**{key.name: "insid"})


def test_the_settings_that_have_choices_are_these():
    assert {cls.__name__ for cls, _ in LISTED} >= {
        "MaSaFusion",
        "NullText",
        "Direct",
        "Npi",
        "Model",
        "Bench",
        "Region",
    }
    assert len(LISTED) > 40


def test_the_words_that_there_are_and_none_where_nothing_need_be_said():
    for cls, key in LISTED:
        for choice in key.choices:
            if choice != "glide":  # which is there to be refused in words of its own
                assert getattr(cls(**{key.name: choice}), key.name) == choice
    assert NullText(keep=None).resolved.keep == "guarded"
    with pytest.raises(InputError, match="'guarded', 'best', None"):
        NullText(keep="worst")


def test_a_method_of_ones_own_is_checked_too():
    assert issubclass(MaSaFusion, Checked)
    assert {field.name for field in fields(MaSaFusion)} >= {"qk_from"}
    with pytest.raises(InputError, match=r"MaSaFusion: qk_from='inside' must be one of 'edit', 'preserve'"):
        MaSaFusion(qk_from="inside")
    with pytest.raises(InputError, match="Take: keys='maskd' must be one of 'plain', 'union', 'masked', 'seen'"):
        Take(keys="maskd")
