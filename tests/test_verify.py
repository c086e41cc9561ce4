"""verify: an untouched run is exact, and every way of tampering with one is found, named and placed."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import medseg_gym
from medseg_gym.bench import verify_episode
from medseg_gym.bench.evaluate import evaluate
from medseg_gym.bench.verify import verify
from medseg_gym.bench.verify_findings import VERDICTS, Report
from medseg_gym.bench.verify_source import _harmless
from medseg_gym.cli import app
from medseg_gym.episodes import decode_mask, encode_mask, from_json
from medseg_gym.errors import BadDataError
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Click, Decision, Prediction, Query, Stop, View

ENV = "MedSeg-Phantom-Stub-v0"
POLICIES = ("OracleBoxThenClicks", "Random", "OracleClicks:jitter=5")
CASES = 5
Lines = list[dict[str, Any]]


class Talker:
    """Unreadable first, then a click, an undo and a stop; in one case it raises."""

    name = "Talker"

    def act(self, views: list[View], rngs: list[np.random.Generator]) -> list[Decision]:
        if any(sum(view.key.encode()) % 3 == 0 and view.turn == 1 for view in views):
            raise RuntimeError("no more words")
        script = (None, Click(20, 20), Click(30, 20), None, Stop())
        return [Decision(script[view.turn], text="so be it", reason="mumbled") for view in views]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "clean"
    options: dict[str, Any] = {"dataset_options": {"size": 48}, "size": 32, "horizon": 5}
    evaluate(ENV, POLICIES, out=folder, cases=CASES, num_envs=3, report=False, **options)
    return folder


@pytest.fixture
def copied(clean: Path, tmp_path: Path) -> Path:
    shutil.copytree(clean, tmp_path / "run")
    return tmp_path / "run"


def rewrite(folder: Path, change: Callable[[Lines], Any]) -> None:
    """Changes the episodes of a folder, given as one dict a line; `change` may return other lines."""
    file = folder / "episodes.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    changed = change(lines)
    lines = changed if isinstance(changed, list) else lines
    file.write_text("".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n" for line in lines))


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record))


def prompted(lines: Lines, policy: str = "OracleBoxThenClicks") -> tuple[int, int]:
    """(line, turn) of a prompt that is not an episode's last turn, so that more follows it."""
    for number, line in enumerate(lines):
        for t, turn in enumerate(line["turns"][:-1]):
            if line["policy"] == policy and turn["action"]["do"] in ("click", "box") and turn["reward"]:
                return number, t
    raise AssertionError("no prompt")


def kinds(report: Report) -> set[str]:
    return {finding.what for finding in report.findings}


def test_an_untouched_run_is_exact_and_everything_was_looked_at(clean: Path) -> None:
    report = verify(clean)
    assert report.verdict == "exact" and report.findings == ()
    assert report.episodes == report.replayed == len(POLICIES) * CASES
    assert report.checks == {
        "files": "15 episodes",
        f"data of {ENV}": "15 episodes scored again, 15 decided again",
        f"replay of {ENV}": "15 exact",
    }


def test_episodes_that_failed_or_could_not_be_read_are_exact_too(tmp_path: Path) -> None:
    evaluate(ENV, Talker(), out=tmp_path, cases=12, num_envs=1, report=False, dataset_options={"size": 48})
    ended = [from_json(line).ended for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert "failed" in ended and "stopped" in ended
    assert verify(tmp_path).verdict == "exact"


class Flaky(Stub):
    """A Stub that raises at the second prompt of some images."""

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        if any(len(q.prompts) > 1 and int(q.embedding.image, 16) % 3 == 0 for q in queries):
            raise RuntimeError("out of memory")
        return super().predict(queries)


def test_a_tool_that_fails_again_as_it_did_is_exact(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": "Phantom", "dataset_options": {"size": 48}}
    evaluate("MedSeg-v0", "Random", tool=Flaky(), out=tmp_path, cases=16, num_envs=1, report=False, **options)
    ended = [from_json(line).ended for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert "failed" in ended and len(set(ended)) > 1
    assert verify(tmp_path, tools={ENV: Flaky()}).verdict == "exact"
    report = verify(tmp_path)  # the plain Stub has the same fingerprint and does not fail
    assert report.verdict == "different" and kinds(report) == {"tool_called"}


def test_a_tool_with_options_is_made_with_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tool_options": {"memory": "latest"}, "dataset_options": {"size": 48}}
    evaluate(ENV, "OracleBoxThenClicks", out=tmp_path, cases=3, report=False, **options)
    assert verify(tmp_path).verdict == "exact"


@pytest.mark.parametrize("reward", ["medsam-agent", "ibis"])
def test_runs_of_other_rewards_rules_and_kinds_of_cases_are_exact(reward: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "dataset_options": {"size": 48, "absent": 0.4, "kinds": ["scratch", "refine"], "corruption": "noise-2"},
        "reward": reward,
        "verbs": ("positive", "negative", "stop"),
        "stop_after_repeats": 2,
        "on_unreadable": "end",
        "timing": "terminal" if reward == "medsam-agent" else None,
    }
    evaluate(ENV, ("XuClicks", "Random"), out=tmp_path, cases=8, report=False, **options)
    assert verify(tmp_path).verdict == "exact"


# each way of tampering: what it does, and the verdict and the finding it must come to


def flip_mask_bit(lines: Lines) -> None:
    number, t = prompted(lines)
    mask = decode_mask(lines[number]["turns"][t]["mask"])
    mask[3, 4] = ~mask[3, 4]
    lines[number]["turns"][t]["mask"] = encode_mask(mask)


def drop_case(lines: Lines) -> Lines:
    return lines[:6] + lines[7:]


def duplicate_case(lines: Lines) -> Lines:
    return [*lines[:3], lines[2], *lines[3:]]


def swap_cases(lines: Lines) -> Lines:
    return [lines[1], lines[0], *lines[2:]]


def another_seed(lines: Lines) -> None:
    lines[7]["seed"] = 99


def edit_reward(lines: Lines) -> None:
    lines[0]["turns"][0]["reward"] += 0.25


def edit_reward_and_term(lines: Lines) -> None:
    turn = lines[0]["turns"][0]
    turn["reward"] += 0.25
    turn["terms"]["quality"] += 0.25


def edit_iou(lines: Lines) -> None:
    lines[0]["iou"][-1] = min(1.0, lines[0]["iou"][-1] + 0.05)


def edit_iou_and_dice(lines: Lines) -> None:
    iou = lines[1]["iou"][1] * 0.5
    lines[1]["iou"][1], lines[1]["dice"][1] = iou, 2 * iou / (1 + iou)


def swap_action(lines: Lines) -> None:
    number, t = prompted(lines)
    lines[number]["turns"][t]["action"] = {"do": "click", "x": 1, "y": 1, "positive": True}


def relabel_stop(lines: Lines) -> None:
    next(line for line in lines if line["ended"] == "stopped")["ended"] = "horizon"


def error_without_failing(lines: Lines) -> None:
    lines[0]["error"] = "policy: none"


def endless(lines: Lines) -> None:
    for line in lines:
        line["horizon"] = 10**30


def free_tool_call(lines: Lines) -> None:
    number, t = prompted(lines)
    lines[number]["turns"][t]["tool_called"] = False


def prompt_outside(lines: Lines) -> None:
    number, t = prompted(lines)
    lines[number]["turns"][t]["action"] = {"do": "click", "x": 4000, "y": 1, "positive": True}


def another_patient(lines: Lines) -> None:
    lines[0]["patient"] = "someone else"


def another_tool(lines: Lines) -> None:
    lines[0]["tool"] = "SAM:0000"


def broken_mask(lines: Lines) -> None:
    lines[0]["turns"][0]["mask"]["counts"] = "zzzz"


def huge_mask(lines: Lines) -> None:
    lines[0]["turns"][0]["mask"]["size"] = [100_000, 100_000]


def text_for_a_number(lines: Lines) -> None:
    lines[0]["seed"] = "0"


def huge_number(lines: Lines) -> None:
    lines[0]["iou"][1] = 10**400  # no float holds it


def seed_below_0(lines: Lines) -> None:
    lines[0]["seed"] = -5


def stranger(lines: Lines) -> Lines:
    return [*lines, {**lines[0], "policy": "Nobody", "env": "MedSeg-Elsewhere-v0"}]


TAMPERING = [
    (flip_mask_bit, "tampered", "iou", "OracleBoxThenClicks", None),
    (drop_case, "incomplete", "case", "Random", 1),
    (duplicate_case, "tampered", "case", "OracleBoxThenClicks", 2),
    (swap_cases, "tampered", "order", "OracleBoxThenClicks", None),
    (another_seed, "tampered", "seed", "Random", 2),
    (edit_reward, "tampered", "reward", "OracleBoxThenClicks", 0),
    (edit_reward_and_term, "tampered", "reward", "OracleBoxThenClicks", 0),
    (edit_iou, "tampered", "overlap", "OracleBoxThenClicks", 0),
    (edit_iou_and_dice, "tampered", "iou", "OracleBoxThenClicks", 1),
    (swap_action, "different", "action", "OracleBoxThenClicks", None),
    (relabel_stop, "tampered", "ended", "OracleBoxThenClicks", None),
    (error_without_failing, "tampered", "error", "OracleBoxThenClicks", 0),
    (endless, "tampered", "horizon", "Random", 4),
    (free_tool_call, "tampered", "tool_called", "OracleBoxThenClicks", None),
    (prompt_outside, "tampered", "action", "OracleBoxThenClicks", None),
    (another_patient, "tampered", "patient", "OracleBoxThenClicks", 0),
    (another_tool, "tampered", "tool", "OracleBoxThenClicks", 0),
    (broken_mask, "tampered", "mask", "OracleBoxThenClicks", 0),
    (huge_mask, "tampered", "mask", "OracleBoxThenClicks", 0),
    (text_for_a_number, "tampered", "seed", "", None),
    (huge_number, "tampered", "curves", "OracleBoxThenClicks", 0),
    (seed_below_0, "tampered", "seed", "", None),
    (stranger, "tampered", "case", "Nobody", 0),
]


@pytest.mark.parametrize(
    ("change", "verdict", "what", "policy", "case"), TAMPERING, ids=lambda v: getattr(v, "__name__", "")
)
def test_changed_episodes_are_found_and_placed(
    copied: Path, change: Callable[[Lines], Any], verdict: str, what: str, policy: str, case: int | None
) -> None:
    rewrite(copied, change)
    report = verify(copied)
    assert report.verdict == verdict
    place = [f for f in report.findings if f.what == what and f.policy == policy and case in (None, f.case)]
    assert place and all(f.found != f.wanted for f in place), [str(f) for f in report.findings]


def test_a_mask_after_a_stop_that_changed_is_found_without_the_data(copied: Path) -> None:
    def change(lines: Lines) -> None:
        line = next(line for line in lines if line["ended"] == "stopped")
        mask = decode_mask(line["turns"][-1]["mask"])
        mask[0, 0] = ~mask[0, 0]
        line["turns"][-1]["mask"] = encode_mask(mask)

    rewrite(copied, change)
    edit(copied, "summary.json", lambda s: [row.update(dataset="Unheard") for row in s["rows"]])
    report = verify(copied)
    assert report.verdict == "tampered" and kinds(report) == {"mask"}
    assert "not done" in report.checks[f"data of {ENV}"]


def test_without_the_data_a_sound_run_is_consistent_and_no_more(copied: Path) -> None:
    edit(copied, "summary.json", lambda s: [row.update(dataset="Unheard") for row in s["rows"]])
    report = verify(copied)
    assert (report.verdict, report.replayed, report.findings) == ("consistent", 0, ())


def test_an_edited_mean_of_the_summary_is_found(copied: Path) -> None:
    edit(copied, "summary.json", lambda s: s["rows"][1].update(dice=s["rows"][1]["dice"] + 1e-4))
    (finding,) = verify(copied).findings
    assert (finding.kind, finding.what, finding.policy) == ("tampered", "summary.json: dice", "Random")


def test_a_number_too_large_for_a_float_is_a_finding_not_a_crash(copied: Path) -> None:
    edit(copied, "summary.json", lambda s: s["rows"][1].update(dice=10**400))
    assert kinds(verify(copied)) == {"summary.json: dice"}


def test_a_click_outside_the_image_is_a_finding_where_the_reward_looks_at_clicks(tmp_path: Path) -> None:
    options: dict[str, Any] = {"reward": "ibis", "dataset_options": {"size": 48}}
    evaluate(ENV, "OracleClicks", out=tmp_path, cases=2, report=False, **options)
    rewrite(tmp_path, lambda lines: lines[0]["turns"][0]["action"].update(x=-3))
    report = verify(tmp_path)
    assert report.verdict == "tampered" and "action" in kinds(report)


def test_a_seed_changed_everywhere_is_found_by_the_cases_and_by_what_the_policy_draws(copied: Path) -> None:
    def reseed(lines: Lines) -> None:
        for line in lines:
            line["seed"] = 7

    rewrite(copied, reseed)
    edit(copied, "run.json", lambda r: r.update(seed=7))
    edit(copied, "summary.json", lambda s: s.update(seed=7))
    report = verify(copied)
    assert report.verdict == "tampered" and "cases or seed" in kinds(report)
    assert {f.policy for f in report.findings if f.what == "action"} >= {"Random"}


def test_a_seed_changed_where_all_cases_were_taken_is_found_by_what_the_policy_draws(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset_options": {"size": 48, "cases": 12}}
    evaluate(ENV, "Random", out=tmp_path, cases=None, report=False, **options)

    def reseed(lines: Lines) -> None:
        for line in lines:
            line["seed"] = 7

    rewrite(tmp_path, reseed)
    edit(tmp_path, "run.json", lambda r: r.update(seed=7))
    edit(tmp_path, "summary.json", lambda s: s.update(seed=7))
    report = verify(tmp_path)
    assert report.verdict == "different" and kinds(report) == {"action"}
    assert "seed 7" in report.findings[0].wanted


def test_a_case_dropped_from_all_files_is_found_by_the_cases_the_seed_chooses(copied: Path) -> None:
    rewrite(copied, lambda lines: [line for line in lines if line["case"] != CASES - 1])
    edit(copied, "run.json", lambda r: r["keys"][ENV].pop())
    from medseg_gym.bench.summary import summarise_row

    def recompute(summary: dict[str, Any]) -> None:
        episodes = [from_json(line) for line in (copied / "episodes.jsonl").read_text().splitlines()]
        summary["cases"] = CASES - 1
        for row in summary["rows"]:
            row.update(summarise_row([e for e in episodes if e.policy == row["policy"]]))

    edit(copied, "summary.json", recompute)
    (finding,) = verify(copied).findings
    assert (finding.kind, finding.what) == ("tampered", "cases or seed") and "5 that seed 0 chooses" in finding.wanted


def test_a_foreign_tool_is_named_and_not_replayed(copied: Path) -> None:
    rewrite(copied, lambda lines: [{**line, "tool": "Stub:feedfeedfeedfeed"} for line in lines])
    edit(copied, "run.json", lambda r: r["tools"].update({ENV: "Stub:feedfeedfeedfeed"}))
    edit(copied, "summary.json", lambda s: [row.update(tool_fingerprint="Stub:feedfeedfeedfeed") for row in s["rows"]])
    report = verify(copied)
    (finding,) = report.findings
    assert report.verdict == "different" and report.replayed == 0
    assert (finding.what, finding.found) == ("tool", "Stub:feedfeedfeedfeed") and Stub().fingerprint in finding.wanted


def test_another_dataset_under_the_same_name_is_named(copied: Path) -> None:
    edit(copied, "summary.json", lambda s: [row.update(dataset_options={"size": 64}) for row in s["rows"]])
    report = verify(copied)
    assert report.verdict == "different" and kinds(report) == {"dataset"}


def test_an_easier_dataset_or_tool_under_anothers_env_is_found(copied: Path) -> None:
    for name in ("run.json", "summary.json", "times.json", "episodes.jsonl"):
        text = (copied / name).read_text()
        (copied / name).write_text(text.replace(ENV, "MedSeg-BTCV-IMISNet-v0"))
    report = verify(copied)
    assert report.verdict == "tampered" and kinds(report) == {"env"}
    assert report.findings[0].wanted == ENV


def test_cut_off_and_missing_files_are_incomplete(copied: Path) -> None:
    file = copied / "episodes.jsonl"
    data = file.read_bytes()
    (copied / "episodes.jsonl.gz").write_bytes(gzip.compress(data)[:-30])
    file.unlink()
    assert verify(copied).verdict == "incomplete"
    (copied / "episodes.jsonl.gz").unlink()
    assert verify(copied).verdict == "incomplete"
    file.write_bytes(data[:-40])
    assert verify(copied).verdict == "incomplete"
    file.write_bytes(data)
    (copied / "summary.json").unlink()
    report = verify(copied)
    assert report.verdict == "incomplete" and kinds(report) == {"summary.json"}


def test_gzipped_episodes_are_read(copied: Path) -> None:
    (copied / "episodes.jsonl.gz").write_bytes(gzip.compress((copied / "episodes.jsonl").read_bytes()))
    (copied / "episodes.jsonl").unlink()
    assert verify(copied).verdict == "exact"


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("keys"),
        lambda r: r.update(pairs=[[ENV]]),
        lambda r: r["envs"][ENV].update(horizon="__import__('os').getcwd()"),
        lambda r: r["rewards"].update({ENV: {"terms": {"nonsense": 1.0}}}),
        lambda r: r["rewards"][ENV]["terms"].update(quality=10**400),
        lambda r: r.update(cases="all"),
    ],
)
def test_settings_that_are_none_are_tampered_not_a_crash(copied: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(copied, "run.json", change)
    assert verify(copied).verdict == "tampered"


@pytest.mark.parametrize(
    "row",
    [{"dataset": "/etc/data.h5"}, {"tool": "os:getcwd"}, {"dataset_options": {"path": "/etc/passwd"}}],
)
def test_nothing_a_strangers_file_names_is_opened_or_imported(copied: Path, row: dict[str, Any]) -> None:
    edit(copied, "summary.json", lambda s: [one.update(row) for one in s["rows"]])
    report = verify(copied)
    assert report.replayed == 0 and any("not done" in how for how in report.checks.values())


def test_more_pixels_than_an_episode_may_have_are_refused_undecoded(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_episode, "MAX_PIXELS", 48 * 48)
    report = verify(copied, play=False)
    assert report.verdict == "tampered" and "mask" in kinds(report)


def test_a_sample_of_cases_is_replayed_for_every_policy(clean: Path) -> None:
    report = verify(clean, cases=2, rng=np.random.default_rng(3))
    assert (report.verdict, report.episodes, report.replayed) == ("exact", 15, 6)


def test_verdicts_are_ordered_from_the_best_to_the_worst() -> None:
    assert VERDICTS == ("exact", "equivalent", "consistent", "different", "incomplete", "tampered")


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        (None, (), 0),
        (None, ("--no-replay",), 0),
        (swap_action, (), 4),
        (drop_case, (), 5),
        (edit_iou, ("--cases", "1"), 6),
    ],
)
def test_the_command_says_the_verdict_and_ends_with_its_code(
    copied: Path, change: Callable[[Lines], Any] | None, words: tuple[str, ...], code: int
) -> None:
    if change is not None:
        rewrite(copied, change)
    result = CliRunner().invoke(app, ["leaderboard", "verify", str(copied.parent), *words])
    assert result.exit_code == code, result.output
    assert ("exact" if not words else "consistent") in result.output or code


def test_a_folder_without_runs_is_a_mistake(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["leaderboard", "verify", str(tmp_path)])
    assert result.exit_code == 1 and "no run in it" in result.output


def test_a_run_of_nano_in_batches_is_exact_or_equivalent(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    medseg_gym.tools.load("Nano")
    options: dict[str, Any] = {"tool_options": {"max_batch": 4}, "dataset_options": {"size": 64}}
    evaluate(
        "MedSeg-Phantom-Nano-v0", "OracleBoxThenClicks", out=tmp_path, cases=6, num_envs=4, report=False, **options
    )
    assert verify(tmp_path).verdict in ("exact", "equivalent")


def test_options_that_name_files_or_are_huge_are_not_taken_from_a_strangers_file() -> None:
    fine = {"size": 48, "kinds": ["refine"], "corruption": "noise-3", "absent": 0.5, "memory": None}
    assert _harmless(fine) == fine
    for option in ("/etc/passwd", "os:getcwd", "x" * 101, ["fine", "a/b"], 2**33, float("inf"), {"a": 1}):
        with pytest.raises(BadDataError, match="not taken from a file of a stranger"):
            _harmless({"weights": option})
