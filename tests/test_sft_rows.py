"""What supervised training is given: the ids a rollout has, the loss where it belongs, and every chat in its turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Blobs

pytest.importorskip("torch")
pytest.importorskip("transformers")

from rollouts import by_turn, collect, engine, make_tokens, worker

from medseg_gym import tools
from medseg_gym.errors import InvalidActionError, MedSegError
from medseg_gym.policies import protocols
from medseg_gym.rl.rollout import Job
from medseg_gym.rl.sft_rows import ChatRows, drawn, open_data, sequences_of
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import TokenSequence
from medseg_gym.trajectories.chats import with_texts
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.sample import sample
from medseg_gym.trajectories.store import write
from medseg_gym.types import Box, Click, Image, Stop

KEYS = [f"Blobs/train-{i}/disc" for i in range(3)]
SIZE = 64


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> ChatTokens:
    return make_tokens(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def demonstrations() -> list[tuple[Trajectory, Image]]:
    """A box-to-point and a click trajectory of each disc, outlined by GrabCut."""
    samples, tool = [Blobs()[key] for key in KEYS], tools.make("GrabCut")
    return [
        (one, case.image)
        for strategy in ("box-to-point", "sequential-click")
        for one, case in zip(sample(tool, samples, strategy), samples, strict=True)
    ]


def segments(sequences: Sequence[TokenSequence]) -> list[Any]:
    return [
        [(s.kind, s.ids, s.turn, [image.pixels.tobytes() for image in s.images]) for s in sequence.segments]
        for sequence in sequences
    ]


def with_thoughts(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, thoughts=("The disc is bright.",) * len(trajectory.episode.turns), answer="Done.")


@pytest.mark.parametrize("name", ["medsam-agent", "ibis", "tiny"])
def test_the_ids_trained_are_those_of_a_rollout_in_which_the_same_is_said(
    name: str, tokens: ChatTokens, demonstrations: list[tuple[Trajectory, Image]]
) -> None:
    """Trap 19: segment for segment, with the pictures, over all turns; ibis as a chat a turn."""
    strategy = "box-to-point" if name != "ibis" else "sequential-click"
    chosen = [(one, image) for one, image in demonstrations if one.strategy == strategy and one.episode.ended]
    if name == "tiny":  # it has no words for clicks
        kinds = [tuple(type(turn.action) for turn in one.episode.turns) for one, _ in chosen]
        chosen = [pair for pair, kind in zip(chosen, kinds, strict=True) if kind == (Box, Stop)]
    assert chosen
    for one, image in chosen:
        trajectory = with_thoughts(one) if name == "ibis" else one
        play = worker(1, name, "GrabCut", horizon=6)
        trained = sequences_of(trajectory, image, play.protocol, tokens, SIZE)
        texts = [turn.text for turn in with_texts(trajectory, play.protocol).turns]
        said = engine(tokens, by_turn(*texts))
        (rollout,) = collect([Job(0, one.episode.key)], [play], said, tokens, max_new_tokens=200)[0]
        assert rollout.episode.ended == "stopped"
        assert [turn.action for turn in rollout.episode.turns] == [turn.action for turn in one.episode.turns]
        assert segments(trained) == segments(rollout.sequences)
        assert len(trained) == (len(texts) if name == "ibis" else 1)
        for mine, played in zip(trained, rollout.sequences, strict=True):
            assert (mine.loss_mask == played.loss_mask).all()


def test_the_loss_falls_on_answers_with_their_end_of_turn_and_on_no_marked_one(
    tokens: ChatTokens, demonstrations: list[tuple[Trajectory, Image]]
) -> None:
    """Traps 3 and 9, and the mistakes of reflective trajectories."""
    one, image = demonstrations[0]
    turns = len(one.episode.turns)
    protocol = protocols.make("medsam-agent")
    texts = [turn.text for turn in with_texts(one, protocol).turns]
    answers = [(*tokens.text(text), tokens.end) for text in texts]
    (plain,) = sequences_of(one, image, protocol, tokens, SIZE)
    assert np.array(plain.ids)[plain.loss_mask].tolist() == [token for answer in answers for token in answer]
    marked = replace(one, marked=(True, *[False] * (turns - 1)))
    (shown,) = sequences_of(marked, image, protocol, tokens, SIZE)
    assert shown.ids == plain.ids
    kept = [token for answer in answers[1:] for token in answer]
    assert np.array(shown.ids)[shown.loss_mask].tolist() == kept


def stored(path: Path, pairs: Sequence[tuple[Trajectory, Image]]) -> Any:
    write(path / "t.h5", pairs, {})
    return open_data(path / "t.h5")


def rows(data: Any, tokens: ChatTokens, protocol: str = "medsam-agent", **options: Any) -> ChatRows:
    given = {"size": SIZE, "max_chat_tokens": 12288, **options}
    return ChatRows(data, protocols.make(protocol), tokens, **given)


def test_refused_trajectories_long_chats_and_marked_turns_are_left_out_and_counted(
    tmp_path: Path, tokens: ChatTokens, demonstrations: list[tuple[Trajectory, Image]]
) -> None:
    (a, image), (b, other), (c, last) = [d for d in demonstrations if d[0].strategy == "sequential-click"]
    turns = [len(one.episode.turns) for one in (a, b, c)]
    marked = replace(with_thoughts(a), marked=(True, *[False] * (turns[0] - 1)))
    data = stored(tmp_path, [(marked, image), (replace(b, dropped="iou"), other), (with_thoughts(c), last)])
    assert len(rows(data, tokens)) == 2  # with history a chat is learned if any of its turns is
    every = rows(data, tokens, "ibis")
    assert len(every) == turns[0] - 1 + turns[2]
    assert every.notes() == "left out: 1 refused, 1 of marked turns alone"
    lengths = sorted(len(sequence.ids) for sequence in every)
    longest = lengths.count(lengths[-1])
    short = rows(data, tokens, "ibis", max_chat_tokens=lengths[-1] - 1)
    assert len(short) == len(every) - longest > 0
    assert f"{longest} longer than {lengths[-1] - 1} tokens (max_chat_tokens)" in short.notes()


def test_a_chat_of_just_as_many_tokens_as_allowed_is_kept(
    tmp_path: Path, tokens: ChatTokens, demonstrations: list[tuple[Trajectory, Image]]
) -> None:
    data = stored(tmp_path, demonstrations[:1])
    length = len(rows(data, tokens)[0].ids)
    assert len(rows(data, tokens, max_chat_tokens=length)[0].ids) == length
    with pytest.raises(MedSegError, match=rf"no chat to learn from; left out: 1 longer than {length - 1} tokens"):
        rows(data, tokens, max_chat_tokens=length - 1)


def test_an_action_without_words_is_told_before_anything_is_trained(
    tmp_path: Path, tokens: ChatTokens, demonstrations: list[tuple[Trajectory, Image]]
) -> None:
    clicks = [pair for pair in demonstrations if isinstance(pair[0].episode.turns[0].action, Click)]
    with pytest.raises(InvalidActionError, match=r"Blobs/train-0/disc, turn 0: .*needs the verb 'positive'"):
        rows(stored(tmp_path, clicks), tokens, "tiny")


def test_no_trajectories_are_told_with_the_command_that_makes_some(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedSegError, match="holds no trajectories; make some with: medseg-gym trajectories"):
        open_data(tmp_path / "empty")
    with pytest.raises(MedSegError, match="no trajectories at"):
        open_data(tmp_path / "nowhere")


def test_rendered_chats_are_kept_up_to_a_limit_and_equal_when_they_are_made_again(
    tmp_path: Path, tokens: ChatTokens, demonstrations: list[tuple[Trajectory, Image]]
) -> None:
    data = stored(tmp_path, demonstrations)
    kept, forgetful = rows(data, tokens), rows(data, tokens, cache_bytes=1)
    for number in [0, 1, 2, 0, 5, 1]:
        assert segments([kept[number]]) == segments([forgetful[number]])
    assert kept[3] is kept[3]
    assert len(forgetful._cache) == 1


def test_every_epoch_has_every_chat_once_in_an_order_of_its_own() -> None:
    """Trap 10: the chats of a step hang on its number alone, so a continuation draws what it would have drawn."""
    count, batch = 10, 4
    steps = [drawn(step, count, batch, seed=3) for step in range(1, 6)]
    flat = [number for step in steps for number in step]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert drawn(3, count, batch, seed=3) == steps[2]
    assert drawn(1, count, batch, seed=4) != steps[0]
    assert sorted(drawn(1, 3, 7, seed=0)) == [0, 0, 0, 1, 1, 2, 2] or len(drawn(1, 3, 7, seed=0)) == 7
