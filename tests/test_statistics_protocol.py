"""benchmarks/PROTOCOL.md states the numbers and names that the code has."""

from __future__ import annotations

import pytest
from conftest import ROOT

from medseg_gym import metrics, surface
from medseg_gym.bench import leaderboard_tables, replay, statistics, summary, verify_findings

PROTOCOL = " ".join((ROOT / "benchmarks" / "PROTOCOL.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    "stated",
    [
        f"{statistics.RESAMPLES:,} resamples",
        f"All are {statistics.LEVEL:.0%} intervals".replace("%", " %"),
        f"| {statistics.BOOTSTRAP_FROM} and more | percentile bootstrap",
        f"| 2 to {statistics.BOOTSTRAP_FROM - 1} | t,",
        f"| below {statistics.FEW_PATIENTS} | the same, flagged",
        f"where every dataset has {statistics.BOOTSTRAP_FROM} patients",
        f"Tolerance {surface.TOLERANCE:g} mm, or {surface.TOLERANCE:g} pixels",
        f"They *match* at IoU > {metrics.ENTITY_IOU}",
        f"(q = {', '.join(map(str, summary.NOC_THRESHOLDS))} % IoU)",
        f"({', '.join(sorted(leaderboard_tables.CEILINGS))})",
        f"Dice >= {replay.EQUIVALENT:.3f}".replace("0.", "."),
        *(f"| `{verdict}` |" for verdict in verify_findings.VERDICTS),
    ],
)
def test_the_protocol_states_what_the_code_does(stated: str) -> None:
    assert stated in PROTOCOL


def test_the_protocol_names_files_that_there_are() -> None:
    for place in PROTOCOL.split("[")[1:]:
        for name in place.partition("]")[0].split(", "):
            if name.endswith(".py"):
                assert (ROOT / "medseg_gym" / name).is_file(), name
