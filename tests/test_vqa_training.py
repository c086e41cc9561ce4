"""Questions beside masks in the loops: what is drawn in which order, what is logged, and how a run goes on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpo_parts import CUE, OneNumber, boxes, chat_tokens, rollout, settings, stand_ins
from sft_runs import cue_task
from sft_runs import settings as sft_settings
from test_grpo import final, numbers, ran

from medseg_gym.datasets.vqa import open_questions
from medseg_gym.errors import MedSegError
from medseg_gym.policies import protocols
from medseg_gym.rl import checkpoint, sync
from medseg_gym.rl.curriculum import CaseOrder
from medseg_gym.rl.engines.base import GenRequest
from medseg_gym.rl.engines.fake import FakeEngine
from medseg_gym.rl.groups import solved_share
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.rl.measures import of_rollouts
from medseg_gym.rl.parts import Parts
from medseg_gym.rl.questions import MixedOrder, Share, order_of
from medseg_gym.rl.sft import SFT
from medseg_gym.rl.sft_questions import MixedRows, QuestionRows
from medseg_gym.rl.sft_rows import ChatRows, drawn, open_data
from medseg_gym.rl.types import Rollout
from medseg_gym.types import Answer, Turn

SPEC = "Phantom:task=cue,cases=30"
QUESTIONS = open_questions(SPEC)
ASKED = {"questions": SPEC, "question_share": 0.5, "prompts": 4}


def says(request: GenRequest) -> str:
    """A letter or a yes by the seed to a question, a box and a stop to a mask."""
    text = chat_tokens().decode(request.ids)
    if "A..: answer" in text:
        return ("AA", "AB", "Ayes", "Ano")[request.seed % 4]
    return boxes(request)


def parts(learner: OneNumber | None = None) -> Parts:
    tokens = chat_tokens()
    worker = LocalWorker("MedSeg-Phantom-Stub-v0", 8, "tiny", size=64, options=CUE, questions=SPEC)
    engine = FakeEngine(says, tokens)
    return Parts([worker], engine, learner or OneNumber(), tokens, sync.publish, worker.env.dataset)


def question(group: int, member: int, said: str, *, closed: bool = True, dropped: str = "") -> Rollout:
    """An episode of one turn that answered "yes" or something else to a question whose answer is yes."""
    right = said == "yes"
    record = {"text": "?", "answer": "yes", "closed": closed, "choices": [], "said": said, "right": right}
    base = rollout(group, member, float(right), dropped=dropped)
    turn = Turn(Answer(said), float(right), {"answer": float(right)}, False, base.episode.turns[0].mask)
    return replace(
        base, episode=replace(base.episode, iou=(), dice=(), turns=(turn,), extra={"question": record}, key="q")
    )


@pytest.mark.parametrize(
    ("share", "marks"), [(0.5, "-Q-Q-Q-Q"), (0.25, "---Q---Q"), (0.75, "-QQQ-QQQ"), (0.1, "---------Q---------Q")]
)
def test_a_share_of_the_row_are_questions_spread_evenly(share: float, marks: str) -> None:
    row = Share(share)
    assert "".join("Q" if row.is_question(p) else "-" for p in range(len(marks))) == marks
    assert row.before(10_000) == round(10_000 * share)


def test_cases_come_in_the_order_they_have_without_questions_and_a_state_goes_on() -> None:
    def order() -> MixedOrder:
        return MixedOrder(CaseOrder(list("abcdef"), 3), CaseOrder([f"q{i}" for i in range(4)], 3), 0.5)

    plain = [draw.key for draw in CaseOrder(list("abcdef"), 3).draw(10)]
    whole = order()
    keys = [draw.key for draw in whole.draw(20)]
    assert [key for key in keys if not key.startswith("q")] == plain
    assert sum(key.startswith("q") for key in keys) == 10
    first, second = order(), order()
    started = [draw.key for draw in first.draw(7)]
    second.load(first.state())
    assert started + [draw.key for draw in second.draw(13)] == keys


def test_a_key_of_a_case_and_of_a_question_is_refused() -> None:
    with pytest.raises(MedSegError, match="both a case's and a question's"):
        MixedOrder(CaseOrder(["a", "b"], 0), CaseOrder(["b"], 0), 0.5)


def test_numbers_of_questions_stand_apart_and_no_iou_is_mixed_with_them() -> None:
    """Two masks of IoU .8 and .6; three questions, two right, and a dropped one: no 0 and no nan gets into the mean."""
    rollouts = [rollout(0, 0, 0.5, iou=0.8), rollout(0, 1, 0.5, iou=0.6)]
    rollouts += [question(1, 0, "yes"), question(1, 1, "no"), question(1, 2, "yes", closed=False)]
    found = of_rollouts([*rollouts, question(1, 3, "no", dropped="lost")])
    assert found["train/iou"] == pytest.approx(0.7)
    assert found["train/reward"] == pytest.approx(0.5)
    assert found["train/vqa_accuracy"] == pytest.approx(2 / 3)
    assert (found["train/vqa_closed"], found["train/vqa_open"]) == (0.5, 1.0)
    assert found["train/dropped"] == pytest.approx(1 / 6)
    assert "train/reward_answer" not in found
    only = of_rollouts(rollouts[2:])
    assert "train/iou" not in only
    assert not any(name.startswith("train/vqa") for name in of_rollouts(rollouts[:2]))


def test_a_question_counts_as_solved_by_its_right_answer() -> None:
    assert solved_share([question(0, 0, "yes"), question(0, 1, "no")], 0.8) == 0.5


def test_an_iteration_plays_both_and_logs_both(tmp_path: Path) -> None:
    ran(settings(tmp_path, **ASKED, validate_every=2, validate_cases=3, validate_questions=6), parts())
    trained = [record for record in numbers(tmp_path) if "train/iou" in record]
    assert len(trained) == 4
    for record in trained:
        assert 0 <= record["train/vqa_accuracy"] <= 1
        assert record["train/vqa_turns"] == 1
    validated = [record for record in numbers(tmp_path) if "val/iou" in record]
    assert all("val/vqa_accuracy" in record for record in validated)
    assert [record["val/iou"] for record in validated] == [validated[0]["val/iou"]] * 3  # the stand-in learns nothing


def test_the_groups_of_masks_are_those_of_a_run_without_questions(tmp_path: Path) -> None:
    """With 4 prompts of which half are questions, the masks' groups of an unfiltered run are those of 2 prompts."""

    def keys(out: Path, made: Parts, **given: Any) -> list[str]:
        seen: list[str] = []
        worker = made.workers[0]
        reset = worker.reset

        async def watched(slot: int, key: str, seed: int) -> Any:
            seen.append(key)
            return await reset(slot, key, seed)

        worker.reset = watched  # type: ignore[method-assign]
        ran(settings(out, filter=False, iterations=2, **given), made)
        return sorted(key for key in seen if key not in QUESTIONS)

    assert keys(tmp_path / "mixed", parts(), **ASKED) == keys(tmp_path / "plain", stand_ins(), prompts=2)


@pytest.mark.slow
def test_a_mixed_run_that_was_killed_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    """Trap 10: with questions among the groups, cursor and curriculum of both are in the checkpoint."""

    class Killed(BaseException):
        pass

    class Mortal(OneNumber):
        async def step(self, plan: Any, objective: Any) -> dict[str, float]:
            if self.steps == 2:
                raise Killed
            return await super().step(plan, objective)

    more = {**ASKED, "save_every": 1, "curriculum": "difficulty", "validate_every": 1, "validate_questions": 4}
    more |= {"validate_cases": 2, "gallery_every": 2}
    ran(settings(tmp_path / "whole", **more), parts())
    with pytest.raises(Killed):
        ran(settings(tmp_path / "cut", **more), parts(Mortal()))
    ran(settings(tmp_path / "cut", **more), parts())
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert final(tmp_path / "cut") == final(tmp_path / "whole")
    page = (tmp_path / "whole" / "gallery" / "iteration-000002.html").read_text(encoding="utf-8")
    assert "Answer yes or no." in page or "A. " in page


def test_settings_of_questions_bind_a_run_only_where_there_are_some(tmp_path: Path) -> None:
    plain = settings(tmp_path)
    assert "questions" not in checkpoint.binding(plain)
    assert checkpoint.digest(replace(plain, validate_questions=3)) == checkpoint.digest(plain)
    asked = replace(plain, questions=SPEC)
    assert checkpoint.digest(asked) != checkpoint.digest(plain)
    assert checkpoint.digest(replace(asked, question_share=0.3)) != checkpoint.digest(asked)
    assert isinstance(order_of(plain, ["a"]), CaseOrder)
    with pytest.raises(MedSegError, match="question_share"):
        replace(asked, question_share=1.0)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = cue_task().write_demonstrations(tmp_path_factory.mktemp("data") / "cue.h5", 8, seed=0)
    return file


def test_a_step_has_its_share_of_questions_and_the_trajectories_it_has_without(demonstrations: Path) -> None:
    spoken, tokens = protocols.make("tiny", ("box", "stop")), chat_tokens()
    rows = ChatRows(open_data(demonstrations), spoken, tokens, size=64, max_chat_tokens=512)
    asked = QuestionRows(QUESTIONS, spoken, tokens, size=64, max_chat_tokens=512)
    assert len(asked) == 90
    mixed = MixedRows(rows, asked, 0.5)
    for step in (1, 2, 5):
        chats = mixed.step(step, 8, seed=7)
        words = [tokens.decode(chat.ids) for chat in chats]
        assert ["A..: answer" in text for text in words] == [False, True] * 4
        shown = [chat.ids for chat in chats[::2]]
        assert shown == [rows[number].ids for number in drawn(step, len(rows), 4, 7)]
        for chat in chats[1::2]:
            (answer,) = [segment for segment in chat.segments if segment.kind == "action"]
            assert tokens.decode(answer.ids)[0] == "A"


def test_a_demonstrated_answer_is_right(demonstrations: Path) -> None:
    spoken, tokens = protocols.make("tiny", ("box", "stop")), chat_tokens()
    asked = QuestionRows(QUESTIONS, spoken, tokens, size=64, max_chat_tokens=512)
    for number in range(12):
        said = tokens.decode(asked[number].segments[-1].ids)
        assert QUESTIONS.question(asked.keys[number]).right(said[1:])


def test_a_question_longer_than_a_chat_may_be_says_what_to_raise() -> None:
    asked = QuestionRows(QUESTIONS, protocols.make("tiny"), chat_tokens(), size=64, max_chat_tokens=64)
    with pytest.raises(MedSegError, match="max_chat_tokens=64"):
        asked[0]


@pytest.mark.slow
def test_supervised_training_with_questions_goes_on_to_the_same_bits(demonstrations: Path, tmp_path: Path) -> None:
    """Trap 10, for mixed batches; and another set of questions is refused."""
    given = {"questions": SPEC, "question_share": 0.5, "steps": 4, "batch": 4, "save_every": 2}

    def run(name: str, **more: Any) -> bytes:
        asyncio.run(SFT(sft_settings(demonstrations, tmp_path / name, **{**given, **more})).run())
        return (tmp_path / name / "final" / "model.safetensors").read_bytes()

    whole = run("whole")
    run("cut", steps=2)
    assert run("cut", steps=4) == whole
    with pytest.raises(MedSegError, match="other settings|choose another"):
        run("cut", questions="Phantom:task=cue,cases=31")
