"""A question's episode in the engine and the worker: answered at once or after the tool, beside masks, stored."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from medseg_gym.datasets.vqa import open_questions
from medseg_gym.episodes import from_json, to_json
from medseg_gym.errors import BadDataError
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.types import Answer, Box, Episode, Stop, Unreadable

SPEC = "Phantom:task=cue,cases=30"
CUE = {"dataset_options": {"task": "cue"}, "verbs": ("box", "stop"), "horizon": 3}
QUESTIONS = open_questions(SPEC)
KEY = QUESTIONS.keys("train")[0]
RIGHT = QUESTIONS.question(KEY).demonstrated
WRONG = {"A": "B", "B": "A"}[RIGHT]


def with_worker(play: Callable[[LocalWorker], Awaitable[Any]], protocol: str = "tiny", **options: Any) -> Any:
    async def whole() -> Any:
        given = {**CUE, **options}
        worker = LocalWorker("MedSeg-Phantom-Stub-v0", 3, protocol, size=64, options=given, questions=SPEC)
        try:
            return await play(worker)
        finally:
            await worker.close()

    return asyncio.run(whole())


def said(*texts: str, key: str = KEY, **options: Any) -> tuple[Episode, float, Any]:
    """The episode of a question in which these were said, its reward, and the worker's counters."""

    async def play(worker: LocalWorker) -> tuple[Episode, float, Any]:
        await worker.reset(0, key, 0)
        seen = [await worker.step(0, text) for text in texts]
        return await worker.episode(0, 0, 0), sum(s.reward for s in seen), await worker.counters()

    return with_worker(play, **options)


def test_an_answer_at_once_ends_the_episode_without_a_tool_call_and_is_paid_by_exact_match() -> None:
    episode, reward, counters = said(f"A{RIGHT}")
    assert (episode.ended, reward) == ("stopped", 1.0)
    assert counters["tool_calls"] == counters["encodes"] == 0
    assert episode.turns[0].action == Answer(RIGHT)
    assert episode.extra["question"]["right"] is True
    assert said(f"A{WRONG}")[1] == 0.0
    assert said(f"A{QUESTIONS.question(KEY).answer}")[1] == 1.0  # the choice's text is as good as its letter


def test_the_tool_may_be_used_before_the_answer_and_its_mask_is_shown() -> None:
    async def play(worker: LocalWorker) -> Any:
        first = await worker.reset(0, KEY, 0)
        second = await worker.step(0, "BKKqq")
        last = await worker.step(0, f"A{RIGHT}")
        return first, second, last, await worker.episode(0, 0, 0)

    first, second, last, episode = with_worker(play)
    assert "Answer yes or no." in str(first.messages[1]["content"]) or "A. left" in str(first.messages[1]["content"])
    assert first.images[0].sha != second.images[0].sha
    assert (second.reward, second.ended, last.reward, last.ended) == (0.0, None, 1.0, "stopped")
    assert [turn.tool_called for turn in episode.turns] == [True, False]
    assert isinstance(episode.turns[0].action, Box)


def test_a_question_has_no_iou_and_its_episode_reads_back_as_it_was_written() -> None:
    episode, _, _ = said("BKKqq", f"A{WRONG}")
    assert episode.iou == episode.dice == ()
    assert episode.reward == "exact-match"
    record = episode.extra["question"]
    assert (record["said"], record["right"], record["closed"]) == (WRONG, False, True)
    assert from_json(to_json(episode)) == episode


def test_an_action_of_another_kind_is_no_answer_record() -> None:
    line = to_json(said(f"A{RIGHT}")[0])
    with pytest.raises(BadDataError, match="not an action"):
        from_json(line.replace(f'"do":"answer","text":"{RIGHT}"', '"do":"answer","text":3'))


def test_stopping_saying_nothing_and_running_out_of_turns_are_wrong_answers() -> None:
    for texts, ended in ((("S", "S", "S"), "unreadable"), (("BKKqq",) * 3, "horizon"), (("what", "A"), None)):
        episode, reward, _ = said(*texts)
        assert reward == 0.0
        assert episode.extra["question"]["said"] is None
        assert not episode.extra["question"]["right"]
        assert episode.ended == (ended or "failed")  # one that goes on when it is asked for has failed
    assert isinstance(said("S", f"A{RIGHT}")[0].turns[0].action, Unreadable)


def test_truncation_ends_a_question_without_an_answer() -> None:
    async def play(worker: LocalWorker) -> Episode:
        await worker.reset(0, KEY, 0)
        await worker.step(0, "BKKqq")
        await worker.truncate(0)
        return await worker.episode(0, 0, 0)

    episode = with_worker(play, reward="shaped", timing="terminal")
    assert (episode.ended, episode.horizon, sum(turn.reward for turn in episode.turns)) == ("horizon", 1, 0.0)


def test_masks_beside_questions_are_played_to_the_bit_as_without_them() -> None:
    async def alone(worker: LocalWorker) -> str:
        key = (await worker.keys("train"))[0]
        await worker.reset(1, key, 0)
        await worker.step(1, "BKKqq")
        await worker.step(1, "S")
        return to_json(await worker.episode(1, 0, 0))

    async def beside(worker: LocalWorker) -> str:
        key = (await worker.keys("train"))[0]
        shown = await asyncio.gather(worker.reset(0, KEY, 0), worker.reset(1, key, 0), worker.reset(2, KEY, 0))
        assert shown[0].messages[0] != shown[1].messages[0]  # another system prompt
        await asyncio.gather(worker.step(0, "BAAzz"), worker.step(1, "BKKqq"), worker.step(2, f"A{RIGHT}"))
        await asyncio.gather(worker.step(0, f"A{RIGHT}"), worker.step(1, "S"))
        assert (await worker.episode(0, 0, 0)).extra["question"]["right"]
        return to_json(await worker.episode(1, 0, 0))

    async def without() -> str:
        worker = LocalWorker("MedSeg-Phantom-Stub-v0", 3, "tiny", size=64, options=CUE)
        try:
            return await alone(worker)
        finally:
            await worker.close()

    plain = asyncio.run(without())
    assert with_worker(alone) == plain
    assert with_worker(beside) == plain


def test_an_answer_where_nothing_was_asked_and_a_stop_where_something_was_are_unreadable_turns() -> None:
    from medseg_gym.bench.vqa import _env  # an env whose engine takes answers
    from medseg_gym.datasets.phantom import Phantom
    from medseg_gym.envs.questions import QuestionEngine

    env = _env(QUESTIONS, "Stub", "train", 3, 1, None, {})
    engine = QuestionEngine(Phantom(task="cue"), env.engine.tool, env.engine.config, 1)
    engine.reset(0, np.random.default_rng(0), {"sample": Phantom(task="cue").keys("train")[0]})
    engine.step([0], [Answer("left")])
    assert isinstance(engine.slot(0).outcomes[0].action, Unreadable)
    assert engine.slot(0).ended is None

    asked = QuestionEngine(env.engine.dataset, env.engine.tool, env.engine.config, 1)
    asked.reset(0, np.random.default_rng(0), {"sample": KEY})
    asked.step([0], [Stop()])
    assert isinstance(asked.slot(0).outcomes[0].action, Unreadable)
    assert asked.slot(0).ended is None


@pytest.mark.parametrize("protocol", ["ibis", "medsam-agent"])
def test_the_papers_protocols_ask_and_read_in_the_same_loop(protocol: str) -> None:
    from medseg_gym.frames import Grid
    from medseg_gym.policies import protocols
    from medseg_gym.policies.protocols.questions import asking, demonstration

    text = demonstration(asking(protocols.make(protocol)), RIGHT, Grid(64, 64))

    async def play(worker: LocalWorker) -> Any:
        shown = await worker.reset(0, KEY, 0)
        return shown, await worker.step(0, text)

    shown, seen = with_worker(play, protocol, verbs=None)
    assert f"Question: {QUESTIONS.question(KEY).asked}" in shown.messages[1]["content"][1]["text"]
    assert (seen.reward, seen.ended) == (1.0, "stopped")
