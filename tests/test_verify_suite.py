"""A suite's run held against its entry and its measures: what is edited beside the episodes is found, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from medseg_gym.bench import suites
from medseg_gym.bench.evaluate import evaluate
from medseg_gym.bench.leaderboard_read import read_all
from medseg_gym.bench.leaderboard_run import freeze, run_suite
from medseg_gym.bench.runs import find_runs
from medseg_gym.bench.suites import Entry, Suite
from medseg_gym.bench.verify import verify
from medseg_gym.errors import MedSegError

MONAI = find_spec("monai") is not None
ENV = "MedSeg-Phantom-Stub-v0"
OPTIONS: dict[str, Any] = {"dataset_options": {"size": 48}, "verbs": ("positive", "negative", "stop")}
TINY = Suite("tiny", "Tiny", "Phantoms.", (Entry("Phantom", "Stub", cases=3, horizon=3, options=OPTIONS),))
Record = dict[str, Any]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "SUITES", {**suites.SUITES, "tiny": TINY})


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_suite(TINY, ["OracleClicks"], out=root)
    return find_runs(root)[0]


@pytest.fixture
def copied(clean: Path, tmp_path: Path) -> Path:
    shutil.copytree(clean, tmp_path / "run")
    return tmp_path / "run"


def edit(folder: Path, name: str, change: Callable[[Record], Any]) -> None:
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record))


def test_a_suites_run_is_exact_and_measured_again(clean: Path) -> None:
    report = verify(clean)
    assert (report.verdict, report.findings) == ("exact", ())
    assert report.checks[f"measures of {ENV}"] == "3 episodes measured again"


def measured(**values: Any) -> Callable[[Record], Any]:
    return lambda record: record["cases"][1].update(values)


EDITS = [
    ("measures.json", measured(present=False), "measures.json: present", "data"),
    ("measures.json", measured(drawn=False), "measures.json: drawn", "files"),
    ("measures.json", measured(present="yes"), "measures.json: present", "files"),
    ("measures.json", measured(hd95=-1.0), "measures.json", "files"),
    ("measures.json", measured(hd95=10**400), "measures.json", "files"),
    ("measures.json", measured(nsd=float("nan")), "measures.json", "files"),
    ("measures.json", measured(unit="m"), "measures.json", "files"),
    ("measures.json", measured(more=1), "measures.json", "files"),
    ("measures.json", lambda r: r["cases"].pop(), "measures.json", "files"),
    ("measures.json", lambda r: r["cases"].insert(0, "one"), "measures.json", "files"),
    ("measures.json", lambda r: r.update(cases={"0": 1}), "measures.json", "files"),
    ("measures.json", lambda r: r.update(schema=2), "measures.json", "files"),
    ("provenance.json", lambda r: r.update(name="Mine"), "provenance.json: pairs", "files"),
    ("provenance.json", lambda r: r["entry"].update(cases=2), "provenance.json: cases", "files"),
    ("provenance.json", lambda r: r.update(tool_fingerprint="Stub:0"), "provenance.json: tool_fingerprint", "files"),
    ("provenance.json", lambda r: r.update(versions="all"), "provenance.json: versions", "files"),
    ("provenance.json", lambda r: r.update(commit=["a"]), "provenance.json: commit", "files"),
    ("summary.json", lambda r: r["rows"][0].update(dataset_options={"size": 49}), "dataset_options", "files"),
    ("times.json", lambda r: r["rows"][0].update(seconds_per_case="<b>"), "times.json", "files"),
    ("times.json", lambda r: r["rows"][0].update(seconds_per_case=-1), "times.json", "files"),
    ("times.json", lambda r: r.update(rows={"0": 1}), "times.json", "files"),
]


@pytest.mark.parametrize(("name", "change", "what", "by"), EDITS, ids=range(len(EDITS)))
def test_what_was_edited_is_found_and_kept_off_the_page(
    copied: Path, name: str, change: Callable[[Record], Any], what: str, by: str
) -> None:
    edit(copied, name, change)
    report = verify(copied)
    assert report.verdict == "tampered"
    assert any(finding.what.endswith(what) for finding in report.findings), [str(f) for f in report.findings]
    played, skipped = read_all([copied.parent])
    assert (not played and len(skipped) == 1) if by == "files" else played


@pytest.mark.skipif(not MONAI, reason="NSD and HD95 need the extra surface")
@pytest.mark.parametrize("name", ["nsd", "hd95"])
def test_a_distance_that_is_not_that_of_the_mask_is_found_by_the_data(copied: Path, name: str) -> None:
    edit(copied, "measures.json", lambda r: r["cases"][2].update({name: r["cases"][2][name] * 0.999}))
    (finding,) = verify(copied).findings
    assert (finding.kind, finding.what, finding.case) == ("tampered", f"measures.json: {name}", 2)


def test_measures_are_held_against_the_masks_without_the_data(copied: Path) -> None:
    edit(copied, "summary.json", lambda s: s["rows"][0].update(dataset="Unheard"))
    assert verify(copied).verdict == "consistent"
    edit(copied, "measures.json", measured(drawn=False))
    assert verify(copied).verdict == "tampered"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"horizon": 4}, "horizon"),
        ({"verbs": ("positive", "negative", "box", "stop")}, "verbs"),
        ({"structures": ("liver",)}, "structures"),
        ({"dataset_options": {"size": 48, "difficulty": 0.1}}, "dataset_options"),
        ({"seed": 1}, "seed"),
        ({"cases": 2}, "cases"),
        ({"split": "val"}, "split"),
        ({"stop_after_repeats": 2}, "stop_after_repeats"),
    ],
)
def test_a_run_by_other_rules_is_no_run_of_the_suite(
    copied: Path, tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    """It is sound in itself, and only its provenance says that it is the suite's."""
    other = tmp_path / "other"
    settings: dict[str, Any] = {"cases": 3, "horizon": 3, **OPTIONS}
    evaluate(ENV, "OracleClicks", out=other, report=False, **{**settings, **options})
    assert verify(other).verdict == "exact"
    for name in ("provenance.json", "measures.json"):
        shutil.copy(copied / name, other / name)
    shutil.rmtree(copied)
    report = verify(other)
    assert report.verdict == "tampered"
    assert f"provenance.json: {what}" in {finding.what for finding in report.findings}
    played, (skipped,) = read_all([other])
    assert not played and "verify" in skipped.why


def test_more_cases_than_the_suite_asks_for_are_no_run_of_it(copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    evaluate(ENV, "OracleClicks", out=other, report=False, cases=5, horizon=3, **OPTIONS)
    edit(copied, "provenance.json", lambda r: r["entry"].update(cases=5))
    shutil.copy(copied / "provenance.json", other)
    assert "provenance.json: cases" in {finding.what for finding in verify(other, play=False).findings}


def test_a_weight_file_of_another_checksum_is_found(copied: Path) -> None:
    edit(copied, "provenance.json", lambda r: r.update(weights_sha256="0" * 64))
    (finding,) = verify(copied).findings
    assert (finding.what, finding.wanted) == ("provenance.json: weights_sha256", "None")


@pytest.mark.parametrize("name", ["measures.json", "provenance.json"])
def test_a_file_of_a_suites_run_that_is_gone_or_cut_off_makes_it_incomplete(copied: Path, name: str) -> None:
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[:-20])
    assert verify(copied).verdict == "incomplete"
    (copied / name).unlink()
    report = verify(copied)
    assert report.verdict == "incomplete" and [finding.what for finding in report.findings] == [name]
    assert not read_all([copied.parent])[0]


def test_a_suite_of_another_version_is_told_and_the_rest_looked_at(copied: Path) -> None:
    edit(copied, "provenance.json", lambda r: r.update(suite="of-old"))
    report = verify(copied)
    assert report.verdict == "different" and "'of-old'" in report.findings[0].found
    assert report.replayed == 3


def test_freezing_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(MedSegError, match="no finished run in"):
        freeze(tmp_path / "nowhere", tmp_path / "out")
