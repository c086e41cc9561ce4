"""What a run checks of its own groups, plans and weights: each fault, made by hand, is named in words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from grpo_parts import stand_ins

from medseg_gym.rl.batch import plan
from medseg_gym.rl.invariants import InvariantError, check_group, check_plan, frozen_digest, mismatch_fault
from medseg_gym.rl.jobs import Job, Settings
from medseg_gym.rl.rollout import play
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import ImageRef, Rollout, Row, Segment, TokenSequence


@pytest.fixture(scope="module")
def played() -> tuple[list[Rollout], ChatTokens]:
    """A group of three, of two turns each."""

    async def whole() -> tuple[list[Rollout], ChatTokens]:
        parts = stand_ins()
        key = (await parts.workers[0].keys("train"))[0]
        settings = Settings(seed=0, max_new_tokens=8, max_chat_tokens=512)
        async for group in play([Job(0, key, 3)], parts.workers, parts.engine, parts.tokens, settings):
            await parts.close()
            return group, parts.tokens
        raise AssertionError

    return asyncio.run(whole())


def changed(group: list[Rollout], at: int, change: Callable[[Segment], Segment | None]) -> list[Rollout]:
    """The group with segment `at` of its last member's chat replaced, or taken out."""
    chat = group[-1].sequences[0]
    new = change(chat.segments[at])
    segments = (*chat.segments[:at], *(() if new is None else (new,)), *chat.segments[at + 1 :])
    return [*group[:-1], replace(group[-1], sequences=(TokenSequence(segments),))]


PROMPT, ACTION, OBSERVATION = 0, 1, 2


def test_a_sound_group_passes(played: tuple[list[Rollout], ChatTokens]) -> None:
    check_group(*played, version=0)


def black(segment: Segment) -> Segment:
    return replace(segment, images=(ImageRef.of(np.zeros((64, 64, 3), np.uint8)),))


FAULTS: dict[str, tuple[int, Callable[[Segment], Segment | None]]] = {
    "first observation is not that": (PROMPT, black),
    "image tokens come in runs": (OBSERVATION, lambda s: replace(s, images=())),
    "turn 0, observation": (OBSERVATION, lambda s: replace(s, images=(), turn=0)),
    "6 sampled tokens with": (ACTION, lambda s: replace(s, logprobs=(math.nan, *s.logprobs[1:]))),
    "6 sampled tokens with ()": (ACTION, lambda s: replace(s, logprobs=())),
    "wanted version 0 for all 6 ids": (ACTION, lambda s: replace(s, versions=((1, 0, 6),))),
    "sampled by ((0, 0, 3),)": (ACTION, lambda s: replace(s, versions=((0, 0, 3),))),
    "0 ends of turn follow": (
        ACTION,
        lambda s: replace(s, ids=s.ids[:-1], logprobs=s.logprobs[:-1], versions=((0, 0, 5),)),
    ),
    "answers in turns [1]": (ACTION, lambda s: None),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_in_a_chat_is_named(played: tuple[list[Rollout], ChatTokens], words: str) -> None:
    """Traps 5, 9, 13 and 14, as a run meets them."""
    group, tokens = played
    with pytest.raises(InvariantError) as raised:
        check_group(changed(group, *FAULTS[words]), tokens, 0)
    assert words in str(raised.value) and group[0].episode.key in str(raised.value)


def test_a_banned_id_is_named(played: tuple[list[Rollout], ChatTokens]) -> None:
    """Trap 6."""
    group, tokens = played
    fault = changed(group, ACTION, lambda s: replace(s, ids=(tokens.vision_end, *s.ids[1:])))
    with pytest.raises(InvariantError, match=f"banned ids .{tokens.vision_end}"):
        check_group(fault, tokens, 0)


def test_members_of_two_cases_are_no_group(played: tuple[list[Rollout], ChatTokens]) -> None:
    """Trap 14."""
    group, tokens = played
    other = replace(group[-1], episode=replace(group[-1].episode, key="Phantom/other"))
    with pytest.raises(InvariantError, match="wanted one"):
        check_group([*group[:-1], other], tokens, 0)
    with pytest.raises(InvariantError, match="came back as one group"):
        check_group([*group, group[0]], tokens, 0)


def test_a_dropped_member_is_not_looked_at(played: tuple[list[Rollout], ChatTokens]) -> None:
    group, tokens = played
    fault = changed(group, PROMPT, black)
    check_group([*fault[:-1], replace(fault[-1], dropped="aborted")], tokens, 0)


def rows(played: tuple[list[Rollout], ChatTokens]) -> list[Row]:
    out = []
    for member in played[0]:
        mask = member.sequences[0].loss_mask.astype(np.float32)
        out.append(Row(member.sequences[0], mask / 8, mask.copy()))
    return out


def test_a_plan_holds_every_row_once_and_ranks_alike(played: tuple[list[Rollout], ChatTokens]) -> None:
    """Trap 11: three rows over two ranks are made even by one that weighs nothing."""
    given = rows(played)
    planned = plan(given, 2, 1, 4096)
    assert [len(rank) for rank in planned] == [2, 2]
    check_plan(planned, given)
    with pytest.raises(InvariantError, match=r"\[2, 1\] micro-batches"):
        check_plan([planned[0], planned[1][:1]], given)
    with pytest.raises(InvariantError, match="3 rows are to be trained, the plan holds 2"):
        check_plan(plan(given[:2], 2, 1, 4096), given)


def test_a_weight_off_the_sampled_tokens_is_noticed(played: tuple[list[Rollout], ChatTokens]) -> None:
    """Trap 3."""
    given = rows(played)
    given[1].weights[0] = 1.0
    with pytest.raises(InvariantError, match="not sampled has a weight"):
        check_plan([[given]], given)


def test_an_advantage_that_is_no_number_is_noticed(played: tuple[list[Rollout], ChatTokens]) -> None:
    """Trap 14."""
    given = rows(played)
    assert given[0].advantages is not None
    given[0].advantages[-1] = np.nan
    with pytest.raises(InvariantError, match="advantage is not a finite number"):
        check_plan([[given]], given)


def test_mismatch_is_an_error_in_float32_and_a_warning_in_half_precision() -> None:
    assert mismatch_fault(1e-7, float32=True) == "" == mismatch_fault(0.01, float32=False)
    assert "0.05" in mismatch_fault(0.05, float32=False)
    for value in (1e-5, math.nan):
        with pytest.raises(InvariantError, match="disagree"):
            mismatch_fault(value, float32=True)


def test_the_digest_of_frozen_weights_knows_names_shapes_and_bits() -> None:
    import torch

    trained = {"w": torch.zeros(2)}
    full = {**trained, "tower": torch.tensor([1.0, 2.0])}
    digest = frozen_digest(full, trained)
    assert frozen_digest({**full, "w": torch.ones(2)}, trained) == digest
    for other in (
        {"tower": torch.tensor([1.0, 2.0000002])},
        {"tower": torch.tensor([[1.0, 2.0]])},
        {"t": full["tower"]},
    ):
        assert frozen_digest({**trained, **other}, trained) != digest
