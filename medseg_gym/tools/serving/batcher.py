"""The batcher: queries of many clients, merged into the tool's batches by one worker thread."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from medseg_gym.errors import MedSegError
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.types import Box, Image, Logits, Prediction, Prompt, Query

RECENT = 10  # a client answered less than so many waits ago is expected back


class BusyError(MedSegError, RuntimeError):
    """More queries wait than the server keeps; ask again in a moment."""


class ClosedError(MedSegError, RuntimeError):
    """The server is shutting down."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One query of one client; without prompts the image is only encoded, and the answer is None."""

    owner: Hashable
    image: Image
    prompts: tuple[Prompt, ...] = ()
    prior: Logits | None = None
    answer: Future[Prediction | None] = field(default_factory=Future)

    @property
    def key(self) -> Hashable:
        """Jobs of equal keys may share a forward pass."""
        boxes = sum(isinstance(prompt, Box) for prompt in self.prompts)
        return len(self.prompts) - boxes, boxes, self.prior is not None


class Batcher:
    """Merges up to `max_batch` queries into one call of the tool. Thread-safe; the tool is only called by one thread.

    It waits up to `wait_ms` for more only while a client that was answered a moment ago has not come back, so a lone
    client never waits. Clients take turns: the next batch begins with the oldest query of the client that was served
    least recently, and is filled with like queries of all. A query that fails in a batch is asked again alone, so its
    error reaches its own client only. More than `max_queue` waiting queries raise BusyError.
    """

    def __init__(
        self,
        tool: SegmentationTool,
        *,
        max_batch: int | None = None,
        wait_ms: float = 3.0,
        max_queue: int = 1024,
    ) -> None:
        self.tool = tool
        self.max_batch = tool.max_batch if max_batch is None else max_batch
        if self.max_batch < 1 or wait_ms < 0 or max_queue < 1:
            raise ValueError(f"max_batch={max_batch}, wait_ms={wait_ms}, max_queue={max_queue}; wanted 1, 0, 1 or more")
        self.max_queue = max_queue
        self.passes = self.answered = self.failed = 0
        self._wait = wait_ms / 1000
        self._lines: OrderedDict[Hashable, deque[Job]] = OrderedDict()  # the client whose turn it is comes first
        self._queued = 0
        self._recent: dict[Hashable, float] = {}  # client -> when it was last answered
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="medseg-batcher", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs or none; their `answer` futures tell how they went. A cancelled one is skipped."""
        with self._changed:
            if self._closed:
                raise ClosedError("the tool server is shutting down")
            if self._queued + len(jobs) > self.max_queue:
                raise BusyError(f"{self._queued} queries wait already and {self.max_queue} may; ask again in a moment")
            for job in jobs:
                self._lines.setdefault(job.owner, deque()).append(job)
            self._queued += len(jobs)
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Answers what is queued, then ends the thread; later submits raise ClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def counters(self) -> dict[str, int]:
        """Forward calls of the tool's predict, queries answered and failed, queries that wait now."""
        with self._changed:
            return {
                "passes": self.passes,
                "answered": self.answered,
                "failed": self.failed,
                "waiting": self._queued,
            }

    def _work(self) -> None:
        while batch := self._next():
            self._answer(batch)
            now = time.monotonic()
            if self.max_batch > 1:  # else nobody is waited for, and nobody would be forgotten
                with self._changed:
                    self._recent.update((job.owner, now) for job in batch)

    def _next(self) -> list[Job]:
        """The next batch; empty once the batcher is closed and nothing is queued."""
        with self._changed:
            while True:
                while not self._queued:
                    if self._closed:
                        return []
                    self._changed.wait()
                until = time.monotonic() + self._wait
                while self._more_expected() and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
                batch = [job for job in self._take() if job.answer.set_running_or_notify_cancel()]
                if batch:
                    return batch

    def _more_expected(self) -> bool:
        """Whether the batch has room and a client that was just answered has not come back yet."""
        if self._closed or self._queued >= self.max_batch or self.max_batch == 1:
            return False
        oldest = time.monotonic() - RECENT * self._wait
        self._recent = {owner: when for owner, when in self._recent.items() if when >= oldest}
        return any(owner not in self._lines for owner in self._recent)

    def _take(self) -> list[Job]:
        """Up to max_batch like jobs: one of each client in turn, until there is room or there are none."""
        owner, line = next(iter(self._lines.items()))
        key = line[0].key
        batch: list[Job] = []
        sources = [_like(line, key) for line in self._lines.values()]
        while sources and len(batch) < self.max_batch:
            for source in list(sources):
                job = next(source, None)
                if job is None:
                    sources.remove(source)
                elif len(batch) < self.max_batch:
                    batch.append(job)
        taken = set(map(id, batch))
        for name in {job.owner: None for job in batch}:
            left = deque(job for job in self._lines[name] if id(job) not in taken)
            if left:
                self._lines[name] = left
            else:
                del self._lines[name]
        if owner in self._lines:
            self._lines.move_to_end(owner)
        self._queued -= len(batch)
        return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        try:
            answers = self._ask(batch)
        except BaseException as error:  # whatever a tool raises: an unanswered client would wait forever
            if len(batch) > 1:
                for job in batch:
                    self._answer([job])
                return
            self._count(failed=1)
            batch[0].answer.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            return
        self._count(answered=len(batch))
        for job, answer in zip(batch, answers, strict=True):
            job.answer.set_result(answer)

    def _ask(self, batch: Sequence[Job]) -> Sequence[Prediction | None]:
        embeddings = self.tool.encode([job.image for job in batch])
        if not batch[0].prompts:
            return [None] * len(batch)
        self._count(passes=1)
        queries = [Query(e, job.prompts, job.prior) for e, job in zip(embeddings, batch, strict=True)]
        answers = self.tool.predict(queries)
        if len(answers) != len(queries):
            raise RuntimeError(f"{self.tool.name} gave {len(answers)} predictions for {len(queries)} queries")
        return answers

    def _count(self, passes: int = 0, answered: int = 0, failed: int = 0) -> None:
        with self._changed:
            self.passes += passes
            self.answered += answered
            self.failed += failed


def _like(line: Sequence[Job], key: Hashable) -> Iterator[Job]:
    return (job for job in tuple(line) if job.key == key)
