"""Questions beside masks in training: in which order cases and questions come, and what an iteration says of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from medseg_gym.datasets.vqa import open_questions
from medseg_gym.envs.questions import RECORD, is_question, is_right
from medseg_gym.errors import MedSegError
from medseg_gym.rl.config import Common, GRPOConfig
from medseg_gym.rl.curriculum import CaseOrder, Draw
from medseg_gym.rl.types import Rollout


class Share:
    """Which positions of an endless row are questions: a share of them, spread evenly. Exact, no randomness."""

    def __init__(self, share: float) -> None:
        self.share = Fraction(share).limit_denominator(10_000)

    def before(self, position: int) -> int:
        """How many questions stand before a position."""
        return math.floor(position * self.share)

    def is_question(self, position: int) -> bool:
        return self.before(position + 1) > self.before(position)


class MixedOrder:
    """Cases and questions in one endless row, each in its own seeded order; what curriculum.CaseOrder is, of both.

    Groups that are filtered out are replaced by what comes next in the row, so the share is of what is drawn.
    """

    def __init__(self, cases: CaseOrder, questions: CaseOrder, share: float) -> None:
        if both := set(cases.keys) & set(questions.keys):
            raise MedSegError(f"{len(both)} keys are both a case's and a question's, such as {sorted(both)[0]!r}")
        self.cases, self.questions = cases, questions
        self._share, self._asked = Share(share), frozenset(questions.keys)
        self.position = 0  # in the row of both

    def draw(self, count: int) -> list[Draw]:
        """The next `count` cases and questions; their positions are those in their own orders."""
        drawn = []
        for _ in range(count):
            order = self.questions if self._share.is_question(self.position) else self.cases
            drawn += order.draw(1)
            self.position += 1
        return drawn

    def played(self, key: str, solved: float) -> None:
        (self.questions if key in self._asked else self.cases).played(key, solved)

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "cases": self.cases.state(), "questions": self.questions.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of the same cases and questions; others raise MedSegError."""
        self.position = int(state["position"])
        self.cases.load(state["cases"])
        self.questions.load(state["questions"])


def order_of(config: GRPOConfig, keys: Sequence[str]) -> CaseOrder | MixedOrder:
    """The order of a run: of its cases, with `config.question_share` of questions among them."""
    cases = CaseOrder(keys, config.seed, config.curriculum)
    if not config.questions:
        return cases
    asked = question_keys(config, config.split)
    return MixedOrder(cases, CaseOrder(asked, config.seed, config.curriculum), config.question_share)


def question_keys(config: Common, split: str) -> list[str]:
    """The questions of a split; MedSegError where there are none."""
    found = list(open_questions(config.questions).keys(split))
    if not found:
        raise MedSegError(f"{config.questions} has no question in its {split} split; prepare it with another --split")
    return found


def validation_questions(config: Common) -> list[str]:
    """The questions that validation asks: `validate_questions` of the validation split by the seed; none without."""
    if not config.questions or not config.validate_questions:
        return []
    from medseg_gym.rl.sft import chosen

    return chosen(question_keys(config, config.validate_split), config.validate_questions, config.seed)


def apart(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[Rollout]]:
    """(episodes that outline, episodes that were asked a question)."""
    asked = [rollout for rollout in rollouts if is_question(rollout.episode)]
    return [rollout for rollout in rollouts if not is_question(rollout.episode)], asked


def answered(rollouts: Sequence[Rollout], start: str, whole: int = 0) -> dict[str, float]:
    """What came of questions: shares of right answers, of all, of closed and of open ones, and habits.

    `whole` is how many were asked, where some could not be read at all: these count as wrong. Nothing of none.
    """
    whole = max(whole, len(rollouts))
    if not whole:
        return {}
    right = [float(is_right(r.episode) and not r.dropped) for r in rollouts]
    closed = [bool(r.episode.extra[RECORD]["closed"]) for r in rollouts]
    numbers = {"vqa_accuracy": sum(right) / whole}
    for name, wanted in (("vqa_closed", True), ("vqa_open", False)):
        those = [value for value, kind in zip(right, closed, strict=True) if kind is wanted]
        if those and (wanted is False or not all(closed)):
            numbers[name] = sum(those) / len(those)
    turns = sum(len(r.episode.turns) for r in rollouts)
    numbers["vqa_turns"] = turns / whole
    numbers["vqa_unanswered"] = sum(r.episode.ended != "stopped" for r in rollouts) / whole
    numbers["vqa_tool"] = sum(any(t.tool_called for t in r.episode.turns) for r in rollouts) / whole
    return {f"{start}{name}": value for name, value in numbers.items()}
