"""evaluate-vqa: scripted and spoken answerers, intervals by patient, resumption, and failures that count as wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from chat_server import ChatServer
from typer.testing import CliRunner

from medseg_gym.bench.vqa import evaluate_vqa, row_of
from medseg_gym.cli import app
from medseg_gym.datasets.vqa import open_questions
from medseg_gym.errors import MedSegError
from medseg_gym.types import Answer, Box, Decision, View

SPEC = "Phantom:task=cue,cases=20"
QUESTIONS = open_questions(SPEC)


class Knows:
    """Draws a box, then answers right but for the questions of one kind, at which it fails."""

    name = "Knows"

    def __init__(self, fails: str = "", after: int = 10**6) -> None:
        self.fails, self.left = fails, after

    def act(self, views: Sequence[View], rngs: Sequence[Any]) -> list[Decision]:
        return [self._one(view) for view in views]

    def _one(self, view: View) -> Decision:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        if self.fails and view.key.endswith(self.fails):
            raise ValueError("no idea")
        return Decision(Answer(QUESTIONS.question(view.key).answer) if view.turn else Box(5, 5, 30, 30))


def test_a_right_and_a_failing_answerer_are_told_by_kind(tmp_path: Path) -> None:
    found = evaluate_vqa(SPEC, Knows("side"), out=tmp_path, tool="Stub")
    (row,) = found.summary["rows"]
    assert row["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert {kind: value["mean"] for kind, value in row["kinds"].items()} == {"height": 1.0, "place": 1.0, "side": 0.0}
    assert row["ended"] == {"stopped": 40, "horizon": 0, "unreadable": 0, "failed": 20}
    assert row["closed"]["cases"] == 60
    assert row["open"] is None
    assert row["answered"] == 40
    assert row["accuracy"]["patients"] == 20
    assert "20 questions failed" in found.summary["notes"][0]
    assert "no idea" in found.summary["notes"][0]
    right = [answer for answer in found.answers if answer["right"]]
    assert {answer["tool_calls"] for answer in right} == {1}


def test_scripted_answerers_are_near_chance_and_compared_pair_by_pair(tmp_path: Path) -> None:
    found = evaluate_vqa(SPEC, ["RandomAnswer", "MajorityAnswer"], out=tmp_path, tool="Stub")
    first, second = found.summary["rows"]
    for row in (first, second):
        assert 0.3 < row["accuracy"]["mean"] < 0.75
        assert row["turns"] == 1
        assert row["used_the_tool"] == 0
    assert second["against_first"]["interval"]["mean"] == pytest.approx(
        second["accuracy"]["mean"] - first["accuracy"]["mean"]
    )


def test_the_majority_is_that_of_the_train_split_within_the_choices(tmp_path: Path) -> None:
    from medseg_gym.policies.answers import MajorityAnswer

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    base = {"image": "a.png", "split": "train"}
    records = [{**base, "question": f"{n}?", "answer": "no" if n else "yes"} for n in range(3)]
    records += [{**base, "question": f"w{n}?", "answer": "a Cell" if n else "lung"} for n in range(3)]
    records += [
        {"image": "a.png", "question": "new?", "answer": "yes", "choices": ["yes", "no"]},
        {"image": "a.png", "question": "what?", "answer": "cell"},
        {"image": "a.png", "question": "which?", "answer": "lung", "choices": ["lung", "heart"]},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    questions = open_questions(str(tmp_path / "q.jsonl"))
    policy = MajorityAnswer(questions)
    said = {questions.question(key).text: policy._answer(questions.question(key)) for key in questions.keys("test")}
    assert said == {"new?": "no", "what?": "a Cell", "which?": "lung"}


def test_a_run_that_was_cut_off_goes_on_to_the_same_files(tmp_path: Path) -> None:
    evaluate_vqa(SPEC, Knows(), out=tmp_path / "whole", tool="Stub", cases=20, seed=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate_vqa(SPEC, Knows(after=23), out=tmp_path / "cut", tool="Stub", cases=20, seed=3, num_envs=4)
    half = (tmp_path / "cut" / "episodes.jsonl").read_bytes()
    assert 0 < half.count(b"\n") < 20
    evaluate_vqa(SPEC, Knows(), out=tmp_path / "cut", tool="Stub", cases=20, seed=3)
    for name in ("episodes.jsonl", "answers.jsonl", "summary.json", "run.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert (tmp_path / "cut" / "episodes.jsonl").read_bytes().startswith(half)
    with pytest.raises(MedSegError, match="holds another run"):
        evaluate_vqa(SPEC, Knows(), out=tmp_path / "cut", tool="Stub", cases=10, seed=3)


def test_a_language_model_is_asked_by_the_asking_form_of_its_protocol(tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> str:
        said = json.dumps(body["messages"])
        answer = "B" if "B. right" in said else "no"
        return f"<tool_call>{json.dumps({'name': 'answer', 'arguments': {'text': answer}})}</tool_call>"

    with ChatServer(reply) as server:
        spec = f"vlm:model=m,base_url={server.url},size=64"
        found = evaluate_vqa(SPEC, spec, out=tmp_path, tool="Stub", cases=12)
    (row,) = found.summary["rows"]
    assert row["ended"]["stopped"] == 12
    assert {answer["said"] for answer in found.answers} <= {"B", "no"}
    for answer in found.answers:
        truth = QUESTIONS.question(answer["key"])
        assert answer["right"] == truth.right(answer["said"])
        assert answer["completion"].startswith("<tool_call>")
    assert "stop_action" not in json.dumps(server.requests[0])


def test_a_checkpoint_in_this_process_is_asked_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from medseg_gym.rl.tiny_model import save_tiny_model

    model = save_tiny_model(tmp_path / "tiny")
    spec = f"vlm-local:model={model},protocol=tiny,size=64,max_tokens=4"
    found = evaluate_vqa(SPEC, spec, out=tmp_path / "out", tool="Stub", cases=4, horizon=2)
    assert sum(found.summary["rows"][0]["ended"].values()) == 4


def test_a_picture_that_is_gone_counts_as_a_wrong_answer(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    records = [{"image": f"{name}.png", "question": "q?", "answer": "yes", "split": "test"} for name in "ab"]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")

    class Yes:
        name = "Yes"

        def act(self, views: Sequence[View], rngs: Sequence[Any]) -> list[Decision]:
            return [Decision(Answer("yes")) for _ in views]

    found = evaluate_vqa(str(tmp_path / "q.jsonl"), Yes(), out=tmp_path / "out", tool="Stub")
    (row,) = found.summary["rows"]
    assert row["accuracy"]["mean"] == 0.5
    assert row["ended"]["failed"] == 1
    assert [answer["patient"] for answer in found.answers] == ["a.png", "b.png"]
    assert "no such file" in found.answers[1]["error"]


def test_accuracies_have_intervals_clustered_by_patient() -> None:
    """Two patients of two questions each, both right or both wrong: mean .5, and an interval that says so little."""
    base = {"kind": "", "closed": True, "ended": "stopped", "unreadable": 0, "turns": 1, "tool_calls": 0, "said": "x"}
    answers = [{**base, "key": f"{p}{n}", "patient": p, "right": p == "a"} for p in "ab" for n in range(2)]
    row = row_of("x", answers)
    assert row["accuracy"]["mean"] == 0.5
    assert (row["accuracy"]["low"], row["accuracy"]["high"]) == (0.0, 1.0)
    assert row["accuracy"]["few_patients"]
    with pytest.raises(MedSegError, match="asked nothing"):
        row_of("x", [])


def test_the_commands_prepare_and_evaluate(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    records = [{"image": "a.png", "question": f"q{n}?", "answer": "yes", "split": "test"} for n in range(3)]
    records.append({"image": "gone.png", "question": "q?", "answer": "yes"})
    (tmp_path / "all.json").write_text(json.dumps(records), encoding="utf-8")
    run = CliRunner().invoke
    source = ["Own", "--from", str(tmp_path), "--layout", "json", "--out", str(tmp_path / "own")]
    prepared = run(app, ["data", "prepare-vqa", *source])
    assert prepared.exit_code == 3, prepared.output
    assert "3 questions" in prepared.output
    assert "'gone.png' is not there" in prepared.output
    asked = ["--questions", str(tmp_path / "own"), "--tool", "Stub", "--out", str(tmp_path / "run")]
    evaluated = run(app, ["evaluate-vqa", *asked, "--policy", "RandomAnswer"])
    assert evaluated.exit_code == 0, evaluated.output
    assert "RandomAnswer" in evaluated.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows"][0]["accuracy"]["cases"] == 3
    wrong = run(app, ["evaluate-vqa", *asked, "--policy", "CentreClick"])
    assert wrong.exit_code == 1
