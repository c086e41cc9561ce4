"""`evaluate-vqa`: policies asked a set of questions; resumable, from episodes to answers and a summary.

Every question that was chosen counts: one that was not answered, failed, or could not even be read is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from medseg_gym.bench.cases import choose_cases
from medseg_gym.bench.drive import drive
from medseg_gym.bench.evaluate import machine, versions
from medseg_gym.bench.rundir import RunDir, write_whole
from medseg_gym.bench.statistics import difference, interval
from medseg_gym.datasets.vqa import Questions, open_questions
from medseg_gym.envs.config import whole_number
from medseg_gym.envs.questions import RECORD, QuestionCases, QuestionEngine, is_question, record_of
from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.errors import MedSegError
from medseg_gym.policies.answers import make
from medseg_gym.policies.base import Policy
from medseg_gym.types import Episode, Unreadable

ANSWERS, SUMMARY = "answers.jsonl", "summary.json"
SCHEMA = 1
VIEW = 8  # pixels of the env's own observations, which nobody looks at
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class VqaEvaluation:
    """What an evaluation gives back."""

    summary: Mapping[str, Any]
    answers: tuple[Mapping[str, Any], ...]  # as answers.jsonl has them
    directory: Path


def evaluate_vqa(
    questions: str | Questions,
    policy: str | Policy | Sequence[str | Policy],
    *,
    out: str | Path,
    tool: str = "Nano",
    split: str = "test",
    cases: int | None = None,
    seed: int = 0,
    horizon: int = 5,
    num_envs: int = 8,
    verbs: Sequence[str] | None = None,
    tool_options: Mapping[str, Any] | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> VqaEvaluation:
    """Asks every policy the questions and writes episodes.jsonl, answers.jsonl, summary.json and times.json into `out`.

    `questions` is what datasets.vqa.open_questions takes, `policy` what policies.answers.make takes. `cases` are a
    seeded choice of the split's questions, None all. `tool` is what an agent may use before it answers, for at most
    `horizon` turns, the answer's included. An interrupted run goes on when it is called again with the same arguments.
    """
    wanted = [policy] if isinstance(policy, str) or not isinstance(policy, Sequence) else list(policy)
    if not wanted:
        raise MedSegError("nothing to evaluate; give at least one policy")
    seed = whole_number("seed", seed, 0, 2**63 - 1)
    asked = open_questions(questions)
    env = _env(asked, tool, split, horizon, num_envs, verbs, tool_options or {})
    keys, notes = choose_cases(env.dataset, split, (), cases, seed)
    with ExitStack() as opened:
        ready: list[Policy] = []
        for spec in wanted:
            made = make(spec, asked, env.verbs)
            if isinstance(spec, str) and callable(close := getattr(made, "close", None)):
                opened.callback(close)
            if made.name in [other.name for other in ready]:
                raise MedSegError(f"two policies are named {made.name!r}; give each its own .name")
            ready.append(made)
        run = RunDir(Path(out), _settings(env, asked, ready, keys, seed, split, cases), restart=restart)
        opened.callback(run.close)
        for made in ready:
            _ask(env, made, keys, run, seed, progress)
        answers = [_answer(episode, asked) for episode in run.episodes]
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        write_whole(run.path / ANSWERS, lines)
        summary = _summary(answers, env, asked, [made.name for made in ready], seed, split, notes)
        run.write(SUMMARY, summary)
        run.write("times.json", {"machine": machine(), "seconds": sum(float(t["seconds"]) for t in run.times)})
        return VqaEvaluation(summary, tuple(answers), run.path)


def _env(
    questions: Questions,
    tool: str,
    split: str,
    horizon: int,
    num_envs: int,
    verbs: Sequence[str] | None,
    tool_options: Mapping[str, Any],
) -> SegmentVectorEnv:
    env = SegmentVectorEnv(
        num_envs,
        QuestionCases(questions),
        tool,
        autoreset_mode=AutoresetMode.DISABLED,
        split=split,
        horizon=horizon,
        size=VIEW,
        on_error="fail",
        verbs=None if verbs is None else tuple(verbs),
        tool_options=dict(tool_options),
    )
    engine = env.engine
    env.engine = QuestionEngine(engine.dataset, engine.tool, engine.config, num_envs)
    return env


def _settings(
    env: SegmentVectorEnv,
    questions: Questions,
    policies: Sequence[Policy],
    keys: Sequence[str],
    seed: int,
    split: str,
    cases: int | None,
) -> dict[str, Any]:
    """All that decides the answers; two runs with equal settings have equal episodes."""
    from medseg_gym import __version__

    return {
        "kind": "vqa",
        "version": __version__,
        "questions": questions.name,
        "content": questions.content,
        "policies": [policy.name for policy in policies],
        "tool": env.engine.tool.fingerprint,
        "verbs": list(env.verbs),
        "horizon": env.engine.config.horizon,
        "split": split,
        "seed": seed,
        "cases": cases,
        "keys": list(keys),
    }


def _ask(
    env: SegmentVectorEnv, policy: Policy, keys: Sequence[str], run: RunDir, seed: int, progress: Progress | None
) -> None:
    there = [episode for episode in run.episodes if episode.policy == policy.name]
    if [episode.key for episode in there] != list(keys[: len(there)]):
        raise MedSegError(f"{run.path / 'episodes.jsonl'}: other questions than asked now; start over with --restart")
    if progress:
        progress(policy.name, len(there), len(keys))
    todo = range(len(there), len(keys))
    played = drive(env, policy, keys, todo, label=policy.name, seed=seed)
    for done, (episode, timing) in enumerate(played, start=len(there) + 1):
        run.append(episode, {"seconds": timing.seconds, "costs": dict(timing.costs)})
        if progress:
            progress(policy.name, done, len(keys))


def _answer(episode: Episode, questions: Questions) -> dict[str, Any]:
    """What answers.jsonl has of an episode; of one whose case could not be read, the question still."""
    if is_question(episode):
        record, patient = dict(episode.extra[RECORD]), episode.patient
    else:
        row = questions.row(episode.key) if hasattr(questions, "row") else None
        record = record_of(questions.question(episode.key), getattr(row, "dataset", questions.name), None)
        patient = getattr(row, "patient", episode.key)
    return {
        "policy": episode.policy,
        "key": episode.key,
        "patient": patient,
        **record,
        "ended": episode.ended,
        "turns": len(episode.turns),
        "tool_calls": sum(turn.tool_called for turn in episode.turns),
        "unreadable": sum(isinstance(turn.action, Unreadable) for turn in episode.turns),
        "completion": episode.turns[-1].text if episode.turns else "",
        "error": episode.error,
    }


def _summary(
    answers: Sequence[Mapping[str, Any]],
    env: SegmentVectorEnv,
    questions: Questions,
    names: Sequence[str],
    seed: int,
    split: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    notes = list(notes)
    rows = []
    by_policy = {name: [answer for answer in answers if answer["policy"] == name] for name in names}
    for name, given in by_policy.items():
        rows.append(row_of(name, given, seed))
        for what, those in (
            ("failed", [a for a in given if a["ended"] == "failed"]),
            ("ended without an answer", [a for a in given if a["ended"] in ("horizon", "unreadable")]),
        ):
            if those:
                first = those[0]["error"] or those[0]["completion"][:120]
                notes.append(f"{name}: {len(those)} questions {what}; the first, {those[0]['key']}: {first}")
    for row in rows[1:]:
        row["against_first"] = _against(by_policy[row["policy"]], by_policy[names[0]], seed)
    return {
        "schema": SCHEMA,
        "kind": "vqa",
        "questions": questions.name,
        "content": questions.content,
        "split": split,
        "seed": seed,
        "tool": env.engine.tool.fingerprint,
        "horizon": env.engine.config.horizon,
        "measure": "exact match (medseg_gym.answers); failed and missing answers are wrong",
        "notes": notes,
        "versions": versions(),
        "rows": rows,
    }


def row_of(name: str, answers: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """A policy's numbers: accuracies with 95 % intervals clustered by patient, and its habits."""
    if not answers:
        raise MedSegError(f"{name} was asked nothing")
    kinds = sorted({str(answer["kind"]) for answer in answers} - {""})
    ended = [str(answer["ended"]) for answer in answers]
    return {
        "policy": name,
        "accuracy": _accuracy(answers, seed),
        "closed": _accuracy([answer for answer in answers if answer["closed"]], seed),
        "open": _accuracy([answer for answer in answers if not answer["closed"]], seed),
        "kinds": {kind: _accuracy([a for a in answers if a["kind"] == kind], seed) for kind in kinds},
        "answered": sum(answer["said"] is not None for answer in answers),
        "ended": {end: ended.count(end) for end in ("stopped", "horizon", "unreadable", "failed")},
        "unreadable_turns": sum(int(answer["unreadable"]) for answer in answers),
        "turns": sum(int(answer["turns"]) for answer in answers) / len(answers),
        "used_the_tool": sum(answer["tool_calls"] > 0 for answer in answers) / len(answers),
    }


def _accuracy(answers: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any] | None:
    """The share of right answers with its interval; None of none."""
    if not answers:
        return None
    right = [float(bool(answer["right"])) for answer in answers]
    patients = [str(answer["patient"]) for answer in answers]
    return asdict(interval(right, patients, np.random.default_rng([seed, 1]), bounds=(0, 1)))


def _against(answers: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The paired difference of accuracy from the first policy's."""
    right: list[dict[Hashable, float]] = [
        {str(a["key"]): float(bool(a["right"])) for a in given} for given in (answers, first)
    ]
    patients: dict[Hashable, str] = {str(answer["key"]): str(answer["patient"]) for answer in answers}
    return asdict(difference(right[0], right[1], patients, np.random.default_rng([seed, 2])))
