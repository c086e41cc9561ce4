"""A learner behind awaits: in a thread of this process, or as several processes with FSDP2 between them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from medseg_gym.errors import MedSegError
from medseg_gym.rl.config import Common
from medseg_gym.rl.forward import micros
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.rank_processes import RankProcesses
from medseg_gym.rl.types import Row, TokenSequence

if TYPE_CHECKING:
    import torch

    from medseg_gym.rl.learner import Learner

TIMEOUT = 1800.0  # most seconds a call of a learner of several ranks may take


class LearnerHandle(Protocol):
    """`Learner`'s methods as awaits. Calls are carried out one after the other, in the order they were made."""

    async def step(self, plan: Sequence[Sequence[Sequence[Row]]], objective: Objective) -> dict[str, float]:
        """One optimiser step on a plan, [rank][micro-batch][row]."""
        ...

    async def logprobs(
        self, sequences: Sequence[TokenSequence], *, temperature: float, banned: bool = True
    ) -> list[NDArray[Any]]: ...

    async def reference_logprobs(
        self, sequences: Sequence[TokenSequence], *, temperature: float, banned: bool = True
    ) -> list[NDArray[Any]]: ...

    async def weights(self, full: bool) -> dict[str, torch.Tensor]: ...

    async def save(self, folder: Path) -> None: ...

    async def load(self, folder: Path) -> None: ...

    async def export(self, folder: Path) -> None: ...

    async def restart(self) -> None:
        """Back to the beginning: as it was loaded, nothing trained."""
        ...

    async def close(self) -> None: ...


class Processes(Protocol):
    """The ranks of a learner, blocking: processes of this machine or actors of a cluster."""

    def start(self) -> None: ...

    def call(self, method: str, calls: Sequence[tuple[Sequence[Any], dict[str, Any]]]) -> list[Any]: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


async def learner(
    config: Common, folder: Path, total_steps: int, *, timeout: float = TIMEOUT, processes: Processes | None = None
) -> LearnerHandle:
    """The learner that the settings ask for, loaded: in a thread of this process, or `ranks` processes.

    Several ranks are started afresh, so a script that asks for them has to keep its own run under
    `if __name__ == "__main__"`. `processes` are ranks elsewhere, one too.
    """
    if config.ranks < 1:
        raise MedSegError(f"ranks={config.ranks}; wanted 1 or more")
    handle: _Local | _Ranks
    if config.ranks == 1 and processes is None:
        handle = _Local(config, folder, total_steps)
    else:
        handle = _Ranks(config, processes or RankProcesses(config, folder, total_steps, timeout))
    try:
        await handle.start()
    except BaseException:
        await handle.close()
        raise
    return handle


class _Threaded:
    """Blocking calls, one at a time, in a thread of their own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="learner")

    async def _call(self, function: Any, *given: Any, **named: Any) -> Any:
        return await asyncio.wrap_future(self._thread.submit(function, *given, **named))


class _Local(_Threaded):
    """A learner in this process."""

    _learner: Learner

    def __init__(self, config: Common, folder: Path, total_steps: int) -> None:
        super().__init__()
        self._given = config, folder, total_steps

    async def start(self) -> None:
        from medseg_gym.rl.learner import Learner

        config, folder, total_steps = self._given
        self._learner = await self._call(Learner, config, folder, total_steps=total_steps)

    async def restart(self) -> None:
        await self.start()

    async def step(self, plan: Sequence[Sequence[Sequence[Row]]], objective: Objective) -> dict[str, float]:
        _check_plan(plan, 1)
        return await self._call(self._learner.step, plan[0], objective)

    async def logprobs(
        self, sequences: Sequence[TokenSequence], *, temperature: float, banned: bool = True
    ) -> list[NDArray[Any]]:
        return await self._call(self._learner.logprobs, sequences, temperature=temperature, banned=banned)

    async def reference_logprobs(
        self, sequences: Sequence[TokenSequence], *, temperature: float, banned: bool = True
    ) -> list[NDArray[Any]]:
        return await self._call(self._learner.reference_logprobs, sequences, temperature=temperature, banned=banned)

    async def weights(self, full: bool) -> dict[str, torch.Tensor]:
        return await self._call(self._learner.weights, full)

    async def save(self, folder: Path) -> None:
        await self._call(self._learner.save, folder)

    async def load(self, folder: Path) -> None:
        await self._call(self._learner.load, folder)

    async def export(self, folder: Path) -> None:
        await self._call(self._learner.export, folder)

    async def close(self) -> None:
        self._thread.shutdown(wait=True)


class _Ranks(_Threaded):
    """A learner of several processes; after an error they are all ended, and `load` or `restart` starts them again."""

    def __init__(self, config: Common, processes: Processes) -> None:
        super().__init__()
        self._config, self._processes = config, processes

    async def start(self) -> None:
        await self._call(self._processes.start)

    async def restart(self) -> None:
        await self._call(self._processes.kill)
        await self.start()

    async def step(self, plan: Sequence[Sequence[Sequence[Row]]], objective: Objective) -> dict[str, float]:
        _check_plan(plan, self._config.ranks)
        return (await self._each("step", [((micro, objective), {}) for micro in plan]))[0]

    async def logprobs(
        self, sequences: Sequence[TokenSequence], *, temperature: float, banned: bool = True
    ) -> list[NDArray[Any]]:
        return await self._score(sequences, reference=False, temperature=temperature, banned=banned)

    async def reference_logprobs(
        self, sequences: Sequence[TokenSequence], *, temperature: float, banned: bool = True
    ) -> list[NDArray[Any]]:
        return await self._score(sequences, reference=True, temperature=temperature, banned=banned)

    async def weights(self, full: bool) -> dict[str, torch.Tensor]:
        return await self._all("weights", full)

    async def save(self, folder: Path) -> None:
        await self._all("save", folder)

    async def load(self, folder: Path) -> None:
        await self.start()
        await self._all("load", folder)

    async def export(self, folder: Path) -> None:
        await self._all("export", folder)

    async def close(self) -> None:
        await self._call(self._processes.close)
        self._thread.shutdown(wait=True)

    async def _all(self, method: str, *given: Any) -> Any:
        """The first rank's answer to a call that all ranks are given alike."""
        return (await self._each(method, [(given, {})] * self._config.ranks))[0]

    async def _each(self, method: str, calls: Sequence[tuple[Sequence[Any], dict[str, Any]]]) -> list[Any]:
        return await self._call(self._processes.call, method, calls)

    async def _score(self, sequences: Sequence[TokenSequence], **named: Any) -> list[NDArray[Any]]:
        """Micro-batches dealt out to the ranks, each as many, since gathering the weights takes all ranks."""
        cut = micros(sequences, self._config.micro_rows, self._config.micro_tokens)
        ranks = self._config.ranks
        filled = cut + [[sequences[0]] for _ in range(-len(cut) % ranks)]
        found = await self._each("score", [((filled[rank::ranks],), named) for rank in range(ranks)])
        values: list[NDArray[Any]] = []
        parts = [iter(part) for part in found]
        for at, these in enumerate(cut):
            values += [next(parts[at % ranks]) for _ in these]
        return values


def _check_plan(plan: Sequence[Sequence[Any]], ranks: int) -> None:
    counts = [len(micro) for micro in plan]
    if len(counts) != ranks or len(set(counts)) > 1:
        raise MedSegError(f"a plan of {counts} micro-batches; wanted {ranks} ranks with as many each")
