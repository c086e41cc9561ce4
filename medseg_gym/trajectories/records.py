"""A Trajectory: an episode as a demonstration, with what supervised training has to know beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medseg_gym.types import Episode

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One case outlined by a strategy. `marked`, `thoughts` have one entry a turn."""

    episode: Episode  # `text` of its turns is empty: a protocol writes it when the trajectory is shown (chats.py)
    strategy: str  # "box-to-point", "sequential-click", "xu"
    kind: str = "plain"  # or "self-correction", "wrong-start": reflective ones
    marked: tuple[bool, ...] = ()  # turns shown but not to be learned; empty means none
    thoughts: tuple[str, ...] = ()  # reasoning before the actions; empty means none
    answer: str = ""  # what goes with the stop, where the protocol has a place for it
    instruction: str = ""  # how the request is worded; empty means the episode's own
    dropped: str = ""  # why the filter refused it ("iou", "length", "empty", "failed"); "" means kept
    tries: int = 0  # tool calls spent, retries included
    extra: Mapping[str, object] = field(default_factory=dict)
