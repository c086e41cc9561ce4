"""The one engine under both envs: slots that hold an episode each, and a step that queries the tool once for all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg_gym import rewards
from medseg_gym.datasets.base import Dataset, WithStartMasks, check_sample
from medseg_gym.envs.config import EnvConfig
from medseg_gym.envs.spaces import ActionCodec, check_verbs, observation_space
from medseg_gym.errors import BadDataError, MedSegError, ToolUnavailableError, UnknownNameError, check_keywords
from medseg_gym.frames import Grid
from medseg_gym.metrics import dice_of_areas, iou_of_areas
from medseg_gym.render import Overlay
from medseg_gym.tools.base import advance, empty_state, given_state
from medseg_gym.tools.cache import CachedTool
from medseg_gym.types import (
    Box,
    Click,
    Ended,
    Episode,
    Image,
    Mask,
    MaskState,
    Sample,
    Stop,
    Turn,
    Undo,
    Unreadable,
    View,
)

RESET_OPTIONS = ("sample", "start_mask")
_warned: set[str] = set()


@dataclass(slots=True)
class Outcome:
    """What one turn did, kept until the episode is over."""

    action: Any
    mask: Mask
    terms: Mapping[str, float]
    reward: float
    tool_called: bool


@dataclass(slots=True)
class Slot:
    """One episode under way."""

    sample: Sample
    grid: Grid
    overlay: Overlay
    target_area: int
    stack: list[MaskState]  # the last is in force; undo pops
    progress: rewards.Progress
    peak_iou: float
    start: Mask | None  # a given start mask
    terms: Mapping[str, float]
    outcomes: list[Outcome] = field(default_factory=list)
    history: list[tuple[Mask, Any]] = field(default_factory=list)
    iou: list[float] = field(default_factory=list)
    dice: list[float] = field(default_factory=list)
    repeats: int = 0
    ended: Ended | None = None
    error: str = ""

    @property
    def state(self) -> MaskState:
        return self.stack[-1]


class Engine:
    """Episodes in numbered slots over one dataset and one tool. Holds no randomness: resets are given a generator."""

    def __init__(self, dataset: Dataset, tool: CachedTool, config: EnvConfig, slots: int) -> None:
        self.dataset = dataset
        self.tool = tool
        self.config = config
        self.reward = rewards.resolve(config.reward, config.timing)
        self.codec = ActionCodec(check_verbs(config.verbs, tool))
        self.keys = dataset.keys(config.split, tuple(config.structures))
        if len(self.keys) == 0:
            chosen = f" with structures {', '.join(config.structures)}" if config.structures else ""
            raise BadDataError(
                f"{dataset.name} has no case in its {config.split} split{chosen}; choose another split= "
                f"or see what is there with: medseg-gym data info {dataset.name}"
            )
        self.observation_space = observation_space(
            config.observation, config.size, len(dataset.structures), config.horizon
        )
        self.slots: list[Slot | None] = [None] * slots
        self._targets = {structure: i for i, structure in enumerate(dataset.structures)}
        self._warn_of_hidden_task()

    # episodes

    def reset(self, index: int, rng: np.random.Generator, options: Mapping[str, Any] | None = None) -> None:
        """Begins an episode in a slot; `options` may pin the case ("sample") and give a start mask ("start_mask")."""
        self.slots[index] = self.begin(rng, options, before=index)

    def begin(self, rng: np.random.Generator, options: Mapping[str, Any] | None = None, *, before: int) -> Slot:
        """A new episode, to be put into a slot; `before` is the slot whose overlay may serve again."""
        options = options or {}
        check_keywords("reset option", options, RESET_OPTIONS)
        sample = self._sample(options.get("sample"), rng)
        stack = [empty_state(sample)]
        given = options.get("start_mask")
        if given is None and isinstance(self.dataset, WithStartMasks):
            given = self.dataset.start_mask(sample.key)
        if given is not None:
            stack.append(given_state(self.tool, _check_start_mask(given, sample)))
        target_area = int(np.count_nonzero(sample.target))
        iou, dice = _overlap(stack[-1].mask, sample.target, target_area)
        progress = rewards.start(iou, dice)
        height, width = sample.target.shape
        return Slot(
            sample=sample,
            grid=Grid(height, width),
            overlay=self._overlay(before, sample.image),
            target_area=target_area,
            stack=stack,
            progress=progress,
            peak_iou=iou,
            start=stack[-1].mask if given is not None else None,
            terms=dict.fromkeys(self.reward.potential(progress), 0.0),
            iou=[iou],
            dice=[dice],
        )

    def step(self, indices: Sequence[int], actions: Sequence[Any]) -> None:
        """One turn in each of the slots, with one tool call for all. Bad actions raise before anything moves."""
        slots = [self.running(index) for index in indices]
        read = [self.codec.read(action, slot.grid) for slot, action in zip(slots, actions, strict=True)]
        states = self._prompt(slots, read)
        for slot, action, state in zip(slots, read, states, strict=True):
            if isinstance(state, Exception):
                self._fail(slot, action, state)
            else:
                self._take(slot, action, state)

    def truncate(self, index: int) -> None:
        """Ends an episode under way at the turns it has, at least one, as if its horizon were these."""
        slot = self.running(index)
        if not slot.outcomes:
            raise MedSegError(f"the episode in slot {index} has no turn yet; step it before it is truncated")
        slot.ended = "horizon" if slot.progress.readable else "unreadable"
        if self.reward.timing == "terminal":  # the other timings have paid already
            slot.terms = self.reward.terms_of_turn(slot.progress, slot.progress, ends=True)
            last = slot.outcomes[-1]
            last.terms, last.reward = slot.terms, sum(slot.terms.values())

    def running(self, index: int) -> Slot:
        """The slot, if an episode is under way in it."""
        slot = self.slot(index)
        if slot.ended is not None:
            raise MedSegError(f"the episode in slot {index} has ended ({slot.ended}); call reset first")
        return slot

    def slot(self, index: int) -> Slot:
        slot = self.slots[index]
        if slot is None:
            raise MedSegError(f"no episode in slot {index} yet; call reset first")
        return slot

    # what the envs hand out

    def observe(self, index: int, out: Image | None = None) -> Any:
        """A fresh observation of a slot; an image observation is drawn into `out` where given."""
        slot = self.slot(index)
        overlay = slot.overlay.draw(slot.state.mask, out=out)
        if self.config.observation == "image":
            return overlay
        return {
            "image": slot.overlay.plain.copy(),
            "overlay": overlay,
            "mask": slot.overlay.view_mask(slot.state.mask).astype(np.uint8),
            "target": np.int64(self._targets[slot.sample.structure]),
            "turn": np.int64(slot.progress.turns),
        }

    def info(self, index: int) -> dict[str, Any]:
        """A slot's info: the same keys at every step."""
        slot = self.slot(index)
        counters = self.tool.counters()
        return {
            "instruction": slot.sample.instruction,
            "structure": slot.sample.structure,
            "key": slot.sample.key,
            "iou": slot.progress.iou,
            "dice": slot.progress.dice,
            "peak_iou": slot.peak_iou,
            "turn": slot.progress.turns,
            "reward_terms": dict(slot.terms),
            "ended": slot.ended,
            "error": slot.error,
            "tool_calls": slot.progress.tool_calls,
            "encodes": counters["encodes"],
            "cache_hits": counters["hits"],
            "cache_misses": counters["misses"],
            "disk_hits": counters.get("disk_hits", 0),
        }

    def view(self, index: int) -> View:
        slot = self.slot(index)
        return View(
            key=slot.sample.key,
            image=slot.sample.image,
            mask=slot.state.mask,
            prompts=slot.state.prompts,
            structure=slot.sample.structure,
            instruction=slot.sample.instruction,
            turn=slot.progress.turns,
            horizon=self.config.horizon,
            history=tuple(slot.history),
        )

    def reward_of(self, index: int) -> float:
        outcomes = self.slot(index).outcomes
        return outcomes[-1].reward if outcomes else 0.0

    def flags(self, index: int) -> tuple[bool, bool]:
        """(terminated, truncated): the horizon truncates, every other end terminates."""
        slot = self.slot(index)
        truncated = slot.ended == "horizon" or (
            slot.ended == "unreadable" and self.config.on_unreadable == "explain"  # then only the horizon says so
        )
        return slot.ended is not None and not truncated, truncated

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a slot's episode as they are stored."""
        from medseg_gym.episodes import encode_mask

        return tuple(
            Turn(
                action=outcome.action,
                reward=outcome.reward,
                terms=dict(outcome.terms),
                tool_called=outcome.tool_called,
                mask=encode_mask(outcome.mask),
            )
            for outcome in self.slot(index).outcomes
        )

    def recorded(self, index: int, episode: Episode) -> Episode:
        """The record of a slot's episode as it is stored; an engine of other tasks words it its own way."""
        return episode

    # one turn

    def _prompt(self, slots: Sequence[Slot], actions: Sequence[Any]) -> list[MaskState | Exception | None]:
        """The states after the prompts among the actions, None elsewhere; an exception where a tool may fail."""
        states: list[MaskState | Exception | None] = [None] * len(slots)
        asking = [i for i, action in enumerate(actions) if isinstance(action, Click | Box)]
        if not asking:
            return states
        samples, before = [slots[i].sample for i in asking], [slots[i].state for i in asking]
        try:
            answers: Sequence[MaskState | Exception] = advance(self.tool, samples, before, [actions[i] for i in asking])
        except ToolUnavailableError:
            raise  # no case's fault, and every other one would fail too
        except Exception:
            if self.config.on_error == "raise":
                raise
            answers = [self._prompt_alone(slots[i], actions[i]) for i in asking]
        for i, state in zip(asking, answers, strict=True):
            states[i] = state
        return states

    def _prompt_alone(self, slot: Slot, action: Any) -> MaskState | Exception:
        """One case by itself, so that the case that fails does not take its batch along."""
        try:
            return advance(self.tool, [slot.sample], [slot.state], [action])[0]
        except ToolUnavailableError:
            raise
        except Exception as error:
            return error

    def _take(self, slot: Slot, action: Any, state: MaskState | None) -> None:
        before = slot.state.mask
        hit = _hit(action, before, slot.sample.target)
        if state is not None:
            slot.stack.append(state)
        elif isinstance(action, Undo) and len(slot.stack) > 1:
            slot.stack.pop()
        iou, dice = slot.progress.iou, slot.progress.dice
        if slot.state.mask is not before:
            iou, dice = _overlap(slot.state.mask, slot.sample.target, slot.target_area)
        progress = rewards.after(slot.progress, action, iou, dice, hit=hit)
        slot.ended = self._ending(slot, action, progress)
        terms = self.reward.terms_of_turn(slot.progress, progress, ends=slot.ended is not None)
        self._record(slot, action, before, progress, terms, tool_called=state is not None)

    def _fail(self, slot: Slot, action: Any, error: Exception) -> None:
        progress = rewards.after(slot.progress, action, slot.progress.iou, slot.progress.dice, tool_called=False)
        slot.ended = "failed"
        slot.error = f"{type(error).__name__}: {error}"
        # a failed episode counts as 0, so what it was paid is taken back: dense and terminal rewards agree again
        terms = {name: -sum(outcome.terms[name] for outcome in slot.outcomes) for name in slot.terms}
        self._record(slot, action, slot.state.mask, progress, terms, tool_called=False)

    def _record(
        self,
        slot: Slot,
        action: Any,
        before: Mask,
        progress: rewards.Progress,
        terms: Mapping[str, float],
        *,
        tool_called: bool,
    ) -> None:
        slot.progress, slot.terms = progress, terms
        slot.peak_iou = max(slot.peak_iou, progress.iou)
        slot.iou.append(progress.iou)
        slot.dice.append(progress.dice)
        slot.history.append((before, action))
        slot.outcomes.append(Outcome(action, slot.state.mask, terms, sum(terms.values()), tool_called))

    def _ending(self, slot: Slot, action: Any, progress: rewards.Progress) -> Ended | None:
        last = slot.history[-1][1] if slot.history else None
        slot.repeats = slot.repeats + 1 if action == last else 1
        if isinstance(action, Stop):
            return "stopped"
        if isinstance(action, Unreadable):
            if self.config.on_unreadable == "end":
                return "unreadable"
        elif 0 < self.config.stop_after_repeats <= slot.repeats:
            return "stopped"
        if progress.turns >= self.config.horizon:
            # an agent that never said anything readable must not score on an absent structure
            return "horizon" if progress.readable else "unreadable"
        return None

    # beginnings

    def _sample(self, key: object, rng: np.random.Generator) -> Sample:
        if key is None:
            key = self.keys[int(rng.integers(len(self.keys)))]
        elif not isinstance(key, str):
            raise UnknownNameError(f"option sample={key!r}; wanted a key such as {self.keys[0]!r}")
        try:
            return check_sample(self.dataset[key])
        except KeyError:
            raise UnknownNameError(
                f"{self.dataset.name} has no case {key!r}; its keys look like {self.keys[0]!r}"
            ) from None

    def _overlay(self, index: int, image: Image) -> Overlay:
        """The overlay of an image; the slot's last one again where the image is the same array."""
        slot = self.slots[index]
        if slot is not None and slot.sample.image is image:
            return slot.overlay
        return Overlay(image, self.config.size)

    def _warn_of_hidden_task(self) -> None:
        structures = self.config.structures or self.dataset.structures
        if self.config.observation == "image" and len(structures) > 1 and self.dataset.name not in _warned:
            _warned.add(self.dataset.name)
            warnings.warn(
                f"an image observation does not say which of {self.dataset.name}'s {len(structures)} structures is "
                'wanted; use observation="dict", or structures= with one of them',
                stacklevel=4,
            )


def _overlap(mask: Mask, target: Mask, target_area: int) -> tuple[float, float]:
    """IoU and Dice; metrics.areas with the target's area known, by OpenCV's counts, which take two thirds the time."""
    import cv2

    bytes_ = mask.view(np.uint8)
    both = cv2.countNonZero(cv2.bitwise_and(bytes_, target.view(np.uint8)))
    area = cv2.countNonZero(bytes_)
    return iou_of_areas(both, area, target_area), dice_of_areas(both, area, target_area)


def _hit(action: Any, mask: Mask, target: Mask) -> bool | None:
    """Whether a click fell on a missed (positive) or spilled (negative) pixel; None for anything but a click."""
    if not isinstance(action, Click):
        return None
    inside, covered = bool(target[action.y, action.x]), bool(mask[action.y, action.x])
    return (inside and not covered) if action.positive else (covered and not inside)


def _check_start_mask(mask: Any, sample: Sample) -> Mask:
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.shape != sample.target.shape:
        raise BadDataError(
            f"start_mask is {mask.shape} {mask.dtype}; wanted {sample.target.shape} bool, the size of {sample.key}"
        )
    return mask
