"""One step off-policy: groups played ahead are of the weights before, whatever the timing, and after a break."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from grpo_parts import OneNumber, boxes, chat_tokens, settings, stand_ins
from rollouts import Late

from medseg_gym.errors import MedSegError
from medseg_gym.rl import checkpoint, sync
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.engines.base import GenRequest, WeightRef
from medseg_gym.rl.engines.fake import FakeEngine
from medseg_gym.rl.grpo import GRPO, train
from medseg_gym.rl.grpo_check import check
from medseg_gym.rl.grpo_step import State
from medseg_gym.rl.invariants import InvariantError, check_staleness
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.rl.stopping import Interrupted, Stopping
from medseg_gym.rl.worker import LostError

TIMED = ("time/", "idle/", "speed/")


class Weighty(FakeEngine):
    """An engine whose answers hang on its weights, so that a play by others than were meant is another play."""

    def __init__(self) -> None:
        super().__init__(self._say, chat_tokens())
        self.weight = 0

    def _say(self, request: GenRequest) -> Any:
        return boxes(replace(request, seed=request.seed + self.weight))

    async def update_weights(self, source: WeightRef) -> None:
        await super().update_weights(source)
        self.weight = zlib.crc32(str(float(sync.load(source)["w"])).encode())


def ran(
    out: Path, learner: Any = None, engine: Any = None, stopping: Stopping | None = None, say: Any = None, **given: Any
) -> State:
    async def whole() -> State:
        parts = replace(stand_ins(learner=learner), engine=engine or Weighty())
        more = {} if say is None else {"say": say}
        try:
            return await GRPO(settings(out, **{"staleness": 1, **given}), parts, stopping=stopping, **more).run()
        finally:
            await parts.close()

    return asyncio.run(whole())


def result(out: Path) -> tuple[list[dict[str, Any]], str]:
    records = [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in read_metrics(out)]
    return records, (out / "final" / "model.json").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """The undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    ran(out)
    return result(out)


def sampled_by(plan: Any) -> set[int]:
    """The versions that a step's tokens were sampled by."""
    rows = [row for rank in plan for micro in rank for row in micro]
    return {span[0] for row in rows for segment in row.sequence.segments for span in segment.versions}


def test_every_token_is_trained_at_most_one_change_of_weights_after_it_was_sampled(tmp_path: Path) -> None:
    """Iteration 1 is trained by what sampled it, iteration k by version k - 1, sampled by k - 2."""
    learner, engine = OneNumber(), Weighty()
    state = ran(tmp_path, learner, engine)
    assert [sampled_by(plan) for plan in learner.plans] == [{0}, {0}, {1}, {2}] and state.version == 4
    assert [(ref.version, ref.full) for ref in engine.updates] == [(0, True), *((v, False) for v in (1, 2, 3, 4))]
    assert [record["groups/staleness"] for record in result(tmp_path)[0]] == [0.0, 1.0, 1.0, 1.0]
    synchronous = OneNumber()
    ran(tmp_path / "0", synchronous, staleness=0)
    assert [sampled_by(plan) for plan in synchronous.plans] == [{0}, {1}, {2}, {3}]


def test_the_next_groups_are_played_while_a_step_is_learned(tmp_path: Path) -> None:
    """A step that ends only when an answer of the next iteration was asked for, and not in the last iteration."""
    asked = asyncio.Event()

    class Waits(OneNumber):
        async def step(self, plan: Any, objective: Any) -> dict[str, float]:
            if self.steps < 3:
                await asyncio.wait_for(asked.wait(), 60)
                asked.clear()
            return await super().step(plan, objective)

    class Notes(Weighty):
        async def generate(self, request: GenRequest) -> Any:
            if int(request.id.split("/")[1]) == learner.steps + 2:
                asked.set()
            return await super().generate(request)

    learner = Waits()
    ran(tmp_path, learner, Notes())
    assert learner.steps == 4


class Slow(OneNumber):
    async def step(self, plan: Any, objective: Any) -> dict[str, float]:
        await asyncio.sleep(0.1)
        return await super().step(plan, objective)


@pytest.mark.parametrize("late", ["engine", "learner"])
def test_what_is_trained_hangs_on_no_timing(tmp_path: Path, whole: Any, late: str) -> None:
    ran(tmp_path, Slow() if late == "learner" else None, Late(Weighty(), 0) if late == "engine" else None)
    assert result(tmp_path) == whole


class Killed(BaseException):
    """The end of a process, as far as the loop can tell."""


class Mortal(OneNumber):
    """A learner that raises before, or at once after, its n-th call of a method."""

    def __init__(self, method: str, at: int, after: bool, error: type[BaseException] = Killed) -> None:
        super().__init__()
        self._method, self._left, self._after, self._error = method, at, after, error

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or name != self._method:
            return found

        async def call(*given: Any, **named: Any) -> Any:
            self._left -= 1
            if not self._left and not self._after:
                raise self._error
            answer = await found(*given, **named)
            if not self._left:
                raise self._error
            return answer

        return call

    async def restart(self) -> None:
        self.weight, self.steps = 0.0, 0


@pytest.mark.parametrize("save_every", [1, 3])
@pytest.mark.parametrize(
    ("method", "at", "after"),
    [("step", 2, True), ("step", 4, False), ("save", 1, True), ("weights", 4, False), ("weights", 5, True)],
)
def test_a_run_that_goes_on_equals_one_that_never_ended(
    tmp_path: Path, whole: Any, save_every: int, method: str, at: int, after: bool
) -> None:
    """Trap 10: killed in a step, between save and publish, and before the engine has what was saved; the groups that
    had been played ahead are played anew, by the weights of then."""
    with pytest.raises(Killed):
        ran(tmp_path, Mortal(method, at, after), save_every=save_every)
    ran(tmp_path, save_every=save_every, weights_folder=str(tmp_path / "weights"))
    assert result(tmp_path) == whole


def test_a_finished_run_goes_on_to_more_iterations_as_if_it_had_never_stopped(tmp_path: Path, whole: Any) -> None:
    ran(tmp_path, iterations=2)
    ran(tmp_path)
    assert result(tmp_path) == whole


def test_a_checkpoint_holds_what_plays_the_next_groups_but_not_what_is_frozen(tmp_path: Path) -> None:
    ran(tmp_path, iterations=2, save_every=1)
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}" / "behind"
        assert list(sync.load(WeightRef(step - 1, False, folder=str(folder)))) == ["w"]
    ran(tmp_path / "0", iterations=1, staleness=0)
    found = checkpoint.latest(tmp_path / "0" / "checkpoints")
    assert found is not None and not (found[0] / "behind").exists()


def test_a_stop_while_groups_are_played_ahead_keeps_the_iteration_under_way(tmp_path: Path, whole: Any) -> None:
    stopping = Stopping()

    class Stops(Weighty):
        async def generate(self, request: GenRequest) -> Any:
            if request.id.startswith("train/3/1/"):
                stopping.ask(15)
            return await super().generate(request)

    with pytest.raises(Interrupted):
        ran(tmp_path, engine=Stops(), stopping=stopping, save_every=100)
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None and found[1]["step"] == 2 and found[1]["behind"] == 1
    ran(tmp_path, save_every=100)
    assert result(tmp_path) == whole


def test_a_lost_learner_ends_what_is_played_ahead_and_the_result_is_the_same(tmp_path: Path, whole: Any) -> None:
    """Trap 17: lost after its step, when an answer of the next iteration is under way, which is asked for again."""
    asked: list[str] = []
    under_way = asyncio.Event()

    class Notes(Weighty):
        async def generate(self, request: GenRequest) -> Any:
            asked.append(request.id)
            if request.id.startswith("train/4/"):
                under_way.set()
                await asyncio.sleep(0.01)
            return await super().generate(request)

    class Waits(Mortal):
        async def step(self, plan: Any, objective: Any) -> dict[str, float]:
            if self.steps == 2:
                await asyncio.wait_for(under_way.wait(), 60)
            return await super().step(plan, objective)

    ran(tmp_path, Waits("step", 3, True, LostError), Notes())
    ahead = Counter(name for name in asked if name.startswith("train/4/"))
    assert set(ahead.values()) == {1, 2}  # some were asked before the loss, and none was played to its end
    assert result(tmp_path) == whole


def test_an_engine_that_fails_ahead_ends_the_run_with_its_own_words(tmp_path: Path) -> None:
    class Fails(Weighty):
        async def generate(self, request: GenRequest) -> Any:
            if request.id.startswith("train/2/"):
                raise MedSegError("the engine is broken")
            return await super().generate(request)

    with pytest.raises(MedSegError, match="the engine is broken"):
        ran(tmp_path, engine=Fails())
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_a_step_that_changes_nothing_leaves_the_next_groups_fresh(tmp_path: Path) -> None:
    """Skipped as not finite, so what was played ahead is of the very weights that are trained."""
    learner = OneNumber(lambda step: {"skipped": 1.0} if step == 2 else {})
    ran(tmp_path / "once", learner)
    assert [record["groups/staleness"] for record in result(tmp_path / "once")[0]] == [0.0, 1.0, 0.0, 1.0]
    first = OneNumber(lambda step: {"skipped": 1.0} if step == 2 else {})
    ran(tmp_path / "twice", first, iterations=2)
    ran(tmp_path / "twice")
    assert result(tmp_path / "twice") == result(tmp_path / "once")


def test_stale_tokens_may_differ_from_the_learner_and_fresh_ones_may_not(tmp_path: Path) -> None:
    """Their mismatch KL is that of two policies; the loss weighs them by the importance weights."""
    ran(tmp_path / "stale", OneNumber(lambda step: {"mismatch_kl": 1e-3 if step > 1 else 0.0}))
    with pytest.raises(InvariantError, match="mismatch KL 0.001"):
        ran(tmp_path / "fresh", OneNumber(lambda step: {"mismatch_kl": 1e-3}))


def test_groups_of_any_other_version_are_not_trained() -> None:
    check_staleness(3, 3, 0)
    check_staleness(3, 4, 1)
    for sampled, trained, most in ((3, 4, 0), (3, 5, 1), (4, 3, 1)):
        with pytest.raises(InvariantError, match=f"sampled by version {sampled} would be trained at version {trained}"):
            check_staleness(sampled, trained, most)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"staleness": 2}, "staleness=2; wanted 0, or 1"), ({"staleness": 1, "importance": "ignore"}, "for what the")],
)
def test_staleness_that_is_not_corrected_for_is_refused(tmp_path: Path, given: Mapping[str, Any], said: str) -> None:
    with pytest.raises(MedSegError, match=said):
        check(settings(tmp_path, **given))


@pytest.mark.slow
def test_a_real_model_one_step_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Transformers as the engine, trained towards another random model; a first run of two iterations, then the rest.
    Tokens that are a step old have another probability by now, fresh ones have not."""
    import numpy as np
    from safetensors.numpy import load_file

    from medseg_gym.rl.tiny_model import save_tiny_model

    model = save_tiny_model(tmp_path / "model", seed=0, spread=0.2)
    other = save_tiny_model(tmp_path / "other", seed=1, spread=0.2)

    def config(name: str, iterations: int) -> GRPOConfig:
        more = {"kl": 1.0, "reference": str(other), "filter": False, "lr": 1e-3, "freeze": ("*visual*",), "slots": 4}
        small = {"prompts": 1, "temperature": 0.8, "gradient_checkpointing": False, "save_every": 1}
        given = {"model": str(model), "iterations": iterations, "staleness": 1, **small, **more}
        return settings(tmp_path / name, **given)

    train(config("whole", 4))
    train(config("twice", 2))
    train(config("twice", 4))
    records = read_metrics(tmp_path / "whole")
    mismatch = [record["learner/mismatch_kl"] for record in records]
    assert mismatch[0] < 1e-6 < 1e-5 < min(mismatch[1:]), mismatch
    assert all(record["learner/weight"] != 1.0 for record in records[1:])
    found, expected = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("twice", "whole"))
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name
