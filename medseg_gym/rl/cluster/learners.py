"""RankActors: a learner's ranks as Ray actors, called together, and ended together when one of them dies."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from medseg_gym.errors import MedSegError
from medseg_gym.rl.config import Common
from medseg_gym.rl.worker import LostError, UnplacedError

Call = tuple[Sequence[Any], dict[str, Any]]  # arguments and keywords
OWN = ("address", "join")  # methods of a rank's actor; all others are its learner's
GRACE = 40.0  # seconds after a rank's fault in which Ray notices that another rank, or its node, is what had gone


class RankActor:
    """One rank of a learner. Its arguments are settings and a folder's path, which every node has to see."""

    def __init__(self, rank: int, config: Common, folder: str, total_steps: int, timeout: float) -> None:
        self.rank, self.config, self.folder = rank, config, Path(folder)
        self.total_steps, self.timeout = total_steps, timeout
        self.learner: Any = None
        self._store: Any = None

    def address(self) -> tuple[str, int] | None:
        """Where the ranks meet: a store on the first one's node, at its address in the cluster alone."""
        if self.rank or self.config.ranks == 1:
            return None
        import ray

        host = ray.util.get_node_ip_address()
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        self._store = self._store_at(host, port, listening.detach())
        return host, port

    def join(self, meeting: tuple[str, int] | None) -> None:
        """Meets the other ranks, if there are any, and loads the learner."""
        import torch

        from medseg_gym.rl.learner import Learner, device_of

        device = device_of(self.config.device, 0 if os.environ.get("CUDA_VISIBLE_DEVICES") else self.rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if meeting is not None:
            torch.distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=self._store or self._store_at(*meeting),
                rank=self.rank,
                world_size=self.config.ranks,
                timeout=timedelta(seconds=self.timeout),
            )
        self.learner = Learner(
            self.config, self.folder, total_steps=self.total_steps, rank=self.rank, world=self.config.ranks
        )

    def call(self, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> tuple[bool, Any]:
        """Whether it went well, and the answer or our error: through Ray it would come wrapped in a traceback."""
        try:
            answer = getattr(self if method in OWN else self.learner, method)(*given, **named)
        except MedSegError as error:
            return False, error
        return True, answer if self.rank == 0 or method in ("score", "logprobs") else None

    def _store_at(self, host: str, port: int, listening: int | None = None) -> Any:
        import torch

        distributed: Any = torch.distributed  # whose types leave the store out
        return distributed.TCPStore(
            host,
            port,
            is_master=listening is not None,
            timeout=timedelta(seconds=self.timeout),
            wait_for_workers=False,
            master_listen_fd=listening,
        )


class RankActors:
    """What RankProcesses is, in a cluster. LostError where a rank died or hung: all are ended; `start` makes others.

    `options` are each rank's for Ray: num_cpus, num_gpus, its place. timeout: seconds a call may take. patience:
    seconds the actors may take to find their places and to load; UnplacedError beyond it.
    """

    def __init__(
        self,
        config: Common,
        folder: Path,
        total_steps: int,
        timeout: float,
        options: Sequence[Mapping[str, Any]],
        patience: float | None = None,
    ) -> None:
        self._given, self._timeout, self._options = (config, str(folder), total_steps), timeout, options
        self._patience = timeout if patience is None else patience
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
        until = time.monotonic() + self._patience
        meeting = self._ask("address", [((), {})] * len(self.actors), until)[0]
        self._ask("join", [((meeting,), {})] * len(self.actors), until)

    def call(self, method: str, calls: Sequence[Call]) -> list[Any]:
        """Each rank's answer to its own call of a method. After an error no rank is left running."""
        if not self.actors:
            raise LostError("the learner's ranks were ended; load a checkpoint to start them again")
        return self._ask(method, calls, time.monotonic() + self._timeout)

    def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        import ray

        for actor in self.actors:
            with suppress(Exception):
                ray.kill(actor)
        self.actors = []

    def _ask(self, method: str, calls: Sequence[Call], until: float) -> list[Any]:
        """The answers, or what went wrong first: what a rank says itself, else that one is gone, else any fault.

        The other ranks of one that failed may wait for it for ever, or fail of its silence before Ray says it is gone.
        """
        try:
            rank_of = {
                actor.call.remote(method, given, named): rank
                for rank, (actor, (given, named)) in enumerate(zip(self.actors, calls, strict=True))
            }
            answers, faults = self._answers(rank_of, method, until)
        except BaseException:
            self.kill()
            raise
        if faults:
            self.kill()
            raise min(faults, key=lambda fault: fault[0])[1]
        return [answers[rank] for rank in range(len(calls))]

    def _answers(
        self, rank_of: Mapping[Any, int], method: str, until: float
    ) -> tuple[dict[int, Any], list[tuple[int, MedSegError]]]:
        """Answers by rank, and faults with their precedence, the lowest first."""
        import ray
        from ray import exceptions as broken

        answers: dict[int, Any] = {}
        faults: list[tuple[int, MedSegError]] = []
        waiting = list(rank_of)
        while waiting and not any(precedence < 2 for precedence, _ in faults):
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not ready:
                late = sorted(rank_of[reference] for reference in waiting)
                faults.append((2, self._late(method, late)))
                break
            rank = rank_of[ready[0]]
            try:
                well, value = ray.get(ready[0])
            except broken.RayTaskError as error:
                faults.append((3, MedSegError(f"{method}, rank {rank} of the learner: {error}")))
                until = min(until, time.monotonic() + GRACE)
            except broken.RayError as error:
                faults.append((1, LostError(f"{method}: rank {rank} of the learner is gone: {_words(error)}")))
            else:
                answers[rank] = value
                if not well:
                    faults.append((0, value))
        return answers, [fault for fault in faults if fault[0] != 2 or len(faults) == 1]

    def _late(self, method: str, ranks: Sequence[int]) -> MedSegError:
        if method not in OWN:
            return LostError(f"{method}: ranks {list(ranks)} of the learner gave no answer within {self._timeout:g} s")
        return UnplacedError(
            f"ranks {list(ranks)} of the learner found no place, or did not load, within {self._patience:g} s "
            "(patience_s); see `ray status` for what is free, and give smaller shares (learner_cpus, learner_gpus)"
        )


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
