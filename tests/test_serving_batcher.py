"""The batcher: what is merged, who is next, whom a failure concerns, and that nobody waits for nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import numpy as np
import pytest

from medseg_gym.tools.serving.batcher import Batcher, BusyError, ClosedError, Job
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Prediction, Query

IMAGE = np.zeros((16, 16, 3), np.uint8)
IMAGE.flags.writeable = False


class Held(Stub):
    """A Stub that notes its batches and stands still until it is let go; a click at (13, 13) raises."""

    def __init__(self, max_batch: int = 8) -> None:
        super().__init__(max_batch=max_batch)
        self.batches: list[list[int]] = []  # per pass: the x of each query's last click
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Event()

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        self.batches.append([q.prompts[-1].x for q in queries])  # type: ignore[union-attr]
        self.started.set()
        assert self.go.wait(30)
        if any(prompt == Click(13, 13) for query in queries for prompt in query.prompts):
            raise ValueError("unlucky")
        if any(prompt == Click(14, 14) for query in queries for prompt in query.prompts):
            raise SystemExit(3)
        return super().predict(queries)


@pytest.fixture
def tool() -> Iterator[Held]:
    tool = Held()
    yield tool
    tool.go.set()


def job(owner: str, x: int, *before: Click | Box) -> Job:
    return Job(owner, IMAGE, (*before, Click(x, x)))


def busy(batcher: Batcher, tool: Held) -> Job:
    """A job that the tool is at, and stays at."""
    tool.go.clear()
    tool.started.clear()
    first = job("first", 1)
    batcher.submit([first])
    assert tool.started.wait(30)
    return first


def test_what_came_during_a_pass_is_merged_up_to_max_batch(tool: Held) -> None:
    batcher = Batcher(tool)
    first = busy(batcher, tool)
    jobs = [job(f"client {i}", i) for i in range(2, 12)]
    for one in jobs:
        batcher.submit([one])
    tool.go.set()
    answers = [one.answer.result(30) for one in jobs]
    assert first.answer.result(30) is not None
    assert [len(batch) for batch in tool.batches] == [1, 8, 2]
    for one, answer in zip(jobs, answers, strict=True):
        alone = Stub().predict([Query(tool.encode([IMAGE])[0], one.prompts)])[0]
        assert answer is not None and np.array_equal(answer.logits, alone.logits)
    assert batcher.counters() == {"passes": 3, "answered": 11, "failed": 0, "waiting": 0}
    batcher.close(30)


def test_only_queries_with_as_many_clicks_boxes_and_priors_share_a_pass(tool: Held) -> None:
    batcher = Batcher(tool)
    busy(batcher, tool)
    box, prior = Box(0, 0, 3, 3), np.zeros((16, 16), np.float32)
    jobs = [job("a", 2), job("b", 3, box), job("c", 4), job("d", 5, box), job("e", 6, Click(0, 0))]
    jobs.append(Job("f", IMAGE, (Click(7, 7),), prior))
    for one in jobs:
        batcher.submit([one])
    tool.go.set()
    for one in jobs:
        one.answer.result(30)
    assert tool.batches == [[1], [2, 4], [3, 5], [6], [7]]
    batcher.close(30)


def test_a_failing_query_fails_alone(tool: Held) -> None:
    batcher = Batcher(tool)
    busy(batcher, tool)
    jobs = [job(f"client {i}", i) for i in (2, 13, 4, 14)]
    for one in jobs:
        batcher.submit([one])
    tool.go.set()
    assert jobs[0].answer.result(30) is not None and jobs[2].answer.result(30) is not None
    with pytest.raises(ValueError, match="unlucky"):
        jobs[1].answer.result(30)
    with pytest.raises(RuntimeError, match="SystemExit"):  # no exception of a tool may end the thread
        jobs[3].answer.result(30)
    assert tool.batches == [[1], [2, 13, 4, 14], [2], [13], [4], [14]]
    assert batcher.counters()["failed"] == 2
    batcher.close(30)


def test_a_client_with_many_queries_does_not_make_the_others_wait_for_all_of_them() -> None:
    tool = Held(max_batch=1)
    batcher = Batcher(tool)
    busy(batcher, tool)
    greedy = [job("greedy", i) for i in (2, 3, 4, 5)]
    modest = job("modest", 9)
    batcher.submit(greedy)
    batcher.submit([modest])
    tool.go.set()
    for one in (*greedy, modest):
        one.answer.result(30)
    assert [batch[0] for batch in tool.batches] == [1, 2, 9, 3, 4, 5]
    batcher.close(30)


def test_a_batch_is_shared_out_among_the_clients() -> None:
    tool = Held(max_batch=4)
    batcher = Batcher(tool)
    busy(batcher, tool)
    greedy, modest = [job("greedy", i) for i in (2, 3, 4, 5, 6)], [job("modest", 8), job("modest", 9)]
    batcher.submit(greedy)
    batcher.submit(modest)
    tool.go.set()
    for one in (*greedy, *modest):
        one.answer.result(30)
    assert tool.batches == [[1], [2, 8, 3, 9], [4, 5, 6]]
    batcher.close(30)


def test_a_lone_client_never_waits_for_company(tool: Held) -> None:
    batcher = Batcher(tool, wait_ms=600_000)  # ten minutes: a wait would end the test
    for x in (1, 2, 3):
        one = job("alone", x)
        batcher.submit([one])
        one.answer.result(30)
    assert tool.batches == [[1], [2], [3]]
    batcher.close(30)


def test_a_client_that_was_just_answered_is_waited_for(tool: Held) -> None:
    batcher = Batcher(tool, wait_ms=600_000)
    busy(batcher, tool)
    early = [job("a", 2), job("b", 3), job("first", 1)]
    for one in early:
        batcher.submit([one])
    tool.go.set()
    for one in early:
        one.answer.result(30)
    assert tool.batches == [[1], [2, 3, 1]]
    # all three were answered a moment ago: the pass begins when the last of them is back
    again = [job("a", 4), job("b", 5), job("first", 6)]
    for waiting, one in enumerate(again):
        time.sleep(0.05)  # time enough for a batcher that does not wait
        assert len(tool.batches) == 2 and batcher.counters()["waiting"] == waiting
        batcher.submit([one])
    for one in again:
        one.answer.result(30)
    assert tool.batches[2:] == [[4, 5, 6]]
    batcher.close(30)


def test_a_full_queue_takes_all_of_a_request_or_nothing(tool: Held) -> None:
    batcher = Batcher(tool, max_queue=3)
    busy(batcher, tool)
    batcher.submit([job("a", 2), job("a", 3)])
    with pytest.raises(BusyError, match="2 queries wait already and 3 may"):
        batcher.submit([job("b", 4), job("b", 5)])
    last = job("b", 6)
    batcher.submit([last])
    tool.go.set()
    last.answer.result(30)
    assert tool.batches == [[1], [2, 6, 3]]
    batcher.close(30)


def test_cancelled_queries_are_not_computed(tool: Held) -> None:
    batcher = Batcher(tool)
    busy(batcher, tool)
    jobs = [job("a", 2), job("b", 3)]
    batcher.submit(jobs)
    assert jobs[0].answer.cancel()
    tool.go.set()
    jobs[1].answer.result(30)
    with pytest.raises(CancelledError):
        jobs[0].answer.result(30)
    assert tool.batches == [[1], [3]]
    batcher.close(30)


def test_closing_answers_what_is_queued_and_takes_no_more(tool: Held) -> None:
    batcher = Batcher(tool)
    first = busy(batcher, tool)
    queued = job("a", 2)
    batcher.submit([queued])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    tool.go.set()
    closing.join(30)
    assert first.answer.done() and queued.answer.done()
    with pytest.raises(ClosedError):
        batcher.submit([job("b", 3)])


def test_a_query_without_prompts_only_encodes(tool: Held) -> None:
    batcher = Batcher(tool)
    one = Job("a", IMAGE)
    batcher.submit([one])
    assert one.answer.result(30) is None and tool.batches == []
    batcher.close(30)


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"wait_ms": -1}, {"max_queue": 0}])
def test_impossible_settings_are_refused(bad: dict[str, int], tool: Held) -> None:
    with pytest.raises(ValueError, match="wanted 1, 0, 1 or more"):
        Batcher(tool, **bad)  # type: ignore[arg-type]


def test_one_at_a_time_remembers_no_clients() -> None:
    """Every connection is a client of its own, so that a server of many days would fill up with them."""
    batcher = Batcher(Stub(max_batch=1))
    for number in range(20):
        asked = job(f"client {number}", 1)
        batcher.submit([asked])
        asked.answer.result(30)
    batcher.close(30)
    assert not batcher._recent
