"""RankActors: a learner's ranks as Ray actors, called together, and ended together when one of them dies."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from medseg_gym.errors import MedSegError
from medseg_gym.rl.config import Common
from medseg_gym.rl.worker import LostError

Call = tuple[Sequence[Any], dict[str, Any]]  # arguments and keywords


class RankActor:
    """One rank of a learner. Its arguments are settings and a folder's path, which every node has to see."""

    def __init__(self, rank: int, config: Common, folder: str, total_steps: int, timeout: float) -> None:
        self.rank, self.config, self.folder = rank, config, Path(folder)
        self.total_steps, self.timeout = total_steps, timeout
        self.learner: Any = None

    def address(self) -> str:
        """Where the ranks can meet on this one's node."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def join(self, meeting: str) -> None:
        """Meets the other ranks, if there are any, and loads the learner."""
        import torch

        from medseg_gym.rl.learner import Learner, device_of

        device = device_of(self.config.device, 0 if os.environ.get("CUDA_VISIBLE_DEVICES") else self.rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.config.ranks > 1:
            torch.distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=meeting,
                rank=self.rank,
                world_size=self.config.ranks,
                timeout=timedelta(seconds=self.timeout),
            )
        self.learner = Learner(
            self.config, self.folder, total_steps=self.total_steps, rank=self.rank, world=self.config.ranks
        )

    def call(self, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> tuple[bool, Any]:
        try:
            answer = getattr(self.learner, method)(*given, **named)
            return True, answer if self.rank == 0 or method in ("score", "logprobs") else None
        except MedSegError as error:
            return False, error

    def process(self) -> int:
        return os.getpid()


class RankActors:
    """What RankProcesses is, in a cluster. LostError where a rank died or hung: all are ended; `start` makes others.

    `options` are each rank's for Ray: num_cpus, num_gpus, its place.
    """

    def __init__(
        self,
        config: Common,
        folder: Path,
        total_steps: int,
        timeout: float,
        options: Sequence[Mapping[str, Any]],
    ) -> None:
        self._given, self._timeout, self._options = (config, str(folder), total_steps), timeout, options
        self.actors: list[Any] = []

    def start(self) -> None:
        """Makes the actors and waits until all have loaded; does nothing where they run."""
        import ray

        if self.actors:
            return
        made = ray.remote(RankActor)
        self.actors = [
            made.options(max_restarts=0, **options).remote(rank, *self._given, self._timeout)
            for rank, options in enumerate(self._options)
        ]
        (meeting,) = self._get([self.actors[0].address.remote()], "start")
        self._get([actor.join.remote(meeting) for actor in self.actors], "start")

    def call(self, method: str, calls: Sequence[Call]) -> list[Any]:
        """Each rank's answer to its own call of a method. After an error no rank is left running."""
        if not self.actors:
            raise LostError("the learner's ranks were ended; load a checkpoint to start them again")
        asked = [
            actor.call.remote(method, given, named) for actor, (given, named) in zip(self.actors, calls, strict=True)
        ]
        answers = self._get(asked, method)
        for well, value in answers:
            if not well:
                self.kill()
                raise value
        return [value for _, value in answers]

    def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        import ray

        for actor in self.actors:
            with suppress(Exception):
                ray.kill(actor)
        self.actors = []

    def _get(self, references: Sequence[Any], method: str) -> list[Any]:
        """The values, or LostError as soon as one actor has died; the others would wait for it for ever."""
        import ray
        from ray import exceptions as broken

        waiting = list(references)
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, num_returns=1, timeout=self._timeout)
                if not ready:
                    raise LostError(f"{method}: a rank of the learner gave no answer within {self._timeout:g} s")
                ray.get(ready)
            return list(ray.get(list(references)))
        except (broken.RayActorError, broken.ObjectLostError, broken.OwnerDiedError) as error:
            self.kill()
            raise LostError(f"{method}: a rank of the learner is gone: {' '.join(str(error).split())[:300]}") from None
        except broken.RayTaskError as error:
            self.kill()
            cause = error.cause if isinstance(error.cause, MedSegError) else MedSegError(f"{method}: {error}")
            raise cause from None
        except BaseException:
            self.kill()
            raise
