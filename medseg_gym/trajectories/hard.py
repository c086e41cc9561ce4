"""The hard set for reinforcement learning: cases that took several rounds, whichever way they were outlined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from medseg_gym.bench.rundir import write_whole
from medseg_gym.errors import MedSegError
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.reflect import WRONG_START
from medseg_gym.trajectories.strategies import BOX_TO_POINT, SEQUENTIAL_CLICK

ROUNDS = (3, 5)  # MedSAM-Agent, section 3.2.2; turns with the stop, as its tables count them


def rounds(trajectory: Trajectory) -> int:
    """Turns of a trajectory, the stop counted, without those of a mistake and of a wrong start that was taken back."""
    turns = len(trajectory.episode.turns) - 2 * sum(trajectory.marked)
    return turns - (trajectory.kind == WRONG_START)


def hard_keys(
    trajectories: Iterable[Trajectory],
    *,
    low: int = ROUNDS[0],
    high: int = ROUNDS[1],
    strategies: Sequence[str] = (BOX_TO_POINT, SEQUENTIAL_CLICK),
    env: str = "",
) -> list[str]:
    """The keys whose kept trajectories took `low` to `high` rounds under each of the strategies, in order, each once.

    Dropped ones do not count. With trajectories of several envs `env` has to say which, as what is hard hangs on the
    tool; MedSegError otherwise.
    """
    if not 1 <= low <= high:
        raise MedSegError(f"rounds from {low} to {high}; wanted 1 <= low <= high")
    if not strategies:
        raise MedSegError("no strategy to judge by; give at least one")
    found: dict[str, set[str]] = {}
    envs: set[str] = set()
    there: set[str] = set()
    for one in trajectories:
        envs.add(one.episode.env)
        if env and one.episode.env != env:
            continue
        there.add(one.strategy)
        if one.strategy in strategies and not one.dropped and low <= rounds(one) <= high:
            found.setdefault(one.episode.key, set()).add(one.strategy)
    if not env and len(envs) > 1:
        raise MedSegError(f"trajectories of {', '.join(sorted(envs))}; say with env= which of them counts")
    if env and env not in envs:
        raise MedSegError(f"no trajectories of {env!r}; there are those of {', '.join(sorted(envs)) or 'none'}")
    missing = [strategy for strategy in strategies if strategy not in there]
    if missing:
        raise MedSegError(f"no trajectories by {', '.join(missing)}; there are those by {', '.join(sorted(there))}")
    return [key for key, by in found.items() if by == set(strategies)]


def write_keys(path: str | Path, keys: Sequence[str]) -> None:
    """A file with a key a line, which `keys_file` of a GRPO run reads."""
    write_whole(Path(path), "".join(f"{key}\n" for key in keys))
