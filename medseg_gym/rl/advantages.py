"""Advantages of a group's members: how much better each did than the group's mean, by the episode or by the turn.

GRPO (arXiv 2402.03300; MedSAM-Agent, equation 7): the reward of an episode minus the mean of its group's. With `std`
divided by the group's standard deviation plus 1e-6: the unbiased one, of n - 1, as verl takes torch.std; without it the
advantages are Dr. GRPO's (arXiv 2503.20783).

A member that was dropped, that has a reward that is not finite or that has no chat never enters a mean and is not
trained; a group needs two others. Rewards within 1e-9 of each other are equal, as sums of terms round differently, and
equal rewards give advantages of exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import unknown
from medseg_gym.rl.types import Rollout

CREDITS = ("episode", "turn")
EQUAL = 1e-9
EPSILON = 1e-6


def usable(rollout: Rollout) -> bool:
    """Whether a member can be trained: not dropped, its rewards finite, at least one chat begun and one turn played."""
    turns = rollout.episode.turns
    return not rollout.dropped and bool(rollout.sequences and turns) and all(np.isfinite(t.reward) for t in turns)


def too_few(group: Sequence[Rollout]) -> bool:
    """Whether a group has no two members to compare."""
    return sum(usable(rollout) for rollout in group) < 2


def advantages(
    group: Sequence[Rollout], *, credit: str = "episode", std: bool = False
) -> list[NDArray[np.float64] | None]:
    """Of each member its turns' advantages, (T,); None for a member that is not trained. Adds up to 0 over a turn.

    Credit by "episode": every turn has the episode's advantage. By "turn": the rewards from the turn on, minus the mean
    of the same over the members that have the turn, so a turn that only one member has gets 0; the first turn's is the
    episode's, and where the reward comes at the end of equally long episodes all are. `std` by turn is the deviation
    within turns, pooled over them.
    """
    if credit not in CREDITS:
        raise unknown("credit", credit, CREDITS)
    if too_few(group):
        return [None] * len(group)
    chosen = [rollout for rollout in group if usable(rollout)]
    rewards = [np.array([turn.reward for turn in rollout.episode.turns], np.float64) for rollout in chosen]
    if credit == "episode":
        centred = [np.full(len(given), value) for given, value in zip(rewards, _episode(rewards, std), strict=True)]
    else:
        centred = _turns(rewards, std)
    found = iter(centred)
    return [next(found) if usable(rollout) else None for rollout in group]


def zero_spread(group: Sequence[Rollout], *, credit: str = "episode") -> bool:
    """Whether a group has two members or more to compare and they teach nothing: every advantage is exactly 0."""
    found = advantages(group, credit=credit)
    return not too_few(group) and all(not values.any() for values in found if values is not None)


def _episode(rewards: Sequence[NDArray[np.float64]], std: bool) -> NDArray[np.float64]:
    centred = _centred(np.array([given.sum() for given in rewards]))
    return centred / (np.sqrt((centred**2).sum() / (len(centred) - 1)) + EPSILON) if std else centred


def _turns(rewards: Sequence[NDArray[np.float64]], std: bool) -> list[NDArray[np.float64]]:
    to_go = [given[::-1].cumsum()[::-1] for given in rewards]
    found = [np.zeros(len(given)) for given in rewards]
    freedom = 0
    for turn in range(max(len(given) for given in rewards)):
        there = [i for i, given in enumerate(rewards) if len(given) > turn]
        freedom += len(there) - 1
        for i, value in zip(there, _centred(np.array([to_go[i][turn] for i in there])), strict=True):
            found[i][turn] = value
    if std:
        deviation = np.sqrt(sum((values**2).sum() for values in found) / freedom)
        found = [values / (deviation + EPSILON) for values in found]
    return found


def _centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.zeros(len(values)) if np.ptp(values) <= EQUAL else values - values.mean()
