"""The strategies that outline a case with its target in sight, and the settings of all of them.

box-to-point      the target's box, then clicks where the mask is wrong (MedSAM-Agent, appendix B.1)
sequential-click  clicks alone, the first at the target's centre (same place)
xu                the click deepest in the error, again and again (IBISAgent, appendix B.1, after Xu et al. 2016)

A strategy is a generator: it yields a state and the prompt it wants answered there, and is sent the state that the tool
makes of it. So many cases can be asked about in one tool call (sample.py), and nothing here knows a tool.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from medseg_gym import oracle
from medseg_gym.errors import MedSegError, check_keywords, unknown
from medseg_gym.frames import Grid
from medseg_gym.metrics import areas, dice_of_areas, iou_of_areas
from medseg_gym.types import Action, Box, Click, Mask, MaskState, Prompt, Sample, Stop

BOX_TO_POINT, SEQUENTIAL_CLICK, XU = STRATEGIES = ("box-to-point", "sequential-click", "xu")
JITTER_SIDE = 1024  # jitter is in pixels of an image of this side, as MedSAM-Agent's data has it
DRAWS = 4  # how often more than asked for a candidate is drawn that was not tried yet

T = TypeVar("T")
Asking = Generator[tuple[MaskState, Prompt], MaskState, T]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the papers state, and ours where their text lost it (marked so)."""

    horizon: int = 0  # turns, the stop among them; 0: 5 (MedSAM-Agent's agent), for xu `steps` and the stop
    # box-to-point and sequential-click
    min_gain: float = 0.04  # what an action has to add to the IoU, exclusive
    retries: int = 5  # further candidates after one that does not
    maxima: int = 3  # ours: local maxima tried in an error region before the next region
    perturbed: int = 2  # ours: the last so many retries are drawn anywhere in the largest error region
    box_jitter: tuple[float, float] = (5.0, 20.0)  # ours: how far each edge moves, in pixels of an image of side 1024
    click_jitter: tuple[float, float] = (0.0, 5.0)  # ours: the same for clicks; never out of the error region
    jitter_share: float = 0.2  # ours: no more than this share of the target's shorter side
    min_iou: float = 0.7  # of the last mask, or the trajectory is dropped
    # xu
    goal: float = 0.8  # the IoU it ends at
    steps: int = 20  # clicks at most
    longest: int = 19  # ours: clicks a kept trajectory has at most; one that used up its steps is too long
    min_dice: float = 0.8  # ours: of the last mask, or the trajectory is dropped
    # start masks and absent structures
    discard_below: float = 0.1  # ours: a start mask whose IoU is lower is taken back first
    absent: str = "stop"  # ours: an absent structure is stopped at at once; or "drop"
    # reflective trajectories (reflect.py)
    self_correction: float = 0.0  # share of cases with a mistake that is taken back
    wrong_start: float = 0.0  # share of cases that begin with a mask of something else
    min_loss: float = 0.04  # ours: what a mistake has to cost in IoU

    def __post_init__(self) -> None:
        for name, low, high in (("horizon", 0, 10_000), ("retries", 0, 1000), ("maxima", 1, 1000)):
            _check(name, getattr(self, name), low, high, int)
        for name, low, high in (("perturbed", 0, 1000), ("steps", 1, 9_999), ("longest", 0, 9_999)):
            _check(name, getattr(self, name), low, high, int)
        shares = ("min_gain", "jitter_share", "min_iou", "goal", "min_dice", "discard_below", "min_loss")
        for name in (*shares, "self_correction", "wrong_start"):
            _check(name, getattr(self, name), 0, 1, float)
        for name in ("box_jitter", "click_jitter"):
            object.__setattr__(self, name, _range(name, getattr(self, name)))
        if self.horizon == 1:
            raise MedSegError("horizon=1 leaves no turn beside the stop; wanted 2 or more")
        if self.absent not in ("stop", "drop"):
            raise unknown("absent", self.absent, ("stop", "drop"))
        if self.self_correction + self.wrong_start > 1:
            raise MedSegError(
                f"self_correction={self.self_correction} and wrong_start={self.wrong_start}; "
                "they are shares of the same cases and add up to 1 at most"
            )

    @staticmethod
    def of(given: Mapping[str, Any]) -> Settings:
        """The settings of keywords; an unknown one raises UnknownNameError with the nearest known."""
        check_keywords("trajectory setting", given, [f.name for f in fields(Settings)])
        return Settings(**given)

    def turns(self, strategy: str) -> int:
        """The most turns of a strategy's episodes, the stop among them."""
        return self.horizon or (self.steps + 1 if strategy == XU else 5)


@dataclass(slots=True)
class Course:
    """A case on its way: after t actions it is in states[t].

    Only the last state can be gone on from, so that a long course holds masks and no logits, unless it is `reversible`.
    """

    sample: Sample
    grid: Grid
    states: list[MaskState]
    turns: int  # that its episode may have
    start: Mask | None = None  # a given one
    reversible: bool = False
    actions: list[Action] = field(default_factory=list)
    marked: list[bool] = field(default_factory=list)
    iou: list[float] = field(default_factory=list)  # one a state
    dice: list[float] = field(default_factory=list)
    tries: int = 0
    kind: str = "plain"
    error: str = ""

    @property
    def state(self) -> MaskState:
        return self.states[-1]

    @property
    def stopped(self) -> bool:
        return bool(self.actions) and isinstance(self.actions[-1], Stop)

    @property
    def prompts_left(self) -> int:
        """Prompts that still fit before the stop."""
        return max(0, self.turns - 1 - len(self.actions))

    def ask(self, prompt: Prompt, state: MaskState | None = None) -> Asking[MaskState]:
        """What the tool makes of a prompt in the present state, or in another."""
        self.tries += 1
        return (yield self.state if state is None else state, prompt)

    def overlap(self, state: MaskState) -> tuple[float, float]:
        """IoU and Dice of a state's mask."""
        counts = areas(state.mask, self.sample.target)
        return iou_of_areas(*counts), dice_of_areas(*counts)

    def take(self, action: Action, state: MaskState, *, at: int | None = None, marked: bool = False) -> None:
        """Adds an action and the state after it, at the end or as action number `at`."""
        if at is None:
            at = len(self.actions)
            if not self.reversible:
                self.states[-1] = MaskState(self.state.prompts, self.state.mask, None)
        iou, dice = self.overlap(state)
        self.actions.insert(at, action)
        self.marked.insert(at, marked)
        self.states.insert(at + 1, state)
        self.iou.insert(at + 1, iou)
        self.dice.insert(at + 1, dice)

    def copy(self) -> Course:
        """The same course, to be changed apart from this one."""
        actions, marked, iou, dice = list(self.actions), list(self.marked), list(self.iou), list(self.dice)
        return replace(self, states=list(self.states), actions=actions, marked=marked, iou=iou, dice=dice)

    def shorten(self) -> None:
        """Takes the action before the closing stop away."""
        del self.actions[-2], self.marked[-2]
        self.states[-2:] = [self.states[-3]]  # the stop's is the one before it
        self.iou[-2:] = [self.iou[-3]]
        self.dice[-2:] = [self.dice[-3]]


def outline(course: Course, strategy: str, settings: Settings, rng: np.random.Generator) -> Asking[None]:
    """Prompts until the strategy has nothing more to do; the stop is left to the caller."""
    if strategy == XU:
        yield from _greedy(course, settings)
    else:
        yield from _constrained(course, settings, rng, boxed=strategy == BOX_TO_POINT)


def verdict(course: Course, strategy: str, settings: Settings) -> str:
    """Why the trajectory is dropped; "" where it is kept."""
    if not course.sample.target.any():
        return "empty" if settings.absent == "drop" else ""
    if strategy == XU:
        if sum(isinstance(action, Click) for action in course.actions) > settings.longest:
            return "length"
        return "dice" if course.dice[-1] < settings.min_dice else ""
    return "iou" if course.iou[-1] < settings.min_iou else ""


def _constrained(course: Course, settings: Settings, rng: np.random.Generator, *, boxed: bool) -> Asking[None]:
    """MedSAM-Agent's progress-constrained sampling: an action that gains too little is tried otherwise, or is the end.

    A candidate that the grid makes equal to one tried already would have the same answer, so it is not asked again.
    """
    for number in range(course.prompts_left):
        before = course.iou[-1]
        if before + settings.min_gain >= 1:  # nothing can gain more
            return
        first = boxed and number == 0
        candidates = boxes(course, settings, rng) if first else clicks(course, settings, rng)
        for prompt in _distinct(course.grid, candidates, 1 + settings.retries):
            state = yield from course.ask(prompt)
            if course.overlap(state)[0] - before > settings.min_gain:
                course.take(prompt, state)
                break
        else:
            return


def _greedy(course: Course, settings: Settings) -> Asking[None]:
    """IBISAgent's clicks. Clicked pixels are not excluded, as released: where the tool does not respond it loops."""
    for _ in range(min(course.prompts_left, settings.steps)):
        click = oracle.greedy_click(course.state.mask, course.sample.target)
        if click is None or course.iou[-1] >= settings.goal:
            return
        snapped = course.grid.snap(click)
        assert isinstance(snapped, Click)
        course.take(snapped, (yield from course.ask(snapped)))


def boxes(course: Course, settings: Settings, rng: np.random.Generator) -> Iterator[Box]:
    """The target's box, jittered anew each time; none for an empty target."""
    box = oracle.target_box(course.sample.target)
    while box is not None:
        yield oracle.jitter_box(box, rng, _shape(course), pixels=_jitter(settings.box_jitter, course, settings))


def clicks(course: Course, settings: Settings, rng: np.random.Generator) -> Iterator[Click]:
    """Where the mask is wrong: local maxima of the error's distance transform, jittered; then any pixels of the error.

    The maxima are those of the largest region, its deepest first, then of the next; then pixels are drawn uniformly
    from the largest region. None where mask and target are equal.
    """
    mask, target = course.state.mask, course.sample.target
    reach = _jitter(settings.click_jitter, course, settings)
    maxima = 1 + max(0, settings.retries - settings.perturbed)
    for click in islice(oracle.error_clicks(mask, target, settings.maxima), maxima):
        moved = oracle.jitter_click(click, rng, _shape(course), pixels=reach)
        wrong = target[moved.y, moved.x] != mask[moved.y, moved.x]
        yield moved if wrong and target[moved.y, moved.x] == click.positive else click
    region = next(oracle.error_regions(mask, target), None)
    while region is not None:
        y, x = divmod(int(rng.choice(np.flatnonzero(region.pixels))), region.pixels.shape[1])
        yield Click(region.x + x, region.y + y, region.positive)


def _distinct(grid: Grid, candidates: Iterator[Prompt], most: int) -> Iterator[Prompt]:
    """The first `most` different prompts as the env would execute them."""
    seen: set[Action] = set()
    for candidate in islice(candidates, DRAWS * most):
        prompt = grid.snap(candidate)
        if prompt in seen:
            continue
        seen.add(prompt)
        assert isinstance(prompt, Click | Box)
        yield prompt
        if len(seen) == most:
            return


def _jitter(pixels: tuple[float, float], course: Course, settings: Settings) -> tuple[float, float]:
    """A jitter range in pixels of this image, no wider than the target's size allows."""
    scale = max(_shape(course)) / JITTER_SIDE
    box = oracle.target_box(course.sample.target)
    shorter = 0 if box is None else 1 + min(box.x2 - box.x1, box.y2 - box.y1)
    low, high = (min(scale * value, settings.jitter_share * shorter) for value in pixels)
    return low, high


def _shape(course: Course) -> tuple[int, int]:
    height, width = course.sample.target.shape
    return height, width


def _check(name: str, value: Any, low: float, high: float, kind: Callable[..., Any]) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole if kind is int else whole or isinstance(value, float)
    if not fits or not low <= value <= high:
        wanted = "a whole number" if kind is int else "a number"
        raise MedSegError(f"{name}={value!r}; wanted {wanted} from {low} to {high}")


def _range(name: str, value: Any) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in value)
    except (TypeError, ValueError):
        low, high = -1.0, -1.0
    if not 0 <= low <= high < float("inf"):
        raise MedSegError(f"{name}={value!r}; wanted two numbers of pixels, [low, high], with 0 <= low <= high")
    return low, high
