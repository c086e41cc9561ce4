"""A leaderboard's numbers against tables worked out by hand, and its pages."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT

from medseg_gym.bench.leaderboard import build
from medseg_gym.bench.leaderboard_cross import TABLE_2, TABLE_9, cross_tables
from medseg_gym.bench.leaderboard_page import page
from medseg_gym.bench.leaderboard_read import Case, Played, Skipped
from medseg_gym.bench.leaderboard_tables import _Group, is_ceiling, results_of, sees_target
from medseg_gym.bench.leaderboard_text import distance, interval, markdown, number, signed
from medseg_gym.bench.statistics import Interval
from medseg_gym.bench.suites import Entry, Suite, suite

DRAWN, CT = Entry("Phantom", "Nano"), Entry("BTCV", "Nano")
SUITE = Suite("hand", "Worked by hand", "Two datasets of two modalities.", (DRAWN, CT, Entry("BTCV", "MedSAM2")))


def case(patient: str, *iou: float, ended: str = "stopped", hd95: float = 4.0, unit: str = "mm") -> Case:
    """Begins with an empty mask; Dice is that of the IoU, NSD half of it."""
    curve = (0.0, *iou)
    return Case(
        patient=patient,
        iou=curve,
        dice=tuple(2 * q / (1 + q) for q in curve),
        actions=len(iou),
        tool_calls=max(0, len(iou) - 1),
        unreadable_turns=0,
        ended=ended,
        nsd=iou[-1] / 2 if iou else 0.0,
        hd95=hd95,
        unit=unit,
        entity=(2 * (iou[-1] > 0.5), 2) if iou else (0, 2),
    )


def run(entry: Entry, policy: str, *cases: Case, trial: bool = False, seconds: float = 1.0) -> Played:
    return Played(
        entry=entry,
        policy=policy,
        fingerprint=f"{entry.tool}:0123",
        data="sha256",
        cases={(0, f"{entry.dataset}/{i}"): one for i, one in enumerate(cases)},
        asked=len(cases),
        trial=trial,
        seconds=seconds,
        provenance={"command": f"medseg-gym leaderboard run --policy {policy}", "commit": "a" * 40, "machine": "one"},
    )


ORACLE = (
    run(DRAWN, "OracleClicks", case("p1", 0.9), case("p2", 0.9)),
    run(CT, "OracleClicks", case("q1", 0.9, hd95=2, unit="px"), case("q2", 0.9, hd95=6, unit="px")),
)
AGENT = (
    run(DRAWN, "Agent", case("p1", 0.8), case("p2", 0.6), seconds=3.0),
    run(CT, "Agent", case("q1", 0.5), case("q2", 0.1, 0.3)),
)


def test_the_table_of_two_agents_on_two_datasets_worked_by_hand() -> None:
    results = results_of(SUITE, [*AGENT, *ORACLE])
    assert (results.ran, len(results.gaps)) == (2, 1)
    (table,) = results.tables
    assert table.modality == {"Phantom": "drawn", "BTCV": "CT"}
    oracle, agent = table.rows
    assert (oracle.policy, agent.policy) == ("OracleClicks", "Agent")
    assert agent.iou.datasets["Phantom"].mean == pytest.approx(0.7)
    assert agent.iou.datasets["BTCV"].mean == pytest.approx(0.4)
    assert agent.iou.overall.mean == pytest.approx(0.55)
    # squared errors of both means .1**2, halved weights: .25 * (.01 + .01); 2 degrees of freedom, t = 4.302653
    reach = 4.302653 * math.sqrt(0.005)
    assert agent.iou.overall.low == pytest.approx(0.55 - reach, abs=1e-6)
    assert agent.iou.overall.high == pytest.approx(0.55 + reach, abs=1e-6)
    assert agent.iou.overall.few_patients
    assert agent.dice.overall.mean == pytest.approx(((8 / 9 + 3 / 4) / 2 + (2 / 3 + 6 / 13) / 2) / 2)
    assert agent.nsd == pytest.approx(0.275)
    assert agent.hd95 == {"mm": 4.0}
    assert oracle.hd95 == {"mm": 4.0, "px": 4.0}
    # IoU > .5 in both drawn cases, in neither of CT's: .5 is not above .5
    assert agent.f1 == {"Phantom": 1.0, "BTCV": 0.0}
    assert agent.f1_mean == 0.5
    at80 = agent.clicks[0]
    assert (at80.quality, at80.noc, at80.nof) == (80, 1.0, 0.75)  # one of two reaches it, then none of two
    assert agent.actions == pytest.approx((1 + 1.5) / 2)
    assert agent.tool_calls == pytest.approx((0 + 0.5) / 2)
    assert agent.seconds == 2.0
    # mean over turns 1..5: the last case is .8 below the oracle at turn 1, then .6 four times
    assert agent.regret is not None
    assert agent.regret.mean == pytest.approx(((0.1 + 0.3) / 2 + (0.4 + (0.8 + 4 * 0.6) / 5) / 2) / 2)
    assert agent.ceiling == "OracleClicks"
    assert agent.ceiling_iou == pytest.approx(0.9)
    assert oracle.regret is not None and oracle.regret.mean == 0
    assert agent.against == "OracleClicks with Nano"
    assert agent.difference is not None
    assert agent.difference.mean == pytest.approx(-0.35)
    assert (oracle.rank, agent.rank) == (1, 2)  # the oracle's .9 lies above .854
    assert (agent.cases, agent.patients) == (4, 4)


def test_iou_and_dice_are_shown_by_dataset_and_modality() -> None:
    """IoU .700 drawn and .400 CT; Dice (8/9 + 3/4) / 2 = .819 and (2/3 + 6/13) / 2 = .564."""
    results = [results_of(SUITE, [*AGENT, *ORACLE])]
    text, html = markdown(results, []), page(results, [])
    for of, drawn, scan in (("IoU", "0.700", "0.400"), ("Dice", "0.819", "0.564")):
        assert f"{of} by dataset and modality" in text and f"{of} by dataset and modality" in html
        grid = text.partition(f"{of} by dataset and modality:")[2].partition("\n\n")[2].partition("\n\n")[0]
        (row,) = [line for line in grid.splitlines() if line.startswith("| Agent")]
        cells = [cell.strip().partition(" ")[0] for cell in row.split("|")[1:-1]]
        assert cells[2:6] == [drawn, scan, scan, drawn]  # Phantom, BTCV, mean CT, mean drawn
        table = html.partition(f"<summary>{of} by dataset and modality")[2].partition("</details>")[0]
        assert f">{drawn}<small>" in table and f">{scan}<small>" in table


def test_numbers_without_an_interval_are_averaged_by_modality_too() -> None:
    """Two datasets of one modality and one of another: (mean(.3, .8) + .2) / 2, not the mean of three."""
    group = _Group({}, {}, {}, {"a": "CT", "b": "CT", "c": "MRI"}, 5)
    assert group.chain({"a": 0.3, "b": 0.8, "c": 0.2}) == pytest.approx(0.375)


def test_overlapping_intervals_share_a_rank() -> None:
    nearly = [run(e, "Nearly", case(f"{n}1", 0.95), case(f"{n}2", 0.8)) for e, n in ((DRAWN, "p"), (CT, "q"))]
    rows = results_of(SUITE, [*nearly, *ORACLE, *AGENT]).tables[0].rows
    # Nearly [.647, 1] overlaps the oracle's .9 and Agent's [.246, .854]; the oracle is above Agent
    assert [(row.policy, row.rank) for row in rows] == [("OracleClicks", 1), ("Nearly", 1), ("Agent", 2)]


def test_an_agent_without_all_datasets_or_all_cases_has_no_rank_and_comes_last() -> None:
    half = run(DRAWN, "Half", case("p1", 1.0), case("p2", 1.0))
    tried = [run(e, "Tried", case(f"{n}1", 1.0), trial=True) for e, n in ((DRAWN, "p"), (CT, "q"))]
    rows = results_of(SUITE, [half, *tried, *ORACLE]).tables[0].rows
    assert [(row.policy, row.rank) for row in rows] == [("OracleClicks", 1), ("Half", None), ("Tried", None)]
    text = markdown([results_of(SUITE, [half, *tried, *ORACLE])], [])
    assert "Half (1 of 2 datasets)" in text and "Tried (trial)" in text


def test_agents_that_played_other_cases_are_not_compared() -> None:
    more = run(DRAWN, "More", case("p1", 0.5), case("p2", 0.5), case("p3", 0.5))
    rows = {row.policy: row for row in results_of(SUITE, [more, ORACLE[0]]).tables[0].rows}
    assert rows["More"].difference is None
    assert rows["More"].ceiling == "" and rows["More"].regret is None


def test_the_baseline_is_a_policy_on_the_same_tool() -> None:
    other = run(Entry("BTCV", "MedSAM2"), "Agent", case("q1", 0.9), case("q2", 0.9))
    base = run(Entry("BTCV", "MedSAM2"), "Base", case("q1", 0.4), case("q2", 0.4))
    here = run(CT, "Base", case("q1", 0.1), case("q2", 0.1))
    rows = {
        (row.tool, row.policy): row
        for row in results_of(SUITE, [AGENT[1], here, other, base], baseline="Base").tables[0].rows
    }
    assert rows["Nano", "Agent"].against == rows["MedSAM2", "Agent"].against == "Base"
    gaps = {tool: rows[tool, "Agent"].difference for tool in ("Nano", "MedSAM2")}
    assert {tool: round(gap.mean, 9) for tool, gap in gaps.items() if gap} == {"Nano": 0.3, "MedSAM2": 0.5}
    assert rows["Nano", "Base"].difference is None


def test_the_ceiling_is_the_best_oracle_without_noise() -> None:
    assert is_ceiling("OracleClicks") and is_ceiling("OracleClicks:keep_clicking=true") and is_ceiling("BoxOnce")
    assert not is_ceiling("OracleClicks:jitter=5") and not is_ceiling("Random") and not is_ceiling("mine:Agent")
    assert sees_target("OracleClicks:miss=0.2") and not sees_target("Random")
    noisy = run(DRAWN, "OracleClicks:jitter=5", case("p1", 1.0), case("p2", 1.0))
    weak = run(DRAWN, "CentreClick", case("p1", 0.5), case("p2", 0.5))
    rows = results_of(SUITE, [noisy, weak, ORACLE[0]]).tables[0].rows
    assert {row.ceiling for row in rows} == {"OracleClicks"}
    regrets = {row.policy: row.regret.mean for row in rows if row.regret}
    assert regrets["OracleClicks:jitter=5"] == pytest.approx(-0.1)


@pytest.mark.parametrize("name", ["A", "Z"])  # read before the oracle, and after it
def test_a_case_that_an_agent_could_not_read_belongs_to_its_patient(name: str) -> None:
    lost = run(DRAWN, name, case("", ended="failed"), case("same", 0.8))
    other = run(DRAWN, "OracleClicks", case("same", 0.9), case("same", 0.9))
    row = next(r for r in results_of(SUITE, [lost, other]).tables[0].rows if r.policy == name)
    assert (row.failed, row.patients) == (1, 1)
    assert row.iou.overall.mean == pytest.approx(0.4)


def test_cross_tool_tables_name_every_tool_and_leave_what_did_not_run_empty() -> None:
    one = suite("cross-tool")
    nano = next(e for e in one.entries if (e.dataset, e.tool) == ("BTCV", "Nano"))
    results = results_of(one, [run(nano, "Agent", case("q1", 0.5), case("q2", 0.9))])
    (title2, head2, body2), (title9, head9, body9) = cross_tables(results)
    assert (title2, title9) == (TABLE_2, TABLE_9)
    assert head2 == ["Policy", "Tool", "BTCV Dice", "BTCV IoU"]
    assert head9 == ["Method", "BTCV IoU", "BTCV DSC", "BTCV F1"]
    assert len(body2) == len(body9) == 12
    assert ["Agent", "Nano", "0.807", "0.700"] in body2  # (2/3 + 18/19) / 2
    assert ["Agent", "MedSAM2", "\N{EM DASH}", "\N{EM DASH}"] in body2
    assert ["Agent (Nano)", "70.00", "80.70", "50.00"] in body9
    assert len(results.gaps) == 23


def test_numbers_are_written_with_a_true_minus_and_never_as_minus_zero() -> None:
    assert number(None) == "\N{EM DASH}"
    assert number(-0.25, 2) == "\N{MINUS SIGN}0.25"
    assert signed(0.1234) == "+0.123"
    assert signed(-0.0001) == "0.000"
    assert distance({"mm": 4.04, "px": 7.96}) == "4.0 mm, 8.0 px"
    assert interval(Interval(0.5, None, None, 3, 1, "none", True)) == "0.500"
    assert interval(Interval(0.5, 0.25, 0.75, 3, 3, "t", True)) == "0.500 [0.250, 0.750]"


def test_equal_results_give_equal_pages_in_any_order() -> None:
    pages = []
    for runs in ([*AGENT, *ORACLE], [*ORACLE[::-1], *AGENT[::-1]]):
        results = [results_of(SUITE, runs)]
        pages.append((markdown(results, []), page(results, [])))
    assert pages[0] == pages[1]


def test_the_committed_pages_are_those_of_the_committed_results(tmp_path: Path) -> None:
    if not (ROOT / "benchmarks" / "results" / "quick").is_dir():
        pytest.skip("no frozen results beside the tests")
    built = build([ROOT / "benchmarks" / "results"], out=tmp_path)
    assert not built.skipped
    for name in ("LEADERBOARD.md", "leaderboard.html"):
        texts = [(folder / name).read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "benchmarks")]
        assert PICTURE.sub("", texts[0]) == PICTURE.sub("", texts[1]), (
            "build them again: medseg-gym leaderboard build benchmarks/results --out benchmarks"
        )
        for here, there in zip(*map(PICTURE.findall, texts), strict=True):
            assert here == there or np.abs(_pixels(here) - _pixels(there)).mean() < 3  # another OpenCV, other bytes


PICTURE = re.compile(r"data:image/webp;base64,([A-Za-z0-9+/=]+)")


def _pixels(data: str) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR).astype(int)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.refers: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "br", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag


def test_the_page_loads_nothing_and_is_whole() -> None:
    text = page([results_of(SUITE, [*AGENT, *ORACLE])], [Skipped("a/b", "not finished")])
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.tags.count("script") == 1 and "link" not in reader.tags and "img" not in reader.tags
    assert all(ref.startswith("#") and ref[1:] in reader.ids for ref in reader.refers)
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert "default-src 'none'" in text
    assert "0.550" in text and "0.854" in text and "2 of 3 envs ran" in text


def test_names_of_strangers_stay_names() -> None:
    evil = "<script>alert(1)</script>|`x`\nnext"
    runs = [run(DRAWN, evil, case("p1", 0.5), case("p2", 0.4))]
    results = [results_of(SUITE, runs)]
    assert "<script>alert" not in page(results, [Skipped(evil, evil)])
    rows = [
        line for line in markdown(results, [Skipped(evil, evil)]).splitlines() if "alert" in line and "0.450" in line
    ]
    assert len(rows) == 1
    assert "<script>" not in rows[0].replace("\\<script\\>", "")
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 21  # 20 columns, whatever a name holds
