"""Validation by episodes in the env: numbers by hand, the same for any slots, and nothing that failed is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from rollouts import KEYS, Late, by_turn, content, engine, make_tokens, member_of, worker

from medseg_gym.errors import MedSegError
from medseg_gym.rl.engines.base import GenRequest
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.validate import Validation, validate
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Query


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> ChatTokens:
    return make_tokens(tmp_path_factory.mktemp("model"))


def check(
    workers: Sequence[Any], fakes: Any, tokens: ChatTokens, keys: Sequence[str] = KEYS, **given: Any
) -> Validation:
    return asyncio.run(validate(workers, fakes, tokens, keys, **{"max_new_tokens": 64, **given}))


class LeftFails(Stub):
    def predict(self, queries: Sequence[Query]) -> Any:
        if any(query.prompts[-1].x1 < 8 for query in queries):  # type: ignore[union-attr]
            raise RuntimeError("lost")
        return super().predict(queries)


def test_means_are_over_all_cases_and_those_that_failed_count_as_0(tokens: ChatTokens) -> None:
    """Case 0 boxes and stops, case 1 says nothing readable in 2 turns, case 2 is lost to the tool after a good box."""
    said = {(0, 0): "BIqZz", (0, 1): "S", (1, 0): "?", (1, 1): "x" * 80, (2, 0): "BIqZz", (2, 1): "BAKqq"}

    def script(request: GenRequest) -> str:
        case, member = member_of(request)
        assert member == 0
        return said[case, int(request.id.split("/")[4])]

    w = worker(2, tool=LeftFails(), horizon=2)
    found = check([w], engine(tokens, script), tokens, KEYS[:3], policy="me")
    boxed, unread, failed = (rollout.episode for rollout in found.rollouts)
    assert boxed.iou[-1] > 0
    assert failed.iou[-1] > 0
    assert found.iou == pytest.approx(boxed.iou[-1] / 3)
    assert found.dice == pytest.approx(boxed.dice[-1] / 3)
    rewards = [sum(turn.reward for turn in episode.turns) for episode in (boxed, unread)]
    assert found.reward == pytest.approx(sum(rewards) / 3)
    assert sum(found.terms.values()) == pytest.approx(found.reward)
    assert found.turns == (2 + 2 + 2) / 3
    assert found.unreadable == 2 / 6
    # five letters or one, an end of turn each; of the 80 letters 64, cut off
    assert found.tokens == pytest.approx((6 + 2 + 2 + 64 + 6 + 6) / 6)
    assert found.ended == {"failed": 1, "stopped": 1, "unreadable": 1}
    assert found.by_case == {KEYS[0]: boxed.iou[-1], KEYS[1]: 0.0, KEYS[2]: 0.0}
    assert (failed.ended, found.rollouts[2].dropped) == ("failed", "the env failed 3 times: RuntimeError: lost")
    assert {rollout.episode.policy for rollout in found.rollouts} == {"me"}
    scalars = found.scalars()
    assert scalars["val/iou"] == found.iou
    assert scalars["val/ended_stopped"] == 1.0
    assert all(np.isfinite(value) for value in scalars.values())


def test_a_validation_is_the_same_for_any_slots_workers_and_engine_in_lockstep(tokens: ChatTokens) -> None:
    first = check([worker(1)], engine(tokens), tokens, temperature=1.0, seed=3)
    for slots in ([6], [2, 3]):
        for lockstep in (False, True):
            late = Late(engine(tokens), 0, lockstep, most=0)
            again = check([worker(count) for count in slots], late, tokens, temperature=1.0, seed=3)
            assert content([again.rollouts]) == content([first.rollouts])
            assert sorted({len(batch) for batch in late.batches})[-1:] == ([min(slots)] if lockstep else [])
    assert [rollout.episode.key for rollout in first.rollouts] == KEYS
    other = check([worker(1)], engine(tokens), tokens, temperature=1.0, seed=4)
    assert content([other.rollouts]) != content([first.rollouts])


def test_no_case_at_all_is_an_error_that_says_what_to_change(tokens: ChatTokens) -> None:
    with pytest.raises(MedSegError, match="choose another validate_split"):
        check([worker(1)], engine(tokens, by_turn("S")), tokens, [])
