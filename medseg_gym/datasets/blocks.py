"""Does the importing of a plan, block by block, in this process or in several, and hands out results in plan order."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_gym.datasets.importers import Skipped, importer
from medseg_gym.datasets.spool import ITEM_DONE, Ready, Spool, check, is_sound, read_block, write_block
from medseg_gym.errors import MedSegError

MAX_BLOCK = 32  # items; small enough that a kill costs little, large enough that a hundred thousand items fit


class WorkerDiedError(MedSegError):
    """A process that imported was ended from outside; what was done is kept."""


def results(
    layout: str, items: Sequence[Any], spool: Spool, jobs: int, resumed: list[int] | None = None
) -> Iterator[Ready | Skipped | None]:
    """What every item gives, in order, each item closed by ITEM_DONE; one image in memory at a time.

    Blocks of an earlier run are used where they are whole; the number of items this spared is added to `resumed`.
    """
    size = block_size(len(items))
    blocks = [items[i : i + size] for i in range(0, len(items), size)]
    done = [is_sound(spool.path(number)) for number in range(len(blocks))]
    if resumed is not None:
        resumed.append(sum(len(block) for block, there in zip(blocks, done, strict=True) if there))
    work = [(number, block) for number, block in enumerate(blocks) if not done[number]]
    with _making(layout, work, spool, jobs) as wait_for:
        for number, block in enumerate(blocks):
            wait_for(number)
            path = spool.path(number)
            if not path.exists():  # another run of the same preparation has finished and cleaned up
                make_block(layout, block, path)
            yield from read_block(path)


def block_size(items: int) -> int:
    """Items a block: the same for any number of processes, so that a run can be resumed with another number."""
    return max(1, min(MAX_BLOCK, items // 64))


def make_block(layout: str, items: Sequence[Any], path: Path) -> None:
    """Imports some items into a block."""
    write_block(path, _import(layout, items))


def _import(layout: str, items: Sequence[Any]) -> Iterator[Ready | Skipped | None]:
    reader = importer(layout)
    for item in items:
        try:
            for found in reader.read(item):
                if isinstance(found, Skipped):
                    yield found
                else:
                    yield from check(found)
        except (MemoryError, ImportError, MedSegError) as error:
            if not isinstance(error, ValueError):  # BadDataError is one: the file's fault, not ours or the machine's
                raise
            yield Skipped(_file_of(item), str(error))
        except Exception as error:  # decoders fail in many ways, and one file must not stop a hundred thousand
            yield Skipped(_file_of(item), f"reading it failed ({type(error).__name__}: {error})")
        yield ITEM_DONE


def _file_of(item: Any) -> str:
    for name in ("file", "image", "volume", "path", "label"):
        value = getattr(item, name, None)
        if isinstance(value, str | Path):
            return str(value)
    return str(item)[:200]


@contextmanager
def _making(layout: str, work: Sequence[tuple[int, Sequence[Any]]], spool: Spool, jobs: int) -> Iterator[Any]:
    """A function that returns once a block is there; further blocks are made ahead of it by `jobs` processes."""
    if jobs == 1 or len(work) < 2:
        todo = dict(work)

        def make(number: int) -> None:
            if number in todo:
                make_block(layout, todo.pop(number), spool.path(number))

        yield make
        return

    import multiprocessing

    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of the progress bar's thread
    pool = ProcessPoolExecutor(min(jobs, len(work)), mp_context=context, initializer=_settle)
    waiting = deque(work)
    running: dict[int, Future[None]] = {}

    def wait_for(number: int) -> None:
        while waiting and len(running) < 4 * jobs:
            ahead, block = waiting.popleft()
            running[ahead] = pool.submit(make_block, layout, block, spool.path(ahead))
        if number in running:
            running.pop(number).result()

    try:
        yield wait_for
    except BrokenProcessPool:
        raise WorkerDiedError(
            "a process that imported was ended from outside, perhaps for want of memory. What it had done is kept: "
            "run the command again, with fewer --jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _settle() -> None:
    """In a new process: leave ^C to the parent, and end when the parent is gone, which nobody else would notice."""
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
