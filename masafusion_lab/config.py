"""The experiment: all that a person can set, read from defaults < YAML files < key=value words, and checked at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from masafusion_lab import InputError, keys
from masafusion_lab.axes import Launch, Sweep
from masafusion_lab.choices import Checked
from masafusion_lab.configfile import Text, dump, read_words, read_yaml, short
from masafusion_lab.protocol import Bench
from masafusion_lab.region import Region


@dataclass
class Model(Checked):
    """Which model, and how it is run."""

    path: str = "picturebook"
    """A diffusers folder, a hub id such as CompVis/stable-diffusion-v1-4, or picturebook, the built-in one."""
    adapter: dict[str, str] = field(default_factory=dict)
    """T2I-Adapters by kind of hint, model.adapter.sketch=FOLDER or hub id, beside those in the model's folder."""
    unet: str = ""
    """Another UNet than the model's own, for a method that needs one: its folder, a whole model's, or a hub id."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision; auto: float16 on CUDA, else float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    offload: Literal["none", "model"] = "none"
    """model: every part waits in main memory while it is not used."""
    tiling: bool = False
    """Whether the autoencoder works by tiles: less memory for large pictures."""
    compile: bool = False
    """Whether the UNet is compiled: a slow start, then faster steps."""


@dataclass
class Tracking(Checked):
    """Where a run is recorded, beside its folder."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online if W&B has a key, else offline, to be sent later by `masafusion sync`."""
    logger: Literal["wandb", "csv", "tensorboard"] = "wandb"
    """Who writes the record."""
    project: str = "masafusion"
    """W&B project."""
    entity: str = ""
    """W&B user or team; empty: yours."""
    group: str = ""
    """Runs that belong together."""
    name: str = ""
    """Name of the run; empty: its folder's."""
    tags: list[str] = field(default_factory=list)
    """Words to find it by."""
    attention: int = 0
    """Of every so many cases of an edit the attention is drawn and recorded; 0: of none."""


@dataclass
class Experiment:
    """One experiment. Texts are verbatim; "" is: not given."""

    image: str = ""
    """The picture to edit; without one, and without cases, the built-in example."""
    source: str = ""
    """What the picture shows, in words."""
    target: str = ""
    """What it shall show."""
    instruction: str = ""
    """The edit as an instruction, for methods that take one and for the record."""
    mask: str = ""
    """The region A to edit, white in a picture; auto: from where sketch differs from source_sketch."""
    box: str = ""
    """The region as a rectangle x0,y0,x1,y1: pixels of the picture, or fractions if none exceeds 1."""
    sketch: str = ""
    """Outlines of what it shall show: a picture, or auto, drawn from the image."""
    canny: str = ""
    """Edges of what it shall show: a picture, or auto."""
    pose: str = ""
    """Pose of what it shall show: a picture in openpose's colours."""
    source_sketch: str = ""
    """Outlines of what the image shows, for mask=auto."""
    hint_from: str = ""
    """The picture that an auto hint is drawn from, if not the image."""
    pidinet: str = ""
    """Weights table5_pidinet.pth, by which an auto sketch is drawn."""
    cases: str = ""
    """Many in place of image: a folder, a manifest (.csv, .jsonl, .yaml), or picturebook:8, the world's test edits.
    Of a folder cat.txt is the source of cat.png; a case without a prompt has the one that is given here."""
    size: str = ""
    """Working size in pixels, 512 (short side) or 768x512; empty: the model's own."""
    dilate: int = 0
    """Latent cells by which the region grows."""
    steps: int = 50
    """T, denoising steps: 1 to 999, fewer than the timesteps that the model was trained on."""
    seed: int = 0
    """Of the Gaussian noise; with it the same case gives the same picture."""
    batch: int = 1
    """Cases at once."""
    out: str = ""
    """Folder of the run; empty: runs/TIME-ID."""
    store: str = ""
    """Folder of the inversions; empty: $MASAFUSION_HOME/inversions, or ~/.cache/masafusion/inversions."""
    force: bool = False
    """Whether results of another configuration, of other weights, or of pictures that changed may be replaced."""
    region: Region = field(default_factory=Region)
    model: Model = field(default_factory=Model)
    inversion: dict[str, Any] = field(default_factory=lambda: {"name": "direct"})
    method: dict[str, Any] = field(default_factory=lambda: {"name": "masafusion"})
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any key of Lightning's Trainer, such as trainer.precision=16-mixed."""
    tracking: Tracking = field(default_factory=Tracking)
    axes: dict[str, str] = field(default_factory=dict)
    """What a sweep varies: axes.seed=1,2,3, axes.KEY=[0,9],[9,50], range(1,9,2), windows(0,50,5), uniform(1,9) ..."""
    sweep: Sweep = field(default_factory=Sweep)
    bench: Bench = field(default_factory=Bench)
    launch: Launch = field(default_factory=Launch)


TABLES: dict[str, type] = {"region": Region, "model": Model, "tracking": Tracking, "sweep": Sweep, "bench": Bench}
TABLES |= {"launch": Launch}
"""Tables of the experiment whose keys are always the same."""
PROMPTS = ("source", "target", "instruction")
FILES = ("image", "mask", "sketch", "canny", "pose", "source_sketch", "hint_from", "pidinet", "cases")
"""Keys that may name a file which changes what comes out."""
VERBATIM = (*PROMPTS, *FILES, "out", "store", "bench.root")
"""Prompts and paths: any text at all."""


def load(
    files: Iterable[str | Path] = (),
    words: Iterable[str] = (),
    *,
    base: Experiment | None = None,
    needs: Callable[[Experiment], Iterable[str]] = lambda experiment: (),
) -> Experiment:
    """The experiment of defaults, or `base`, < YAML files < key=value words, of which later ones win.

    Who names another inversion or method than before drops the settings of the former. `needs` says what is wrong with
    an experiment for the task at hand. Raises InputError with all that is wrong, a line each.
    """
    problems: list[str] = []
    given: dict[str, tuple[str, Text]] = {}
    tree = _filled(base or Experiment())
    for more in (*map(read_yaml, files), read_words(words, problems)):
        for table in keys.CHOSEN:
            name = f"{table}.name"
            if name in more and more[name][1] != given.get(name, ("", tree[table]["name"]))[1]:
                given = {key: value for key, value in given.items() if not key.startswith(f"{table}.")}
        given |= more
    names = {table: given.get(f"{table}.name", ("", tree[table]["name"]))[1] for table in keys.CHOSEN}
    tree |= {table: {} for table, name in names.items() if name != tree[table]["name"]}
    chosen = {table: str(name) if name in keys.classes(table) else None for table, name in names.items()}
    known = keys.known(chosen)
    values = {}
    for name, (where, text) in given.items():
        try:
            values[name] = _value(name, text, known)
        except ValueError as error:
            problems.append(f"{where}{error}")
    experiment = _made(_placed(tree, values))
    problems += [*_impossible(experiment), *needs(experiment)]
    if problems:
        lines = [f"{len(problems)} problems:", *problems]
        raise InputError("\n  ".join(lines) if len(problems) > 1 else problems[0])
    return experiment


def problems(error: InputError) -> list[str]:
    """The problems that an error of `load` lists."""
    first, *more = str(error).split("\n  ")
    return more or [first]


def to_yaml(experiment: Experiment) -> str:
    """The whole experiment as a file that `load` reads to the same one; without `force`, which is said each time."""
    values = _filled(experiment)
    del values["force"]
    return dump(values)


def inversion(experiment: Experiment) -> Any:
    """The inversion that the experiment names, with its settings."""
    from masafusion_lab.phases import INVERSIONS

    return _built(INVERSIONS, "inversion", experiment.inversion)


def method(experiment: Experiment) -> Any:
    """The method that the experiment names, with its settings."""
    from masafusion_lab.methods import METHODS

    return _built(METHODS, "method", experiment.method)


def box(text: str) -> tuple[float, float, float, float]:
    """The corners that "x0,y0,x1,y1" means. Raises ValueError unless 0 <= x0 < x1 and 0 <= y0 < y1."""
    x0, y0, x1, y1 = map(float, text.strip("[]()").split(","))
    if not (0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf):
        raise ValueError(text)
    return x0, y0, x1, y1


def _built(classes: Mapping[str, type], table: str, values: Mapping[str, Any]) -> Any:
    settings = dict(values)
    name = settings.pop("name", keys.name_key(table).default)
    if name not in classes:
        raise InputError(f"{table}.name={name}: must be {keys.name_key(table).kind}{keys.suggest(name, classes)}")
    return classes[name](**settings)


def _filled(experiment: Experiment) -> dict[str, Any]:
    """The experiment as dictionaries, in which inversion and method have all of their settings."""
    values = asdict(experiment)
    for table in keys.CHOSEN:
        name = values[table].get("name", keys.name_key(table).default)
        all_of_it = keys.fields(*keys.classes(table)[name], f"{table}.")
        defaults = {key.name.removeprefix(f"{table}."): key.default for key in all_of_it}
        values[table] = {"name": name, **defaults, **values[table]}
    return values


def _placed(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with these values at their places."""
    for name, value in values.items():
        *path, last = name.split(".", 1) if name.startswith("axes.") else name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def _made(tree: Mapping[str, Any]) -> Experiment:
    tables = {name: cls(**tree.get(name, {})) for name, cls in TABLES.items()}
    filled = _filled(experiment := Experiment(**{**tree, **tables}))
    return replace(experiment, **{table: filled[table] for table in keys.CHOSEN})


def _value(name: str, text: Text, known: Mapping[str, keys.Key]) -> Any:
    """The value that a text means for a key. Raises ValueError, in one line, for an unknown key or impossible value."""
    key = keys.find(name, known)
    if key is None:
        raise ValueError(f"{name}: {keys.unknown(name, text, known)}")
    shown = f"{name}={short(text)}"
    text = ", ".join(text) if isinstance(text, list) and name.startswith("axes.") else text
    for each in [text] if isinstance(text, str) else text:
        if "\0" in each:
            raise ValueError(f"{shown}: holds a null byte; remove it")
        if "${" in each and name not in VERBATIM:
            raise ValueError(f"{shown}: nothing is filled in here, neither keys nor the environment; write the value")
    try:
        value = key.read(text)
    except ValueError as error:
        near = keys.suggest(text, key.choices, 0.5) if isinstance(text, str) else ""
        raise ValueError(f"{shown}: {error}{near}") from None
    if name in PROMPTS:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{shown}: is not valid UTF-8; set the terminal to UTF-8") from None
    return value


def _impossible(experiment: Experiment) -> Iterator[str]:
    """What is of the right type and yet cannot be."""
    e, i = experiment, experiment.inversion
    device, devices = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", e.model.device), "auto, cpu, cuda, cuda:1, mps"
    counts = {"dilate": e.dilate, "tracking.attention": e.tracking.attention, "bench.count": e.bench.count,
              "bench.sessions": e.bench.sessions, "launch.workers": e.launch.workers,
              "launch.cpus": e.launch.cpus, "inversion.inner_steps": i.get("inner_steps")}  # fmt: skip
    precision = str(e.trainer.get("precision", "32-true"))
    mixed = precision == "32-true" or not re.fullmatch(r"64|.*-true", precision)
    yield from e.region.problems()
    for key, value, right, allowed in (
        ("steps", e.steps, 1 <= e.steps <= 999, "1 to 999, fewer than the model was trained on"),
        ("batch", e.batch, e.batch >= 1, "at least 1"),
        ("launch.minutes", e.launch.minutes, e.launch.minutes >= 1, "at least 1"),
        *((key, n, n is None or n >= 0, "at least 0") for key, n in counts.items()),
        ("size", e.size, re.fullmatch(r"([1-9]\d*(x[1-9]\d*)?)?", e.size), "a side, 512, or both, 768x512"),
        ("model.device", e.model.device, device, devices),
        ("trainer.precision", precision, mixed, "32-true or mixed, for latents are float32; else set model.dtype"),
        ("inversion.lr", i.get("lr"), i.get("lr") is None or i["lr"] > 0, "above 0"),
    ):
        if not right:
            yield f"{key}={value}: must be {allowed}"
    try:
        e.box and box(e.box)
    except ValueError:
        yield f"box={short(e.box)}: must be x0,y0,x1,y1 with 0 <= x0 < x1 and 0 <= y0 < y1"
    for key, value in e.method.items():
        if isinstance(value, tuple) and key.endswith("_steps") and not 0 <= value[0] < min(value[1], max(e.steps, 1)):
            yield f"method.{key}=[{value[0]},{value[1]}]: must be [a,b] with 0 <= a < b and a < steps={e.steps}"
