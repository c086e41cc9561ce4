"""The policies that only recipes play: an exploit by name, a box before IBISAgent's clicks, and recorded actions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from medseg_gym import oracle
from medseg_gym.bench.exploits import EXPLOITS, Exploit
from medseg_gym.datasets.base import Dataset
from medseg_gym.errors import unknown
from medseg_gym.policies.scripted import Targets, XuClicks
from medseg_gym.types import Action, Box, Decision, Episode, Mask, Stop, Unreadable, View

HERE = "medseg_gym.bench.recipe_policies"


def exploit(dataset: Dataset, *, kind: str) -> Exploit:
    """One of `bench.exploits.EXPLOITS` for a policy's spec: "medseg_gym.bench.recipe_policies:exploit:kind=climb"."""
    if kind not in EXPLOITS:
        raise unknown("exploit", kind, EXPLOITS)
    return Exploit(kind, Targets(dataset))


class BoxThenXuClicks(XuClicks):
    """The target's box first, then IBISAgent's greedy clicks (the agent "with bbox" of its Table 10)."""

    needs = ("box", "positive", "negative")  # type: ignore[assignment]

    def aim(self, view: View, target: Mask) -> Action:
        boxed = any(isinstance(action, Box) for _, action in view.history)
        return (None if boxed else oracle.target_box(target)) or super().aim(view, target)


class Recorded:
    """The actions of played episodes once more, whatever the mask shows now: turn by turn, and then a stop.

    A turn that was unreadable is unreadable again. A case without an episode raises KeyError, which fails it.
    """

    def __init__(self, episodes: Iterable[Episode], name: str) -> None:
        self.name = name
        self._actions = {episode.key: tuple(turn.action for turn in episode.turns) for episode in episodes}

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        return [self._again(self._actions[view.key], view.turn) for view in views]

    def _again(self, actions: Sequence[Action | Unreadable], turn: int) -> Decision:
        action = actions[turn] if turn < len(actions) else Stop()
        return Decision(None, reason=action.reason) if isinstance(action, Unreadable) else Decision(action)
