"""What all who are in the annotation lab share, and what one of them does there: pictures, sets, runs. No page."""

from __future__ import annotations

import base64
import copy
import hashlib
import os
import re
import secrets
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from masafusion_lab import InputError, config, request
from masafusion_lab.annotate import pieces, seen
from masafusion_lab.data.case import HINTS
from masafusion_lab.data.pictures import open_picture
from masafusion_lab.runs import read_json, replacing, write_picture
from masafusion_lab.web.desk import Desk, Job

BYTES = 20_000_000
"""Of a picture that is brought in."""

ROOM = 1000
"""Pictures that one person may bring in."""

LATEST = 24
"""Runs that are shown."""


@dataclass(frozen=True)
class Past:
    """A run that was begun: its folder, its state.json and, where it was finished, its result.json."""

    folder: Path
    state: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def done(self) -> bool:
        """Whether there are pictures to look at."""
        return bool(self.result)

    @property
    def killed(self) -> bool:
        """Whether its process ended without a word."""
        return self.state.get("state") == "running" and self.state.get("pid") != os.getpid()


@dataclass
class Studio:
    """The experiment that the lab was started with, by words and files; where all is kept; the desk that computes.

    Each person has a folder of their own, named by a hash of the token that only their browser knows.
    """

    experiment: config.Experiment
    words: Sequence[str]
    files: Sequence[Path]
    root: Path
    desk: Desk = field(default_factory=Desk)

    def __post_init__(self) -> None:
        """Check what it was started with. Raises InputError."""
        if self.experiment.cases and not Path(self.experiment.cases).is_dir():
            raise InputError(f"cases={self.experiment.cases}: the lab annotates a folder of pictures; name one")
        self._lock = threading.Lock()
        self._loading: Job | None = None
        self._models: dict[str, Any] = {}
        self._tokenizer: Any = None

    def load(self) -> Job:
        """Have the model loaded, once; again where that failed."""
        with self._lock:
            if self._loading is None or (self._loading.future.done() and self._loading.future.exception()):
                self._loading = self.desk.submit("", lambda job: self._load(job, self.experiment))
            return self._loading

    def _load(self, job: Job, experiment: config.Experiment) -> Any:
        """The model with the kind of UNet that the method of an experiment needs; see `network.NETWORKS`."""
        from masafusion_lab.model import StableDiffusion

        kind = config.method(experiment).needs.network
        if kind not in self._models:
            job.tell("loading the model", 0, 0)
            self._models[kind] = StableDiffusion.load(**vars(self.experiment.model), network=kind)
        return self._models[kind]

    @property
    def model(self) -> Any:
        """The model, when it is loaded. Raises InputError if it cannot be."""
        return self.load().future.result()

    def pieces(self, source: str, target: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
        """Both prompts in the tokens that the model reads, each with whether it is in this prompt alone."""
        model = self.model
        with self._lock:  # a tokenizer is for one thread at a time, and the model's own is the desk's
            self._tokenizer = self._tokenizer or copy.deepcopy(model.tokenizer)
            return pieces(self._tokenizer, source, target)

    @property
    def drawn_by(self) -> str:
        """How a drawing is read, which is white on black, however the files are; see `Region.by`."""
        return "auto" if self.experiment.region.by == "auto" else "light"

    def see(self, picture: Image.Image, region: Image.Image, size: str, dilate: int) -> tuple[Image.Image, str]:
        """The region as the model will see it; see `annotate.seen`."""
        m, how = self.model, replace(self.experiment.region, by=self.drawn_by)
        sizes: dict[str, Any] = {"factor": m.factor, "multiple": m.multiple, "native": m.native, "size": size}
        return seen(picture, region, **sizes, dilate=dilate, how=how)

    def person(self, token: str) -> Path:
        """The folder of whose browser has this token."""
        return self.root / hashlib.sha256(str(token).encode("utf-8", "surrogatepass")).hexdigest()[:20]

    @property
    def served(self) -> Path:
        """The one folder from which files are served: copies, each under a name that nobody guesses."""
        return self.root.absolute() / "served"

    def set_folder(self, token: str) -> Path:
        """The folder of the set that this person annotates: the one that the lab was started with, or their own."""
        return Path(self.experiment.cases) if self.experiment.cases else self.person(token) / "set"

    def submit(
        self, token: str, picture: Path, drawings: Mapping[str, Image.Image | None], words: Sequence[str]
    ) -> Job:
        """Have a picture edited with the drawings (mask, and hints by kind) over it, under more key=value words.

        Raises InputError for what cannot be run, or if too much waits.
        """
        folder = self.person(token)
        files = {kind: keep_picture(folder / "drawings", kind, image) for kind, image in drawings.items() if image}
        given = dict.fromkeys(("mask", "box", *HINTS, "cases", "out"), "") | {
            "image": picture,
            "region.by": self.drawn_by,
        }
        experiment = request.read(
            [*self.words, *(f"{key}={value}" for key, value in (given | files).items()), *words], self.files
        )
        self.load()
        return self.desk.submit(folder.name, lambda job: self._edit(job, experiment, folder / "runs"))

    def _edit(self, job: Job, experiment: Any, root: Path) -> Path:
        from masafusion_lab import phases, tracking
        from masafusion_lab.callbacks import Told
        from masafusion_lab.recorded import recorded

        lab = phases.build(experiment, track=job.track, model=self._load(job, experiment))
        with recorded(experiment, root) as folder, tracking.recording(experiment, folder) as loggers:
            cases = request.cases_of(experiment)
            return phases.edit(lab, cases, folder, loggers=loggers, callbacks=[Told(job.tell)])[0]

    def attend(self, token: str, name: str) -> Job:
        """Have the attention of a finished run looked at: its denoising again, watched as by `masafusion attend`.

        Figures, maps and page are added to its folder, in which nothing else changes. Raises InputError.
        """
        past = self.finished(token, name)
        if past is None:
            raise InputError(f"{name}: is no finished run; load the page again")
        self.load()
        return self.desk.submit(self.person(token).name, lambda job: self._attend(job, past.folder))

    def _attend(self, job: Job, folder: Path) -> Path:
        from masafusion_lab import phases
        from masafusion_lab.callbacks import Attend, Told
        from masafusion_lab.explorer import is_kept, keep
        from masafusion_lab.results import is_done
        from masafusion_lab.watch import Watch

        experiment, watch = config.load([folder / "config.yaml"]), Watch()
        lab = phases.build(experiment, track=job.track, model=self._load(job, experiment))
        (case,) = request.cases_of(experiment)
        if not is_done(folder, phases.job(lab, case, folder).key):
            raise InputError("another model, or version, made this run: run it again to see its attention")
        seen = [Attend(watch, keep=keep), Told(job.tell)]
        return phases.edit(lab, [case], folder, callbacks=seen, whole=lambda f: is_kept(f, watch))[0]

    def finished(self, token: str, name: str) -> Past | None:
        """The run of this person of that name, if it is done."""
        return next((past for past in self.past(token) if past.done and past.folder.name == name), None)

    def past(self, token: str) -> list[Past]:
        """The runs of this person, latest first."""
        found = {path: read_json(path) for path in (self.person(token) / "runs").glob("*/state.json")}
        runs = sorted(found, key=lambda path: found[path].get("started", ""), reverse=True)[:LATEST]
        return [looked_at(path.parent, found[path]) for path in runs]


def looked_at(folder: Path, state: Mapping[str, Any]) -> Past:
    """What is left of a run; of one whose files are not what was written, what is damaged and no result."""
    from masafusion_lab.results import damage

    result = read_json(folder / "result.json")
    if result and (why := damage(folder)):
        return Past(folder, {**state, "state": "damaged", "error": why.replace(f"{folder}{os.sep}", "")}, {})
    return Past(folder, state, result)


def keep_picture(folder: Path, name: str, image: Image.Image, *, apart: bool = True) -> Path:
    """Keep a picture, PNG, once; `apart`: in a folder of its own in this one, so that its name stays what it was.

    Raises InputError if there are too many.
    """
    digest = hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()[:12]
    path = folder.absolute() / (f"{digest}/{name}.png" if apart else f"{name}-{digest}.png")
    if not path.is_file():
        if folder.is_dir() and sum(1 for _ in folder.iterdir()) >= ROOM:
            raise InputError(f"there are {ROOM} pictures already: remove some of {folder}")
        write_picture(path, image)
    return path


def brought(upload: Any, opens: Callable[[Path], Image.Image] = open_picture) -> tuple[str, Image.Image]:
    """The name, fit for a file, and the picture of {"name", "data"}, whose data is a base64 data: URL.

    `opens` reads it from a file. Raises InputError for what is no picture, or too large.
    """
    name, data = (str(upload.get(key, "")) if isinstance(upload, Mapping) else "" for key in ("name", "data"))
    said = Path(name).name[:80] or "picture"
    if len(data) > BYTES * 4 / 3 + 100:
        raise InputError(f"{said}: has more than {BYTES // 1_000_000} MB; make it smaller")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture"
        try:
            file.write_bytes(base64.b64decode(data.partition(",")[2], validate=True))
            image = opens(file)
        except InputError as error:
            raise InputError(str(error).replace(str(file), said)) from None
        except ValueError:
            raise InputError(f"{said}: did not arrive whole; bring it again") from None
    return re.sub(r"[^\w.-]+", "-", Path(name).stem).strip("-.")[:60] or "picture", image


def zipped(folder: Path, path: Path) -> Path:
    """Write all files of a folder, but hidden ones, into a zip at `path`."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*")):
            inside = file.relative_to(folder)
            if file.is_file() and not file.is_symlink() and not any(part.startswith(".") for part in inside.parts):
                archive.write(file, Path(folder.name) / inside)
    return path


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)
