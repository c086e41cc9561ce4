"""Rollouts made by hand for the tests of training's mathematics: of given rewards and token counts, no pictures."""

from __future__ import annotations

from collections.abc import Sequence

from medseg_gym.rl.types import Rollout, Segment, TokenSequence
from medseg_gym.types import Episode, Stop, Turn


def made_episode(rewards: Sequence[float]) -> Episode:
    turns = tuple(Turn(Stop(), reward, {}, False, {"size": [1, 1], "counts": "1"}) for reward in rewards)
    steps = (0.0,) * (len(rewards) + 1)
    return Episode(
        env="MedSeg-Phantom-Stub-v0",
        tool="stub",
        policy="policy",
        case=0,
        key="Phantom/train-0/cue",
        structure="cue",
        instruction="cue",
        patient="0",
        seed=0,
        horizon=5,
        reward="shaped",
        turns=turns,
        iou=steps,
        dice=steps,
        ended="stopped",
    )


def made_sequence(
    answers: Sequence[int], *, first: int = 0, gap: int = 2, logprob: float = -1.0, token: int = 7
) -> TokenSequence:
    """A chat of turns `first` on, whose answers have so many tokens; before each `gap` tokens of an observation."""
    segments: list[Segment] = []
    for turn, count in enumerate(answers, start=first):
        segments.append(Segment("observation" if turn else "prompt", (1,) * gap, turn))
        segments.append(Segment("action", (token,) * count, turn, logprobs=(logprob,) * count))
    return TokenSequence(tuple(segments))


def made_rollout(
    rewards: Sequence[float],
    *,
    answers: Sequence[int] = (),
    member: int = 0,
    dropped: str = "",
    history: bool = True,
    logprob: float = -1.0,
    token: int = 7,
) -> Rollout:
    """An episode of these rewards a turn, its answers one token each unless `answers` says how many."""
    counts = list(answers) or [1] * len(rewards)
    if history:
        sequences = [made_sequence(counts, logprob=logprob, token=token)] if counts else []
    else:
        sequences = [made_sequence([n], first=i, logprob=logprob, token=token) for i, n in enumerate(counts)]
    return Rollout(0, member, made_episode(rewards), tuple(sequences), dropped)
