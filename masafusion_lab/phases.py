"""The phases of an experiment: invert fills the store, edit reads it and leaves one folder a case."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from masafusion_lab import InputError, __version__, interrupt
from masafusion_lab.batches import Batches, as_item
from masafusion_lab.callbacks import Attend, Job, Mirror, Results
from masafusion_lab.data.case import HINTS, Case
from masafusion_lab.data.digests import UNREAD, check_inputs, inputs
from masafusion_lab.editor import Editor, followed
from masafusion_lab.inversion import Ddim, Direct, EditFriendly, Inversion, Npi
from masafusion_lab.inverting import invert
from masafusion_lab.lab import Lab, build, facts, record_facts, settings, sha256
from masafusion_lab.lockstep import check
from masafusion_lab.model import StableDiffusion
from masafusion_lab.null_text import NullText
from masafusion_lab.results import fail_case, is_done, stays_done
from masafusion_lab.runs import case_folder
from masafusion_lab.sites import self_layers
from masafusion_lab.trainer import make, undisturbed
from masafusion_lab.words import ids

__all__ = ["INVERSIONS", "Lab", "build", "edit", "invert"]

log = logging.getLogger(__name__)

INVERSIONS: dict[str, type] = {"direct": Direct, "ddim": Ddim, "null_text": NullText, "npi": Npi,
                               "edit_friendly": EditFriendly}  # fmt: skip
"""Name, as in `inversion.name=...`, to class."""


def job(lab: Lab, case: Case, folder: Path, place: int = 0, callbacks: Sequence[L.Callback] = ()) -> Job:
    """Check a case against model, method and what shall be watched, without denoising anything. Raises InputError."""
    interrupt.check()
    prepared, model = lab.prepare(case), lab.model
    height, width = prepared.pixels.shape[-2:]
    model.check_size(height, width)
    told = {"target": case.target, "instruction": followed(model, lab.method, case.instruction)}
    for prompt in (case.source, *told.values()):
        if lost := model.cut(prompt):
            log.warning("%s: the text encoder reads %d tokens; not read: %r", case.id, model.length, lost)
    if lab.method.needs.inversion and not case.source:
        log.warning('%s: is kept under an empty prompt; say what it shows, source="a cat in the snow"', case.id)
    item = as_item(case, prepared, Inversion(torch.empty(0)))
    editor = Editor(model, lab.method, lab.schedule)
    given = editor.given([item], None)  # raises for words, hints and adapters
    try:
        given = lab.method.prepare(model, given, lab.schedule)
        said = given.prompts.keys() - {name for name, text in told.items() if not text}
        plan = lab.method.plan(model.sites, len(lab.schedule))
        if not given.hint and any(branch.prompt == "target" for branch in plan.branches.values()):
            told_apart(model, case)
        latents = {branch.x for branch in plan.branches.values()}
        layers = self_layers(model.sites)
        check(plan, given, steps=len(lab.schedule), layers=layers, latents=latents, prompts=said)
        for watching in callbacks:
            if isinstance(watching, Attend):
                watching.check(editor, item, lab.batch)
    except InputError as error:
        raise InputError(f"{case.id}: {error}") from None
    record = record_facts(lab, prepared.pixels, case.source)
    depends = {
        "record": record,
        "case": case.id,
        **told,
        "mask": None if prepared.mask is None else sha256(prepared.mask),
        **({"shown": sha256(prepared.shown)} if lab.method.needs.paste and prepared.shown is not None else {}),
        "hints": {kind: sha256(hint) for kind, hint in prepared.hints.items()},
        "adapters": model.digest(sorted(prepared.hints)),
        "method": settings(lab.method),
        "seed": lab.seed,
        "trainer": dict(lab.trainer),
        "version": __version__,
    }
    kin = (width, height, *sorted(prepared.hints), prepared.mask is None)
    key, of_record = lab.store.key(depends), lab.store.key(record)
    made_of = lab.ask(inputs, lab.read(case)) | ({} if lab.reads_hints else dict.fromkeys(HINTS, UNREAD))
    return Job(case, folder, key, of_record, kin, prepared.original, place, made_of)


def _predict(
    lab: Lab,
    jobs: Mapping[str, Job],
    found: Mapping[str, bool],
    loggers: Sequence[Any],
    callbacks: Sequence[L.Callback],
) -> None:
    """Edit and write cases of the same settings, whose inversions are in the store."""
    results = Results(jobs, {**facts(lab), "weights": lab.model.weights}, found, lab.store.seconds)
    options = {"inference_mode": False, "enable_progress_bar": False} | dict(lab.trainer)
    editor = Editor(lab.model, lab.method, lab.schedule, seed=lab.seed, track=lab.track)
    with undisturbed(interrupt.check):
        trainer = make(lab.model.device, options, loggers=loggers, callbacks=[results, Mirror(jobs), *callbacks])
        trainer.predict(editor, Batches(lab, list(jobs.values())), return_predictions=False)


def told_apart(model: StableDiffusion, case: Case) -> None:
    """Raise InputError for prompts whose difference the text encoder does not read; warn of equal ones."""
    if case.source == case.target:
        log.warning("%s: source and target are the same prompt; no words say what to edit", case.id)
    elif ids(model.tokenizer, case.source, model.length) == ids(model.tokenizer, case.target, model.length):
        raise InputError(
            f"source and target are the same in the {model.length - 2} tokens that the text encoder reads, so nothing "
            "would be edited; shorten the prompts, or put what changes first"
        )


def edit(
    lab: Lab,
    cases: Sequence[Case],
    folder: Path,
    *,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[L.Callback] = (),
    whole: Callable[[Path], bool] = lambda folder: True,
    force: bool = False,
    lost: Callable[[Case, InputError], None] | None = None,
) -> list[Path]:
    """Edit the cases that are not done yet, each written when its batch is; the folders of all that are done.

    One case goes into `folder` itself, several each into one of their own inside it. `whole` may find that a case is
    not done because what `callbacks` write into its folder is not there. All are checked before the first is inverted;
    `force` replaces results of other inputs. `lost` is told of a case of several that cannot be edited, which is on
    record in its folder and left out. Raises NotFinite; Changed for a result of other inputs; and InputError for a
    case that cannot be edited, without `lost`, or if none can.
    """
    if twice := [id for id, times in Counter(case.id for case in cases).items() if times > 1]:
        raise InputError(f"case {twice[0]!r} is there twice: every case needs an id of its own")
    folder = Path(folder)
    folders = [folder if len(cases) == 1 else case_folder(folder, case.id) for case in cases]
    places = list(zip(cases, folders, strict=True))
    for case, its in places:
        check_inputs(case, its, force=force, changed=lab.changed, weights=lab.model.weights)
    jobs, labs, unfit = list[Job](), dict[str, Lab](), list[tuple[Case, Path, InputError]]()
    for place, (case, its) in enumerate(places):
        try:
            labs[case.id] = lab.of(case)
            jobs.append(job(labs[case.id], case, its, place, callbacks))
        except InputError as error:
            if lost is None or len(cases) == 1:
                raise
            unfit.append((case, its, error))
    if unfit and not jobs:
        said = "\n  ".join(str(error) for *_, error in unfit[:8])
        raise InputError(f"none of the {len(cases)} cases can be edited:\n  {said}")
    for case, its, why in unfit:
        fail_case(its, str(why), folder)
        if lost is not None:
            lost(case, why)
    left = {job.case.id: job for job in jobs if not (stays_done(job.folder, job.key) and whole(job.folder))}
    if len(left) < len(jobs):
        log.info("%d of %d cases are done already, under the same configuration", len(jobs) - len(left), len(jobs))
    found = {}
    waiting, numbers = [job.case for job in left.values()], [job.place for job in left.values()]
    for case, _, hit in invert(lab, waiting, loggers=loggers, callbacks=callbacks, places=numbers):
        found[case.id] = hit
    kin: dict[str, dict[str, Job]] = {}
    for id, each in left.items():
        kin.setdefault(repr(labs[id].method), {})[id] = each
    for alike in kin.values():
        _predict(labs[next(iter(alike))], alike, found, loggers, callbacks)
    if missed := [job for job in jobs if not (is_done(job.folder, job.key) and whole(job.folder))]:
        raise InputError(f"the trainer left out {len(missed)} of {len(jobs)} cases: lift its limit in trainer.*")
    return [job.folder for job in jobs]
