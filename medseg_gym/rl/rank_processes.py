"""The processes of a learner of several ranks: started afresh, called together, and ended together when one fails.

They speak over pipes with the driver and over loopback with each other. A rank ends when the driver is gone, however
that went; ^C and SIGTERM it leaves to the driver, which may still want to save.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from medseg_gym import errors
from medseg_gym.errors import MedSegError
from medseg_gym.rl.config import Common
from medseg_gym.rl.worker import LostError

GRACE = 1.0  # seconds after a rank's error in which another may say what led to it
Call = tuple[Sequence[Any], dict[str, Any]]  # arguments and keywords


class RankError(RuntimeError):
    """An error within a rank that is nobody's to mend by other settings; its text holds the rank's traceback."""


class RankProcesses:
    """`config.ranks` learners. Blocking, from one thread at a time."""

    def __init__(self, config: Common, folder: Path, total_steps: int, timeout: float) -> None:
        self._given, self._timeout = (config, Path(folder), total_steps), timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._meeting: Path | None = None  # a folder with the file by which ranks find each other

    def start(self) -> None:
        """Starts the processes and waits until all have loaded; does nothing where they run."""
        if self._processes:
            return
        context = multiprocessing.get_context("spawn")
        ranks = self._given[0].ranks
        self._meeting = Path(tempfile.mkdtemp(prefix="medseg-ranks-"))
        atexit.register(self.kill)
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self._meeting, self._timeout, *self._given),
                name=f"learner-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._answers("start")

    def call(self, method: str, calls: Sequence[Call]) -> list[Any]:
        """Each rank's answer to its own call of a method. After an error no rank is left running."""
        if not self._processes:
            raise MedSegError("the learner's ranks were ended; load a checkpoint to start them again")
        for pipe, (given, named) in zip(self._pipes, calls, strict=True):
            with suppress(OSError):  # a rank that is gone is found by its missing answer
                pipe.send((method, tuple(given), named))
        return self._answers(method)

    def close(self) -> None:
        """Lets the processes end by themselves, for a few seconds."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        end = time.monotonic() + 10
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Ends the processes at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        if self._meeting is not None:
            shutil.rmtree(self._meeting, ignore_errors=True)
        self._processes, self._pipes, self._meeting = [], [], None
        atexit.unregister(self.kill)

    def _answers(self, method: str) -> list[Any]:
        answers: dict[int, Any] = {}
        failures: list[BaseException] = []
        deadline = time.monotonic() + self._timeout
        while len(answers) < len(self._pipes) and not (failures and time.monotonic() > deadline):
            waiting = [rank for rank in range(len(self._pipes)) if rank not in answers]
            ready = wait([self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready and not failures:
                failures.append(RankError(f"{method}: no answer in {self._timeout:g} s of ranks {waiting}"))
            for rank in waiting:
                if self._pipes[rank] not in ready:
                    continue
                fine, value = self._receive(rank, method)
                answers[rank] = value
                if not fine:
                    failures.append(value)
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            self.kill()
            # A rank that is waiting for one that failed fails too, of that.
            raise min(failures, key=lambda error: not isinstance(error, MedSegError))
        return [answers[rank] for rank in range(len(answers))]

    def _receive(self, rank: int, method: str) -> tuple[bool, Any]:
        """Whether a rank's call went well, and its answer or error."""
        tensors: dict[str, Any] = {}
        try:
            while True:
                kind, *rest = self._pipes[rank].recv()
                if kind != "tensor":
                    break
                tensors[rest[0]] = rest[1]
        except (EOFError, OSError):
            self._processes[rank].join(GRACE)
            code = self._processes[rank].exitcode
            return False, LostError(
                f"{method}: rank {rank} of the learner died (exit code {code}) and the others were ended; "
                "the same command goes on from the last checkpoint"
            )
        if kind == "answer":
            return True, _as_tensors(tensors) if tensors else rest[0]
        name, text = rest
        known = getattr(errors, name, None)
        return False, known(text) if known else RankError(f"{method}, rank {rank} of the learner:\n{text}")


def _serve(
    pipe: Connection, rank: int, meeting: Path, timeout: float, config: Common, folder: Path, total_steps: int
) -> None:
    """What a rank's process does: one call after the other, until the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, args=(meeting,), daemon=True).start()
    try:
        learner = _join(rank, meeting, timeout, config, folder, total_steps)
        pipe.send(("answer", None))
        while (call := pipe.recv()) is not None:
            method, given, named = call
            _send(pipe, getattr(learner, method)(*given, **named))
        import torch

        torch.distributed.destroy_process_group()
        os._exit(0)  # taking down an interpreter with all of torch in it lasts seconds
    except (EOFError, BrokenPipeError):
        _end_with_driver(meeting)
    except MedSegError as error:
        pipe.send(("error", type(error).__name__, str(error)))
    except BaseException:
        pipe.send(("error", "", traceback.format_exc()))


def _join(rank: int, meeting: Path, timeout: float, config: Common, folder: Path, total_steps: int) -> Any:
    """This rank's learner, in a group with the others."""
    loopback = "lo" if os.path.isdir("/sys/class/net/lo") else "lo0"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    import torch

    from medseg_gym.rl.learner import Learner, device_of

    device = device_of(config.device, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.ranks))
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting / 'store'}",  # no port that others could reach
        rank=rank,
        world_size=config.ranks,
        timeout=timedelta(seconds=timeout),
    )
    return Learner(config, folder, total_steps=total_steps, rank=rank, world=config.ranks)


def _send(pipe: Connection, answer: Any) -> None:
    """An answer; tensors one by one as arrays, since torch's own way through a pipe takes a file descriptor each."""
    if isinstance(answer, dict) and any(hasattr(value, "numpy") for value in answer.values()):
        for name, value in answer.items():
            pipe.send(("tensor", name, value.numpy()))
        answer = None
    pipe.send(("answer", answer))


def _as_tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _end_with_driver(meeting: Path) -> None:
    """Ends this process when the driver's ends, even in the middle of waiting for another rank."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    shutil.rmtree(meeting, ignore_errors=True)
    os._exit(1)
