"""Protocols in their asking form: an answer takes the place of the stop, the tool's words stay."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from medseg_gym.errors import InvalidActionError, MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies import protocols
from medseg_gym.policies.protocols.base import Moment
from medseg_gym.policies.protocols.questions import THOUGHT, asking, demonstration
from medseg_gym.types import Answer, Box, Click, Stop, Undo, Unreadable

GRID = Grid(64, 64)
ASKED = "On which side is it?\nA. left\nB. right"


def form(name: str, **options: object) -> protocols.ChatProtocol:
    return asking(protocols.make(name, **options))


@pytest.mark.parametrize("name", list(protocols.PROTOCOLS))
@pytest.mark.parametrize("said", ["B", "left lung", 'so-called "x"', "5.5 cm, or {more}", "ä"])
def test_what_is_said_as_an_answer_is_read_as_that_answer(name: str, said: str) -> None:
    spoken = form(name)
    assert spoken.parse(demonstration(spoken, said, GRID), GRID).action == Answer(said)


@pytest.mark.parametrize("name", list(protocols.PROTOCOLS))
def test_the_question_stands_in_the_first_turn_and_a_box_or_click_can_still_be_said(name: str) -> None:
    spoken = form(name)
    assert ASKED in spoken.user(Moment(ASKED, 0, False))
    for action in (Box(8, 8, 40, 40), Click(10, 12, True), Undo()):
        verb = {Box: "box", Click: "positive", Undo: "undo"}[type(action)]
        if verb in spoken.verbs:
            text = spoken.format(action, GRID)
            assert spoken.parse(text, GRID).action == GRID.snap(action)
    assert "Unreadable" not in spoken.user(Moment(ASKED, 1, False, Unreadable("no")))


@pytest.mark.parametrize(("name", "stop"), [("tiny", "S"), ("medsam-agent", '{"name": "stop_action"}')])
def test_a_question_has_no_stop(name: str, stop: str) -> None:
    spoken = form(name)
    text = stop if name == "tiny" else f"<tool_call>{stop}</tool_call>"
    assert protocols.make(name).parse(text, GRID).action == Stop()
    decision = spoken.parse(text, GRID)
    assert decision.action is None
    assert decision.reason


def test_medsam_agents_answer_is_a_function_beside_the_tools() -> None:
    spoken = form("medsam-agent", verbs=("box", "stop"))
    listed = [json.loads(line)["name"] for line in spoken.system().split("\n") if line.startswith('{"name": "')]
    assert listed == ["add_bbox", "answer"]

    def call(**arguments: object) -> str:
        return f"<tool_call>{json.dumps({'name': 'answer', 'arguments': arguments})}</tool_call>"

    assert spoken.parse(f"<think>{call(text='no')}</think>{call(text=' yes ')}", GRID).action == Answer("yes")
    for wrong in (call(), call(text=""), call(text=3), call(text="x" * 600), call(text="a", more=1), "yes"):
        assert spoken.parse(wrong, GRID).action is None


def test_ibis_answers_by_terminate_and_what_stands_in_answer() -> None:
    spoken = form("ibis")
    said = demonstration(spoken, "yes", GRID)
    assert said == f"<think>\n{THOUGHT}\n</think>\n<action>\nTerminate\n</action>\n<answer>\nyes\n</answer>"
    silent = "<think>\nwell\n</think>\n<action>\nTerminate\n</action>"
    assert spoken.parse(silent, GRID).action is None
    assert spoken.parse(silent + "<answer> </answer>", GRID).action is None
    point = "<think>\nwell\n</think>\n<action>\nPositive Point (0.5, 0.5)\n</action>"
    assert isinstance(spoken.parse(point, GRID).action, Click)


def test_an_asking_form_keeps_the_options_and_a_second_one_is_the_same() -> None:
    spoken = form("ibis", history=True, thinking=False)
    assert spoken.history
    assert "<think>" not in demonstration(spoken, "yes", GRID)
    assert asking(spoken) is spoken
    assert asking(asking(protocols.make("tiny"))).verbs == ("box",)


def test_the_form_for_masks_has_no_words_for_an_answer() -> None:
    for name in protocols.PROTOCOLS:
        with pytest.raises(InvalidActionError):
            protocols.make(name).format(Answer("yes"), GRID)


def test_a_protocol_without_an_asking_form_says_so_and_its_own_is_taken() -> None:
    class Other:
        name, verbs, history = "other", ("box",), True

    with pytest.raises(MedSegError, match="no words for questions"):
        asking(Other())  # type: ignore[arg-type]
    own = form("tiny")
    Other.asking = lambda self: own  # type: ignore[attr-defined]
    assert asking(Other()) is own  # type: ignore[arg-type]


def test_an_answer_that_would_end_its_own_tags_is_refused() -> None:
    for name, tag in (("ibis", "</answer>"), ("medsam-agent", "</tool_call>")):
        with pytest.raises(MedSegError, match="too early"):
            demonstration(form(name), f"yes {tag} no", GRID)
    assert replace(Answer("a"), text="b") == Answer("b")
