"""Questions in the env's engine: an episode about a picture that is ended by an answer and paid by exact match.

The agent may use the tool on the picture before it answers, or answer at once. There is no mask to be right about, so
such an episode has no IoU and no Dice, at any turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medseg_gym import rewards
from medseg_gym.datasets.base import Dataset, WithStartMasks, check_split
from medseg_gym.datasets.vqa import Question, Questions, VqaSample
from medseg_gym.envs.config import EnvConfig
from medseg_gym.envs.engine import Engine, Slot
from medseg_gym.envs.spaces import ActionCodec
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.frames import Grid
from medseg_gym.tools.cache import CachedTool
from medseg_gym.types import Action, Answer, Ended, Episode, Mask, MaskState, Sample, Stop, Undo, Unreadable

STRUCTURE = "question"  # the structure of a question's sample and episode
REWARD = "exact-match"  # the name of its reward
TERM = "answer"  # its one term: 1 for the right answer, else 0
RECORD = "question"  # where Episode.extra has the question, what was said, and whether it was right


@dataclass(frozen=True, slots=True, eq=False)
class QuestionSample(Sample):
    """A question as a case: its instruction is the question, its target is empty and means nothing."""

    question: Question = field(default_factory=lambda: Question("", "", True))
    dataset: str = ""


class QuestionCases:
    """A set of questions as a Dataset of QuestionSamples."""

    structures = (STRUCTURE,)

    def __init__(self, questions: Questions) -> None:
        self.questions = questions

    @property
    def name(self) -> str:
        return self.questions.name

    @property
    def content(self) -> str:
        return self.questions.content

    def keys(self, split: str, structures: Sequence[str] = ()) -> Sequence[str]:
        check_split(split)
        return self.questions.keys(split)

    def __contains__(self, key: object) -> bool:
        return key in self.questions

    def __getitem__(self, key: str) -> QuestionSample:
        return _sample(self.questions[key])


class WithQuestions:
    """A dataset and a set of questions beside it. Keys, name and structures are the dataset's; a question is found by
    its own key, and a key of both is an error where it is met."""

    def __init__(self, dataset: Dataset, cases: QuestionCases) -> None:
        self.dataset, self.cases = dataset, cases
        self.name, self.structures = dataset.name, dataset.structures

    @property
    def content(self) -> str | None:
        return getattr(self.dataset, "content", None) or getattr(self.dataset, "checksum", None)

    def keys(self, split: str, structures: Sequence[str] = ()) -> Sequence[str]:
        return self.dataset.keys(split, structures)

    def start_mask(self, key: str) -> Mask | None:
        if key in self.cases or not isinstance(self.dataset, WithStartMasks):
            return None
        return self.dataset.start_mask(key)

    def __getitem__(self, key: str) -> Sample:
        return self.cases[key] if key in self.cases else self.dataset[key]


class QuestionCodec(ActionCodec):
    """A codec that lets an Answer through beside what the env's verbs allow."""

    def read(self, action: Any, grid: Grid) -> Action | Unreadable:
        return action if isinstance(action, Answer) else super().read(action, grid)


class QuestionEngine(Engine):
    """An Engine of which some or all cases are questions; the others are played as ever.

    A question's reward has the one term "answer": 1 for the right answer, else 0, whatever `timing` says. Stop is no
    answer, and an Answer where nothing was asked is no action: both are unreadable turns.
    """

    def __init__(self, dataset: Dataset, tool: CachedTool, config: EnvConfig, slots: int) -> None:
        super().__init__(dataset, tool, config, slots)
        self.codec = QuestionCodec(self.codec.verbs)
        self._terms = dict.fromkeys((*self.reward.potential(rewards.start(0.0, 0.0)), TERM), 0.0)

    @staticmethod
    def beside(engine: Engine, questions: Questions) -> QuestionEngine:
        """The engine of another one's dataset, tool and settings, with questions beside its cases."""
        mixed = WithQuestions(engine.dataset, QuestionCases(questions))
        return QuestionEngine(mixed, engine.tool, engine.config, len(engine.slots))

    def begin(self, rng: np.random.Generator, options: Mapping[str, Any] | None = None, *, before: int) -> Slot:
        slot = super().begin(rng, options, before=before)
        if isinstance(slot.sample, QuestionSample):
            slot.progress, slot.terms = rewards.start(0.0, 0.0), {TERM: 0.0}
        return slot

    def truncate(self, index: int) -> None:
        slot = self.running(index)
        if not isinstance(slot.sample, QuestionSample):
            super().truncate(index)
            return
        if not slot.outcomes:
            raise MedSegError(f"the episode in slot {index} has no turn yet; step it before it is truncated")
        slot.ended = "horizon" if slot.progress.readable else "unreadable"

    def info(self, index: int) -> dict[str, Any]:
        found = super().info(index)  # a vector env's infos have the same keys in every slot
        return {**found, "reward_terms": {**self._terms, **found["reward_terms"]}}

    def recorded(self, index: int, episode: Episode) -> Episode:
        slot = self.slot(index)
        if not isinstance(slot.sample, QuestionSample):
            return episode
        said = next((o.action.text for o in slot.outcomes if isinstance(o.action, Answer)), None)
        record = record_of(slot.sample.question, slot.sample.dataset, said if episode.ended == "stopped" else None)
        return replace(episode, reward=REWARD, iou=(), dice=(), extra={RECORD: record})

    def _take(self, slot: Slot, action: Any, state: MaskState | None) -> None:
        if not isinstance(slot.sample, QuestionSample):
            if isinstance(action, Answer):
                action = Unreadable("no question was asked; outline the structure")
            super()._take(slot, action, state)
            return
        if isinstance(action, Stop):
            action = Unreadable("a question is ended by its answer")
        before = slot.state.mask
        if state is not None:
            slot.stack.append(state)
        elif isinstance(action, Undo) and len(slot.stack) > 1:
            slot.stack.pop()
        progress = rewards.after(slot.progress, action, 0.0, 0.0)
        slot.ended = self._ending(slot, action, progress)
        right = isinstance(action, Answer) and slot.sample.question.right(action.text)
        self._record(slot, action, before, progress, {TERM: float(right)}, tool_called=state is not None)

    def _ending(self, slot: Slot, action: Any, progress: rewards.Progress) -> Ended | None:
        return "stopped" if isinstance(action, Answer) else super()._ending(slot, action, progress)


def record_of(question: Question, dataset: str, said: str | None) -> dict[str, Any]:
    """A question with what was said to it, as Episode.extra and answers.jsonl hold it; None: nothing was said."""
    return {
        "text": question.text,
        "answer": question.answer,
        "closed": question.closed,
        "choices": list(question.choices),
        "kind": question.kind,
        "dataset": dataset,
        "said": said,
        "right": said is not None and question.right(said),
    }


def is_question(episode: Episode) -> bool:
    return RECORD in episode.extra


def is_right(episode: Episode) -> bool:
    """Whether a question's episode ended with the right answer."""
    return bool(episode.extra[RECORD]["right"])


def _sample(found: VqaSample) -> QuestionSample:
    image = found.image
    if image.ndim != 3:
        raise BadDataError(f"{found.key}: image is {image.shape}; wanted (H, W, 3)")
    return QuestionSample(
        key=found.key,
        image=image,
        target=np.zeros(image.shape[:2], np.bool_),
        structure=STRUCTURE,
        instruction=found.asked.asked,
        patient=found.patient,
        question=found.asked,
        dataset=found.dataset,
    )
