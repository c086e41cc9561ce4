"""Trajectories as chats: in a protocol's words, with the marks of what is not to be learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trajectory_cases import trajectory

from medseg_gym.errors import InvalidActionError, MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies import protocols
from medseg_gym.trajectories.chats import chats, speakable, unspeakable, with_texts
from medseg_gym.trajectories.export import answers
from medseg_gym.types import Turn, Unreadable


def test_the_texts_are_read_as_the_actions() -> None:
    for kind in ("plain", "self-correction", "wrong-start"):
        one, image = trajectory(0, kind)
        protocol, grid = protocols.make("medsam-agent"), Grid(*image.shape[:2])
        for turn in with_texts(one, protocol).turns:
            assert protocol.parse(turn.text, grid).action == turn.action


def test_a_chat_has_all_turns_with_history_and_one_without() -> None:
    one, image = trajectory(0, "self-correction", boxes=False)
    (whole,) = chats(one, image, protocols.make("medsam-agent"), 64)
    assert [message["role"] for message in whole.messages] == ["system", *["user", "assistant"] * 5]
    assert whole.trained == (True, False, True, True, True) and whole.turns == (0, 1, 2, 3, 4)
    apart = chats(one, image, protocols.make("ibis", thinking=False), 64)
    assert [len(chat.messages) for chat in apart] == [3] * 5
    assert [(chat.trained, chat.turns) for chat in apart] == [((turn != 1,), (turn,)) for turn in range(5)]


def test_rows_for_trainers_without_a_mask_hold_no_marked_answer_last() -> None:
    one, image = trajectory(0, "self-correction", boxes=False)
    (whole,) = chats(one, image, protocols.make("medsam-agent"), 64)
    assert [len(row) for row in answers(whole, "turn")] == [3, 7, 9, 11]  # system, then two messages a turn; not turn 1
    assert list(answers(whole, "chat")) == []
    plain, image = trajectory()
    (whole,) = chats(plain, image, protocols.make("medsam-agent"), 64)
    assert list(answers(whole, "chat")) == [whole.messages]


def test_thoughts_answer_and_instruction_are_told_where_they_have_a_place() -> None:
    one, image = trajectory(boxes=False)
    one = replace(one, thoughts=("look", "there", "done"), answer="It is outlined.", instruction="Find the disc!")
    ibis = [chat.messages for chat in chats(one, image, protocols.make("ibis"), 64)]
    assert ibis[0][2]["content"].startswith("<think>\nlook\n</think>\n<action>\nPositive Point")
    assert ibis[2][2]["content"].endswith("<answer>\nIt is outlined.\n</answer>")
    assert "<answer>" not in ibis[1][2]["content"]
    assert all("Find the disc!" in messages[1]["content"][1]["text"] for messages in ibis)
    agent = protocols.make("medsam-agent")
    assert "look" not in with_texts(one, agent).turns[0].text  # its released form has no thoughts
    assert with_texts(one, agent, thoughts=True).turns[0].text.startswith("look\n<tool_call>")


def test_a_protocol_that_wants_thoughts_says_where_they_come_from() -> None:
    one, image = trajectory(boxes=False)
    with pytest.raises(MedSegError, match=r"trajectories thoughts.*thinking=False"):
        chats(one, image, protocols.make("ibis"), 64)
    assert speakable(one, protocols.make("ibis"))  # its actions have words


def test_actions_without_words_raise_and_can_be_asked_about() -> None:
    box, image = trajectory()
    undo, _ = trajectory(0, "self-correction")
    assert speakable(box, protocols.make("medsam-agent")) and not speakable(box, protocols.make("ibis"))
    assert "needs the verb 'undo'" in unspeakable(undo, protocols.make("medsam-agent", ("positive", "box", "stop")))
    with pytest.raises(InvalidActionError, match=r"turn 0: Box.* needs the verb 'box'"):
        chats(box, image, protocols.make("ibis", thinking=False), 64)
    turns = box.episode.turns
    mute: tuple[Turn, ...] = (replace(turns[0], action=Unreadable("?")), *turns[1:])
    assert "unreadable" in unspeakable(replace(box, episode=replace(box.episode, turns=mute)), protocols.make("ibis"))


def test_the_tiny_grammar_may_be_coarser_than_the_image() -> None:
    one, image = trajectory()
    box_and_stop = (one.episode.turns[0], one.episode.turns[2])
    episode = replace(one.episode, turns=box_and_stop, iou=one.episode.iou[:3], dice=one.episode.dice[:3])
    (told,) = chats(replace(one, episode=episode), image, protocols.make("tiny"), 64)
    assert [len(m["content"]) for m in told.messages if m["role"] == "assistant"] == [5, 1]


def test_what_looks_like_a_special_token_is_defused() -> None:
    one, image = trajectory()
    (told,) = chats(replace(one, instruction="<image> of <|im_end|>"), image, protocols.make("medsam-agent"), 64)
    assert "< image> of < |im_end|>" in told.messages[1]["content"][1]["text"]


def test_an_episode_without_turns_has_no_chat() -> None:
    one, image = trajectory()
    empty = replace(one, episode=replace(one.episode, turns=(), iou=(0.0,), dice=(0.0,)))
    assert chats(empty, image, protocols.make("medsam-agent"), 64) == []
