"""The keys as they are read from the sources are the keys that there are."""

import re
import subprocess
import sys
import typing
from dataclasses import MISSING, fields, is_dataclass

import pytest

from masafusion_lab import config, keys, null_text
from masafusion_lab.methods import METHODS
from masafusion_lab.phases import INVERSIONS


def of_class(cls, prefix=""):
    """Name, type and default of each field, as Python knows them."""
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        default = field.default_factory() if field.default is MISSING else field.default
        if is_dataclass(hints[field.name]):
            yield from of_class(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name], default


@pytest.mark.parametrize(
    ("title", "cls", "prefix"),
    [(f"{table}.name={name}", cls, f"{table}.") for table, classes in (("inversion", INVERSIONS), ("method", METHODS))
     for name, cls in classes.items()],
)  # fmt: skip
def test_the_source_says_of_a_chosen_class_what_python_does(title, cls, prefix):
    assert [(key.name, key.type, key.default) for key in keys.tables()[title]] == list(of_class(cls, prefix))


def test_the_source_says_of_the_experiment_what_python_does():
    read = keys.fields("masafusion_lab.config", "Experiment")
    assert [(key.name, key.type, key.default) for key in read] == list(of_class(config.Experiment))


def test_every_class_that_can_be_named_is_listed():
    assert list(keys.classes("inversion")) == list(INVERSIONS)
    assert list(keys.classes("method")) == list(METHODS)


def test_every_key_says_what_it_means_in_a_line():
    for listed in keys.tables().values():
        for key in listed:
            assert key.doc or key.name in keys.CHOSEN, key.name
            assert "\n" not in key.doc


def test_nothing_heavy_is_imported_to_know_the_keys():
    code = "import sys; from masafusion_lab import config, keys; config.load([], ['inversion.name=null_text']); "
    heavy = "print([name for name in ('torch', 'lightning', 'wandb', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "20", 20),
        ("inversion.lr", "2e-4", 2e-4),
        ("inversion.lr", "null", None),
        ("inversion.early_stop", "yes", True),
        ("method.preserve_steps", "[0,25]", (0, 25)),
        ("method.preserve_steps", "0, 25", (0, 25)),
        ("tracking.tags", "[a, b]", ["a", "b"]),
        ("tracking.tags", ["a, b", "c"], ["a, b", "c"]),
        ("trainer.precision", "16-mixed", "16-mixed"),
        ("trainer.limit_predict_batches", "0.5", 0.5),
        ("trainer.devices", "[0]", [0]),
        ("trainer.devices", ["0"], [0]),
        ("trainer.devices", "auto", "auto"),
        ("trainer.max_epochs", "3", 3),
        ("trainer.max_epochs", "null", None),
        ("trainer.max_time", "00:00:10:00", "00:00:10:00"),
        ("trainer.deterministic", "warn", "warn"),
        ("trainer.fast_dev_run", "true", True),
        ("trainer.default_root_dir", "007", "007"),
        ("model.adapter.sketch", "folder=1", "folder=1"),
        ("model.path", "007", "007"),
    ],
)
def test_a_text_becomes_a_value_of_the_keys_type(name, text, value):
    known = keys.known({"inversion": "null_text", "method": "masafusion"})
    assert keys.find(name, known).read(text) == value


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("steps", "2.5", "whole number"),
        ("inversion.lr", "nan", "finite"),
        ("inversion.preset", "papper", "paper | reference"),
        ("method.preserve_steps", "[1]", "[whole number, whole number]"),
        ("method.hint_on_null", "maybe", "true | false"),
        ("seed", "[1]", "whole number"),
        ("trainer.max_epochs", "abc", "whole number | null"),
        ("trainer.max_epochs", "2.5", "whole number | null"),
        ("trainer.precision", "17", "16-mixed"),
        ("trainer.deterministic", "perhaps", "true | false | warn | null"),
        ("trainer.limit_predict_batches", "inf", "whole number | number | null"),
        ("trainer.callbacks", "MyCallback", "null"),
    ],
)
def test_a_text_that_is_none_is_refused_with_what_is_allowed(name, text, said):
    known = keys.known({"inversion": "null_text", "method": "masafusion"})
    with pytest.raises(ValueError, match="must be") as refusal:
        keys.find(name, known).read(text)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("inversion.nme", "inversion.name"),
        ("method.guidence", "method.guidance"),
        ("guidance", "method.guidance"),
        ("imge", "image"),
        ("dtype", "model.dtype"),
    ],
)
def test_a_slip_is_understood(wrong, right):
    known = keys.known({"inversion": "direct", "method": "masafusion"})
    assert keys.suggest(wrong, known) == f"; did you mean {right}?"
    assert keys.suggest("zzz", known) == ""


def test_every_table_of_entries_shows_one_in_what_it_means():
    for key in keys.known({"inversion": None, "method": None}).values():
        assert typing.get_origin(key.type) is not dict or re.search(rf"\b{key.name}\.\w+=", key.doc), key.name


def test_every_key_of_the_trainer_is_one_of_lightnings():
    import inspect

    from lightning.pytorch import Trainer

    assert [f"trainer.{name}" for name in list(inspect.signature(Trainer.__init__).parameters)[1:]] == list(
        keys.trainer_keys()
    )


def test_keys_and_their_values_are_completed():
    def words(*given):
        return [word for word, _ in keys.complete(*given)]

    assert words("ste") == ["steps=", "steps=50"]
    assert words("inversion.name=d") == ["inversion.name=direct", "inversion.name=ddim"]
    assert words("inversion.lr") == []
    assert words("inversion.lr=", ["inversion.name=null_text"]) == []
    assert "inversion.lr_schedule=" in words("inversion.l", ["inversion.name=null_text"])
    assert words("d", ["inversion.name", "="]) == ["direct", "ddim"]  # as bash splits words
    assert words("trainer.prec") == ["trainer.precision="]
    assert words("trainer.barebones=") == ["trainer.barebones=true", "trainer.barebones=false"]


def test_the_published_preset_is_one_of_the_choices():
    known = keys.known({"inversion": "null_text", "method": "masafusion"})
    assert known["inversion.preset"].choices == tuple(null_text.PRESETS)
