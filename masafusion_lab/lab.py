"""The lab of an experiment: model, schedule, method, inversion and store, and what results say of them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masafusion_lab import InputError, __version__, config, keys
from masafusion_lab.data.case import Case
from masafusion_lab.data.prepared import Prepared, prepare
from masafusion_lab.inversion import Direct, NoInversion, Track, silent
from masafusion_lab.loading import check_steps, choose_device
from masafusion_lab.methods import METHODS, Method
from masafusion_lab.model import StableDiffusion
from masafusion_lab.null_text import NullText
from masafusion_lab.once import Ask, call
from masafusion_lab.region import USUAL, Region
from masafusion_lab.schedule import Schedule
from masafusion_lab.store import Store
from masafusion_lab.trainer import make, undisturbed

log = logging.getLogger(__name__)


@dataclass
class Lab:
    """What the phases of one experiment share. `trainer`: keys of lightning's Trainer; `ask`: see `Once`."""

    model: StableDiffusion
    schedule: Schedule
    method: Method
    inversion: Direct | NoInversion | NullText
    store: Store
    seed: int = 0
    batch: int = 1
    trainer: Mapping[str, Any] = field(default_factory=dict)
    track: Track = silent
    ask: Ask = call
    size: str = ""
    dilate: int = 0
    region: Region = USUAL
    changed: Mapping[str, Any] = field(default_factory=dict)
    """The settings that are not the defaults, for the reader of a result."""

    @cached_property
    def reads_hints(self) -> bool:
        """Whether a branch of the method reads drawn conditions; they are not opened for one that reads none."""
        with suppress(InputError):  # which is said when the plan is followed
            branches = self.method.plan(self.model.sites, len(self.schedule)).branches.values()
            return any(branch.hint is not None for branch in branches)
        return True

    def of(self, case: Case) -> Lab:
        """The lab with the settings of its method that a case has for itself; those of other methods are not read.

        Raises InputError for a setting that no method has, or a value that it cannot have.
        """
        if not case.settings:
            return self
        every = keys.known(dict.fromkeys(keys.CHOSEN))
        known = keys.known({**dict.fromkeys(keys.CHOSEN), "method": settings(self.method)["name"]})
        values: dict[str, Any] = {}
        for name, text in case.settings.items():
            if name == "method.name":
                raise InputError(f"{case.id}: {name}={text}: all cases have one method; edit this in a run of its own")
            if (key := keys.find(name, known)) is None:
                if keys.find(name, every) is None:
                    raise InputError(f"{case.id}: {name}: {keys.unknown(name, text, every)}")
                continue
            try:
                _, field_, *entry = name.split(".", 2)
                value = key.read(text)
            except ValueError as error:
                raise InputError(f"{case.id}: {name}={text}: {error}") from None
            before = values.get(field_, getattr(self.method, field_))
            values[field_] = {**before, entry[0]: value} if entry else value
        return replace(self, method=replace(self.method, **values)) if values else self  # type: ignore[type-var]

    def read(self, case: Case) -> Case:
        """The case without its hints, if the method reads none."""
        return case if self.reads_hints else self.ask(_without_hints, case)

    def prepare(self, case: Case) -> Prepared:
        """The tensors of a case, at the size that this model works at."""
        m = self.model
        return self.ask(
            prepare,
            self.read(case),
            factor=m.factor,
            multiple=m.multiple,
            native=m.native,
            size=self.size or None,
            dilate=self.dilate,
            how=self.region,
        )


def _without_hints(case: Case) -> Case:
    return replace(case, hints={})


def chosen(experiment: config.Experiment) -> tuple[Any, Any]:
    """The inversion, none where the method reads none, and the method of an experiment. Raises InputError."""
    inversion, method = config.inversion(experiment), config.method(experiment)
    return getattr(inversion, "resolved", inversion) if method.needs.inversion else NoInversion(), method


def build(
    experiment: config.Experiment, *, track: Track = silent, model: StableDiffusion | None = None, ask: Ask = call
) -> Lab:
    """The lab of an experiment, its settings checked before the model is loaded and against it. Raises InputError.

    `model`: the one that it names, where that is loaded already.
    """
    inversion, method = chosen(experiment)
    w, of_edit = getattr(inversion, "guidance", None), getattr(method, "guidance", None)
    cancels = not getattr(inversion, "interpolation", True)
    if None not in (w, of_edit) and w != of_edit and not cancels:
        log.warning("inversion.guidance=%g but method.guidance=%g: the source is replayed under the former", w, of_edit)
    needed = method.needs
    if not needed.inversion:
        log.info("method.name=%s reads no inversion: none is made", experiment.method["name"])
    store = Store(Path(experiment.store) if experiment.store else None)
    with undisturbed():
        make(model.device if model else choose_device(experiment.model.device), experiment.trainer)
    if model is None:
        check_steps(experiment.model.path, experiment.steps)
        log.info("reading the model %s", experiment.model.path)
        model = StableDiffusion.load(**vars(experiment.model), network=needed.network)
    return Lab(
        model,
        model.schedule(experiment.steps),
        method,
        inversion,
        store,
        experiment.seed,
        experiment.batch,
        experiment.trainer,
        track,
        ask,
        experiment.size,
        experiment.dilate,
        experiment.region,
        changes(experiment, inversion, method),
    )


def record_facts(lab: Lab, pixels: Tensor, prompt: str) -> dict[str, Any]:
    """All that the record of a picture depends on: what its key in the store is made of."""
    inversion = settings(lab.inversion)
    inversion.pop("checkpointing", None)  # the same embeddings with and without
    return {
        "picture": sha256(pixels),
        "prompt": prompt,
        "model": lab.model.digest(),
        "dtype": str(lab.model.dtype),
        "tiling": bool(getattr(lab.model.vae, "use_tiling", False)),
        "timesteps": lab.schedule.timesteps,
        "abar": sha256(lab.schedule.abar),
        "prediction": lab.schedule.prediction,
        "inversion": inversion,
        "trainer": dict(lab.trainer) if isinstance(lab.inversion, NullText) else {},
    }


def sha256(x: Tensor) -> str:
    """The sha256 of a float tensor's shape and values."""
    data = x.detach().cpu().float().contiguous().numpy().tobytes()
    return hashlib.sha256(repr(tuple(x.shape)).encode() + data).hexdigest()


def facts(lab: Lab) -> dict[str, Any]:
    """What the results of all cases of a lab share: how and with what they were made."""
    packages = ("torch", "lightning", "diffusers", "transformers")
    device = lab.model.device
    return {
        "model": lab.model.digest(),
        "steps": len(lab.schedule),
        "seed": lab.seed,
        "inversion": settings(lab.inversion),
        "method": settings(lab.method),
        "changed": dict(lab.changed),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})",
        "versions": {
            "masafusion_lab": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def settings(chosen: Any) -> dict[str, Any]:
    """Name, as in `method.name=...` or `inversion.name=...`, and fields of a method or an inversion."""
    names = {cls: name for name, cls in METHODS.items()}
    return {"name": names.get(type(chosen)) or getattr(chosen, "name", type(chosen).__name__), **asdict(chosen)}


def changes(experiment: config.Experiment, inversion: Any, method: Any) -> dict[str, Any]:
    """The settings that are not the defaults, by key; without the prompts and without where things are put."""
    now, usual = asdict(experiment), asdict(type(experiment)())
    for table, it in (("inversion", inversion), ("method", method)):
        default = type(it)()
        now[table] = settings(it)
        usual[table] = settings(getattr(default, "resolved", default)) | {"name": usual[table]["name"]}
    aside = "source target instruction out store force tracking axes sweep bench launch"
    for unshown in aside.split():
        del now[unshown]
    before = dict(_flat(usual))
    return {key: value for key, value in _flat(now) if before.get(key) != value}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of settings, by key."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
