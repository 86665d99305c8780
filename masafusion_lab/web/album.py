"""What the annotation lab does with a set: its pictures one after another, kept in its manifest at every change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from masafusion_lab import InputError
from masafusion_lab.annotate import LAYERS, layer_of, opened, read_drawings
from masafusion_lab.config import PROMPTS
from masafusion_lab.data.annotated import MANIFEST, annotate, annotated, is_whole
from masafusion_lab.data.case import Case
from masafusion_lab.data.pictures import LINES, open_picture
from masafusion_lab.web import views
from masafusion_lab.web.handlers import kind_of, lay, meant, told, uploads
from masafusion_lab.web.notices import noticed
from masafusion_lab.web.studio import Studio, brought, keep_picture, zipped


def album(studio: Studio, token: str) -> dict[str, Case]:
    """The cases of this person's set, by id."""
    return annotated(studio.set_folder(token))


def open_set(studio: Studio, token: str) -> tuple[Any, ...]:
    """The first picture that is not done yet; see `turn`."""
    with told():
        cases = album(studio, token)
        return _shown(
            studio, token, next((id for id, case in cases.items() if not is_whole(case)), next(iter(cases), ""))
        )


def turn(studio: Studio, token: str, by: int, id: str, *said: Any) -> tuple[Any, ...]:
    """Keep what is said of a picture (see `keep`) and go to the one so many before or after it.

    Gives id, picture, drawing, prompts, kind of hint, the state of the set, and the names to jump to.
    """
    keep(studio, token, id, *said)
    return jump(studio, token, by, id)


def jump(studio: Studio, token: str, by: int, id: str) -> tuple[Any, ...]:
    """The picture so many before or after this one."""
    with told():
        ids = list(album(studio, token))
        return _shown(studio, token, ids[(ids.index(id) + by) % len(ids)] if id in ids else "".join(ids[:1]))


def keep(studio: Studio, token: str, id: str, sent: Any, kind: str, *texts: str) -> str:
    """Keep in the manifest what is said of the picture, and the layers that were touched; what to know of the set."""
    if not id:
        return ""
    with told():
        folder = studio.set_folder(token)
        case = album(studio, token).get(id)
        if case is None:
            raise InputError(f"{id}: is no picture of {folder} any more; load the page again")
        touched = sent.get("touched") if isinstance(sent, Mapping) else None
        touched = touched if isinstance(touched, list) else LAYERS
        drawings = read_drawings(sent, open_picture(case.image), kind)
        if drawings and kind not in case.hints:  # the drawing goes from one kind to the other
            touched = [*touched, "sketch"]
            drawings |= dict.fromkeys(set(LINES) & set(case.hints))
        drawings = {column: each for column, each in drawings.items() if layer_of(column) in touched}
        annotate(folder, id, dict(zip(PROMPTS, texts, strict=True)), drawings)
        return _state(studio, token, album(studio, token), id)


def add(studio: Studio, token: str, picture: str, sent: Any) -> tuple[Any, ...]:
    """Add pictures that were brought in to this person's own set; or show what was for a layer of the drawing."""
    if meant(sent):
        return gr.skip(), gr.skip(), lay(studio, picture, sent), *[gr.skip()] * 6
    folder, first = studio.set_folder(token), ""
    with told():
        if studio.experiment.cases:
            raise InputError(f"the set is the folder {folder}: put pictures there")
        if not uploads(sent):
            raise InputError("no picture came: bring it again")
        for upload in uploads(sent):
            name, image = brought(upload)
            path = keep_picture(folder, name, image, apart=False)
            first = first or path.stem
        return _shown(studio, token, first)


def _shown(studio: Studio, token: str, id: str) -> tuple[Any, ...]:
    cases = album(studio, token)
    names = gr.update(choices=list(cases), value=id or None)
    if id not in cases:
        return "", "", gr.skip(), "", "", "", "sketch", _state(studio, token, cases, ""), names
    case = cases[id]
    with noticed() as said:
        picture, drawings = opened(case)
    texts = case.source, case.target, case.instruction, kind_of(drawings)
    return id, str(case.image), views.drawing(picture, drawings, said), *texts, _state(studio, token, cases, id), names


def _state(studio: Studio, token: str, cases: Mapping[str, Case], id: str) -> str:
    done = [case.id for case in cases.values() if is_whole(case)]
    place = list(cases).index(id) + 1 if id in cases else 0
    return views.part("album", place, len(cases), len(done), id in done, studio.set_folder(token) / MANIFEST)


def download(studio: Studio, token: str) -> Any:
    """The set as a zip: pictures, drawings, manifest."""
    folder = studio.set_folder(token)
    if not folder.is_dir():
        return gr.skip()
    name = studio.person(token).name
    return str(zipped(folder, studio.served / "zips" / name / f"{Path(folder).name}.zip"))
