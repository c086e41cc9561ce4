"""What an iteration says of itself: rewards, quality and habits of its episodes, groups, speed, idle shares."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from medseg_gym.rl.groups import Groups
from medseg_gym.rl.questions import answered, apart
from medseg_gym.rl.types import Rollout
from medseg_gym.rl.validate import summary


def of_rollouts(rollouts: Sequence[Rollout], start: str = "train/") -> dict[str, float]:
    """What a Validation says, of the episodes that were not dropped, and the share of those that were.

    Questions are counted apart: they have no IoU, and none of their numbers is mixed into those of masks.
    """
    kept = [rollout for rollout in rollouts if not rollout.dropped]
    dropped = {f"{start}dropped": 1 - len(kept) / len(rollouts) if rollouts else 0.0}
    outlined, asked = apart(kept)
    return {**dropped, **(summary(outlined).scalars(start) if outlined else {}), **answered(asked, start)}


def of_groups(groups: Groups) -> dict[str, float]:
    """How many groups were played, trained and left out, and how far rewards spread within those trained."""
    spreads = [max(values) - min(values) for values in map(_rewards, groups.trained) if values]
    return {
        "groups/played": len(groups.played),
        "groups/trained": len(groups.trained),
        "groups/equal": groups.equal,
        "groups/short": groups.short,
        "groups/rounds": groups.rounds,
        "groups/spread": sum(spreads) / len(spreads) if spreads else 0.0,
    }


def _rewards(group: Sequence[Rollout]) -> list[float]:
    return [member.reward for member in group if not member.dropped]


class Stopwatch:
    """Seconds by part of an iteration. They are logged under "time/", and leave idle shares and rates behind."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun

    def measures(self, engine: Mapping[str, float], workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """time/, idle/ and speed/ of the iteration; `engine` and `workers` are their counters' changes over it.

        idle/ROLE is the share of the iteration's seconds in which the role did nothing; workers' is their mean.
        """
        whole = max(time.perf_counter() - self.begun, 1e-9)
        busy = [counters["busy_s"] for counters in workers if "busy_s" in counters]
        out = {f"time/{name}": seconds for name, seconds in sorted(self.seconds.items())}
        out["time/iteration"] = whole
        out["idle/learner"] = 1 - min(1.0, self.seconds["learn"] / whole)
        if "busy_s" in engine:
            out["idle/engine"] = 1 - min(1.0, engine["busy_s"] / whole)
        if busy:
            out["idle/workers"] = 1 - min(1.0, sum(busy) / len(busy) / whole)
        for name in ("prompt_tokens", "completion_tokens"):
            if name in engine:
                out[f"speed/{name}_s"] = engine[name] / whole
        return out


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What counters went up by; one that begins anew, as after an actor's restart, counts from 0."""
    return {
        name: value - before[name] if value >= before.get(name, value) and name in before else value
        for name, value in after.items()
    }
