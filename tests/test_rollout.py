"""Rollouts: what is trained is what was sampled, whatever the timing, and an episode that fails harms no other."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import numpy as np
import pytest
from conftest import Blobs

pytest.importorskip("torch")
pytest.importorskip("transformers")

from rollouts import (
    JOBS,
    KEYS,
    Late,
    by_turn,
    collect,
    content,
    engine,
    left,
    make_tokens,
    member_of,
    worker,
)

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.policies import chat, protocols
from medseg_gym.rl.engines.base import GenRequest, GenResult
from medseg_gym.rl.rollout import Job, Settings, play
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Rollout
from medseg_gym.types import Unreadable

POINT = "<think>here</think><action>\nPositive Point (0.3125, 0.4125)\n</action>"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> ChatTokens:
    return make_tokens(tmp_path_factory.mktemp("model"))


def one(tokens: ChatTokens, script: Any, protocol: str = "tiny", *, horizon: int = 3, **settings: Any) -> Rollout:
    """A single episode of the first disc."""
    job = Job(0, KEYS[1])
    return collect([job], [worker(1, protocol, horizon=horizon)], engine(tokens, script), tokens, **settings)[0][0]


# what is trained


def test_the_loss_mask_counts_exactly_the_sampled_tokens(tokens: ChatTokens) -> None:
    """Trap 3: five letters and an end of turn, 64 of one cut off, a letter and an end; nothing of what was shown."""
    rollout = one(tokens, by_turn("BAAzz", "x" * 100, "S"))
    (sequence,) = rollout.sequences
    assert int(sequence.loss_mask.sum()) == 6 + 64 + 2
    kinds = [(segment.kind, segment.turn) for segment in sequence.segments]
    assert kinds == [
        ("prompt", 0),
        ("action", 0),
        ("observation", 1),
        ("action", 1),
        ("injected", 1),
        ("observation", 2),
        ("action", 2),
    ]
    said = np.array(sequence.ids)[sequence.loss_mask]
    wanted = [*tokens.text("BAAzz"), tokens.end, *tokens.text("x" * 64), *tokens.text("S"), tokens.end]
    assert said.tolist() == wanted
    assert (sequence.logprobs[sequence.loss_mask] == -1).all()
    assert not sequence.logprobs[~sequence.loss_mask].any()
    assert [segment.versions for segment in sequence.segments if segment.kind == "action"] == [
        ((0, 0, 6),),
        ((0, 0, 64),),
        ((0, 0, 2),),
    ]


def test_a_sampled_end_of_turn_is_trained_and_an_injected_one_is_not_and_each_turn_has_one(tokens: ChatTokens) -> None:
    """Trap 9: also in the last turn, whose answer nothing follows."""
    rollout = one(tokens, by_turn("BAAzz", "x" * 100, "y" * 64))
    (sequence,) = rollout.sequences
    for turn, trained in enumerate([1, 0, 0]):
        mine = (sequence.turns == turn) & (np.array(sequence.ids) == tokens.end)
        answered = [s for s in sequence.segments if s.turn == turn and s.kind in ("action", "injected")]
        assert sum(segment.ids.count(tokens.end) for segment in answered) == 1
        assert int((mine & sequence.loss_mask).sum()) == trained
    assert sequence.segments[-1].kind == "injected"
    assert rollout.episode.turns[1].action == Unreadable("the answer was cut off; wanted B and four letters, or S")


def test_a_chat_is_what_the_policies_chat_renders_with_the_sampled_ids_in_it(tokens: ChatTokens) -> None:
    """Token in, token out: one renderer for evaluation, training and rollouts; the last answer's end closes it."""
    w = worker(1, "medsam-agent", horizon=4)
    box = '<tool_call>\n{"name": "add_bbox", "arguments": {"bbox_2d": [%d, 200, 600, 700]}}\n</tool_call>'
    boxes = [box % x for x in (1, 300)]
    script = by_turn(boxes[0], "hm <|im_end|>", boxes[1], "z" * 500)
    ((rollout,),) = collect([Job(0, KEYS[1])], [w], engine(tokens, script), tokens, max_new_tokens=200)
    (sequence,) = rollout.sequences
    said = [segment.ids for segment in sequence.segments if segment.kind == "action"]
    (messages,) = chat.of_episode(rollout.episode, Blobs()[KEYS[1]].image, w.protocol, 64)
    whole = tokens.conversation(messages[:-1], said[:-1])
    assert sequence.ids == (*whole.ids, *said[-1], tokens.end)
    assert all((a.pixels == b).all() for a, b in zip(sequence.images, whole.images, strict=True))
    assert [turn.text for turn in rollout.episode.turns] == [tokens.decode(ids) for ids in said]


def test_without_history_every_turn_is_a_chat_of_its_own(tokens: ChatTokens) -> None:
    rollout = one(tokens, by_turn(POINT, "hm", POINT), "ibis", max_new_tokens=200)
    assert [[s.kind for s in sequence.segments] for sequence in rollout.sequences] == [["prompt", "action"]] * 3
    assert [{s.turn for s in sequence.segments} for sequence in rollout.sequences] == [{0}, {1}, {2}]
    pairs = chat.of_episode(rollout.episode, Blobs()[KEYS[1]].image, protocols.make("ibis"), 64)
    for sequence, messages in zip(rollout.sequences, pairs, strict=True):
        assert sequence.segments[0].ids == tokens.prompt(messages[:-1]).ids
        assert len(sequence.images) == 1


def test_an_answer_that_no_text_gives_back_is_kept_as_it_was_sampled(tokens: ChatTokens) -> None:
    """Half a character does not survive decoding; its ids do."""
    half = tokens.text("é")[:1]
    rollout = one(tokens, by_turn((*half, tokens.end), "S"))
    assert rollout.sequences[0].segments[1].ids == (*half, tokens.end)
    assert rollout.episode.turns[0].text == "�"


# pictures


def test_images_and_placeholder_runs_are_checked_and_the_error_names_the_turn(tokens: ChatTokens) -> None:
    """Trap 5: they fit in a rollout; a picture that does not fit its tokens is an error before anything is asked."""
    rollout = one(tokens, by_turn("BAAzz", "BKKqq", "S"))
    (sequence,) = rollout.sequences
    assert len(sequence.images) == 3
    assert sequence.ids.count(tokens.image_pad) == 3 * 4  # 64 pixels are 2 x 2 visual tokens

    class Wrong(Late):
        async def step(self, *args: Any, **keywords: Any) -> Any:
            seen = await self.inner.step(*args, **keywords)
            seen.messages[-1]["content"][0]["image"] = np.zeros((64, 50, 3), np.uint8)
            return seen

    with pytest.raises(BadDataError, match=f"{KEYS[1]}, turn 1: .*64x50"):
        collect([Job(0, KEYS[1])], [Wrong(worker(1), 0)], engine(tokens, ["BAAzz"]), tokens)


def test_an_observation_without_room_is_left_out_whole_and_the_episode_ends_there(tokens: ChatTokens) -> None:
    """Trap 5: the picture goes with its text, and what is stored is what was played, with the horizon it had."""
    free = one(tokens, by_turn("BAAzz", "BKKqq", "S"))
    until = sum(len(segment.ids) for segment in free.sequences[0].segments[:3])  # prompt, answer, observation
    for room, turns in ((until + 64, 2), (until + 63, 1), (until + 5000, 3)):
        rollout = one(tokens, by_turn("BAAzz", "BKKqq", "S"), max_chat_tokens=room)
        (sequence,) = rollout.sequences
        assert len(rollout.episode.turns) == turns
        assert len(sequence.images) == turns
        assert [s.kind for s in sequence.segments].count("action") == turns
        assert sequence.segments[-1].kind == "action"
        assert len(sequence.ids) <= room
        assert rollout.episode.ended == ("stopped" if turns == 3 else "horizon")
        assert rollout.episode.horizon == (3 if turns == 3 else turns)
        assert not rollout.dropped
    terminal = worker(1, horizon=3, timing="terminal")
    ((paid,),) = collect([Job(0, KEYS[1])], [terminal], engine(tokens, ["BAAzz"]), tokens, max_chat_tokens=until + 63)
    assert paid.reward == pytest.approx(one(tokens, ["BAAzz"], max_chat_tokens=until + 63).reward)


def test_a_first_turn_that_does_not_fit_is_refused(tokens: ChatTokens) -> None:
    with pytest.raises(MedSegError, match="first turn of Blobs/train-0/disc takes 61 tokens.*raise max_chat_tokens"):
        one(tokens, ["S"], max_chat_tokens=124)


def test_a_group_shares_case_picture_and_first_observation(tokens: ChatTokens) -> None:
    """Trap 14: all members see the same first turn; sampling seeds are all that differs."""
    asked: list[GenRequest] = []

    def script(request: GenRequest) -> str:
        asked.append(request)
        return ["BAAzz", "BKKqq", "S"][request.seed % 3]

    (group,) = collect([Job(0, KEYS[0], 4, seed=9)], [worker(4)], engine(tokens, script), tokens)
    firsts = [rollout.sequences[0].segments[0] for rollout in group]
    assert all(first.ids == firsts[0].ids and first.images[0] is firsts[0].images[0] for first in firsts)
    assert {(r.episode.key, r.episode.seed, r.episode.case) for r in group} == {(KEYS[0], 9, 0)}
    assert len({request.seed for request in asked}) == len(asked)
    assert len({request.id for request in asked}) == len(asked)


def test_memory_stays_flat_as_a_picture_is_stored_once(tokens: ChatTokens) -> None:
    """Trap 18: equal pictures are one object; with the rollouts all go but the plain one of each slot's last case."""
    w, scripted = worker(4), engine(tokens, by_turn("BAAzz", "BAAzz", "S"))
    for iteration in range(3):
        groups = collect(JOBS, [w], scripted, tokens, iteration=iteration)
        images = [image for group in groups for r in group for q in r.sequences for image in q.images]
        assert len(images) == 6 * 3 * 3
        # three images with a case each for disc and bar: plain, and with the box's mask, which is the same for both
        assert len({id(image) for image in images}) == len({image.sha for image in images}) == 3 * 2
        seen = [weakref.ref(image) for image in images]
        del groups, images
        assert len({id(image()) for image in seen if image() is not None}) <= w.slots


# timing


@pytest.mark.parametrize("lockstep", [False, True], ids=["free", "lockstep"])
def test_what_is_played_is_the_same_whatever_the_timing_the_workers_and_the_slots(
    tokens: ChatTokens, lockstep: bool
) -> None:
    """Random delays in env and engine, one worker or three, few slots or many; the plain run is the measure."""
    plain = collect(JOBS, [worker(3)], engine(tokens), tokens)
    batches = []
    for seed, slots in enumerate([(3,), (18,), (4, 3, 5)]):
        workers = [Late(worker(count), 10 * seed + i) for i, count in enumerate(slots)]
        late = Late(engine(tokens), 100 + seed, lockstep)
        assert content(collect(JOBS, workers, late, tokens)) == content(plain)
        batches.append(sorted(late.batches))
    assert batches == [batches[0]] * 3
    if lockstep:
        assert max(len(batch) for batch in batches[0]) == 3
    else:
        assert batches[0] == []
    assert len({turn.text for group in plain for r in group for turn in r.episode.turns}) > 4


def test_another_seed_or_iteration_is_another_rollout(tokens: ChatTokens) -> None:
    plain, *others = (
        content(collect(JOBS, [worker(3)], engine(tokens), tokens, **settings))
        for settings in ({}, {"seed": 6}, {"iteration": 1})
    )
    assert plain not in others
    assert others[0] != others[1]


def test_a_slow_worker_and_a_slow_answer_delay_no_one_else(tokens: ChatTokens) -> None:
    """No barrier: one worker's env and one member's answer wait until all that can be done without them is done."""
    jobs = [Job(i, KEYS[i % 6], 2) for i in range(8)]
    released, order = asyncio.Event(), []

    class Slow(Late):
        async def step(self, *args: Any, **keywords: Any) -> Any:
            await released.wait()
            return await self.inner.step(*args, **keywords)

    class Stuck(Late):
        async def generate(self, request: GenRequest) -> GenResult:
            if member_of(request) == (1, 1):
                await released.wait()
            return await self.inner.generate(request)

    async def run() -> None:
        # the slow worker takes group 0, the other one all that follow; of group 1 a member hangs
        workers = [Slow(worker(2), 0, most=0), worker(3)]
        settings = Settings(seed=0)
        async for group in play(jobs, workers, Stuck(engine(tokens), 0, most=0), tokens, settings):
            order.append(group[0].group)
            if len(order) == 6:
                assert not released.is_set()
                released.set()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert sorted(order) == list(range(8))
    assert set(order[6:]) == {0, 1}


def test_a_group_larger_than_the_slots_is_refused_at_once_and_more_groups_than_slots_wait(tokens: ChatTokens) -> None:
    with pytest.raises(MedSegError, match="a group of 5 episodes needs as many slots in every worker; there are 8, 4"):
        collect([Job(0, KEYS[0], 5)], [worker(8), worker(4)], engine(tokens), tokens)
    with pytest.raises(MedSegError, match="no worker"):
        collect(JOBS, [], engine(tokens), tokens)
    with pytest.raises(MedSegError, match="needs a key"):
        collect([Job(0)], [worker(1)], engine(tokens), tokens)
    assert collect([], [worker(1)], engine(tokens), tokens) == []
    assert len(collect(JOBS * 3, [worker(3)], engine(tokens), tokens)) == 18


def test_groups_come_as_they_are_complete_and_a_reader_that_leaves_stops_the_rest(tokens: ChatTokens) -> None:
    async def run() -> None:
        w = worker(3)
        async for _ in (groups := play(JOBS, [w], engine(tokens), tokens, Settings(seed=0))):
            break
        await groups.aclose()
        assert not left()
        again = [group async for group in play(JOBS, [w], engine(tokens), tokens, Settings(seed=5, max_new_tokens=64))]
        plain = await asyncio.to_thread(collect, JOBS, [worker(3)], engine(tokens), tokens)
        assert content(sorted(again, key=lambda group: group[0].group)) == content(plain)

    asyncio.run(run())
