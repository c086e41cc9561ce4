"""Scripted answerers, for comparison: the most frequent answer, and a random choice. Neither looks at the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medseg_gym.answers import normalised
from medseg_gym.errors import MedSegError, unknown
from medseg_gym.types import Answer, Decision, View

if TYPE_CHECKING:
    from medseg_gym.datasets.vqa import Question, Questions
    from medseg_gym.policies.base import Policy

READ = 20_000  # questions of the train split that are counted, at most


class MajorityAnswer:
    """The most frequent answer of the train split to questions of the same kind and with the same choices.

    Where the train split has none such: to questions of that kind, then to closed or open ones, then to any; of an
    answer that is not among the choices, the first choice.
    """

    name = "MajorityAnswer"

    def __init__(self, questions: Questions) -> None:
        self._questions = questions
        self._counts: dict[tuple[object, ...], Counter[str]] = {}
        self._spelled: dict[str, str] = {}
        for key in questions.keys("train")[:READ]:
            asked = questions.question(key)
            word = normalised(asked.answer)
            self._spelled.setdefault(word, asked.answer)
            for group in _groups(asked):
                self._counts.setdefault(group, Counter())[word] += 1

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        return [Decision(Answer(self._answer(self._questions.question(view.key)))) for view in views]

    def _answer(self, asked: Question) -> str:
        allowed = {normalised(choice): choice for choice in asked.choices}
        for group in _groups(asked):
            counts = self._counts.get(group, Counter())
            fitting = {word: count for word, count in counts.items() if not allowed or word in allowed}
            if fitting:
                word = min(fitting, key=lambda word: (-fitting[word], word))
                return allowed.get(word, self._spelled[word])
        return asked.choices[0] if asked.choices else "yes"


class RandomAnswer:
    """One of a question's choices, each as likely; where it has none, an answer of the train split."""

    name = "RandomAnswer"

    def __init__(self, questions: Questions) -> None:
        self._questions = questions
        found = [questions.question(key) for key in questions.keys("train")[:READ]]
        self._open = [asked.answer for asked in found if not asked.choices] or ["yes", "no"]

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        said = []
        for view, rng in zip(views, rngs, strict=True):
            words = self._questions.question(view.key).choices or self._open
            said.append(Decision(Answer(words[int(rng.integers(len(words)))])))
        return said


SCRIPTED = {kind.name: kind for kind in (MajorityAnswer, RandomAnswer)}


def make(spec: str | Policy, questions: Questions, verbs: Sequence[str]) -> Policy:
    """The policy of a spec for questions: MajorityAnswer, RandomAnswer, or one of policies.make in its asking form.

    A language model is spoken to by the asking form of its protocol; any other policy is taken as it is, and has to
    give Answer records.
    """
    from medseg_gym import policies
    from medseg_gym.policies.base import BUILTIN
    from medseg_gym.policies.protocols.questions import asking
    from medseg_gym.policies.vlm import VLMPolicy

    name = spec.partition(":")[0] if isinstance(spec, str) else ""
    if name in SCRIPTED:
        if spec != name:
            raise MedSegError(f"{name} takes no options; {spec!r} came")
        return SCRIPTED[name](questions)
    if name in (*BUILTIN, "TextOracle"):
        raise MedSegError(f"{name} outlines structures and answers nothing; wanted {', '.join(SCRIPTED)}, vlm:...")
    if name and ":" not in str(spec) and name not in policies.names():
        raise unknown("policy", name, [*SCRIPTED, *policies.names()])
    policy = policies.make(spec, verbs=tuple(verbs)) if isinstance(spec, str) else policies.make(spec)
    if isinstance(policy, VLMPolicy):
        policy.protocol = asking(policy.protocol)
    return policy


def _groups(asked: Question) -> list[tuple[object, ...]]:
    """The groups a question is counted in, the narrowest first."""
    choices = tuple(sorted(normalised(choice) for choice in asked.choices))
    return [("kind", asked.kind, choices), ("kind", asked.kind), ("closed", asked.closed), ("all",)]
