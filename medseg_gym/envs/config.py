"""The settings of an env: one flat record, checked once, the same for the single and the vector env."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
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
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise MedSegError(f"{name}={value!r}; wanted a whole number from {low} to {high}")
        if isinstance(self.structures, str):
            object.__setattr__(self, "structures", (self.structures,))
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
