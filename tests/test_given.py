"""What an edit is given from Python fits together, or is refused in words that say what does not."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from masafusion_lab import InputError
from masafusion_lab.editor import Editor
from masafusion_lab.inversion import Inversion
from masafusion_lab.lockstep import lockstep
from masafusion_lab.methods import METHODS, MaSaFusion
from tests.edits import STEPS, case, lab

NEEDED = {
    "masactrl": {"variant": "auto", "auto_source": ("cat",), "auto_target": ("dog",), "source_prompt": "source"},
}
"""Settings by which a method reads what we take away."""
READ = {name: {"source", "target", "empty"} for name in METHODS} | {
    "t2i_only": {"target", "empty"},
    "plain": {"target", "empty"},
    "reconstruction": {"source", "empty"},
    "replay": {"source"},
    "sdedit": {"target", "empty"},
    "blended": {"target", "empty"},
    "glide": {"target", "empty"},
    "diffedit": {"source", "target"},
}
"""The prompts that a method reads."""
READING = sorted(name for name, method in METHODS.items() if method().needs.inversion)


@pytest.fixture(scope="module")
def ready(tiny_root, tmp_path_factory):
    """A lab, and what a method is called with for a case: given, record, noise."""
    from masafusion_lab import phases

    made = lab(tiny_root, tmp_path_factory.mktemp("store"), "inversion.name=npi")
    (found,) = phases.invert(made, [case()])
    item = phases.as_item(case(), made.prepare(case()), found[1])
    return made, Editor(made.model, made.method, made.schedule).ready([item])


def refused(made, method, given, record, x, says):
    with pytest.raises(InputError, match=says) as caught:
        list(method(made.model, given, record, x, schedule=made.schedule))
    assert "\n" not in str(caught.value)


def longer(states, by):
    return torch.cat([states, states[-1:]]) if by > 0 else states[:by]


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("by", [-1, 1])
def test_a_record_of_another_schedule_is_refused_by_every_method_that_reads_one(ready, name, by):
    made, (given, record, x) = ready
    other = Inversion(longer(record.states, by), record.null)
    says = rf"record's states: is \({STEPS + 1 + by}, 1, 4, 8, 12\), must be \({STEPS + 1}, 1, 4, 8, 12\)"
    refused(made, METHODS[name](**NEEDED.get(name, {})), given, other, x, says)


@pytest.mark.parametrize("name", READING)
def test_a_record_of_other_pictures_is_refused(ready, name):
    made, (given, record, x) = ready
    for states in (record.states.repeat(1, 2, 1, 1, 1), record.states[..., :8]):
        refused(made, METHODS[name](**NEEDED.get(name, {})), given, Inversion(states), x, "the record's states: is")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: {"mask": torch.ones(1, 1, 32, 48)}, r"Given.mask, in latent cells: is \(1, 1, 32, 48\), must be"),
        (lambda g: {"mask": g.mask[0]}, r"Given.mask, in latent cells: is \(1, 8, 12\), must be \(1, 1, 8, 12\)"),
        (lambda g: {"mask": g.mask.repeat(2, 1, 1, 1)}, "Given.mask, in latent cells"),
        (
            lambda g: {"null": g.null[:-1]},
            rf"Given.null: is \({STEPS - 1}, 1, 24, 32\), must be \({STEPS}, 1, \.\.\.\)",
        ),
        (lambda g: {"null": longer(g.null, 1)}, "Given.null: is"),
        (lambda g: {"null": g.null.repeat(1, 2, 1, 1)}, "Given.null: is"),
        (
            lambda g: {"prompts": g.prompts | {"source": g.prompts["source"].repeat(2, 1, 1)}},
            r"prompts\['source'\]: is",
        ),
        (lambda g: {"prompts": g.prompts | {"target": g.null[:2]}}, r"prompts\['target'\]: is \(2, 1, 24, 32\)"),
        (lambda g: {"hint": tuple(f.repeat(2, 1, 1, 1) for f in g.hint)}, "Given.hint: is"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(ready, change, says):
    made, (given, record, x) = ready
    refused(made, MaSaFusion(), replace(given, **change(given)), record, x, says)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method().needs.network])
@pytest.mark.parametrize("lacking", ["source", "target", "empty"])
def test_a_prompt_that_is_not_given_is_named_unless_the_method_does_without(ready, name, lacking):
    made, (given, record, x) = ready
    given = replace(given, prompts={k: text for k, text in given.prompts.items() if k != lacking}, null=None)
    method = METHODS[name](**NEEDED.get(name, {}))
    with pytest.raises(InputError, match=lacking) if lacking in READ[name] else nullcontext():
        list(method(made.model, given, record, x, schedule=made.schedule))


@pytest.mark.parametrize("name", ["masactrl", "embctrl", "prompt_to_prompt"])
@pytest.mark.parametrize("lacking", ["source", "target"])
def test_words_that_are_not_given_are_named(ready, name, lacking):
    made, (given, record, x) = ready
    given = replace(given, texts={key: typed for key, typed in given.texts.items() if key != lacking})
    refused(made, METHODS[name](**NEEDED.get(name, {})), given, record, x, f"the words of '{lacking}' are wanted")


def test_the_loop_itself_refuses_a_record_of_another_schedule(ready):
    made, (given, record, x) = ready
    course = MaSaFusion().course(made.model, given, record, x, schedule=made.schedule)
    for by in (-1, 1):
        replay = {"source": longer(record.states, by)}
        with pytest.raises(InputError, match="record of latent 'source': is"):
            next(lockstep(made.model, course.plan, course.x, given, schedule=made.schedule, replay=replay))
    other = {**course.x, "target": x[..., :8]}
    with pytest.raises(InputError, match="latent 'target': is"):
        next(lockstep(made.model, course.plan, other, given, schedule=made.schedule, replay=course.replay))
