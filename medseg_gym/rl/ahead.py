"""Ahead: an iteration's groups played while the one before is learned, and the weights that play them.

All groups of iteration k + 1 are sampled by the weights that iteration k's step starts from; the engine is given others
between two plays only. So what is trained hangs on no timing, and every token is trained at most one change of weights
after it was sampled, which the importance weights of the loss correct (`GRPOConfig.importance`). A checkpoint after
iteration k therefore holds those weights too, where the step has changed them: a run that goes on from it plays the
groups of iteration k + 1 by them once more, the same groups, and equals a run that never ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_gym.rl import sync
from medseg_gym.rl.engines.base import WeightRef
from medseg_gym.rl.groups import Groups

BEHIND = "behind"  # the folder in a checkpoint, and its version in the record


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What the engine was given."""

    version: int
    weights: Mapping[str, Any]


class Ahead:
    """The play of the next iteration's groups, if there is one under way or done, and what plays it."""

    def __init__(self, given: Given | None = None) -> None:
        self.given = given  # by which the next iteration's groups are, or have to be, played
        self.names: frozenset[str] = frozenset()  # of the weights that are trained: the others are always the learner's
        self._engine: Given | None = None  # what the engine has
        self._task: asyncio.Task[Groups] | None = None

    @staticmethod
    def read(folder: Path, record: Mapping[str, Any]) -> Ahead:
        """As it stood when a checkpoint was written."""
        if BEHIND not in record:
            return Ahead()
        version = int(record[BEHIND])
        return Ahead(Given(version, sync.load(WeightRef(version, False, folder=str(folder / BEHIND)))))

    def record(self, version: int) -> dict[str, int]:
        """What a checkpoint's record says beside a learner of this version."""
        return {} if self.given is None or self.given.version == version else {BEHIND: self.given.version}

    def write(self, folder: Path, version: int) -> None:
        """Puts the weights that play the next groups into a checkpoint, unless they are the learner's."""
        if self.given is not None and self.record(version):
            sync.publish(self.given.weights, self.given.version, False, folder / BEHIND)

    def published(self, version: int, weights: Mapping[str, Any]) -> None:
        """The engine was given weights."""
        self._engine = Given(version, {name: value for name, value in weights.items() if name in self.names})

    def begin(self, play: Coroutine[Any, Any, Groups] | None) -> None:
        """Begins to play the next groups by what the engine has; with None it is only noted what would play them."""
        self.given = self._engine
        self._task = None if play is None else asyncio.ensure_future(play)

    @property
    def playing(self) -> bool:
        return self._task is not None

    async def played(self) -> None:
        """Waits until the play under way is done, or has failed."""
        if self._task is not None:
            await asyncio.wait({self._task})

    def check(self) -> None:
        """Raises what the play that is done has raised."""
        if self._task is not None:
            self._task.result()

    async def take(self) -> tuple[Groups, int]:
        """The groups that were played, and the version that played them."""
        assert self._task is not None and self.given is not None
        task, self._task = self._task, None
        return await task, self.given.version

    async def drop(self) -> None:
        """Ends what is under way, to be played anew."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
