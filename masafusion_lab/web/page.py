"""The page of the annotation lab: its parts, and what each press of them calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from masafusion_lab import annotate, config, keys
from masafusion_lab.data.pictures import LINES
from masafusion_lab.web import album, form, handlers, views
from masafusion_lab.web.studio import Studio

TEMPLATES = Path(__file__).parents[1] / "templates"
TO_RESULT = """() => document.querySelector('.status :is(.warn, .stopped)')
  || document.querySelector('.result:not(.hide)')?.scrollIntoView({behavior: 'smooth', block: 'start'})"""
QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}


class Page(gr.Blocks):
    """A page that takes no files: one that a request names is neither opened nor fetched, as Gradio by itself would."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> Any:
        """Refuse inputs that name a file."""
        if names_file(inputs):
            raise gr.Error("this page opens no files", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *args, **options)


def names_file(value: Any) -> bool:
    """Whether a value that came from outside is, or holds, what Gradio takes for a file."""
    if isinstance(value, Mapping):
        return "path" in value or any(map(names_file, value.values()))
    return isinstance(value, list | tuple) and any(map(names_file, value))


@dataclass(frozen=True)
class Annotator:
    """The parts of the page with which a picture is annotated."""

    canvas: gr.HTML
    how: gr.Radio
    outline: gr.Button
    compare: gr.Button
    kind: gr.Radio
    texts: list[gr.Textbox]
    words: gr.HTML
    seen: gr.Image
    said: gr.HTML


def page(studio: Studio) -> gr.Blocks:
    """The page of a studio: edit, earlier runs, a set."""
    experiment = studio.experiment
    with Page(title="MaSaFusion", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as demo:
        token = gr.BrowserState("", storage_key="masafusion", secret="masafusion")  # which hides nothing; see Studio
        gr.HTML(views.part("head", experiment.model.path, studio.root, experiment.tracking))
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Edit"):
                picture = gr.State("")
                with gr.Row():
                    with gr.Column(scale=6, min_width=320):
                        canvas = _canvas("1")
                    with gr.Column(scale=5, min_width=320):
                        texts, words = _prompts("2")
                        gr.HTML(views.part("step", "3", "Run"))
                        with gr.Row():
                            run = gr.Button("Run", variant="primary", scale=3, min_width=120, interactive=False)
                            stop = gr.Button("Cancel", interactive=False, scale=1, min_width=90)
                        opening = views.part("progress", "opening the picture", 0, 0, None)
                        status = gr.HTML(opening, elem_classes=["status"])  # arriving enables Run, or a click were lost
                        edit = _annotator(studio, canvas, texts, words)
                view = _viewer(studio, token, "result")
                fields, inputs = _form(experiment)
            with gr.Tab("Your runs") as runs:
                cards = gr.HTML()
                chosen = gr.Dropdown([], label="Look at", visible=False)
                old = _viewer(studio, token)
            with gr.Tab("Annotate a set") as tab:
                many = _album(studio, token, tab)
        shown = [status, run, stop, *view, cards, chosen]
        size, dilate = (inputs[k] for k, field in enumerate(fields) if field.key.name in ("size", "dilate"))
        _wire(studio, edit, picture, size, dilate)
        arrived = [token, picture, edit.canvas, *edit.texts, edit.kind, cards, chosen]
        arrival = demo.load(partial(handlers.arrive, studio), token, arrived, show_progress="hidden", api_name="arrive")
        arrival.then(partial(handlers.follow, studio), token, shown, show_progress="hidden", concurrency_limit=None,
                     api_name="follow")  # fmt: skip
        arrival.then(partial(handlers.able, studio), edit.kind, [edit.kind, edit.canvas, many],
                     show_progress="hidden", api_visibility="private")  # fmt: skip
        edit.canvas.upload(partial(handlers.bring, studio), [token, picture, edit.canvas],
                           [picture, edit.canvas, *edit.texts], show_progress="hidden", api_name="bring")  # fmt: skip
        asked = [token, picture, edit.canvas, edit.kind, *edit.texts, *inputs]
        run.click(partial(handlers.run, studio, fields), asked, shown, show_progress="hidden", concurrency_limit=None,
                  api_name="run").then(None, js=TO_RESULT)  # fmt: skip
        stop.click(partial(handlers.cancel, studio), token, None, concurrency_limit=None, show_progress="hidden",
                   api_name="cancel")  # fmt: skip
        for event in (chosen.input, runs.select):
            event(partial(handlers.look, studio), [token, chosen], old, show_progress="hidden", api_name="look")
    return demo


def _canvas(number: str = "", *classes: str) -> gr.HTML:
    """Where region and sketch are drawn."""
    gr.HTML(views.part("step", number, "Draw", "the region that shall change, and its new outlines"))
    return gr.HTML(
        html_template=(TEMPLATES / "canvas.html").read_text(encoding="utf-8"),
        js_on_load=(TEMPLATES / "canvas.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_classes=[*classes],
    )


def _prompts(number: str = "") -> tuple[list[gr.Textbox], gr.HTML]:
    """Where prompts and instruction are said, and which tokens of them change."""
    gr.HTML(views.part("step", number, "Say", "what it shows, and what it shall show"))
    source = gr.Textbox(label="Source prompt", max_lines=3)
    target = gr.Textbox(label="Target prompt", max_lines=3)
    words = gr.HTML()
    with gr.Accordion("Instruction, for methods that take one", open=False):
        instruction = gr.Textbox(show_label=False, container=False, max_lines=3)
    return [source, target, instruction], words


def _annotator(studio: Studio, canvas: gr.HTML, texts: list[gr.Textbox], words: gr.HTML) -> Annotator:
    """What helps to draw: the region as the model sees it, and what is drawn by itself."""
    with gr.Accordion("The region as the model sees it", open=True):
        seen = gr.Image(show_label=False, container=False, interactive=False, format="png", buttons=[], height=220,
                        visible=False)  # fmt: skip
        said = gr.HTML(views.part("said", "It is shown when one is painted and the model is loaded."))
    ways = list(annotate.ways(studio.experiment.pidinet))
    with gr.Accordion("Let sketch and region be drawn", open=False):
        how = gr.Radio(ways, value=ways[0], label="How the sketch is drawn", visible=len(ways) > 1)
        with gr.Row():
            outline = gr.Button("Sketch from the picture", size="sm", min_width=120)
            compare = gr.Button("Region from the redrawn sketch", size="sm", min_width=120)
        kind = gr.Radio([*LINES], value=LINES[0], label="The sketch is a hint of this kind")
    return Annotator(canvas, how, outline, compare, kind, texts, words, seen, said)


def _wire(studio: Studio, parts: Annotator, picture: gr.State, size: Any, dilate: Any) -> None:
    """What annotating does, whatever the picture is of."""
    canvas, see = parts.canvas, partial(handlers.see, studio)
    seen = dict(fn=see, inputs=[picture, canvas, size, dilate], outputs=[parts.seen, parts.said], **QUIET)
    canvas.input(**seen, api_visibility="private")
    size.change(**seen, api_visibility="private")
    dilate.change(**seen, api_visibility="private")
    for text in parts.texts[:2]:
        text.change(partial(handlers.difference, studio), parts.texts[:2], parts.words, **QUIET,
                    api_visibility="private")  # fmt: skip
    parts.outline.click(partial(handlers.outline, studio), [picture, parts.how], canvas, show_progress="hidden",
                        api_visibility="private")  # fmt: skip
    parts.compare.click(partial(handlers.compare, studio), [picture, canvas, parts.how], canvas,
                        show_progress="hidden", api_visibility="private")  # fmt: skip


def _form(experiment: config.Experiment) -> tuple[list[form.Field], list[Any]]:
    """The fields of a run and their inputs: what is always asked in sight, the rest of method and inversion below."""
    fields = list(form.fields(experiment))
    made: dict[int, Any] = {}
    gr.HTML(views.part("step", "", "Settings", "those of the paper, if left as they are"))
    with gr.Row(elem_classes=["settings", "main"]):
        for k, field in enumerate(fields):
            if not field.of:
                made[k] = _input(field, min_width=150)
    for table in form.CHOSEN:
        chooser = next(made[k] for k, field in enumerate(fields) if field.key.name == f"{table}.name")
        with gr.Accordion(f"Settings of the {table}", open=False):
            groups = {}
            for name in keys.classes(table):
                of = f"{table}.name={name}"
                with gr.Column(visible=name == chooser.value) as groups[name]:
                    gr.HTML(views.part("said", keys.about(table, name)))
                    with gr.Row(elem_classes=["settings"]):
                        made |= {k: _input(field, min_width=260) for k, field in enumerate(fields) if field.of == of}
        chooser.change(
            lambda chosen, names=tuple(groups): [gr.update(visible=name == chosen) for name in names],
            chooser, list(groups.values()), show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return fields, [made[k] for k in range(len(fields))]


def _input(field: form.Field, *, min_width: int) -> Any:
    """The input of a field, with its line of help."""
    name = field.key.name if field.key.name.endswith(".name") else field.key.name.rpartition(".")[2]
    options: dict[str, Any] = {
        "label": name.removesuffix(".name"),
        "info": field.key.doc or None,
        "min_width": min_width,
    }
    if field.key.type is bool:
        return gr.Checkbox(field.value == "true", **options)
    if field.choices:
        return gr.Dropdown(field.choices, value=field.value, **options)
    if field.key.type is int:
        return gr.Number(int(field.value), precision=0, **options)
    return gr.Textbox(field.value, max_lines=1, **options)


def _viewer(studio: Studio, token: gr.BrowserState, *classes: str) -> list[Any]:
    """Where a finished run is looked at; see `handlers.VIEWED`."""
    with gr.Column(visible=False, elem_classes=[*classes]) as group:
        gr.HTML(views.part("step", "", "Look", "drag the line: source to its left, target to its right"))
        with gr.Row():
            slider = gr.ImageSlider(label="Source | target", interactive=False, format="png", buttons=[])
            gallery = gr.Gallery(label="All pictures", columns=2, format="png", buttons=[])
        facts, name = gr.HTML(), gr.State("")
        with gr.Row(elem_classes=["acts"]):
            download = gr.DownloadButton("Download this run", size="sm", min_width=140)
            ask = gr.Button("Word maps and interference", size="sm", min_width=200)
            stop = gr.Button("Cancel", size="sm", min_width=90, visible=False)
        status = gr.HTML()
        figures = gr.Gallery(label="Attention", columns=1, format="png", buttons=[], visible=False,
                             elem_classes=["figures"])  # fmt: skip
    view = [group, slider, gallery, facts, download, name, figures, status]
    ask.click(partial(handlers.attend, studio), [token, name], [ask, stop, *view], show_progress="hidden",
              concurrency_limit=None, api_visibility="private")  # fmt: skip
    stop.click(partial(handlers.cancel, studio), token, None, concurrency_limit=None, show_progress="hidden",
               api_visibility="private")  # fmt: skip
    return view


def _album(studio: Studio, token: gr.BrowserState, tab: gr.Tab) -> gr.HTML:
    """The pictures of a set one after another; where they are drawn upon."""
    picture, id = gr.State(""), gr.Textbox(visible=False)
    state = gr.HTML()
    with gr.Row(equal_height=True):
        back = gr.Button("Back", size="sm", min_width=80)
        jump = gr.Dropdown([], show_label=False, container=False, min_width=160, scale=3)
        on = gr.Button("Next", size="sm", variant="primary", min_width=80)
        zip_ = gr.DownloadButton("Download the set", size="sm", min_width=140)
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            canvas = _canvas("", "many", *(["fixed"] if studio.experiment.cases else []))
        with gr.Column(scale=5, min_width=320):
            parts = _annotator(studio, canvas, *_prompts())
    _wire(studio, parts, picture, gr.State(studio.experiment.size), gr.State(studio.experiment.dilate))
    said = [id, parts.canvas, parts.kind, *parts.texts]
    shown = [id, picture, parts.canvas, *parts.texts, parts.kind, state, jump]
    tab.select(partial(album.open_set, studio), token, shown, show_progress="hidden", api_name="open_set")
    for button, by in ((back, -1), (on, 1)):
        button.click(lambda token, *said, by=by: album.turn(studio, token, by, *said), [token, *said], shown,
                     show_progress="hidden", api_name=f"turn_{'on' if by > 0 else 'back'}")  # fmt: skip
    jump.input(lambda token, id: album.jump(studio, token, 0, id), [token, jump], shown, show_progress="hidden",
               api_visibility="private")  # fmt: skip
    parts.canvas.upload(
        partial(album.add, studio), [token, picture, parts.canvas], shown, show_progress="hidden", api_name="add"
    )
    for event in (parts.canvas.input, *(text.input for text in parts.texts), parts.kind.input):
        event(partial(album.keep, studio), [token, *said], state, **QUIET, api_name="keep")
    zip_.click(partial(album.download, studio), token, zip_, api_visibility="private")
    return canvas
