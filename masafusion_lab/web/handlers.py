"""What the annotation lab does when something is pressed, between the page and studio.py, annotate.py, views.py."""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from masafusion_lab import InputError, request
from masafusion_lab.annotate import opened, over, read_drawings, ways
from masafusion_lab.config import PROMPTS
from masafusion_lab.data.pictures import open_picture
from masafusion_lab.hints import region_from_sketches
from masafusion_lab.interrupt import Cancelled
from masafusion_lab.web import form, views
from masafusion_lab.web.desk import Job
from masafusion_lab.web.studio import Past, Studio, brought, keep_picture, new_token, zipped

log = logging.getLogger(__name__)

MORE: dict[str, Callable[[Any, Path], Sequence[tuple[Image.Image, str]]]] = {}
"""What can be made of a finished run when it is asked for: a title -> pictures with captions, of model and folder."""

SHOWN = ("source", "reconstruction", "intermediate", "target")
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
    (case,) = request.cases_of(replace(experiment, cases=""))
    picture, drawings = opened(case)
    path = keep_picture(studio.person(token) / "pictures", case.id, picture)
    kind = next((name for name in drawings if name != "mask"), "sketch")
    texts = case.source, case.target, case.instruction
    return token, str(path), views.drawing(picture, drawings), *texts, kind, *history(studio, token)


def history(studio: Studio, token: str) -> tuple[str, Any]:
    """The runs so far, side by side, and the names of those that can be looked at."""
    runs = studio.past(token)
    names = [past.folder.name for past in runs if past.done]
    return views.cards(runs), gr.update(choices=names, value=names[0] if names else None, visible=bool(names))


def bring(studio: Studio, token: str, sent: Any) -> tuple[Any, ...]:
    """A picture that was brought in: itself, its drawing, and no prompts."""
    with told():
        name, picture = brought((uploads(sent) or [None])[0])
        path = keep_picture(studio.person(token) / "pictures", name, picture)
    return str(path), views.drawing(picture, {}), "", "", ""


def uploads(sent: Any) -> list[Any]:
    """The pictures that a page's drawing has sent."""
    found = sent.get("uploads") if isinstance(sent, Mapping) else None
    return found if isinstance(found, list) else []


def difference(studio: Studio, source: str, target: str) -> str:
    """Which tokens change, and what of the prompts the model does not read."""
    with told():
        before, after = studio.pieces(source, target)
        return views.part(
            "difference", before, after, " … ".join(filter(None, map(studio.model.cut, (source, target))))
        )


def see(studio: Studio, picture: str, sent: Any, size: str, dilate: float) -> tuple[Any, str]:
    """The region as the model will see it, and what to know of it."""
    try:
        image = _open(picture)
        region = read_drawings(sent, image, "sketch").get("mask")
        if region is None:
            return None, views.part("said", "Nothing is painted yet: paint the region to edit.")
        shown, said = studio.see(image, region, size, int(dilate or 0))
    except InputError as error:
        return None, views.part("said", str(error), "warn")
    return shown, views.part("said", said)


def outline(studio: Studio, picture: str, how: str) -> dict[str, Any]:
    """The sketch drawn from the picture."""
    with told():
        return views.drawing(None, {"sketch": over(_drawn(studio, how, picture), _open(picture))})


def compare(studio: Studio, picture: str, sent: Any, how: str) -> dict[str, Any]:
    """The region in which the sketch differs from the one that is drawn from the picture."""
    with told():
        image = _open(picture)
        after = read_drawings(sent, image, "sketch").get("sketch")
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
    said = ""
    while not job.future.done():
        if (now := views.progress(studio.desk, job)) != said:
            said = now
            yield _status(said, running=True)
        await asyncio.sleep(POLL)
    error = Cancelled() if job.future.cancelled() else job.future.exception()
    if error is None:
        past = next(past for past in studio.past(token) if past.folder == job.future.result())
        yield (*_status("", running=False)[:3], *viewer(studio, past), *history(studio, token))
        return
    if isinstance(error, Cancelled):
        said = "Cancelled."
    elif isinstance(error, InputError | ArithmeticError):
        said = str(error)
    else:
        said = f"{type(error).__name__}: {error}; see {getattr(error, 'log', 'the log')}"
        log.error("a run failed: %s", said)
    shown = views.part("said", said, "soft" if isinstance(error, Cancelled) else "warn")
    yield (*_status(shown, running=False)[:-2], *history(studio, token))


def _status(said: str, *, running: bool) -> tuple[Any, ...]:
    """Status, and the two buttons; pictures and history as they are."""
    return said, gr.update(interactive=not running), gr.update(interactive=running), *[gr.skip()] * 7


def cancel(studio: Studio, token: str) -> None:
    """Call off what this person has waiting or running; whoever follows it says so."""
    studio.desk.cancel(studio.person(token).name)


def viewer(studio: Studio, past: Past) -> tuple[Any, ...]:
    """A finished run to look at: whether to, before and after, all pictures, facts, and the folder as a zip."""
    pictures = {name: Image.open(path) for name in SHOWN if (path := past.folder / f"{name}.png").is_file()}
    name = f"{past.folder.parent.parent.name}-{past.folder.name}"
    archive = zipped(past.folder, studio.served / "zips" / name / f"{past.folder.name}.zip")
    return (
        gr.update(visible=True),
        (pictures["source"], pictures["target"]),
        [(picture, name) for name, picture in pictures.items()],
        views.facts(past),
        gr.update(value=str(archive)),
    )


def look(studio: Studio, token: str, name: str) -> tuple[Any, ...]:
    """An earlier run of this person, by name."""
    past = next((past for past in studio.past(token) if past.done and past.folder.name == name), None)
    return (gr.update(visible=False), *[gr.skip()] * 4) if past is None else viewer(studio, past)


def closer(studio: Studio, token: str, name: str, title: str) -> list[tuple[Image.Image, str]]:
    """What MORE makes of an earlier run of this person, when its turn comes."""
    folders = {past.folder.name: past.folder for past in studio.past(token) if past.done}
    if name not in folders or title not in MORE:
        return []
    with told():
        job = studio.desk.submit(studio.person(token).name, lambda job: MORE[title](studio.model, folders[name]))
        return list(job.future.result())
