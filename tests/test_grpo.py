"""The GRPO loop against stand-ins: what it does in which order, what it skips, how it stops and goes on."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from grpo_parts import OneNumber, boxes, settings, stand_ins

from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.rl import checkpoint
from medseg_gym.rl.config import GRPOConfig, presets, read
from medseg_gym.rl.grpo import GRPO
from medseg_gym.rl.grpo_check import check
from medseg_gym.rl.grpo_step import State
from medseg_gym.rl.invariants import InvariantError
from medseg_gym.rl.parts import Parts
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.rl.stopping import Interrupted, Stopping

TIMED = ("time/", "idle/", "speed/")


def ran(config: GRPOConfig, parts: Parts, **given: Any) -> State:
    async def whole() -> State:
        try:
            return await GRPO(config, parts, **given).run()
        finally:
            await parts.close()

    return asyncio.run(whole())


def numbers(out: Path) -> list[dict[str, Any]]:
    """The run's metrics but for its times."""
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in read_metrics(out)]


def final(out: Path, name: str = "final") -> float:
    return float(json.loads((out / name / "model.json").read_text()))


def test_the_engine_gets_the_weights_after_the_checkpoint_and_whole_only_once(tmp_path: Path) -> None:
    """Trap 15: frozen weights are published once, at the start; the two reads at either end are of their digest."""
    parts = stand_ins()
    ran(settings(tmp_path, save_every=1, iterations=2), parts)
    once = ["step", "save", "weights part"]
    assert parts.learner.order == [
        "weights full",
        "weights part",
        *once,
        *once,
        "weights full",
        "weights part",
        "export",
    ]
    assert [(ref.version, ref.full) for ref in parts.engine.updates] == [(0, True), (1, False), (2, False)]


def test_an_iteration_has_one_record_with_its_groups_and_rewards(tmp_path: Path) -> None:
    ran(settings(tmp_path), stand_ins())
    records = numbers(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["groups/played"] == record["groups/trained"] + record["groups/equal"]
        terms = sum(value for name, value in record.items() if name.startswith("train/reward_"))
        assert record["train/reward"] == pytest.approx(terms)
        assert record["train/ended_stopped"] == 4 * record["groups/played"]


def test_validation_leaves_training_as_it_is(tmp_path: Path) -> None:
    ran(settings(tmp_path / "a"), stand_ins())
    ran(settings(tmp_path / "b", validate_every=1, validate_cases=3), stand_ins())
    trained = [record for record in numbers(tmp_path / "b") if "val/iou" not in record]
    assert trained == numbers(tmp_path / "a")
    assert [r["step"] for r in numbers(tmp_path / "b") if "val/iou" in r] == [0, 1, 2, 3, 4]


class Killed(BaseException):
    """The end of a process, as far as the loop can tell."""


class Mortal(OneNumber):
    """A learner whose process ends at its n-th call, before or after the call does its work."""

    def __init__(self, at: int, after: bool) -> None:
        super().__init__()
        self._left, self._after = at, after

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("step", "weights", "save", "export"):
            return found

        async def call(*given: Any, **named: Any) -> Any:
            self._left -= 1
            if not self._left and not self._after:
                raise Killed
            result = await found(*given, **named)
            if not self._left:
                raise Killed
            return result

        return call


@pytest.mark.slow
def test_a_run_killed_at_any_call_and_resumed_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Trap 10, every moment in turn: before each call, so after the one before and what was written since, and at once
    after each step and each save, so before its numbers are written and between save and publish.
    """
    more = {
        "iterations": 2,
        "prompts": 2,
        "validate_every": 1,
        "validate_cases": 2,
        "curriculum": "difficulty",
        "save_every": 1,
        "gallery_every": 2,
    }
    learner = OneNumber()
    assert ran(settings(tmp_path / "whole", **more), stand_ins(learner=learner)).version == 2
    calls = learner.order
    moments = [(at, False) for at in range(len(calls))]
    moments += [(at, True) for at, call in enumerate(calls) if call in ("step", "save")]
    for at, after in moments:
        out = tmp_path / f"{at}-{after}"
        with pytest.raises(Killed):
            ran(settings(out, **more), stand_ins(learner=Mortal(at + 1, after)))
        ran(settings(out, **more), stand_ins())
        assert numbers(out) == numbers(tmp_path / "whole"), (calls[at], after)
        assert final(out) == final(tmp_path / "whole"), (calls[at], after)
        assert final(out, "best") == final(tmp_path / "whole", "best"), (calls[at], after)
        assert len(list((out / "gallery").iterdir())) == 1, (calls[at], after)


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    config = settings(tmp_path, validate_every=2, validate_cases=2)
    first = ran(config, stand_ins())
    before = numbers(tmp_path)
    parts = stand_ins()
    assert ran(config, parts) == first
    assert numbers(tmp_path) == before and "step" not in parts.learner.order


def test_a_stop_in_the_middle_of_playing_saves_what_was_done_and_goes_on_from_there(tmp_path: Path) -> None:
    ran(settings(tmp_path / "whole", save_every=100), stand_ins())
    asked = 0

    async def whole() -> None:
        stopping = Stopping()

        def script(request: Any) -> str:
            nonlocal asked
            asked += 1
            if asked == 45:  # within the second iteration: the first has 24 to 40 answers, by what is drawn again
                stopping.ask(15)
            return boxes(request)

        parts = stand_ins(script)
        try:
            await GRPO(settings(tmp_path / "stopped", save_every=100), parts, stopping=stopping).run()
        finally:
            await parts.close()

    with pytest.raises(Interrupted, match="SIGTERM"):
        asyncio.run(whole())
    found = checkpoint.latest(tmp_path / "stopped" / "checkpoints")
    assert found is not None and 0 < found[1]["step"] < 4
    ran(settings(tmp_path / "stopped", save_every=100), stand_ins())
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert final(tmp_path / "stopped") == final(tmp_path / "whole")


def test_groups_without_spread_make_no_step_and_no_nan(tmp_path: Path) -> None:
    said: list[str] = []
    parts = stand_ins(lambda request: "S")
    state = ran(settings(tmp_path, iterations=1), parts, say=said.append)
    assert parts.learner.order.count("step") == 0 and state.version == 0 and len(parts.engine.updates) == 1
    assert "of 9 groups 9 have equal rewards" in said[0]  # 3 groups, and twice 3 others
    (record,) = numbers(tmp_path)
    assert record["groups/trained"] == 0
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in record.values())


@pytest.mark.parametrize("given", [{"filter": False}, {"kl": 0.1}])
def test_without_the_filter_or_with_a_kl_term_equal_groups_make_no_step_either(
    tmp_path: Path, given: Mapping[str, Any]
) -> None:
    """With a KL term, where groups are filtered out, no row is left to compare with the reference."""
    parts = stand_ins(lambda request: "S")
    ran(settings(tmp_path, iterations=1, **given), parts)
    assert parts.learner.order.count("step") == 0


def test_a_step_that_is_not_finite_is_skipped_and_its_weights_are_not_published(tmp_path: Path) -> None:
    said: list[str] = []
    learner = OneNumber(lambda step: {"skipped": 1.0, "loss": math.nan} if step == 2 else {})
    parts = stand_ins(learner=learner)
    state = ran(settings(tmp_path), parts, say=said.append)
    assert state.version == 3 and [ref.version for ref in parts.engine.updates] == [0, 1, 2, 3]
    assert "iteration 2: step skipped" in said[0]
    assert [record["learner/loss"] for record in numbers(tmp_path)] == [0.0, None, 0.0, 0.0]


def test_steps_that_go_on_not_being_finite_end_the_run_on_the_last_good_checkpoint(tmp_path: Path) -> None:
    learner = OneNumber(lambda step: {"skipped": 1.0} if step > 1 else {})
    with pytest.raises(MedSegError, match="3 optimiser steps in a row"):
        ran(settings(tmp_path, save_every=1, iterations=9), stand_ins(learner=learner))
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None and found[1]["state"]["version"] == 1


def test_engine_and_learner_that_disagree_end_the_run_before_its_checkpoint(tmp_path: Path) -> None:
    learner = OneNumber(lambda step: {"mismatch_kl": 1e-3})
    with pytest.raises(InvariantError, match=r"mismatch KL 0.001, at most 1e-06 in float32"):
        ran(settings(tmp_path, save_every=1), stand_ins(learner=learner))
    assert checkpoint.latest(tmp_path / "checkpoints") is None
    said: list[str] = []
    learner = OneNumber(lambda step: {"mismatch_kl": 0.03})
    ran(settings(tmp_path / "half", iterations=1, dtype="bfloat16"), stand_ins(learner=learner), say=said.append)
    assert "mismatch KL 0.03" in said[0]


def test_frozen_weights_that_change_are_noticed_at_the_end(tmp_path: Path) -> None:
    """Trap 15."""

    class Thawing(OneNumber):
        async def step(self, plan: Any, objective: Any) -> dict[str, float]:
            self.frozen = 4.0
            return await super().step(plan, objective)

    with pytest.raises(InvariantError, match="frozen"):
        ran(settings(tmp_path), stand_ins(learner=Thawing()))


def test_the_run_ends_early_when_validations_do_not_get_better(tmp_path: Path) -> None:
    """The script's IoU is the same at every validation: the one before training is the best, two more end the run."""
    config = settings(tmp_path, iterations=9, validate_every=2, validate_cases=2, patience=2, save_every=100)
    state = ran(config, stand_ins())
    assert (state.step, state.best_step, state.worse) == (4, 0, 2) and "2 validations" in state.stopped
    assert final(tmp_path, "best") == 0.0 < final(tmp_path)  # the best weights are kept: those before training
    before = numbers(tmp_path)
    assert ran(config, stand_ins()).step == 4
    assert numbers(tmp_path) == before


def test_the_run_ends_early_above_a_mean_reward(tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole")
    ran(whole, stand_ins())
    rewards = [record["train/reward"] for record in numbers(tmp_path / "whole")]
    limit = max(rewards) - 1e-6
    state = ran(settings(tmp_path / "early", stop_reward=limit), stand_ins())
    assert state.step == 1 + rewards.index(max(rewards)) and "is above" in state.stopped


def test_the_reference_goes_with_every_row_where_there_is_a_kl_term(tmp_path: Path) -> None:
    learner = OneNumber()
    ran(settings(tmp_path, iterations=1, kl=0.1), stand_ins(learner=learner))
    rows = [row for rank in learner.plans[0] for micro in rank for row in micro]
    assert rows and all((row.reference == row.sequence.logprobs).all() for row in rows)


def test_a_gallery_is_written_as_often_as_it_is_asked_for(tmp_path: Path) -> None:
    ran(settings(tmp_path, gallery_every=3), stand_ins())
    assert [file.name for file in (tmp_path / "gallery").iterdir()] == ["iteration-000003.html"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rollouts": 1}, "rollouts=1; wanted 2 or more"),
        ({"save_every": 0}, "save_every=0"),
        ({"seed": -1}, "seed=-1; wanted 0 or more"),
        ({"patience": 2}, "patience=2 counts validations"),
        ({"credit": "turns"}, "did you mean 'turn'"),
        ({"importance": "tokens"}, "did you mean 'token'"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(tmp_path: Path, given: Mapping[str, Any], said: str) -> None:
    with pytest.raises((MedSegError, UnknownNameError), match=said):
        check(settings(tmp_path, **given))


@pytest.mark.parametrize("name", presets(GRPOConfig))
def test_every_preset_is_a_run_that_can_be_had(name: str) -> None:
    config = read(GRPOConfig, preset=name, model="m", out="o", **({} if name == "tiny" else {"env": "MedSeg-v0"}))
    check(config)


def test_the_papers_presets_have_the_papers_numbers() -> None:
    paper = read(GRPOConfig, preset="paper", model="m", out="o", env="e")
    assert (paper.prompts, paper.rollouts, paper.lr, paper.weight_decay) == (8, 8, 1e-6, 0.01)
    assert (paper.clip_low, paper.clip_high, paper.dual_clip, paper.std, paper.normaliser) == (
        0.2,
        0.2,
        3,
        True,
        "token",
    )
    assert (paper.temperature, paper.kl, paper.freeze, paper.env_options["horizon"]) == (1.0, 0.0, (), 5)
    ibis = read(GRPOConfig, preset="ibis", model="m", out="o", env="e")
    assert (ibis.prompts, ibis.rollouts, ibis.lr, ibis.kl, ibis.std) == (256, 4, 1e-6, 0.0, True)
    assert paper.importance == ibis.importance == "ignore"
    assert paper.size % 32 == 0 == ibis.size % 28  # Qwen3-VL's and Qwen2.5-VL's patches
