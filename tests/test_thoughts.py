"""Reasoning text: what the templates say, what a thought may not say, and a teacher that is asked again."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from string import Formatter
from typing import Any

import cv2
import numpy as np
import pytest
from chat_server import ChatServer
from conftest import Blobs
from trajectory_cases import several, trajectory

from medseg_gym.errors import MedSegError, PolicyUnavailableError
from medseg_gym.trajectories import store
from medseg_gym.trajectories.store import Trajectories
from medseg_gym.trajectories.thoughts import TemplateWriter, add_thoughts, moments, situation, where, write_thoughts
from medseg_gym.trajectories.wordings import ANSWERS, STYLES, THOUGHTS, forbidden
from medseg_gym.types import Box, Click, Stop, Undo


@pytest.mark.parametrize(
    "text",
    [
        "a red area",
        "RED",
        "reddish tissue",
        "It is blue.",
        "bluish",
        "the cross marks it",
        "crosses",
        "a crosshair",
        "TP",
        "the fps",
        "two FNs",
        "Ground Truth",
        "ground-truth mask",
        "groundtruths",
        "false negative",
        "GT",
        "true  positives",
        "(fp)",
        "yellow",
        "Vermilion",
        "the orange rim",
    ],
)
def test_forbidden_words_are_found_in_every_form(text: str) -> None:
    assert forbidden(text)


@pytest.mark.parametrize(
    "text",
    [
        "infrared",
        "scattered",
        "reduced",
        "across the border",
        "cross-section",
        "a cross section",
        "blurred",
        "ground glass",
        "the true border",
        "green edge",
        "https",
        "a positive point",
        "background truth",
    ],
)
def test_other_words_are_left_alone(text: str) -> None:
    assert not forbidden(text)


def test_a_case_about_a_forbidden_word_may_name_it() -> None:
    assert forbidden("the red blood cells lie left") == "red"
    assert not forbidden("the Red Blood Cells lie left", "red blood cells")
    assert forbidden("the red blood cells are red", "red blood cells") == "red"


def test_no_template_says_what_only_the_oracle_sees() -> None:
    for text in (*sum(THOUGHTS.values(), ()), *sum(ANSWERS.values(), ())):
        assert not forbidden(text) and "<" not in text, text
        assert {name for _, name, _, _ in Formatter().parse(text) if name} <= {"structure", "modality", "where"}
    assert set(ANSWERS) == set(itertools.product(STYLES, (True, False))) and len(STYLES) == 5


def test_situations_follow_from_mask_and_action() -> None:
    def told(kind: str, **more: Any) -> list[str]:
        return [situation(moment) for moment in moments(trajectory(0, kind, **more)[0])]

    assert told("plain") == ["first box", "missed", "fits"]
    assert told("plain", boxes=False) == ["first click", "missed", "fits"]
    assert told("self-correction") == ["first box", "missed", "undo", "missed", "fits"]
    assert told("wrong-start", boxes=False) == ["discard", "click again", "missed", "fits"]
    assert told("wrong-start") == ["discard", "box again", "missed", "fits"]


def test_where_is_told_from_the_picture_and_then_from_the_mask() -> None:
    nothing = np.zeros((90, 120), np.bool_)
    assert where(Click(10, 10), nothing) == "in the upper left part of the image"
    assert where(Click(60, 45), nothing) == "near the middle of the image"
    assert where(Click(60, 80), nothing) == "in the lower part of the image"
    assert where(Box(90, 30, 119, 59), nothing) == "in the right part of the image"
    mask = nothing.copy()
    mask[30:60, 30:60] = True  # thirds of it end at 40 and 50
    assert where(Click(25, 25), mask) == "at its upper left"
    assert where(Click(45, 65), mask) == "at its lower end"
    assert where(Click(70, 45), mask) == "at its right side"
    assert where(Click(45, 45, positive=False), mask) == "in its middle"
    assert where(Box(0, 0, 30, 20), mask) == "in the upper left part of the image"
    high = nothing.copy()
    high[0:30, 0:30] = True
    assert where(Click(25, 25), high) == "at its lower right"  # of the mask, though in the upper left of the picture
    assert where(Stop(), mask) == where(Undo(), nothing) == ""


def test_the_same_seed_says_the_same_and_another_something_else() -> None:
    writer, pairs = TemplateWriter(3), several()
    first = writer.write(pairs)
    assert writer.write(pairs[::-1])[::-1] == first == TemplateWriter(3).write(pairs)
    assert TemplateWriter(4).write(pairs) != first
    for one in first:
        assert len(one.thoughts) == len(one.episode.turns) and all(one.thoughts) and one.answer
        assert "{" not in "".join(one.thoughts) + one.answer


def test_all_five_styles_of_answers_are_used() -> None:
    one, _ = trajectory()
    said = {TemplateWriter(seed).one(one).answer for seed in range(60)}
    words = {"structure": "disc", "modality": "drawing"}
    for style in STYLES:
        assert said & {text.format(**words) for text in ANSWERS[style, True]}, style
    empty = replace(one.episode, turns=one.episode.turns[2:], iou=(0.0, 0.0), dice=(0.0, 0.0))
    absent = TemplateWriter().one(replace(one, episode=empty))
    assert absent.answer in {text.format(**words) for style in STYLES for text in ANSWERS[style, False]}
    assert absent.thoughts[0] in {text.format(**words) for text in THOUGHTS["absent"]}


def test_thoughts_are_written_to_another_folder_and_gone_on_with(tmp_path: Path) -> None:
    pairs = several()
    store.write(tmp_path / "a" / "trajectories-000000.h5", pairs, {"env": "x"})
    assert write_thoughts(tmp_path / "a", tmp_path / "whole", TemplateWriter(1)) == 5
    with store.TrajectoryWriter(tmp_path / "b", {"env": "x", "thoughts": {"writer": "template", "seed": 1}}) as begun:
        for pair in list(add_thoughts(pairs, TemplateWriter(1)))[:2]:
            begun.add(*pair)
    assert write_thoughts(tmp_path / "a", tmp_path / "b", TemplateWriter(1)) == 3
    whole = list(Trajectories(tmp_path / "whole").records())
    assert list(Trajectories(tmp_path / "b").records()) == whole == TemplateWriter(1).write(pairs)
    with pytest.raises(MedSegError, match="other settings"):
        write_thoughts(tmp_path / "a", tmp_path / "b", TemplateWriter(2))
    store.write(tmp_path / "c" / "trajectories-000000.h5", pairs[::-1], {"env": "x"})
    with pytest.raises(MedSegError, match="other trajectories"):
        write_thoughts(tmp_path / "c", tmp_path / "b", TemplateWriter(1))
    with pytest.raises(MedSegError, match="no trajectories in"):
        write_thoughts(tmp_path, tmp_path / "d", TemplateWriter(1))


# the teacher


@pytest.fixture
def teach() -> Iterator[Any]:
    """A function that has a teacher, who answers as given, write thoughts for trajectories."""
    pytest.importorskip("openai")
    from medseg_gym.policies.endpoint import EndpointModel
    from medseg_gym.trajectories.teacher import TeacherWriter

    opened = []

    def run(url: str, **options: Any) -> TeacherWriter:
        model = EndpointModel(url, "wise", temperature=0.7, retries=0, timeout=20)
        opened.append(model)
        return TeacherWriter(model, lambda key: Blobs()[key].target, size=64, **options)

    yield run
    for model in opened:
        model.close()


def texts(body: dict[str, Any]) -> str:
    return "\n".join(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text")


def test_the_teachers_thoughts_land_at_their_turns(teach: Any) -> None:
    def answer(body: dict[str, Any]) -> str:
        action = texts(body).split("Next action: ")[1].split()[1]
        return f' "<think>hm</think>I {action}\n now." '

    with ChatServer(answer) as server:
        writer = teach(server.url)
        pairs = [trajectory(), trajectory(0, "self-correction")]
        plain, wrong = writer.write(pairs)
    templates = TemplateWriter().write(pairs)
    assert plain.thoughts == ("I box now.", "I positive now.", "I stop, now.")
    assert wrong.thoughts == ("I box now.", templates[1].thoughts[1], "I take now.", "I positive now.", "I stop, now.")
    assert [one.answer for one in (plain, wrong)] == [one.answer for one in templates]
    assert dict(writer.counts) == {"asked": 7}  # the marked turn is the template's
    assert len({body["seed"] for body in server.requests}) == 7


def test_the_teacher_sees_the_agents_view_and_the_privileged_one(teach: Any) -> None:
    with ChatServer(lambda body: "fine") as server:
        teach(server.url).write([trajectory()])
        first = next(body for body in server.requests if "a box" in texts(body))
    assert "disc" in texts(first) and "drawing" in texts(first)
    pictures = []
    for part in first["messages"][1]["content"][:2]:
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        pictures.append(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int))
    own, privileged = pictures
    target = Blobs()["Blobs/train-0/disc"].target
    inside = np.pad(target, ((8, 8), (0, 0)))  # 48 x 64 in the middle of 64 x 64
    assert (own[inside] == (200, 180, 170)).all()  # no mask yet: the plain image
    missed = np.round(0.45 * np.array((200, 180, 170)) + 0.55 * np.array((240, 228, 66)))
    share = (np.abs(privileged[inside] - missed).max(axis=1) <= 1).mean()
    assert share > 0.6  # yellow where it is missed, but for the box drawn over it


def test_a_word_that_gives_the_view_away_is_asked_about_again(teach: Any) -> None:
    said = iter(["The yellow part is missed.", "The ground truth says so.", "I see an edge."])
    with ChatServer(lambda body: next(said)) as server:
        writer = teach(server.url)
        one, image = trajectory()
        stop = replace(
            one,
            episode=replace(one.episode, turns=one.episode.turns[:1], iou=(0.0, 0.5), dice=(0.0, 0.6)),
        )
        assert writer.write([(stop, image)])[0].thoughts == ("I see an edge.",)
    assert dict(writer.counts) == {"asked": 1, "refused": 2}
    again = server.requests[1]["messages"]
    assert again[2] == {"role": "assistant", "content": "The yellow part is missed."}
    assert "'yellow'" in again[3]["content"]


@pytest.mark.parametrize("bad", ["", "red", "x" * 900, "a <tool_call>", "at (120, 340)", "  ` ` "])
def test_after_so_many_tries_the_template_stands_in(teach: Any, bad: str) -> None:
    with ChatServer(lambda body: bad) as server:
        writer = teach(server.url, tries=2)
        pair = trajectory()
        assert writer.write([pair])[0].thoughts == TemplateWriter().one(pair[0]).thoughts
    assert dict(writer.counts) == {"asked": 3, "refused": 6, "fallback": 3}


def test_a_server_that_fails_now_and_then_is_asked_again(teach: Any) -> None:
    replies = itertools.cycle([500, "I look."])
    with ChatServer(lambda body: next(replies)) as server:
        writer = teach(server.url)
        told = [writer.write([trajectory(number)])[0].thoughts for number in range(2)]
    assert all(thought == "I look." for thoughts in told for thought in thoughts)
    assert writer.counts["asked"] == 6 and writer.counts["failed"] >= 3 and not writer.counts["fallback"]


def test_a_teacher_that_is_gone_leaves_what_was_written(teach: Any, tmp_path: Path) -> None:
    pairs = [pair for _ in range(8) for pair in several()]  # 40: a batch of 32, and the rest
    store.write(tmp_path / "a" / "trajectories-000000.h5", pairs, {})
    unmarked = sum(len(one.episode.turns) - sum(one.marked) for one, _ in pairs[:32])
    count = itertools.count()
    with ChatServer(lambda body: "I look." if next(count) < unmarked else 401) as server:
        with pytest.raises(PolicyUnavailableError, match="401"):
            write_thoughts(tmp_path / "a", tmp_path / "b", teach(server.url))
        assert len(Trajectories(tmp_path / "b")) == 32
        server.answer = lambda body: "I look."
        assert write_thoughts(tmp_path / "a", tmp_path / "b", teach(server.url)) == 8
    assert len(Trajectories(tmp_path / "b")) == 40
