"""Courses that share their rows: what several compute alike from the first step until now is computed once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from masafusion_lab import InputError
from masafusion_lab.fusion import HALVES, Branch, Given, Masked, Script, Span
from masafusion_lab.lockstep import Course, calls

Rule: TypeAlias = str | Masked
Move: TypeAlias = tuple[str, Rule]
"""The latent that another is made from, and what denoises it."""


@dataclass(frozen=True)
class Shared:
    """One course that does what many do.

    `ends`: for each of the many the name, at the end, of every latent that was wanted; `rows`: UNet rows of each step.
    """

    course: Course
    ends: tuple[dict[str, str], ...]
    rows: tuple[int, ...]


def share(courses: Sequence[Course], *, steps: int, layers: int, wanted: Iterable[str] = ("target",)) -> Shared:
    """One course of `steps` steps in which every latent that is wanted of these ends as it does alone.

    A latent or a branch is known by what it is computed from, back to the start: those known as the same are computed
    once, and what no wanted latent is computed from is left out. `layers`: self-attention layers of the model. Raises
    InputError for a course that the model cannot follow, or along another hint than the rest.
    """
    common, wanted = Common(layers), tuple(wanted)
    for course in courses:
        course.check(steps, layers)
    latents = [common.start(course) for course in courses]
    made: list[dict[str, Move]] = [{} for _ in range(steps)]
    for i in range(steps):
        for course, its in zip(courses, latents, strict=True):
            now = {name: (its[name], common.rule(course, its, rule, i)) for name, rule in course.plan.noise.items()}
            for name, move in now.items():
                its[name] = common.name(name, move)
                made[i][its[name]] = move
    return _written(common, made, [{name: its[name] for name in wanted if name in its} for its in latents])


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

    def rule(self, course: Course, latents: Mapping[str, str], rule: Rule, i: int) -> Rule:
        """What denoises a latent at step i."""
        if isinstance(rule, str):
            return self.branch(course, latents, rule, i)
        inside, region = self.branch(course, latents, rule.inside, i), course.given.region(rule.region)
        if i not in rule.steps or region is None:
            return inside
        outside = self.branch(course, latents, rule.outside, i)
        return Masked(inside, outside, region=self.tensor("region", "A", region))

    def branch(self, course: Course, latents: Mapping[str, str], name: str, i: int, path: tuple[str, ...] = ()) -> str:
        """The name of a branch at step i. Raises InputError for one that reads itself by way of others."""
        if name in path:
            raise InputError(f"branches {', '.join(path)} read one another: such a plan shares no rows; run it apart")
        branch, given = course.plan.branches[name], course.given
        facts = {field.name: getattr(branch, field.name) for field in fields(branch)}
        for field in fields(branch):
            if is_dataclass(value := facts[field.name]):
                read = {b: self.branch(course, latents, b, i, (*path, name)) for b in getattr(value, "read", ())}
                facts[field.name] = self._in_force(value, i, read) or field.default
        if given.hint is None:
            facts["hint"] = None
        for half in ("prompt", "null"):
            text = facts[half] if facts[half] != "tuned" or given.null is not None else "empty"
            embedding = given.null if text == "tuned" else given.prompts[text]
            facts[half] = self.tensor("prompt", "text", embedding)
        guided = name in course.plan.used(i)  # of one that is only read, w says nothing
        facts |= {"x": latents[branch.x], "w": (course.w if branch.w is None else branch.w) if guided else 1.0}
        known = Branch(**facts)
        common = self.name(name, known)
        self.branches[common] = known
        return common

    def closure(self, names: Iterable[str]) -> dict[str, Branch]:
        """These branches and all that they read, directly or not."""
        found: dict[str, Branch] = {}
        waiting = list(names)
        while waiting:
            if (name := waiting.pop(0)) not in found:
                found[name] = self.branches[name]
                waiting += sorted(found[name].read)
        return found

    def _in_force(self, rule: Any, i: int, read: Mapping[str, str]) -> Any:
        """A branch's rule (Take, Hint and their like) as it is at step i, of branches by their names in `read`.

        None where it does nothing.
        """
        facts = {}
        for field in fields(rule):
            value = getattr(rule, field.name)
            if field.name == "steps":
                value = Span() if i in value else ()
            elif field.name == "layers":
                value = frozenset(d for d in range(self.layers) if d in value)
            elif field.name == "halves":
                value = tuple(half for half in HALVES if half in value)
            elif isinstance(value, str):
                value = read.get(value, value)
            if value in ((), frozenset()):
                return None
            facts[field.name] = value
        return type(rule)(**facts)


def _written(common: Common, made: Sequence[Mapping[str, Move]], ends: Sequence[Mapping[str, str]]) -> Shared:
    """The course of what is needed, found from the end backwards."""
    moving = {name for step in made for after, (before, _) in step.items() for name in (after, before)}
    needed = {name for its in ends for name in its.values()}
    places = last = _places(needed, moving)
    script: list[tuple[dict[str, Branch], dict[str, Move]]] = []
    for step in reversed(made):
        moves = {name: step[name] for name in sorted(needed & step.keys())}
        used = common.closure(name for _, rule in moves.values() for name in named(rule))
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
        {name: states for name, states in tensors["replay"].items()},
    )
    rows = tuple(len(calls(branches, i)[0]) for i, (branches, _) in enumerate(script))
    return Shared(course, tuple({name: last.get(end, end) for name, end in its.items()} for its in ends), rows)


def _places(needed: Iterable[str], moving: Container[str]) -> dict[str, str]:
    """Where the latents that steps make are kept at a state, in names that later states use again."""
    places: dict[str, str] = {}
    for name in sorted(needed):
        if name in moving:
            places[name] = f"{name.rpartition('.')[0]}:{len(places)}"
    return places


def named(rule: Rule) -> tuple[str, ...]:
    """The branches that a rule names."""
    return (rule,) if isinstance(rule, str) else (rule.inside, rule.outside)
