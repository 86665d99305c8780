"""Changes: what each of the eight kinds of edit does to a scene, with its instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from masafusion_lab import InputError
from masafusion_lab.picturebook.captions import VERB, article, where
from masafusion_lab.picturebook.scene import (
    BACKGROUNDS,
    COLOURS,
    GROUND,
    KINDS,
    PATTERNS,
    POSES,
    SIZES,
    Dice,
    Scene,
    Thing,
    fitted,
    overlap,
    thing,
)

EDITS = ("add", "replace", "remove", "recolour", "pattern", "pose", "move", "background")


@dataclass(frozen=True)
class Change:
    """What one edit does: the target, the thing before (None: added) and after (None: removed), the instruction."""

    target: Scene
    before: Thing | None
    after: Thing | None
    instruction: str


def _settled(t: Thing, others: tuple[Thing, ...]) -> Thing | None:
    """The thing, fitted and pushed into the picture; None where it would hide another."""
    t = fitted(t)
    left, top, right, _ = t.box
    t = replace(t, x=t.x + max(0.0, 0.02 - left) - max(0.0, right - 0.98), y=t.y + max(0.0, 0.03 - top))
    return t if t.y <= 0.97 and all(overlap(t, other) < 0.06 for other in others) else None


def _others(scene: Scene, k: int) -> tuple[Thing, ...]:
    return scene.things[:k] + scene.things[k + 1 :]


def _with(scene: Scene, k: int, t: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:k], t, *scene.things[k + 1 :]))


def _told(t: Thing, looks: bool = True) -> str:
    """The thing in an instruction: "a sitting red striped cat", or "a sitting cat"."""
    return article(" ".join(w for w in (t.pose, t.colour * looks, t.pattern * looks, t.kind) if w not in ("", "plain")))


def _sky(scene: Scene) -> bool:
    return all(t.airborne for t in scene.things)


def _add(scene: Scene, d: Dice) -> Change | None:
    if len(scene.things) == 3:
        return None
    kind = d.pick([k for k in KINDS if k not in {t.kind for t in scene.things}])
    colour = d.pick([c for c in COLOURS if c not in {t.colour for t in scene.things}])
    new = thing(d, kind, colour, size=d.u(*SIZES[len(scene.things) + 1]))
    for _ in range(60):
        y = d.u(0.4, 0.62) if new.airborne else d.u(*GROUND)
        after = _settled(replace(new, x=d.u(0.15, 0.85), y=y), scene.things)
        if after:
            return Change(replace(scene, things=(*scene.things, after)), None, after, f"add {_told(after)}")
    return None


def _remove(scene: Scene, d: Dice) -> Change | None:
    if len(scene.things) == 1:
        return None
    k = d.integer(len(scene.things))
    before = scene.things[k]
    return Change(replace(scene, things=_others(scene, k)), before, None, f"remove the {before.kind}")


def _replace(scene: Scene, d: Dice) -> Change | None:
    k = d.integer(len(scene.things))
    before = scene.things[k]
    kind = d.pick([other for other in KINDS if other not in {t.kind for t in scene.things}])
    after = _settled(replace(before, kind=kind, pose=d.pick(POSES.get(kind, ("",)))), _others(scene, k))
    if not after or after.airborne != before.airborne:
        return None
    return Change(_with(scene, k, after), before, after, f"replace the {before.kind} with {_told(after, False)}")


def _recolour(scene: Scene, d: Dice) -> Change | None:
    k = d.integer(len(scene.things))
    before = scene.things[k]
    after = replace(before, colour=d.pick([c for c in COLOURS if c not in {t.colour for t in scene.things}]))
    return Change(_with(scene, k, after), before, after, f"make the {before.kind} {after.colour}")


def _pattern(scene: Scene, d: Dice) -> Change | None:
    k = d.integer(len(scene.things))
    before = scene.things[k]
    after = replace(before, pattern=d.pick([p for p in PATTERNS if p != before.pattern]))
    return Change(_with(scene, k, after), before, after, f"make the {before.kind} {after.pattern}")


def _pose(scene: Scene, d: Dice) -> Change | None:
    animals = [k for k, t in enumerate(scene.things) if t.pose]
    if not animals:
        return None
    k = d.pick(animals)
    before = scene.things[k]
    moved = replace(before, pose=next(p for p in POSES[before.kind] if p != before.pose))
    if moved.airborne != before.airborne:
        moved = replace(moved, y=d.u(0.45, 0.62) if moved.airborne else d.u(*GROUND))
    after = _settled(moved, _others(scene, k))
    if not after:
        return None
    return Change(_with(scene, k, after), before, after, f"make the {before.kind} {VERB[after.pose]}")


def _move(scene: Scene, d: Dice) -> Change | None:
    if len(scene.things) > 1 or where(scene.things[0]) == "middle":
        return None
    before = scene.things[0]
    half = (before.box[2] - before.box[0]) / 2 + 0.03
    x = d.u(half, half + 0.3 * (0.5 - half))
    after = replace(before, x=1 - x if before.x < 0.5 else x)
    if where(after) == "middle":
        return None
    return Change(_with(scene, 0, after), before, after, f"move the {before.kind} to the {where(after)}")


def _background(scene: Scene, d: Dice) -> Change | None:
    there = d.pick([b for b in BACKGROUNDS if b != scene.background])
    told = {"snow": "snow", "city": "a city at night"}.get(there, article(there))
    return Change(replace(scene, background=there), None, None, f"change the background to {told}")


_APPLY: dict[str, Callable[[Scene, Dice], Change | None]] = {
    "add": _add, "replace": _replace, "remove": _remove, "recolour": _recolour, "pattern": _pattern, "pose": _pose,
    "move": _move, "background": _background,
}  # fmt: skip


def change(scene: Scene, kind: str, d: Dice, *, unseen: bool | None = None) -> Change | None:
    """One edit of this kind on a scene, or None where the dice found none; unseen=False: none of HELD_BACK's.

    But for poses, all stays "over" a background or "on" it, so that prompts differ in the edit's words alone.
    """
    if kind not in EDITS:
        raise InputError(f"kind of edit: {kind!r} is not one of {', '.join(EDITS)}")
    made = _APPLY[kind](scene, d)
    if made is None or (unseen is False and made.target.unseen):
        return None
    return made if kind == "pose" or _sky(scene) == _sky(made.target) else None
