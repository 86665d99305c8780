"""What the annotation lab does when something is pressed, between the page and studio.py, annotate.py, views.py."""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from masafusion_lab import InputError, request
from masafusion_lab.annotate import LAYERS, opened, over, read_drawings, read_layer, ways
from masafusion_lab.config import PROMPTS
from masafusion_lab.data.pictures import LINES, open_picture
from masafusion_lab.hints import region_from_sketches
from masafusion_lab.interrupt import Cancelled
from masafusion_lab.web import form, views
from masafusion_lab.web.desk import Job
from masafusion_lab.web.notices import noticed
from masafusion_lab.web.studio import Past, Studio, brought, keep_picture, new_token, zipped

log = logging.getLogger(__name__)

SHOWN = ("source", "reconstruction", "intermediate", "target")
FIGURES = ("words", "self_attention", "interference")
VIEWED = 8
"""Parts of a viewer: its group, before and after, pictures, facts, the zip, the name, attention, status of that."""
POLL = 0.25
"""Seconds between two looks at a computation."""


@contextmanager
def told() -> Iterator[None]:
    """Show what cannot be done, instead of doing it."""
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error)), title="Not possible", print_exception=False) from None


def arrive(studio: Studio, token: str) -> tuple[Any, ...]:
    """Who comes, or comes back: token, picture, drawing, prompts, kind of hint, and the runs so far."""
    studio.load()
    token = token if isinstance(token, str) and token else new_token()
    experiment = studio.experiment if studio.experiment.image else request.read([], [])
    with told(), noticed() as said:
        (case,) = request.cases_of(replace(experiment, cases=""))
        picture, drawings = opened(case, experiment.region.by)
    path = keep_picture(studio.person(token) / "pictures", case.id, picture)
    texts = case.source, case.target, case.instruction
    drawing = views.drawing(picture, drawings, said)
    return token, str(path), drawing, *texts, kind_of(drawings), *history(studio, token)


def kind_of(drawings: Mapping[str, Any]) -> str:
    """The kind of hint that the sketch among drawings is."""
    return next((kind for kind in LINES if kind in drawings), LINES[0])


def able(studio: Studio, kind: str) -> tuple[Any, ...]:
    """What the model can be shown, once it is loaded: the kinds that the sketch may be, beside its own, and poses."""
    with told():
        kinds = {*studio.model.adapters, kind}
    drawing = views.drawing(None, {}, pose="pose" in kinds)
    return gr.update(choices=[each for each in LINES if each in kinds]), drawing, drawing


def history(studio: Studio, token: str) -> tuple[str, Any]:
    """The runs so far, side by side, and the names of those that can be looked at."""
    runs = studio.past(token)
    names = [past.folder.name for past in runs if past.done]
    return views.cards(runs), gr.update(choices=names, value=names[0] if names else None, visible=bool(names))


def bring(studio: Studio, token: str, picture: str, sent: Any) -> tuple[Any, ...]:
    """A picture that was brought in, its drawing, and no prompts; or what was brought in for a layer of the drawing."""
    if meant(sent):
        return gr.skip(), lay(studio, picture, sent), gr.skip(), gr.skip(), gr.skip()
    with told():
        name, image = brought((uploads(sent) or [None])[0])
        path = keep_picture(studio.person(token) / "pictures", name, image)
    return str(path), views.drawing(image, {}), "", "", ""


def lay(studio: Studio, picture: str, sent: Any) -> dict[str, Any]:
    """A region, sketch or pose from a file, brought to polarity and size, and what had to be done for that."""
    layer, by = meant(sent), studio.experiment.region.by
    with told(), noticed() as said:
        _, drawing = brought((uploads(sent) or [None])[0], lambda file: read_layer(file, layer, by))
        laid = over(drawing, _open(picture))
    unnamed = [text.split(": ", 1)[-1] for text in said]
    return views.drawing(None, {"mask" if layer == "region" else layer: laid}, unnamed)


def meant(sent: Any) -> str:
    """The layer that a page's drawing has brought something in for; "": a picture was brought."""
    layer = sent.get("as") if isinstance(sent, Mapping) else None
    return layer if layer in LAYERS else ""


def uploads(sent: Any) -> list[Any]:
    """The pictures that a page's drawing has sent."""
    found = sent.get("uploads") if isinstance(sent, Mapping) else None
    return found if isinstance(found, list) else []


def difference(studio: Studio, source: str, target: str) -> str:
    """Which tokens change, and what of the prompts the model does not read."""
    with told():
        before, after = studio.pieces(source, target)
        lost = filter(None, map(studio.model.cut, (source, target)))
        return views.part("difference", before, after, " … ".join(lost))


def see(studio: Studio, picture: str, sent: Any, size: str, dilate: float) -> tuple[Any, str]:
    """The region as the model will see it, and what to know of it."""
    try:
        image = _open(picture)
        region = read_drawings(sent, image).get("mask")
        if region is None:
            return gr.update(visible=False), views.part("said", "Nothing is painted yet: paint the region to edit.")
        shown, said = studio.see(image, region, size, int(dilate or 0))
    except InputError as error:
        return gr.update(visible=False), views.part("said", str(error), "warn")
    return gr.update(value=shown, visible=True), views.part("said", said)


def outline(studio: Studio, picture: str, how: str) -> dict[str, Any]:
    """The sketch drawn from the picture."""
    with told():
        return views.drawing(None, {"sketch": over(_drawn(studio, how, picture), _open(picture))})


def compare(studio: Studio, picture: str, sent: Any, how: str) -> dict[str, Any]:
    """The region in which the sketch differs from the one that is drawn from the picture."""
    with told():
        image = _open(picture)
        after = read_drawings(sent, image).get("sketch")
        if after is None:
            raise InputError("there is no sketch: draw it from the picture, then redraw what shall change")
        before = over(_drawn(studio, how, picture), image)
        return views.drawing(None, {"mask": region_from_sketches(before, over(after, image))})


def _open(picture: str) -> Image.Image:
    """A picture that was kept, or is of the set. Raises InputError."""
    if not picture:
        raise InputError("there is no picture: load the page again")
    return open_picture(Path(picture))


def _drawn(studio: Studio, how: str, picture: str) -> Image.Image:
    return ways(studio.experiment.pidinet)[how](_open(picture))


async def run(
    studio: Studio, fields: Sequence[form.Field], token: str, picture: str, sent: Any, kind: str, *given: Any
) -> AsyncIterator[tuple[Any, ...]]:
    """Have the edit computed: status, whether it runs, its pictures, and the runs so far, as long as it takes.

    `given`: source, target, instruction, and the values of the form's fields.
    """
    try:
        drawings = read_drawings(sent, _open(picture), kind)
        words = [f"{key}={text}" for key, text in zip(PROMPTS, given, strict=False)]
        words += form.words(fields, given[len(PROMPTS) :])
        job = studio.submit(token, Path(picture), drawings, words)
    except InputError as error:
        yield _status(views.part("said", str(error), "warn"), running=False)
        return
    async for news in follow(studio, token, job):
        yield news


async def follow(studio: Studio, token: str, job: Job | None = None) -> AsyncIterator[tuple[Any, ...]]:
    """Show a computation, or the one that this person has waiting or running, until it is done."""
    job = job or studio.desk.of(studio.person(token).name)
    if job is None:
        yield _status("", running=False)
        return
    async for said in watched(studio, job):
        yield _status(said, running=True)
    status = _status(ended(job), running=False)
    if failed(job) is not None:
        yield (*status[:-2], *history(studio, token))
        return
    past = next(past for past in studio.past(token) if past.folder == job.future.result())
    yield (*status[:3], *viewer(studio, past), *history(studio, token))


async def watched(studio: Studio, job: Job) -> AsyncIterator[str]:
    """How far a computation is, whenever that changes, until it is done."""
    said = ""
    while not job.future.done():
        if (now := views.progress(studio.desk, job)) != said:
            yield (said := now)
        await asyncio.sleep(POLL)


def failed(job: Job) -> BaseException | None:
    """What ended a computation, if it did not come to its own end."""
    return Cancelled() if job.future.cancelled() else job.future.exception()


def ended(job: Job) -> str:
    """What is to be said of a computation that is done."""
    error = failed(job)
    if error is None:
        return views.part("notices", job.warnings)
    if isinstance(error, Cancelled):
        return views.part("said", "Cancelled.", "soft stopped")
    said = str(error)
    if not isinstance(error, InputError | ArithmeticError):
        where = getattr(error, "log", "what the lab says where it was started")
        said = f"{type(error).__name__}: {said}; see {where}"
        log.error("%s", said, exc_info=None if hasattr(error, "log") else error)
    return views.part("said", said, "warn")


def _status(said: str, *, running: bool) -> tuple[Any, ...]:
    """Status, and the two buttons; pictures and history as they are."""
    return said, gr.update(interactive=not running), gr.update(interactive=running), *[gr.skip()] * (VIEWED + 2)


def cancel(studio: Studio, token: str) -> None:
    """Call off what this person has waiting or running; whoever follows it says so."""
    studio.desk.cancel(studio.person(token).name)


def viewer(studio: Studio, past: Past) -> tuple[Any, ...]:
    """A finished run to look at: see `VIEWED`."""
    pictures = {name: Image.open(path) for name in SHOWN if (path := past.folder / f"{name}.png").is_file()}
    figures = [path for name in FIGURES if (path := past.folder / f"attention_{name}.png").is_file()]
    name = f"{past.folder.parent.parent.name}-{past.folder.name}"
    archive = zipped(past.folder, studio.served / "zips" / name / f"{past.folder.name}.zip")
    return (
        gr.update(visible=True),
        (pictures["source"], pictures["target"]),
        [(picture, name) for name, picture in pictures.items()],
        views.facts(past),
        gr.update(value=str(archive)),
        past.folder.name,
        gr.update(value=[Image.open(path) for path in figures], visible=bool(figures)),
        "",
    )


def look(studio: Studio, token: str, name: str) -> tuple[Any, ...]:
    """A run of this person, by name."""
    past = studio.finished(token, name)
    return (gr.update(visible=False), *[gr.skip()] * (VIEWED - 1)) if past is None else viewer(studio, past)


async def attend(studio: Studio, token: str, name: str) -> AsyncIterator[tuple[Any, ...]]:
    """Have the attention of a run looked at: whether that may be asked and called off, and a viewer."""
    rest = [gr.skip()] * (VIEWED - 1)
    try:
        job = studio.attend(token, name)
    except InputError as error:
        yield gr.skip(), gr.skip(), *rest, views.part("said", str(error), "warn")
        return
    async for said in watched(studio, job):
        yield gr.update(interactive=False), gr.update(visible=True), *rest, said
    parts = look(studio, token, name) if failed(job) is None else rest
    yield gr.update(interactive=True), gr.update(visible=False), *parts[: VIEWED - 1], ended(job)
