"""Parts that are lost: a learner takes the run back to its checkpoint, what a worker had is played again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from grpo_parts import OneNumber, boxes, settings, stand_ins
from rollouts import JOBS, Late, collect, content, engine, left, make_tokens, worker

from medseg_gym.errors import MedSegError
from medseg_gym.rl.grpo import GRPO
from medseg_gym.rl.rollout import Settings, play
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.rl.stopping import Interrupted, Stopping
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.worker import LostError, UnplacedError, keys_of

TIMED = ("time/", "idle/", "speed/")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> ChatTokens:
    return make_tokens(tmp_path_factory.mktemp("model"))


class LostLearner(OneNumber):
    """A learner that is lost at these of its steps, and has then forgotten all."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.asked, self.lost_at, self.restarts = 0, steps, 0

    async def step(self, plan: Any, objective: Any) -> dict[str, float]:
        self.asked += 1
        if self.asked in self.lost_at:
            self.weight = self.steps = 99
            raise LostError("a rank is gone")
        return await super().step(plan, objective)

    async def restart(self) -> None:
        self.weight, self.steps, self.restarts = 0.0, 0, self.restarts + 1


def run(out: Path, learner: OneNumber, stopping: Stopping | None = None, **given: Any) -> list[dict[str, Any]]:
    """The run's numbers but for its times."""

    async def whole() -> None:
        parts = stand_ins(boxes, learner)
        try:
            await GRPO(settings(out, **given), parts, stopping=stopping).run()
        finally:
            await parts.close()

    asyncio.run(whole())
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in read_metrics(out)]


@pytest.mark.parametrize("lost_at", [(1,), (2, 3), (4, 6)], ids=str)
def test_a_lost_learner_takes_the_run_back_to_its_newest_checkpoint_or_its_beginning(
    tmp_path: Path, lost_at: tuple[int, ...]
) -> None:
    """Trap 17. Checkpoints are of iterations 2 and 4, so the first two cases begin anew."""
    learner = LostLearner(*lost_at)
    more: dict[str, Any] = {"validate_every": 1, "validate_cases": 2}
    assert run(tmp_path / "lost", learner, **more) == run(tmp_path / "whole", OneNumber(), **more)
    assert learner.restarts == len(lost_at)
    assert (tmp_path / "lost/final/model.json").read_text() == (tmp_path / "whole/final/model.json").read_text()


def test_a_learner_that_is_lost_over_and_over_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(MedSegError, match="lost 4 times after iteration 1: a rank is gone"):
        run(tmp_path, LostLearner(*range(2, 99, 2)), save_every=4)


def test_a_learner_lost_after_a_stop_was_asked_for_does_not_begin_again(tmp_path: Path) -> None:
    stopping = Stopping()

    class Stopped(LostLearner):
        async def step(self, plan: Any, objective: Any) -> dict[str, float]:
            stopping.ask(15)
            return await super().step(plan, objective)

    learner = Stopped(1)
    with pytest.raises(Interrupted):
        run(tmp_path, learner, stopping)
    assert learner.restarts == 0


class Mortal(Late):
    """A worker that is lost at some of its calls, with all that is under way; `alive` says when there is another."""

    def __init__(self, inner: Any, *at: int, back: float = 0.05, lives: int = 9) -> None:
        super().__init__(inner, 0)
        self.at, self.back, self.lives, self.calls, self.lost = at, back, lives, 0, False

    async def alive(self) -> None:
        if self.lost:
            await asyncio.sleep(self.back)
            if not self.lives:
                raise UnplacedError("the worker could not be brought back")
            self.lost = False

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name not in ("reset", "step", "truncate", "episode"):
            return found

        async def call(*given: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls in self.at and not self.lost:
                self.lives, self.lost = self.lives - 1, True
            if self.lost:
                raise LostError("the worker is gone")
            result = await found(*given, **named)
            if self.lost:
                raise LostError("the worker is gone")
            return result

        return call


@pytest.mark.parametrize("lockstep", [False, True], ids=["free", "lockstep"])
@pytest.mark.parametrize("at", [1, 3, 8, 14])
def test_what_a_lost_worker_had_is_played_again_with_the_same_seeds(
    tokens: ChatTokens, lockstep: bool, at: int
) -> None:
    """Trap 17: lost in a reset, in a turn and while others are at it; back at once, after the others, or never."""

    def fakes() -> Any:
        return Late(engine(tokens), 0, lockstep)

    plain = content(collect(JOBS, [worker(3), worker(3)], fakes(), tokens))
    assert content(collect(JOBS, [Mortal(worker(4), at, 2 * at)], fakes(), tokens)) == plain
    assert content(collect(JOBS, [Mortal(worker(4), at, lives=1), worker(3)], fakes(), tokens)) == plain
    assert content(collect(JOBS, [Mortal(worker(4), at, back=0.5), worker(3)], fakes(), tokens)) == plain


def test_workers_that_are_not_there_are_waited_for_and_all_missing_is_an_error(tokens: ChatTokens) -> None:
    class Absent(Mortal):
        def __init__(self, inner: Any, lives: int) -> None:
            super().__init__(inner, lives=lives)
            self.lost = True

    plain = content(collect(JOBS, [worker(3)], engine(tokens), tokens))
    assert content(collect(JOBS, [Absent(worker(3), 0), worker(3)], engine(tokens), tokens)) == plain
    assert content(collect(JOBS, [Absent(worker(3), 1)], engine(tokens), tokens)) == plain

    async def none() -> None:
        with pytest.raises(UnplacedError, match="could not be brought back"):
            async for _ in play(JOBS, [Absent(worker(3), 0)] * 2, engine(tokens), tokens, Settings(seed=0)):
                pass
        assert not left()

    asyncio.run(none())


def test_the_cases_are_those_of_the_first_worker_that_comes() -> None:
    """The first never comes, or says that it cannot; with none there is nothing to wait for."""

    class Tells:
        def __init__(self, after: float, error: Exception | None = None) -> None:
            self.after, self.error = after, error

        async def keys(self, split: str) -> list[str]:
            await asyncio.sleep(self.after)
            if self.error is not None:
                raise self.error
            return [split]

    def asked(*workers: Any) -> list[str]:
        return asyncio.run(keys_of(workers, "val"))

    gone = UnplacedError("no place")
    assert asked(Tells(999), Tells(0.01)) == asked(Tells(0, gone), Tells(0.01)) == ["val"]
    with pytest.raises(UnplacedError, match="no place"):
        asked(Tells(0, gone), Tells(0.01, gone))
    with pytest.raises(MedSegError, match="no data"):
        asked(Tells(999), Tells(0, MedSegError("no data")))


def test_a_job_over_which_every_worker_is_lost_ends_the_play(tokens: ChatTokens) -> None:
    with pytest.raises(MedSegError, match="5 workers were lost over Blobs/train-0/bar: the worker is gone"):
        collect(JOBS[:1], [Mortal(worker(3), *range(1, 99))], engine(tokens), tokens)
