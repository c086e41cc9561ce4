"""The scripted policies: random, one prompt, and the oracles that see the target and prompt where the mask is wrong.

Each is a pure function of View and generator: what it needs to know of earlier turns it reads from `View.history`.
All but Random read the target from the dataset they are built with.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from medseg_gym import oracle
from medseg_gym.datasets.base import Dataset
from medseg_gym.envs.spaces import VERBS
from medseg_gym.errors import InvalidActionError, MedSegError
from medseg_gym.metrics import iou
from medseg_gym.policies.base import spelled
from medseg_gym.types import Action, Box, Click, Decision, Mask, Stop, Undo, View

_EPSILON = 1e-9  # two IoUs closer than this are equal
# On the last turn a click cannot be undone. With GrabCut on 26 cases and 5 turns, leaving masks above this alone raised
# the final IoU from .75 to .81, and those above .5 a little less. 0.7 is MedSAM-Agent's own bar for a good mask.
_SAFE_IOU = 0.7


class Scripted:
    """What the scripted policies share: verbs, name, and noise on prompts; a subclass says `choose`.

    `jitter` moves clicks and box edges by up to that many pixels; `miss` is the probability in [0, 1] that a click
    lands on any pixel of the image instead. The env snaps prompts to its grid. A `needs` verb that is not allowed
    raises InvalidActionError (a ValueError).
    """

    needs: tuple[str, ...] = ()

    def __init__(self, verbs: Sequence[str] = VERBS, *, jitter: float = 0, miss: float = 0, **options: Any) -> None:
        self.verbs = tuple(verbs)
        self.jitter = _number("jitter", jitter, 0, 10_000)
        self.miss = _number("miss", miss, 0, 1)
        own = {"jitter": jitter, "miss": miss, **options}
        signature = inspect.signature(type(self)).parameters
        kind = type(self).__name__
        self.name = spelled(kind, own, {key: signature[key].default if key in signature else 0 for key in own})
        for verb in self.needs:
            if verb not in self.verbs:
                raise InvalidActionError(f"{kind} needs the verb {verb!r}; the env allows {', '.join(self.verbs)}")

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        return [Decision(self.decide(view, rng)) for view, rng in zip(views, rngs, strict=True)]

    def decide(self, view: View, rng: np.random.Generator) -> Action:
        """The action for one view; where stop is not allowed, `idle` stands in for it."""
        action = self.choose(view, rng)
        if isinstance(action, Click | Box):
            return self.noisy(action, rng, view.mask.shape)
        return self.idle(view) if isinstance(action, Stop) and "stop" not in self.verbs else action

    def choose(self, view: View, rng: np.random.Generator) -> Action:
        raise NotImplementedError

    def noisy(self, prompt: Click | Box, rng: np.random.Generator, shape: tuple[int, ...]) -> Click | Box:
        """The prompt with `jitter` and `miss` applied, inside the (H, W) image."""
        size = (shape[0], shape[1])
        if isinstance(prompt, Click) and self.miss and rng.random() < self.miss:
            return Click(int(rng.integers(size[1])), int(rng.integers(size[0])), prompt.positive)
        if not self.jitter:
            return prompt
        if isinstance(prompt, Box):
            return oracle.jitter_box(prompt, rng, size, pixels=(0, self.jitter))
        return oracle.jitter_click(prompt, rng, size, pixels=(0, self.jitter))

    def idle(self, view: View) -> Action:
        """The least harmful action where stop is not allowed.

        The newest prompt once more; with none in force, an undo of nothing; else a negative click, a positive one or a
        box in the image's top left pixel, whichever is allowed.
        """
        if view.prompts:
            return view.prompts[-1]
        if "undo" in self.verbs and not view.mask.any():
            return Undo()
        if "negative" in self.verbs:
            return Click(0, 0, False)
        if "positive" in self.verbs:
            return Click(0, 0, True)
        return Box(0, 0, 0, 0) if "box" in self.verbs else Undo()


class Random(Scripted):
    """A uniformly drawn allowed verb with uniformly drawn pixels; stop has the share of any other verb."""

    def __init__(self, verbs: Sequence[str] = VERBS) -> None:
        super().__init__(verbs)

    def choose(self, view: View, rng: np.random.Generator) -> Action:
        verb = self.verbs[int(rng.integers(len(self.verbs)))]
        if verb == "stop":
            return Stop()
        if verb == "undo":
            return Undo()
        height, width = view.mask.shape
        if verb == "box":
            x1, x2 = sorted(int(x) for x in rng.integers(width, size=2))
            y1, y2 = sorted(int(y) for y in rng.integers(height, size=2))
            return Box(x1, y1, x2, y2)
        return Click(int(rng.integers(width)), int(rng.integers(height)), verb == "positive")


class Targets:
    """The targets of a dataset by key, the latest `size` of them kept."""

    def __init__(self, dataset: Dataset, size: int = 128) -> None:
        self.dataset = dataset
        self.size = size
        self._kept: OrderedDict[str, Mask] = OrderedDict()

    def __getitem__(self, key: str) -> Mask:
        if key not in self._kept:
            self._kept[key] = self.dataset[key].target
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class Privileged(Scripted):
    """A scripted policy that sees the target."""

    def __init__(self, dataset: Dataset, verbs: Sequence[str] = VERBS, **options: Any) -> None:
        super().__init__(verbs, **options)
        self.targets = Targets(dataset)

    def choose(self, view: View, rng: np.random.Generator) -> Action:
        return self.aim(view, self.targets[view.key])

    def aim(self, view: View, target: Mask) -> Action:
        """The action without noise."""
        raise NotImplementedError


class CentreClick(Privileged):
    """One click at the centre of the target's largest region, then stop; an absent structure is stopped at once."""

    needs = ("positive",)

    def __init__(self, dataset: Dataset, verbs: Sequence[str] = VERBS, *, jitter: float = 0, miss: float = 0) -> None:
        super().__init__(dataset, verbs, jitter=jitter, miss=miss)

    def aim(self, view: View, target: Mask) -> Action:
        return (oracle.centre_click(target) if view.turn == 0 else None) or Stop()


class BoxOnce(Privileged):
    """The target's box, then stop; an absent structure is stopped at once."""

    needs = ("box",)

    def __init__(self, dataset: Dataset, verbs: Sequence[str] = VERBS, *, jitter: float = 0) -> None:
        super().__init__(dataset, verbs, jitter=jitter)

    def aim(self, view: View, target: Mask) -> Action:
        return (oracle.target_box(target) if view.turn == 0 else None) or Stop()


class OracleClicks(Privileged):
    """Clicks at the centre of the largest error (MedSAM-Agent's Sequential-Click) until the mask is good enough.

    From the empty mask the first click is the target's centre. The rules, first match first:
    - stop at IoU >= `stop_iou`, and at once on an absent structure with an empty mask;
    - undo (`undo_losses`, where the verb is allowed) a prompt that lowered the IoU, on the last turn too: an undo is no
      tool call. Undo also what is outlined of an absent structure, and a start mask without a pixel of the target;
    - click the largest error; after a click here that was undone or changed nothing, the next one. Stop after more than
      `retries` clicks in a row that raised the IoU by less than `min_gain`, about what a click costs in the reward
      "shaped". On the last turn, where no undo could follow, stop after one such click, and at IoU >= 0.7;
    - an error counts while mending it exactly would raise the IoU by `min_gain`; stop when none does.
    `keep_clicking` measures the interaction curve as the literature does: it stops at a perfect mask only, never
    undoes, and leaves an error only where clicking it changed nothing.
    """

    needs: tuple[str, ...] = ("positive", "negative")

    def __init__(
        self,
        dataset: Dataset,
        verbs: Sequence[str] = VERBS,
        *,
        jitter: float = 0,
        miss: float = 0,
        stop_iou: float = 0.95,
        undo_losses: bool = True,
        retries: int = 3,
        min_gain: float = 0.01,
        keep_clicking: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            verbs,
            jitter=jitter,
            miss=miss,
            stop_iou=stop_iou,
            undo_losses=undo_losses,
            retries=retries,
            min_gain=min_gain,
            keep_clicking=keep_clicking,
        )
        self.stop_iou = _number("stop_iou", stop_iou, 0, 1)
        self.retries = _number("retries", retries, 0, 1000)
        self.min_gain = _number("min_gain", min_gain, 0, 1)
        self.keep_clicking = _flag("keep_clicking", keep_clicking)
        self.undoes = _flag("undo_losses", undo_losses) and not keep_clicking and "undo" in self.verbs

    def aim(self, view: View, target: Mask) -> Action:
        now = iou(view.mask, target)
        if now >= (1.0 if self.keep_clicking else self.stop_iou):
            return Stop()
        if self.undoes and (_lost(view, target, now) or _worthless(view, target, now)):
            return Undo()
        return self.opening(view, target) or self._click(view, target, now)

    def opening(self, view: View, target: Mask) -> Action | None:
        """What comes before the clicks; None when it is done."""
        return None

    def _click(self, view: View, target: Mask, now: float) -> Action:
        here, in_a_row = failed_clicks(view, target, self.min_gain)
        if self.keep_clicking:
            regions = list(islice(oracle.error_regions(view.mask, target), here + 1))
            return next(regions[here % len(regions)].centres())
        last = view.turn >= view.horizon - 1
        if in_a_row > self.retries or (last and self.undoes and (in_a_row or now >= _SAFE_IOU)):
            return Stop()
        return next(islice(self._candidates(view.mask, target, now), here, None), None) or Stop()

    def _candidates(self, mask: Mask, target: Mask, now: float) -> Iterator[Click]:
        """The centres of the errors that count, largest first; then more places in the largest."""
        largest = None
        for region in oracle.error_regions(mask, target):
            # what overlaps nothing gains no IoU by losing one of its spilled regions, yet it must begin somewhere
            if now > 0 and oracle.iou_after_repair(mask, target, region) < now + self.min_gain:
                continue
            largest = largest or region
            yield next(region.centres())
        if largest is not None:
            yield from islice(largest.centres(), 1, None)


class OracleBoxThenClicks(OracleClicks):
    """The target's box first, then OracleClicks (MedSAM-Agent's Box-to-Point); the same rules and options."""

    needs = ("box", "positive", "negative")

    def opening(self, view: View, target: Mask) -> Action | None:
        if any(isinstance(action, Box) for _, action in view.history):
            return None
        return oracle.target_box(target)


class XuClicks(Privileged):
    """IBISAgent's trajectories: the pixel deepest in the error, without undo, until IoU >= `stop_iou`.

    Clicked pixels are not excluded, as released: where a click does nothing it is repeated until the horizon.
    """

    needs = ("positive", "negative")

    def __init__(
        self,
        dataset: Dataset,
        verbs: Sequence[str] = VERBS,
        *,
        jitter: float = 0,
        miss: float = 0,
        stop_iou: float = 0.8,
    ) -> None:
        super().__init__(dataset, verbs, jitter=jitter, miss=miss, stop_iou=stop_iou)
        self.stop_iou = _number("stop_iou", stop_iou, 0, 1)

    def aim(self, view: View, target: Mask) -> Action:
        if iou(view.mask, target) >= self.stop_iou:
            return Stop()
        return oracle.greedy_click(view.mask, target) or Stop()


def _lost(view: View, target: Mask, now: float) -> bool:
    """Whether the last action was a prompt that lowered the IoU."""
    if not view.history or not isinstance(view.history[-1][1], Click | Box):
        return False
    return now < iou(view.history[-1][0], target) - _EPSILON


def _worthless(view: View, target: Mask, now: float) -> bool:
    """Whether the mask overlaps nothing, an undo may discard it, and the last one was no undo without effect."""
    if now > 0 or not view.mask.any() or (target.any() and view.prompts):
        return False
    before, action = view.history[-1] if view.history else (None, None)
    return not (isinstance(action, Undo) and before is not None and np.array_equal(before, view.mask))


def failed_clicks(view: View, target: Mask, min_gain: float) -> tuple[int, int]:
    """Clicks that came to nothing: those tried on this very mask, and all in a row.

    On this mask: taken back, or without effect. In a row: these, and those that raised the IoU by less than `min_gain`.
    """
    masks = [*(mask for mask, _ in view.history), view.mask]
    stack = [(0, 0, False)]  # for each mask that undo can return to: the two counts, and whether a click made it
    for (before, action), after in zip(view.history, masks[1:], strict=True):
        here, in_a_row, _ = stack[-1]
        if isinstance(action, Click):
            idle = np.array_equal(before, after)
            gained = not idle and iou(after, target) - iou(before, target) >= min_gain
            stack.append((here + 1 if idle else 0, 0 if gained else in_a_row + 1, True))
        elif isinstance(action, Box):
            stack.append((0, 0, False))
        elif isinstance(action, Undo) and len(stack) == 1:
            stack = [(0, 0, False)]  # a start mask was taken back, or there was nothing
        elif isinstance(action, Undo):
            by_click = stack.pop()[2]
            here, in_a_row, made_by_click = stack[-1]
            stack[-1] = (here + by_click, in_a_row + by_click, made_by_click)
    return stack[-1][:2]


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise MedSegError(f"{name}={value!r}; wanted a number from {low} to {high}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise MedSegError(f"{name}={value!r}; wanted true or false")
    return value
