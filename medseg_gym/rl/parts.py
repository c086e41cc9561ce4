"""What the GRPO loop drives, behind handles: env workers, a policy engine, a learner; here all in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from medseg_gym.datasets.base import Dataset
from medseg_gym.errors import MedSegError
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.engines.base import PolicyEngine
from medseg_gym.rl.ranks import LearnerHandle, learner
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.worker import EnvWorker


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What the loop drives."""

    workers: Sequence[EnvWorker]
    engine: PolicyEngine
    learner: LearnerHandle
    tokens: ChatTokens
    publish: Callable[[dict[str, Any], int, bool], Any]  # (weights, version, full) -> WeightRef
    dataset: Dataset | None = None  # for the gallery's pictures
    leave: Callable[[], object] = lambda: None  # what is left to do when all are closed

    async def close(self) -> None:
        async with AsyncExitStack() as stack:  # one that cannot be closed keeps no other open
            stack.callback(self.leave)
            parts: list[EnvWorker | LearnerHandle | PolicyEngine] = [*self.workers, self.learner, self.engine]
            for part in parts:
                stack.push_async_callback(part.close)


async def local_parts(config: GRPOConfig) -> Parts:
    """All in this process but the learner's ranks, where there are several."""
    from medseg_gym.rl import sync
    from medseg_gym.rl.engines import builds
    from medseg_gym.rl.local_worker import LocalWorker
    from medseg_gym.rl.start import starting_folder

    check_slots(config)
    folder = starting_folder(config)
    tokens = ChatTokens.from_pretrained(folder)
    workers = [
        LocalWorker(
            config.env,
            config.slots // config.workers,
            config.protocol,
            size=config.size,
            options=config.env_options,
            protocol_options=config.protocol_options,
            questions=config.questions,
        )
        for _ in range(config.workers)
    ]
    return Parts(
        workers=workers,
        engine=builds.make(config, folder),
        learner=await learner(config, folder, config.iterations),
        tokens=tokens,
        publish=partial(sync.publish, folder=config.weights_folder or None),
        dataset=workers[0].env.dataset,
    )


def check_slots(config: GRPOConfig) -> None:
    """MedSegError where a worker would have no room for a group."""
    if config.slots < config.workers * config.rollouts:
        raise MedSegError(
            f"slots={config.slots} for {config.workers} workers is less than a group of {config.rollouts} in each; "
            f"give at least {config.workers * config.rollouts}"
        )


__all__ = ["LearnerHandle", "Parts", "check_slots", "local_parts"]
