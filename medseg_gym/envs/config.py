"""The settings of an env: one flat record, checked once, the same for the single and the vector env."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any

from medseg_gym.errors import MedSegError, UnknownNameError, check_keywords, unknown
from medseg_gym.rewards import RewardSpec

MAX_SIZE = 4096


@dataclass(frozen=True)
class EnvConfig:
    """What `gym.make` takes beside `dataset`, `tool` and `render_mode`."""

    split: str = "train"  # "train", "val" or "test"
    structures: Sequence[str] = ()  # only cases of these structures; empty means all
    horizon: int = 5  # turns until truncation; every prompt, undo, stop and unreadable turn counts
    size: int = 256  # side of the observation in pixels
    observation: str = "image"  # "image": the overlay alone; "dict": image, overlay, mask, target, turn
    reward: str | RewardSpec = "shaped"  # a preset's name ("shaped", "medsam-agent", "ibis") or a RewardSpec
    timing: str | None = None  # "dense" or "terminal"; None keeps the reward's own
    verbs: Sequence[str] | None = None  # a choice of "positive", "negative", "box", "stop", "undo"
    stop_after_repeats: int = 0  # end after this many identical actions in a row (IBISAgent: 3); 0 means never
    on_unreadable: str = "explain"  # or "end": whether an unreadable turn ends the episode
    on_error: str = "raise"  # or "fail": a tool's exception ends the episode as "failed" instead of being raised
    dataset_options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the dataset
    tool_options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the tool

    def __post_init__(self) -> None:
        for name, low, high in (("horizon", 1, 10_000), ("size", 8, MAX_SIZE), ("stop_after_repeats", 0, 10_000)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), low, high))
        object.__setattr__(self, "structures", _names("structures", self.structures))
        if self.verbs is not None:
            object.__setattr__(self, "verbs", _names("verbs", self.verbs))
        for name in ("dataset_options", "tool_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise MedSegError(f"{name}={getattr(self, name)!r}; wanted a dict of keywords")
        for name, known in (
            ("observation", ("image", "dict")),
            ("on_unreadable", ("explain", "end")),
            ("on_error", ("raise", "fail")),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)

    @staticmethod
    def of(options: Mapping[str, Any]) -> EnvConfig:
        """The config of keyword arguments; an unknown one raises UnknownNameError with the nearest known."""
        names = [f.name for f in fields(EnvConfig)]
        try:
            check_keywords("env", options, [*names, "dataset", "tool", "render_mode", "num_envs", "autoreset_mode"])
        except UnknownNameError as error:
            if "max_episode_steps" in options:
                raise UnknownNameError(f"{error}; an episode's length is set by horizon=") from None
            raise
        return EnvConfig(**options)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """The value as an int if it is a whole number within the bounds, NumPy's too; otherwise MedSegError."""
    try:
        number = index(value) if not isinstance(value, bool) else None
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise MedSegError(f"{name}={value!r}; wanted a whole number from {low} to {high}")
    return number


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    try:
        names = tuple(value)
    except TypeError:
        names = (None,)
    if not all(isinstance(n, str) for n in names):
        raise MedSegError(f"{name}={value!r}; wanted a sequence of names")
    return names
