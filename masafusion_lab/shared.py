"""Courses that share their rows: what several compute alike from the first step until now is computed once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import HALVES, Branch, Hint, Masked, Noise, Plan, Span, Take, denoisers
from masafusion_lab.given import Given
from masafusion_lab.lockstep import Course, Script, calls

Move: TypeAlias = tuple[str, Noise]
"""The latent that another is made from, and what denoises it."""
KNOWN: dict[type, str] = {
    Plan: "branches noise",
    Branch: "x prompt hint null take w",
    Masked: "inside outside steps region",
    Take: "q k v steps layers halves",
    Hint: "steps halves scale",
}
"""What is understood here of plans and their parts; a plan that says more than this is run apart from others."""


@dataclass(frozen=True)
class Shared:
    """One course that does what many do.

    `ends`: for each of the many the name, at the end, of every latent that was wanted.
    """

    course: Course
    ends: tuple[dict[str, str], ...]
    steps: int

    def rows(self, most: int | None = None) -> list[int]:
        """UNet rows of each step, in calls of at most so many."""
        return [sum(map(len, calls(self.course.plan, i, self.course.w, most))) for i in range(self.steps)]


def share(courses: Sequence[Course], *, steps: int, layers: int, wanted: Iterable[str] = ("target",)) -> Shared:
    """One course of `steps` steps in which every latent that is wanted of these ends as it does alone.

    A latent or a branch is known by what it is computed from, back to the start: those known as the same are computed
    once, and what no wanted latent is computed from is left out. `layers`: self-attention layers of the model. Raises
    InputError for a course that the model cannot follow, or along another hint than the rest.
    """
    common, wanted = Common(layers), tuple(wanted)
    for course in courses:
        course.check(steps=steps, layers=layers)
    latents = [common.start(course) for course in courses]
    made: list[dict[str, Move]] = [{} for _ in range(steps)]
    for i in range(steps):
        for course, its in zip(courses, latents, strict=True):
            for name, move in At(common, course, its, i).made().items():
                its[name] = common.name(name, move)
                made[i][its[name]] = move
    return _written(common, made, [{name: its[name] for name in wanted if name in its} for its in latents])


def is_shareable(course: Course) -> bool:
    """Whether it is no more than its plan, and all that this says is in KNOWN."""

    def understood(part: Any) -> bool:
        known = KNOWN.get(type(part), "").split()
        strange = [field for field in fields(part) if field.name not in known]
        usual = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in strange}
        return bool(known) and all(getattr(part, name) == value for name, value in usual.items())

    plan = course.plan
    if not isinstance(plan, Plan) or course.after or course.taps or course.schedule:
        return False
    rules = (rule for branch in plan.branches.values() for rule in vars(branch).values() if is_dataclass(rule))
    noise = (rule for rule in plan.noise.values() if not isinstance(rule, str))
    return all(map(understood, (plan, *plan.branches.values(), *rules, *noise)))


class Common:
    """The names that courses have in common: one for equal tensors, for equal branches, and for latents made alike."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.hint: tuple[Tensor, ...] | None = None
        self.branches: dict[str, Branch] = {}
        self.tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._names: dict[Any, str] = {}
        self._digests: dict[int, tuple[Tensor, str]] = {}

    def name(self, word: str, known_by: Any) -> str:
        """The name, word.number, of what is known by this."""
        return self._names.setdefault((word, known_by), f"{word}.{len(self._names)}")

    def tensor(self, table: str, word: str, x: Tensor) -> str:
        """The name of a tensor, which is put into a table."""
        if id(x) not in self._digests:
            data = x.detach().cpu().contiguous().numpy().tobytes()
            self._digests[id(x)] = x, hashlib.sha256(repr(tuple(x.shape)).encode() + data).hexdigest()
        name = self.name(word, self._digests[id(x)][1])
        self.tensors[table].setdefault(name, x)
        return name

    def start(self, course: Course) -> dict[str, str]:
        """The names of a course's latents at its start."""
        if (hint := course.given.hint) is not None:
            self.hint = self.hint or hint
            if [self.tensor("hint", "hint", f) for f in hint] != [self.tensor("hint", "hint", f) for f in self.hint]:
                raise InputError("courses along different hints share no rows; run them apart")
        latents = {name: self.tensor("x", name, x) for name, x in course.x.items()}
        return latents | {name: self.tensor("replay", name, states) for name, states in course.replay.items()}

    def closure(self, names: Iterable[str]) -> dict[str, Branch]:
        """These branches and all that they read, directly or not."""
        found: dict[str, Branch] = {}
        waiting = list(names)
        while waiting:
            if (name := waiting.pop(0)) not in found:
                found[name] = self.branches[name]
                waiting += sorted(found[name].read)
        return found


class At:
    """Step `i` of a course whose latents have these names: its branches and rules, by the names in common."""

    def __init__(self, common: Common, course: Course, latents: Mapping[str, str], i: int) -> None:
        self.common, self.course, self.latents, self.i = common, course, latents, i
        self.branches, self.moves = course.plan.at(i), course.plan.moves(i)
        self.used = {name for _, rule in self.moves.values() for name in denoisers(rule)}

    def made(self) -> dict[str, Move]:
        """What the step makes of the course's latents, by its own name of each."""
        return {name: (self.latents[before], self.rule(rule)) for name, (before, rule) in self.moves.items()}

    def rule(self, rule: Noise) -> Noise:
        """What denoises a latent."""
        if isinstance(rule, str):
            return self.branch(rule)
        assert isinstance(rule, Masked), "only what is_shareable"
        region = self.course.given.region(rule.region)
        if self.i not in rule.steps or region is None:
            return self.branch(rule.inside)
        A = self.common.tensor("region", "A", region)
        return Masked(self.branch(rule.inside), self.branch(rule.outside), region=A)

    def branch(self, name: str, path: tuple[str, ...] = ()) -> str:
        """The name of a branch, which is read along the path, if any. Raises InputError if it is on that path."""
        if name in path:
            raise InputError(f"branches {', '.join(path)} read one another: such a plan shares no rows; run it apart")
        branch = self.branches[name]
        facts: dict[str, Any] = {field.name: getattr(branch, field.name) for field in fields(branch)}
        for field in fields(branch):
            if isinstance(value := facts[field.name], Take | Hint):
                facts[field.name] = self._in_force(value, (*path, name)) or field.default
        facts |= {half: self._prompt(facts[half]) for half in ("prompt", "null")}
        facts |= {"x": self.latents[branch.x], "w": branch.guidance(self.course.w) if name in self.used else 1.0}
        known = Branch(**facts)
        common = self.common.name(name, known)
        self.common.branches[common] = known
        return common

    def _prompt(self, name: str) -> str:
        """The name of a prompt's embedding."""
        given = self.course.given
        if name == "tuned" and given.null is not None:
            return self.common.tensor("prompt", "text", given.null)
        return self.common.tensor("prompt", "text", given.text("empty" if name == "tuned" else name))

    def _in_force(self, rule: Take | Hint, path: tuple[str, ...]) -> Take | Hint | None:
        """A rule of the path's last branch as it is at this step; None where it does nothing."""
        halves = tuple(half for half in HALVES if half in rule.halves)
        if self.i not in rule.steps or not halves:
            return None
        if isinstance(rule, Hint):
            return replace(rule, steps=Span(), halves=halves) if rule.scale and self.course.given.hint else None
        layers = frozenset(d for d in range(self.common.layers) if d in rule.layers)
        if not layers or not rule.read:
            return None
        named = {part: getattr(rule, part) for part in "qkv"}
        read: Any = {part: b if b is None else self.branch(b, path) for part, b in named.items()}
        return replace(rule, steps=Span(), layers=layers, halves=halves, **read)


def _written(common: Common, made: Sequence[Mapping[str, Move]], ends: Sequence[Mapping[str, str]]) -> Shared:
    """The course of what is needed, found from the end backwards."""
    moving = {name for step in made for after, (before, _) in step.items() for name in (after, before)}
    needed = {name for its in ends for name in its.values()}
    places = last = _places(needed, moving)
    script: list[tuple[dict[str, Branch], dict[str, Move]]] = []
    for step in reversed(made):
        moves = {name: step[name] for name in sorted(needed & step.keys())}
        used = common.closure(name for _, rule in moves.values() for name in denoisers(rule))
        needed = (needed - moves.keys()) | {before for before, _ in moves.values()} | {b.x for b in used.values()}
        after, places = places, _places(needed, moving)
        branches = {name: replace(branch, x=places.get(branch.x, branch.x)) for name, branch in used.items()}
        script.append((branches, {after[name]: (places[before], rule) for name, (before, rule) in moves.items()}))
    script.reverse()
    tensors = common.tensors
    course = Course(
        Script([branches for branches, _ in script], [moves for _, moves in script]),
        {places.get(name, name): x for name, x in tensors["x"].items() if name in needed},
        Given(tensors["prompt"], hint=common.hint, regions=tensors["region"]),
        dict(tensors["replay"]),
    )
    return Shared(course, tuple({name: last.get(end, end) for name, end in its.items()} for its in ends), len(made))


def _places(needed: Iterable[str], moving: Container[str]) -> dict[str, str]:
    """Where the latents that steps make are kept at a state, in names that later states use again."""
    places: dict[str, str] = {}
    for name in sorted(needed):
        if name in moving:
            places[name] = f"{name.rpartition('.')[0]}:{len(places)}"
    return places
