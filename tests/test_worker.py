"""The env worker: what it shows is what policies are shown, and slots wait for nobody that was not asked about."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import Blobs

from medseg_gym.envs import SegmentEnv
from medseg_gym.episodes import to_json
from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.policies import chat, protocols
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Decision, Embedding, Episode, Image, Prediction, Query, Unreadable

DISC, BAR = "Blobs/train-0/disc", "Blobs/train-0/bar"
BOX = '<tool_call>\n{"name": "add_bbox", "arguments": {"bbox_2d": [100, 200, 600, 700]}}\n</tool_call>'
CLICK = (
    '<tool_call>\n{"name": "add_point", "arguments": {"point_2d": [300, 400], "point_type": "positive"}}\n</tool_call>'
)
UNDO = '<tool_call>\n{"name": "undo_action", "arguments": {}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop_action", "arguments": {}}\n</tool_call>'
POINT = "<think>here</think><action>\nPositive Point (0.3125, 0.4125)\n</action>"
END = "<think>done</think><action>\nTerminate\n</action>\n<answer>\nyes\n</answer>"
SAID = {
    "medsam-agent": ["nonsense", BOX, CLICK, UNDO, STOP],
    "ibis": [POINT, "nonsense", "<think>no</think><action>\nUndo\n</action>", POINT, END],
    "tiny": ["BKKqq", "?", "BAAzz", "S"],
}


class Gate(Stub):
    """A Stub that counts what it is asked together, and waits where `closed` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.closed, self.reached, self.open = False, threading.Event(), threading.Event()

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        self.batches.append(len(queries))
        self.reached.set()
        if self.closed:
            assert self.open.wait(30)
        return super().predict(queries)


class Failing(Stub):
    """A Stub that cannot do images as grey as the disc's of image 0."""

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        if any(int(image[0, 0, 0]) == 40 for image in images):
            raise RuntimeError("no")
        return super().encode(images)


def worker(slots: int = 2, protocol: str = "medsam-agent", tool: Any = "Stub", **options: Any) -> LocalWorker:
    return LocalWorker("MedSeg-v0", slots, protocol, size=64, options={"dataset": Blobs(), "tool": tool, **options})


def same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two chats are the same messages, pictures compared by their pixels."""

    def plain(messages: Sequence[Any]) -> list[Any]:
        return [
            (m["role"], m["content"])
            if isinstance(m["content"], str)
            else (m["role"], [(p["type"], p["text"] if "text" in p else p["image"].tobytes()) for p in m["content"]])
            for m in messages
        ]

    return plain(ours) == plain(theirs)


async def through(w: LocalWorker, slot: int, key: str, texts: Sequence[str]) -> Episode:
    await w.reset(slot, key, 3)
    for text in texts:
        await w.step(slot, text)
    return await w.episode(slot, 0, 3)


@pytest.mark.parametrize("protocol", list(SAID))
def test_a_worker_shows_and_does_what_a_plain_env_and_the_policies_chat_do(protocol: str) -> None:
    """The whole chat is what `policies.chat.messages` gives turn by turn, the record what SegmentEnv gives."""
    env = SegmentEnv(Blobs(), "Stub", horizon=5, observation="dict")
    env.reset(seed=3, options={"sample": DISC})
    words = protocols.make(protocol, env.verbs)
    said: list[Decision] = []
    ours: list[Any] = []

    async def play() -> Episode:
        w = worker(3, protocol, horizon=5)
        await w.reset(2, BAR, 0)  # another slot's episode leaves no trace
        seen = await w.reset(1, DISC, 3)
        for text in SAID[protocol]:
            ours[:] = [*ours, *seen.messages] if words.history else seen.messages
            view = replace(env.view(), decisions=tuple(said))
            assert same(ours, chat.messages(view, words, 64))
            decision = words.parse(text, env.engine.slot(0).grid)
            said.append(decision)
            _, reward, _, _, info = env.step(decision.action or Unreadable(decision.reason))
            seen = await w.step(1, text)
            ours.append({"role": "assistant", "content": text})
            assert (seen.reward, seen.iou, seen.dice, seen.turn) == (reward, info["iou"], info["dice"], info["turn"])
            assert (seen.terms, seen.ended) == (info["reward_terms"], info["ended"])
            assert seen.readable == (decision.action is not None)
        assert seen.ended is not None
        assert seen.messages == []
        return await w.episode(1, 7, 3)

    episode = asyncio.run(play())
    turns = tuple(replace(t, text=text) for t, text in zip(episode.turns, SAID[protocol], strict=True))
    assert to_json(episode) == to_json(replace(env.episode(seed=3, case=7), turns=turns))


def test_what_is_asked_while_the_env_is_busy_is_done_in_one_tool_call_and_the_loop_goes_on() -> None:
    tool = Gate()
    tool.closed = True

    async def play() -> None:
        w = worker(4, tool=tool)
        await asyncio.gather(*(w.reset(slot, DISC, 0) for slot in range(4)))
        first = asyncio.create_task(w.step(0, BOX))
        while not tool.reached.is_set():
            await asyncio.sleep(0)
        others = [asyncio.create_task(w.step(slot, BOX)) for slot in (1, 2, 3)]
        await asyncio.sleep(0)  # the loop runs while the tool does not answer
        assert not first.done()
        tool.open.set()
        seen = await asyncio.gather(first, *others)
        assert {observed.iou for observed in seen} == {seen[0].iou}
        await w.close()

    asyncio.run(play())
    assert tool.batches == [1, 3]


def test_a_group_encodes_its_image_once_and_is_shown_one_picture() -> None:
    """Trap 14: case, image and first observation are shared, the picture as one array."""

    async def play() -> None:
        w = worker(4, tool=Gate())
        seen = await asyncio.gather(*(w.reset(slot, DISC, slot) for slot in range(4)))
        pictures = [observed.messages[-1]["content"][0]["image"] for observed in seen]
        assert all(picture is pictures[0] for picture in pictures)
        assert all(same(observed.messages, seen[0].messages) for observed in seen)
        await asyncio.gather(*(w.step(slot, BOX) for slot in range(4)))
        await asyncio.gather(*(w.step(slot, CLICK) for slot in range(2)))
        counters = await w.counters()
        assert [counters[name] for name in ("encodes", "hits", "queries", "tool_calls")] == [1, 5, 6, 2]
        assert counters["busy_s"] > 0

    asyncio.run(play())


def test_a_tools_error_fails_its_own_episode_only() -> None:
    async def play() -> None:
        w = worker(2, tool=Failing())
        await w.reset(0, DISC, 0)
        await w.reset(1, "Blobs/train-1/disc", 0)
        bad, good = await asyncio.gather(w.step(0, BOX), w.step(1, BOX))
        assert (bad.ended, good.ended) == ("failed", None)
        assert "RuntimeError: no" in (await w.episode(0, 0, 0)).error
        assert good.iou > 0
        with pytest.raises(MedSegError, match="slot 0 has ended"):
            await w.step(0, BOX)
        assert (await w.step(1, STOP)).ended == "stopped"

    asyncio.run(play())


def test_an_answer_that_was_cut_off_is_told_so_where_nothing_could_be_read() -> None:
    async def play() -> list[Any]:
        w = worker(1)
        await w.reset(0, DISC, 0)
        await w.step(0, "<tool_call>", cut_off=True)
        await w.step(0, BOX + " and", cut_off=True)
        return [turn.action for turn in (await w.episode(0, 0, 0)).turns]

    cut, read = asyncio.run(play())
    assert cut.reason.startswith("the answer was cut off; ")
    assert not isinstance(read, Unreadable)


@pytest.mark.parametrize("reward", [{}, {"timing": "terminal"}, {"reward": "ibis"}], ids=["dense", "terminal", "ibis"])
def test_a_truncated_episode_is_the_one_whose_horizon_was_its_turns(reward: dict[str, Any]) -> None:
    async def play() -> tuple[Episode, Episode]:
        long, short = worker(1, horizon=5, **reward), worker(1, horizon=2, **reward)
        await long.reset(0, DISC, 0)
        with pytest.raises(MedSegError, match="no turn yet"):
            await long.truncate(0)
        await long.step(0, BOX)
        await long.step(0, CLICK)
        await long.truncate(0)
        return await long.episode(0, 0, 3), await through(short, 0, DISC, [BOX, CLICK])

    ours, theirs = asyncio.run(play())
    assert ours.ended == "horizon"
    assert to_json(ours) == to_json(theirs)


def test_a_case_that_cannot_be_read_raises_and_leaves_the_worker_as_it_was() -> None:
    async def play() -> None:
        w = worker(1)
        with pytest.raises(UnknownNameError, match="no case 'x'"):
            await w.reset(0, "x", 0)
        with pytest.raises(MedSegError, match="call reset first"):
            await w.step(0, BOX)
        assert (await through(w, 0, DISC, [BOX, STOP])).ended == "stopped"
        assert (await w.keys("val"))[:2] == ["Blobs/val-0/bar", "Blobs/val-0/disc"]
        with pytest.raises(MedSegError, match="slot 1; wanted 0 to 0"):
            await w.step(1, BOX)

    asyncio.run(play())


def test_a_worker_serves_one_event_loop_after_another_even_where_one_was_left_in_the_middle() -> None:
    w = worker(2)

    async def leave() -> None:
        await w.reset(0, DISC, 0)
        task = asyncio.create_task(w.step(0, BOX))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    again = asyncio.run(through(w, 0, DISC, [BOX, STOP]))
    fresh = asyncio.run(through(worker(1), 0, DISC, [BOX, STOP]))
    assert to_json(again) == to_json(fresh)


def test_what_does_not_fit_is_refused_when_the_worker_is_made() -> None:
    with pytest.raises(UnknownNameError, match="MedSeg-Phantom-Stub-v0"):
        LocalWorker("MedSeg-Phantom-Stob-v0", 1)
    with pytest.raises(UnknownNameError, match="horizn"):
        worker(horizn=3)
    with pytest.raises(MedSegError, match="size=50"):
        LocalWorker("MedSeg-Phantom-Stub-v0", 1, size=50)
    with pytest.raises(MedSegError, match="several=True"):
        LocalWorker("MedSeg-Phantom-Stub-v0", 1, "ibis", protocol_options={"several": True})


def test_a_closed_worker_says_so() -> None:
    async def play() -> None:
        w = worker(1)
        await w.reset(0, DISC, 0)
        await w.close()
        with pytest.raises(MedSegError, match="closed"):
            await w.step(0, BOX)

    asyncio.run(play())


def test_news_are_the_last_messages_of_the_whole_chat_at_every_turn() -> None:
    env = SegmentEnv(Blobs(), "Stub", horizon=5, observation="dict")
    env.reset(seed=0, options={"sample": DISC})
    for history in (True, False):
        words = protocols.make("ibis", env.verbs, history=history)
        pictures = chat.Pictures(env.view().image, words, 64)
        for x in range(2):
            whole, news = chat.messages(env.view(), words, 64), chat.news(env.view(), words, pictures)
            assert same(news, whole[-len(news) :])
            assert len(news) == (1 if x and history else 2)
            env.step(np.array([0, 300 + 50 * x, 400, 0, 0]))
        env.reset(seed=0, options={"sample": DISC})
