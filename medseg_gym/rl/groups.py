"""The groups of an iteration: cases are drawn and played, groups that teach nothing are replaced, within a bound."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from medseg_gym.envs.questions import is_question, is_right
from medseg_gym.errors import BadDataError
from medseg_gym.rl.advantages import too_few, zero_spread
from medseg_gym.rl.curriculum import Draw
from medseg_gym.rl.types import Rollout
from medseg_gym.types import Episode

Group = Sequence[Rollout]
Play = Callable[[Sequence[Draw], int], AsyncIterator[Group]]
"""Plays a group a draw, numbered from the given number on; gives each as it is complete, in any order."""


class Order(Protocol):
    """What comes next: curriculum.CaseOrder, or questions.MixedOrder."""

    def draw(self, count: int) -> list[Draw]: ...

    def played(self, key: str, solved: float) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The groups of one iteration, in the order their cases were drawn in."""

    played: tuple[Group, ...]
    trained: tuple[Group, ...]  # those of `played` that are kept, at most as many as were wanted
    equal: int  # groups filtered out because all their rewards are equal
    short: int  # groups filtered out because fewer than two members are left
    rounds: int  # of drawing others, 0 where the first groups were enough


async def draw_groups(
    order: Order, play: Play, *, wanted: int, filtered: bool, credit: str, resample: int, solved: float
) -> Groups:
    """Draws `wanted` groups and plays them; those filtered out are replaced by others in at most `resample` rounds.

    A round draws as many cases as are missing and is played to its end, so that what is trained, and where the cursor
    stands, hang on no timing. Which groups are equal is judged from rewards alone. `solved` is the IoU from which an
    episode counts as solved for the curriculum.
    """
    played: list[Group] = []
    kept: list[Group] = []
    equal = short = 0
    begun = 0
    for number in range(1 + (resample if filtered else 0)):
        draws = order.draw(wanted - len(kept))
        first = len(played)
        complete = {group[0].group: group async for group in play(draws, first)}
        if sorted(complete) != list(range(first, first + len(draws))):
            raise BadDataError(f"groups {sorted(complete)} came back; {first} to {first + len(draws) - 1} were played")
        begun = number
        for at, draw in enumerate(draws, start=first):
            group = complete[at]
            played.append(group)
            share = solved_share(group, solved)
            if share is not None:
                order.played(draw.key, share)
            if too_few(group):
                short += 1
            elif filtered and zero_spread(group, credit=credit):
                equal += 1
            else:
                kept.append(group)
        if len(kept) == wanted:
            break
    return Groups(tuple(played), tuple(kept), equal, short, begun)


def solved_share(group: Group, least: float) -> float | None:
    """The share of a group's episodes whose last IoU is at least `least`; failed and unreadable ones are not solved.

    A question's episode is solved by the right answer.

    None where every member was dropped: then nothing was learned of the case.
    """
    kept = [member.episode for member in group if not member.dropped]
    solved = [is_right(e) if is_question(e) else _outlined(e, least) for e in kept]
    return sum(solved) / len(solved) if solved else None


def _outlined(episode: Episode, least: float) -> bool:
    return episode.ended not in ("failed", "unreadable") and bool(episode.iou) and episode.iou[-1] >= least
