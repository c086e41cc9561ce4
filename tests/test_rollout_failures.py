"""What goes wrong while episodes are played is tried again with the same seeds, dropped or raised, never trained."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from rollouts import JOBS, KEYS, Late, by_turn, collect, content, engine, left, make_tokens, member_of, turn_of, worker

from medseg_gym.errors import MedSegError, ToolUnavailableError
from medseg_gym.rl.engines.base import GenRequest, GenResult
from medseg_gym.rl.rollout import Job, Settings, play
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Query


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> ChatTokens:
    return make_tokens(tmp_path_factory.mktemp("model"))


class Flaky(Stub):
    """A Stub that fails whenever its calls' numbers say so."""

    def __init__(self, *numbers: int, error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.calls, self.numbers, self.error = 0, numbers, error

    def predict(self, queries: Sequence[Query]) -> Any:
        self.calls += 1
        if self.calls in self.numbers:
            raise self.error("lost")
        return super().predict(queries)


@pytest.mark.parametrize("lockstep", [False, True], ids=["free", "lockstep"])
def test_an_episode_that_fails_in_the_env_is_played_again_as_if_nothing_had_happened(
    tokens: ChatTokens, lockstep: bool
) -> None:
    script = by_turn("BAAzz", "BKKqq", "S")
    plain = collect(JOBS[:2], [worker(3)], engine(tokens, script), tokens)
    # a batch that fails is asked again one by one; calls 1 to 4 fail a first turn of three, or of one and its retry
    tool = Flaky(1, 2, 3, 4)
    late = Late(engine(tokens, script), 0, lockstep, most=0)
    again = collect(JOBS[:2], [worker(3, tool=tool)], late, tokens)
    assert content(again) == content(plain)
    if lockstep:  # the whole group is played again, so no batch is smaller than it would have been
        assert [len(batch) for batch in late.batches] == [3] * len(late.batches)


def test_a_member_whose_env_fails_three_times_is_dropped_and_the_others_are_kept(tokens: ChatTokens) -> None:
    class OnlyBoxesFail(Stub):
        def predict(self, queries: Sequence[Query]) -> Any:
            if any(query.prompts[-1].x1 < 8 for query in queries):  # type: ignore[union-attr]
                raise RuntimeError("lost")
            return super().predict(queries)

    def script(request: GenRequest) -> str:
        return "BAAzz" if member_of(request) == (0, 1) else "BgKqq"

    fakes = engine(tokens, script)
    w = worker(3, tool=OnlyBoxesFail(), horizon=2)
    (group,) = collect([Job(0, KEYS[1], 3)], [w], fakes, tokens)
    assert [rollout.dropped for rollout in group] == ["", "the env failed 3 times: RuntimeError: lost", ""]
    assert [rollout.episode.ended for rollout in group] == ["horizon", "failed", "horizon"]
    assert asyncio.run(fakes.status()).counters["requests"] == 2 + 3 + 2


def test_a_case_that_cannot_be_read_drops_its_group_and_no_other(tokens: ChatTokens) -> None:
    first, second = collect([Job(0, "x", 2), Job(1, KEYS[0], 2)], [worker(2)], engine(tokens), tokens)
    assert [rollout.dropped[:36] for rollout in first] == ["the env failed 3 times: case: Blobs "] * 2
    assert [rollout.sequences for rollout in first] == [(), ()]
    assert [rollout.episode.key for rollout in first] == ["x", "x"]
    assert all(not rollout.dropped for rollout in second)


def test_an_aborted_answer_is_asked_for_again_with_the_same_prefix_and_seed(tokens: ChatTokens) -> None:
    """Trap 13: what was aborted is no part of the chat; a member that is aborted three times is dropped."""
    asked: list[GenRequest] = []

    class Aborting(Late):
        async def generate(self, request: GenRequest) -> GenResult:
            asked.append(request)
            result = await self.inner.generate(request)
            tries = int(request.id.rsplit("/", 1)[1])
            if turn_of(request) == 1 and (tries == 0 or member_of(request)[1] == 1):
                return GenResult(result.ids[:2], result.logprobs[:2], "abort", ((0, 0, 2),))
            return result

    plain = collect(JOBS[:1], [worker(3)], engine(tokens), tokens)[0]
    again = collect(JOBS[:1], [worker(3)], Aborting(engine(tokens), 0, most=0), tokens)[0]
    assert content([again[::2]]) == content([plain[::2]])
    assert len(plain[1].episode.turns) > 1
    assert again[1].dropped == "turn 1: the answer was aborted 3 times"
    (sequence,) = again[1].sequences
    assert [segment.kind for segment in sequence.segments] == ["prompt", "action"]
    assert len(again[1].episode.turns) == 1
    tried = [request for request in asked if member_of(request) == (0, 1) and turn_of(request) == 1]
    assert len(tried) == 3
    assert {(request.ids, request.seed) for request in tried} == {(tried[0].ids, tried[0].seed)}


def test_errors_of_the_engine_and_a_tool_that_is_gone_end_the_play(tokens: ChatTokens) -> None:
    failing = engine(tokens, fail=lambda request, number: OSError("gone") if number == 5 else None)

    async def run(fakes: Any, w: Any) -> None:
        async for _ in play(JOBS, [w], fakes, tokens, Settings(seed=0)):
            pass

    async def whole(fakes: Any, w: Any, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            await run(fakes, w)
        assert not left()

    asyncio.run(whole(failing, worker(3), OSError, "gone"))
    gone = worker(3, tool=Flaky(3, error=ToolUnavailableError))
    asyncio.run(whole(engine(tokens), gone, ToolUnavailableError, "lost"))

    class Unreachable(Late):
        async def reset(self, slot: int, key: str, seed: int) -> Any:
            raise ToolUnavailableError("lost at the start")

    asyncio.run(whole(engine(tokens), Unreachable(worker(3), 0), ToolUnavailableError, "lost at the start"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ids": ()}, "0 tokens; wanted 1 to 64"),
        ({"logprobs": (-1.0,)}, "1 log-probabilities for 6 tokens"),
        ({"finish": "length"}, "ended by 'length'"),
        ({"versions": ((0, 0, 5),)}, "version spans"),
        ({"versions": ((0, 0, 3), (1, 4, 6))}, "version spans"),
    ],
)
def test_an_engines_answer_that_cannot_be_trained_is_refused(
    tokens: ChatTokens, change: dict[str, Any], text: str
) -> None:
    class Wrong(Late):
        async def generate(self, request: GenRequest) -> GenResult:
            result = await self.inner.generate(request)
            fields = {name: getattr(result, name) for name in ("ids", "logprobs", "finish", "versions")}
            return GenResult(**{**fields, **change})

    with pytest.raises(MedSegError, match=f"{KEYS[0]}, turn 0: the engine gave .*{text}"):
        collect([Job(0, KEYS[0])], [worker(1)], Wrong(engine(tokens, ["BAAzz"]), 0), tokens)


def test_banned_ids_in_an_answer_are_refused(tokens: ChatTokens) -> None:
    class Blind(Late):
        async def generate(self, request: GenRequest) -> GenResult:
            ids = (tokens.image_pad, tokens.end)
            return GenResult(ids, (-1.0, -1.0), "stop", ((0, 0, 2),))

    with pytest.raises(MedSegError, match=f"banned ids \\[{tokens.image_pad}\\]"):
        collect([Job(0, KEYS[0])], [worker(1)], Blind(engine(tokens), 0), tokens)
