"""validate: given cases played once each by an engine, as in training, and what came of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medseg_gym.errors import MedSegError
from medseg_gym.rl.engines.base import PolicyEngine
from medseg_gym.rl.jobs import Job, Settings
from medseg_gym.rl.questions import answered, apart
from medseg_gym.rl.rollout import Watch, play
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Rollout
from medseg_gym.rl.worker import EnvWorker
from medseg_gym.types import Ended, Unreadable

TOGETHER = 16  # cases that a lockstep engine answers in one batch; fewer where the workers have fewer slots


@dataclass(frozen=True)
class Validation:
    """Means over the cases, those that failed counting as 0; a case's own values are in its Rollout."""

    iou: float
    dice: float
    reward: float
    terms: Mapping[str, float]  # of the reward: they add up to it
    turns: float  # actions an episode
    unreadable: float  # share of the turns
    tokens: float  # sampled, a turn
    ended: Mapping[Ended, int]
    by_case: Mapping[str, float]  # IoU of each case, in order
    rollouts: tuple[Rollout, ...]  # in the cases' order
    questions: Mapping[str, float] = field(default_factory=dict)  # what came of the questions; {} where none was asked

    def scalars(self, start: str = "val/") -> dict[str, float]:
        """Names and numbers for a log."""
        named = {name: getattr(self, name) for name in ("iou", "dice", "reward", "turns", "unreadable", "tokens")}
        named |= {f"reward_{term}": value for term, value in self.terms.items()}
        named |= {f"ended_{end}": float(count) for end, count in self.ended.items()}
        return {f"{start}{name}": value for name, value in (*named.items(), *self.questions.items())}


async def validate(
    workers: Sequence[EnvWorker],
    engine: PolicyEngine,
    tokens: ChatTokens,
    keys: Sequence[str],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
    max_chat_tokens: int = 12288,
    policy: str = "",
    watch: Watch | None = None,
    questions: Sequence[str] = (),
) -> Validation:
    """Plays each case once; a case's sampling seeds hang on `seed` and its place among `keys` alone.

    `questions` are keys that the workers find questions by: asked once each, after the cases, and counted apart.
    """
    if not keys:
        raise MedSegError("no cases to validate on; choose another validate_split, or validate_every=0")
    settings = Settings(
        seed=seed,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        max_chat_tokens=max_chat_tokens,
        policy=policy,
        name="validate",
    )
    size = min([TOGETHER, *(worker.slots for worker in workers)]) if engine.lockstep else 1

    async def played(keys: Sequence[str], settings: Settings) -> list[Rollout]:
        jobs = [Job(start, keys=tuple(keys[start : start + size])) for start in range(0, len(keys), size)]
        found: list[Rollout] = []
        async for rollouts in play(jobs, workers, engine, tokens, settings, watch=watch):
            found += rollouts
        return sorted(found, key=lambda rollout: rollout.group)

    outlined = summary(await played(keys, settings))
    if not questions:
        return outlined
    asked = apart(await played(questions, replace(settings, name="validate-questions")))[1]
    return replace(outlined, questions=answered(asked, "", len(questions)))


def summary(rollouts: Sequence[Rollout]) -> Validation:
    """The Validation of played cases, at least one."""
    counted = [rollout.episode.ended != "failed" and not rollout.dropped for rollout in rollouts]
    episodes = [rollout.episode for rollout in rollouts]
    iou = [episode.iou[-1] if fine else 0.0 for episode, fine in zip(episodes, counted, strict=True)]
    dice = [episode.dice[-1] if fine else 0.0 for episode, fine in zip(episodes, counted, strict=True)]
    turns = [turn for episode in episodes for turn in episode.turns]
    terms = {term: 0.0 for turn in turns for term in turn.terms}
    for episode, fine in zip(episodes, counted, strict=True):
        for turn in episode.turns if fine else ():
            for term, value in turn.terms.items():
                terms[term] += value / len(episodes)
    sampled = sum(int(sequence.loss_mask.sum()) for rollout in rollouts for sequence in rollout.sequences)
    return Validation(
        iou=float(np.mean(iou)),
        dice=float(np.mean(dice)),
        reward=float(np.mean([r.reward if fine else 0.0 for r, fine in zip(rollouts, counted, strict=True)])),
        terms=terms,
        turns=len(turns) / len(episodes),
        unreadable=sum(isinstance(turn.action, Unreadable) for turn in turns) / max(1, len(turns)),
        tokens=sampled / max(1, len(turns)),
        ended=dict(sorted(Counter(episode.ended for episode in episodes).items())),
        by_case={episode.key: value for episode, value in zip(episodes, iou, strict=True)},
        rollouts=tuple(rollouts),
    )
