"""What a sweep varies, as a person writes it: axes, their values, and the points that they span."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from masafusion_lab import InputError
from masafusion_lab.choices import Checked


@dataclass
class Sweep(Checked):
    """How the points of a sweep are chosen and run."""

    kind: Literal["grid", "list", "random", "search"] = "grid"
    """Points: every combination of values; the first values, the second ...; at random; or where Optuna looks next."""
    points: int = 20
    """Of a random sweep and of a search how many."""
    halvings: int = 0
    """Of a search: how often the worse half of what is tried together is given up, first after steps / 2^halvings."""
    study: str = ""
    """Journal of a search, which several runs may share; empty: in the run's folder."""
    most: int = 10000
    """Points that are not refused."""
    rows: str = "auto"
    """Rows of the UNet at once; auto: 16 on a CPU, else 64, or as many as a quarter of the machine's memory holds."""
    retry: bool = False
    """Whether points that failed before are tried again."""
    objective: str = ""
    """What is best: a measure, or of two the trade-off, as done or psnr_area,clip_t; empty: of kept against edited."""


AGAIN = 3
"""Times that a worker which died is started again."""


@dataclass
class Launch(Checked):
    """Who runs the items of a benchmark, a sweep or an inversion."""

    by: Literal["here", "local", "ray", "submitit"] = "here"
    """here: this process; local: processes on this machine; ray: a Ray cluster; submitit: a SLURM array."""
    workers: int = 0
    """How many; 0: one a device of this machine, of a cluster one."""
    cpus: int = 0
    """Cores, and threads, of each; 0: this machine's, which those on it share."""
    address: str = ""
    """Of the Ray cluster; empty: one of this machine's own."""
    partition: str = ""
    """Of SLURM."""
    minutes: int = 240
    """Of a SLURM job, after which it is queued again and goes on."""


RUNNING = ("rows", "retry", "most", "points", "halvings", "objective", "study")
"""Keys that change how fast and how far a sweep runs and what is called best, never what a point gives."""

TABLES = ("method.", "inversion.", "region.")
"""Tables whose keys may be varied."""

VARIED = ("seed", "dilate", "steps", "size")
"""Other keys that may be varied."""


@dataclass(frozen=True)
class Axis:
    """A key and its values, or else where they are drawn from: [low, high], evenly or by the logarithm."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def draw(self, source: random.Random) -> str:
        """One value at random."""
        if self.values:
            return source.choice(self.values)
        if self.whole:
            return str(source.randint(int(self.low), int(self.high)))
        if self.log:
            return f"{math.exp(source.uniform(math.log(self.low), math.log(self.high))):.6g}"
        return f"{source.uniform(self.low, self.high):.6g}"


def read(written: Mapping[str, str]) -> list[Axis]:
    """The axes by key and text. Raises InputError, all that is wrong a line each."""
    axes, problems = [], []
    for key, text in written.items():
        try:
            axes.append(_axis(key, text))
        except ValueError as error:
            problems.append(f"axes.{key}={text[:60]}: {error}")
    if not written:
        problems.append("nothing is varied; give axes, such as axes.method.guidance=3,5,7.5")
    if problems:
        raise InputError("\n  ".join(problems))
    return axes


def points(axes: Sequence[Axis], how: Sweep, seed: int = 0) -> list[dict[str, str]]:
    """The value of every axis at each point, in order and each once; of a search what may be asked for.

    Raises InputError for more points than are allowed, and for axes that span none.
    """
    lengths = [len(axis.values) for axis in axes]
    if how.kind in ("grid", "list") and not all(lengths):
        axis = axes[lengths.index(0)]
        raise InputError(f"axes.{axis.key}: has no values to go through, but a range; take sweep.kind=random or search")
    if how.kind == "list" and len(set(lengths)) > 1:
        said = ", ".join(f"{axis.key} {n}" for axis, n in zip(axes, lengths, strict=True))
        raise InputError(f"sweep.kind=list: the axes are of different lengths ({said})")
    count = {"grid": math.prod(lengths), "list": lengths[0]}.get(how.kind, how.points)
    if count > how.most:
        raise InputError(f"{count} points are more than {how.most}: say sweep.most={count} if that is meant")
    if count < 1:
        raise InputError(f"sweep.points={how.points}: must be at least 1")
    if how.kind in ("random", "search"):
        source = random.Random(seed)
        drawn = [{axis.key: axis.draw(source) for axis in axes} for _ in range(count)]
        return [dict(point) for point in dict.fromkeys(tuple(point.items()) for point in drawn)]
    combine = itertools.product if how.kind == "grid" else zip
    return [dict(zip((axis.key for axis in axes), its, strict=True)) for its in combine(*(a.values for a in axes))]


def window(text: str) -> tuple[float, float] | None:
    """The ends of a value that is a window, [a,b], in steps or in fractions; None of another."""
    match = re.fullmatch(r"\[\s*(\d+\.?\d*)\s*,\s*(\d+\.?\d*)\s*\]", text)
    return (float(match[1]), float(match[2])) if match else None


def coordinates(values: Mapping[str, str]) -> dict[str, float | str]:
    """Where a point lies: its values as numbers where they are; a window as the two, KEY.start and KEY.stop."""
    found: dict[str, float | str] = {}
    for key, text in values.items():
        if ends := window(text):
            found |= {f"{key}.start": ends[0], f"{key}.stop": ends[1]}
        else:
            try:
                found[key] = float(text)
            except ValueError:
                found[key] = text
    return found


def _axis(key: str, text: str) -> Axis:
    """The axis that is written so. Raises ValueError."""
    if not key.startswith(TABLES) and key not in VARIED:
        some = ", ".join((*(f"{table}*" for table in TABLES), *VARIED))
        raise ValueError(f"a sweep varies {some}; make a run of its own for others")
    if made := re.fullmatch(r"\s*([a-z]+)\((.*)\)\s*", text):
        name, numbers = made[1], _numbers(made[2])
        shapes = {"range": 3, "windows": 3, "uniform": 2, "loguniform": 2, "integers": 2}
        if shapes.get(name) != len(numbers):
            raise ValueError("must be a list, range(a,b,step), windows(a,b,step), uniform, loguniform or integers(a,b)")
        low, high = numbers[:2]
        if not low < high or (name == "loguniform" and low <= 0) or (len(numbers) == 3 and numbers[2] <= 0):
            raise ValueError("must have a < b, and a step above 0" + ", and a above 0" * (name == "loguniform"))
        if name in ("uniform", "loguniform", "integers"):
            return Axis(key, low=low, high=high, log=name == "loguniform", whole=name == "integers")
        steps = (high - low) / numbers[2] + 1e-9
        if name == "windows" and steps < 1:
            raise ValueError("must have a step of b - a at most")
        if (steps * (steps + 1) / 2 if name == "windows" else steps) > 1e6:
            raise ValueError("has more than a million values")
        grid = [f"{low + n * numbers[2]:.10g}" for n in range(int(steps) + 1)]
        return Axis(key, tuple(grid if name == "range" else (f"[{a},{b}]" for a, b in itertools.combinations(grid, 2))))
    values = list(dict.fromkeys(_split(text)))
    if not values:
        raise ValueError("has no values")
    return Axis(key, tuple(values))


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"({text}) must be numbers") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"({text}) must be finite")
    return numbers


def _split(text: str) -> Iterator[str]:
    """The values between the commas that are in no bracket."""
    depth, value = 0, ""
    for letter in f"{text},":
        depth += (letter in "[(") - (letter in ")]")
        if letter == "," and depth <= 0:
            if value.strip():
                yield value.strip()
            value = ""
        else:
            value += letter
