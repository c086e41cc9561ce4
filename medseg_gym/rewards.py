"""Rewards as named terms: what a term may look at, one function a term, and the presets shaped, medsam-agent and ibis.

A term of a *potential* reward is a value after t turns; a turn earns its change (timing "dense", so an episode's
rewards add up to the terminal reward) or the episode earns it at its end (timing "terminal"). A term of a *stepwise*
reward is what one turn earns. Everything is computed from a `Progress`, which a stored episode yields again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from medseg_gym.errors import UnknownNameError, unknown
from medseg_gym.types import Action, Box, Click, Stop, Undo, Unreadable

Timing = Literal["dense", "terminal"]


@dataclass(frozen=True, slots=True)
class Progress:
    """All a reward may know of an episode after `turns` turns."""

    iou: float
    dice: float
    start_q: float  # q = (IoU + Dice) / 2 before the first action
    best_q: float  # the best q so far, the start included
    last_iou: float  # IoU before the latest action
    best_iou: float = 0.0  # over executed prompts and undos only
    rises: float = 0.0  # sum of IoU gains from the second executed action on
    turns: int = 0
    readable: int = 0
    executed: int = 0  # prompts and undos
    tool_calls: int = 0
    prompted: bool = False
    latest: Action | Unreadable | None = None
    hit: bool | None = None  # whether the latest click fell on an error of its sign; None where it was no click

    @property
    def q(self) -> float:
        return 0.5 * (self.iou + self.dice)


def start(iou: float, dice: float) -> Progress:
    """The progress before the first action, with the overlap of the start mask (empty, or given)."""
    q = 0.5 * (iou + dice)
    return Progress(iou=iou, dice=dice, start_q=q, best_q=q, last_iou=iou)


def after(
    before: Progress,
    action: Action | Unreadable,
    iou: float,
    dice: float,
    *,
    hit: bool | None = None,
    tool_called: bool | None = None,
) -> Progress:
    """The progress after one more turn. `tool_called` defaults to whether the action is a prompt."""
    is_prompt = isinstance(action, Click | Box)
    executed = is_prompt or isinstance(action, Undo)
    rise = max(0.0, iou - before.iou) if executed and before.executed >= 1 else 0.0
    return Progress(  # not dataclasses.replace, which costs a tenth of a millisecond's step
        iou=iou,
        dice=dice,
        start_q=before.start_q,
        best_q=max(before.best_q, 0.5 * (iou + dice)),
        last_iou=before.iou,
        best_iou=max(before.best_iou, iou) if executed else before.best_iou,
        rises=before.rises + rise,
        turns=before.turns + 1,
        readable=before.readable + (not isinstance(action, Unreadable)),
        executed=before.executed + executed,
        tool_calls=before.tool_calls + (is_prompt if tool_called is None else tool_called),
        prompted=before.prompted or is_prompt,
        latest=action,
        hit=hit,
    )


Term = Callable[[Progress], float]


# shaped: the terms of our own potential


def readable(p: Progress) -> float:
    """Share of readable turns in [0, 1]; 1 before the first turn."""
    return p.readable / p.turns if p.turns else 1.0


def quality(p: Progress) -> float:
    """q = (IoU + Dice) / 2 of the mask now, in [0, 1]."""
    return p.q


def gain(p: Progress) -> float:
    """What the best mask so far has over the start: a best-so-far cannot be earned twice, so zig-zag pays nothing."""
    return p.best_q - p.start_q


def overshoot(p: Progress) -> float:
    """How far the mask has fallen below the best so far, in q."""
    return p.best_q - p.q


def tool_cost(p: Progress) -> float:
    """Tool calls so far."""
    return float(p.tool_calls)


# medsam-agent: MedSAM-Agent eq. 3-5, as its released code has it (T = executed actions, stop not among them)


def protocol(p: Progress) -> float:
    """1 for a prompt somewhere and a stop at the end, half for one of the two (MedSAM-Agent's format reward)."""
    return 0.5 * p.prompted + 0.5 * isinstance(p.latest, Stop)


def overshoot_iou(p: Progress) -> float:
    """Fall below the best IoU; not counted before the second executed action (MedSAM-Agent)."""
    return p.best_iou - p.iou if p.executed > 1 else 0.0


def action_cost(p: Progress) -> float:
    """Executed actions; the first is free as long as it is the only one (MedSAM-Agent)."""
    return float(p.executed) if p.executed > 1 else 0.0


def improvement(p: Progress) -> float:
    """Sum of all IoU rises after the first action (MedSAM-Agent): falling and rising again pays each time."""
    return p.rises


# ibis: IBISAgent's rewards per step


def ibis_format(p: Progress) -> float:
    """1 when the turn was readable, else 0 (IBISAgent)."""
    return 0.0 if isinstance(p.latest, Unreadable) else 1.0


def ibis_answer(p: Progress) -> float:
    """3, 2, 1 or 0 for an IoU above .80, .70, .50, or not (IBISAgent)."""
    return 3.0 if p.iou > 0.80 else 2.0 if p.iou > 0.70 else 1.0 if p.iou > 0.50 else 0.0


def ibis_click(p: Progress) -> float:
    """+1 for a click on an error of its sign, -1 for any other click, 0 for no click (IBISAgent)."""
    return 0.0 if p.hit is None else (1.0 if p.hit else -1.0)


def ibis_gain(p: Progress) -> float:
    """1 when the IoU rose in the turn (IBISAgent)."""
    return float(p.iou > p.last_iou)


def ibis_length(p: Progress) -> float:
    """+1 up to the fifth turn, then -0.2 for each turn beyond it (IBISAgent)."""
    return 1.0 if p.turns <= 5 else -0.2 * (p.turns - 5)


POTENTIALS: dict[str, Term] = {
    f.__name__: f
    for f in (readable, quality, gain, overshoot, tool_cost, protocol, overshoot_iou, action_cost, improvement)
}
STEPWISE: dict[str, Term] = {f.__name__: f for f in (ibis_format, ibis_answer, ibis_click, ibis_gain, ibis_length)}


@dataclass(frozen=True)
class RewardSpec:
    """A named, weighted sum of terms.

    `terms` maps term names to weights: all from POTENTIALS or all from STEPWISE. `clip` bounds the weighted sum of
    the terms named in `clipped`; what the bound takes or gives is reported as the term "clip".
    """

    terms: Mapping[str, float]
    name: str = "custom"
    timing: Timing = "dense"
    clipped: tuple[str, ...] = ()
    clip: tuple[float, float] = (float("-inf"), float("inf"))
    _potential: bool = field(init=False, repr=False, compare=False, default=True)

    def __post_init__(self) -> None:
        if not self.terms:
            raise UnknownNameError(f"reward {self.name!r} has no terms; known terms: {', '.join(TERMS)}")
        for term in (*self.terms, *self.clipped):
            if term not in TERMS:
                raise unknown("reward term", term, TERMS)
        for term, weight in self.terms.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise UnknownNameError(f"reward {self.name!r}: the weight of {term} is {weight!r}; wanted a number")
        object.__setattr__(self, "clipped", tuple(self.clipped))
        object.__setattr__(self, "clip", tuple(self.clip))
        for term in self.clipped:
            if term not in self.terms:
                raise UnknownNameError(f"reward {self.name!r} clips the term {term!r}, which it does not have")
        if self.timing not in ("dense", "terminal"):
            raise unknown("reward timing", self.timing, ("dense", "terminal"))
        potential = {term in POTENTIALS for term in self.terms}
        if len(potential) > 1:
            raise UnknownNameError(f"reward {self.name!r} mixes potential and stepwise terms: {', '.join(self.terms)}")
        object.__setattr__(self, "_potential", potential.pop())
        if not self._potential and self.timing == "terminal":
            raise UnknownNameError(f"reward {self.name!r} is stepwise; it has no terminal timing, use timing='dense'")
        if not self._potential and self.clipped:
            raise UnknownNameError(f"reward {self.name!r} is stepwise; only potential terms can be clipped")

    def potential(self, progress: Progress) -> dict[str, float]:
        """The weighted terms after this much progress; their sum is what an episode ending here has earned."""
        values = {name: weight * TERMS[name](progress) for name, weight in self.terms.items()}
        if self.clipped:
            raw = sum(values[name] for name in self.clipped)
            values["clip"] = min(max(raw, self.clip[0]), self.clip[1]) - raw
        return values

    def terms_of_turn(self, before: Progress, now: Progress, *, ends: bool) -> dict[str, float]:
        """The weighted terms that one turn earns; their sum is its reward."""
        if not self._potential:
            return self.potential(now)
        if self.timing == "terminal":
            values = self.potential(now)
            return values if ends else dict.fromkeys(values, 0.0)
        values = self.potential(now)
        if before.turns == 0:  # the first turn earns the whole potential, so that the sum telescopes
            return values
        earlier = self.potential(before)
        return {name: value - earlier[name] for name, value in values.items()}


TERMS: dict[str, Term] = {**POTENTIALS, **STEPWISE}

PRESETS: dict[str, RewardSpec] = {
    "shaped": RewardSpec(
        name="shaped",
        terms={"readable": 0.2, "quality": 0.8, "gain": 0.08, "overshoot": -0.8, "tool_cost": -0.008},
    ),
    "medsam-agent": RewardSpec(
        name="medsam-agent",
        terms={"protocol": 0.2, "quality": 0.8, "overshoot_iou": -0.8, "action_cost": -0.008, "improvement": 0.08},
        clipped=("quality", "overshoot_iou", "action_cost", "improvement"),
        clip=(0.0, 0.8),
    ),
    "ibis": RewardSpec(
        name="ibis",
        terms=dict.fromkeys(("ibis_format", "ibis_answer", "ibis_click", "ibis_gain", "ibis_length"), 0.2),
    ),
}


def describe(spec: RewardSpec) -> dict[str, Any]:
    """A spec as plain values for JSON, from which `RewardSpec(**values)` makes it again."""
    bounds = None if not spec.clipped else list(spec.clip)
    return {
        "name": spec.name,
        "timing": spec.timing,
        "terms": dict(spec.terms),
        **({"clipped": list(spec.clipped), "clip": bounds} if bounds else {}),
    }


def resolve(reward: str | RewardSpec, timing: Any = None) -> RewardSpec:
    """The spec of a preset's name, or the spec itself; `timing` overrides its own. Unknown names raise."""
    if isinstance(reward, RewardSpec):
        spec = reward
    elif isinstance(reward, str) and reward in PRESETS:
        spec = PRESETS[reward]
    else:
        raise unknown("reward", reward, PRESETS)
    return spec if timing is None else replace(spec, timing=timing)
