"""TextOracle: an oracle that speaks. Its actions are written and read back, as a language model's would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg_gym.datasets.base import Dataset
from medseg_gym.envs.spaces import VERBS
from medseg_gym.frames import Grid
from medseg_gym.policies import base
from medseg_gym.policies.protocols import ChatProtocol, make
from medseg_gym.types import Decision, View


class TextOracle:
    """A scripted policy through the text of a protocol: formatted, then parsed. It scores what the policy scores.

    `policy` is a name that takes `dataset` and `verbs`, or a ready policy; it is given the verbs the protocol has.
    """

    def __init__(
        self,
        dataset: Dataset | None = None,
        verbs: Sequence[str] = VERBS,
        *,
        protocol: str | ChatProtocol = "medsam-agent",
        policy: str | base.Policy = "OracleClicks",
        **options: Any,
    ) -> None:
        self.protocol = make(protocol, verbs, **options)
        lent = {"dataset": dataset, "verbs": self.protocol.verbs} if isinstance(policy, str) else {}
        self.policy = base.make(policy, **lent)
        self.name = base.spelled(
            "TextOracle",
            {"protocol": self.protocol.name, "policy": self.policy.name, **options},
            {"protocol": "medsam-agent", "policy": "OracleClicks", **dict.fromkeys(options)},
        )

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        return [self.speak(view, d) for view, d in zip(views, self.policy.act(views, rngs), strict=True)]

    def speak(self, view: View, decision: Decision) -> Decision:
        """What the protocol reads from what it writes for a decision; an unreadable one stays as it is."""
        if decision.action is None:
            return decision
        grid = Grid(*view.mask.shape)
        return self.protocol.parse(self.protocol.format(decision.action, grid), grid)
