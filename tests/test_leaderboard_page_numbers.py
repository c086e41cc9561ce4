"""Every number of the published page, looked up in the frozen runs: summary.json first, episodes where it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from page_tree import Node, tree

from medseg_gym import metrics
from medseg_gym.bench.leaderboard_reported import grids
from medseg_gym.bench.leaderboard_text import distance, number, percent, signed
from medseg_gym.bench.leaderboard_turns import SMALL
from medseg_gym.bench.reported import reported
from medseg_gym.bench.runs import find_runs, read_episodes, read_record
from medseg_gym.bench.statistics import interval
from medseg_gym.bench.suites import CORRUPTIONS, suite
from medseg_gym.bench.summary import curves
from medseg_gym.types import Episode

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "leaderboard.html"
ORACLES = ("BoxOnce", "CentreClick", "OracleBoxThenClicks", "OracleClicks", "XuClicks")
SUITES = ("quick", "btcv")  # their tables hold one dataset each, so that a row of the page is a row of summary.json


def tables() -> list[tuple[str, str]]:
    """The suites and groups that have a frozen run."""
    there = {(name, folder.parent.name) for name in SUITES for folder in find_runs(RESULTS / name)}
    return list(
        dict.fromkeys(
            (name, entry.group) for name in SUITES for entry in suite(name).entries if (name, entry.folder) in there
        )
    )


pytestmark = pytest.mark.skipif(not PAGE.is_file() or not RESULTS.is_dir(), reason="no published page beside the tests")


@dataclass(eq=False)
class Frozen:
    """One frozen run, as its files say."""

    folder: Path
    others: dict[tuple[str, str], Frozen] = field(repr=False)

    @cached_property
    def row(self) -> Mapping[str, Any]:
        (row,) = self.record("summary.json")["rows"]
        return row

    @cached_property
    def episodes(self) -> dict[str, Episode]:
        return {episode.key: episode for episode in read_episodes(self.folder)}

    def record(self, name: str) -> dict[str, Any]:
        found = read_record(self.folder / name)
        assert found is not None
        return found

    @property
    def key(self) -> tuple[str, str]:
        return self.row["tool"], self.row["policy"]

    @cached_property
    def area(self) -> float:
        return float(np.mean(self.row["iou_at"][1:]))

    @cached_property
    def ceiling(self) -> Frozen:
        oracles = [run for (tool, policy), run in self.others.items() if tool == self.key[0] and policy in ORACLES]
        return min(oracles, key=lambda run: (-run.area, run.key[1]))

    def spread(self, values: Mapping[str, float], low: float, form: Any) -> str:
        found = interval(
            list(values.values()),
            [self.episodes[key].patient for key in values],
            np.random.default_rng(0),
            bounds=(low, 1),
        )
        return f"[{form(found.low)}, {form(found.high)}]"

    def final(self, of: int) -> dict[str, float]:
        return {key: curves(episode)[of][-1] for key, episode in self.episodes.items()}

    @cached_property
    def areas(self) -> dict[str, float]:
        return {key: metrics.auc(curves(e)[0], self.row["horizon"]) for key, e in self.episodes.items()}


@pytest.fixture(scope="module")
def root() -> Node:
    return tree(PAGE.read_text(encoding="utf-8"))


Runs = dict[tuple[str, str], dict[tuple[str, str], Frozen]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """By suite and group, then by tool and policy."""
    groups = {(name, entry.folder): entry.group for name in SUITES for entry in suite(name).entries}
    found: Runs = {}
    for name in SUITES:
        for folder in find_runs(RESULTS / name):
            of_table = found.setdefault((name, groups[name, folder.parent.name]), {})
            run = Frozen(folder, of_table)
            of_table[run.key] = run
    return found


def part(root: Node, table: tuple[str, str]) -> Node:
    """All that the page shows of one table: scores, figures, episodes."""
    return root.one(id=table[0]).one("div", "group", data_group=table[1])


def scores(root: Node, table: tuple[str, str]) -> list[Node]:
    return rows_of(part(root, table).one("table", "board"))


def beside(root: Node, table: tuple[str, str], which: str) -> list[Node]:
    """The rows of the table of numbers that belongs to a figure."""
    board = part(root, table).one("table", "board")
    return rows_of(root.one("table", id=f"{board['id']}-{which}"))


def rows_of(table: Node) -> list[Node]:
    return table.one("tbody").all("tr")


def agent(row: Node) -> tuple[str, str]:
    return row["data-tool"], row["data-policy"]


def expected(run: Frozen, first: Frozen, ranks: Mapping[tuple[str, str], int]) -> dict[str, str]:
    """The whole text of each cell of a row, by column."""
    row, best = run.row, run.ceiling
    measured = run.record("measures.json")["cases"]
    by_unit: dict[str, list[float]] = {}
    for case in measured:
        by_unit.setdefault(case["unit"], []).append(case["hd95"])
    counts = [
        metrics.entity_counts(curves(episode)[0][-1], case["drawn"], case["present"], failed=not finished(episode))
        for episode, case in zip(run.episodes.values(), measured, strict=True)
    ]
    above, own = best.areas, run.areas
    finals, of_first = run.final(0), first.final(0)
    (timed,) = run.record("times.json")["rows"]
    difference = "\N{EM DASH}"
    if run is not first:
        gaps = {key: finals[key] - of_first[key] for key in finals}
        difference = f"{signed(row['iou'] - first.row['iou'])} {run.spread(gaps, -1, signed)}"
    sees = "" if not sees_target(run) else " sees target"
    regret = {key: above[key] - own[key] for key in own}
    return {
        "rank": str(ranks[run.key]),
        "policy": run.key[1] + sees,
        "tool": run.key[0],
        "iou": f"{number(row['iou'])} {run.spread(finals, 0, number)}",
        "dice": f"{number(row['dice'])} {run.spread(run.final(1), 0, number)}",
        "nsd": f"{number(float(np.mean([c['nsd'] for c in measured])))} "
        + distance({unit: float(np.mean(by_unit[unit])) for unit in sorted(by_unit)}).replace(", ", " "),
        "f1": number(metrics.entity_f1(counts)),
        **{
            f"noc{q}": f"{number(row['noc'][q]['mean'], 2)} {percent(row['noc'][q]['nof'])}" for q in ("80", "85", "90")
        },
        "actions": f"{number(row['actions'], 2)} {number(row['tool_calls'], 2)}, "
        f"{number(timed['seconds_per_case'], 2)} s",
        "regret": f"{signed(best.area - run.area)} {run.spread(regret, -1, signed)} of {number(best.row['iou'])}",
        "difference": difference,
        "failed": f"{row['ended']['failed']} {row['ended']['unreadable']}",
        "cases": f"{row['episodes']} {row['patients']}" + (" few" if row["patients"] < 8 else ""),
    }


def ends(episode: Episode, k: int) -> bool:
    """Whether its action of index k ends the episode and leaves the mask as it is."""
    return type(episode.turns[k].action).__name__ in ("Stop", "Answer")


def finished(episode: Episode) -> bool:
    return episode.ended not in ("failed", "unreadable")


def sees_target(run: Frozen) -> bool:
    return run.key[1].partition(":")[0] in (*ORACLES, "TextOracle")


@pytest.mark.parametrize("table", tables(), ids="-".join)
def test_every_cell_of_the_scores_is_what_the_run_says(table: tuple[str, str], root: Node, runs: Runs) -> None:
    rows = scores(root, table)
    assert {agent(row) for row in rows} == runs[table].keys()
    ends = {}
    for row in rows:
        low, high = re.findall(r"[\d.]+", row.one(data_k="iou").one("small").text)
        ends[agent(row)] = float(low), float(high)
    ranks = {one: 1 + sum(low > high for low, _ in ends.values()) for one, (_, high) in ends.items()}
    first = runs[table][agent(rows[0])]
    for row in rows:
        run = runs[table][agent(row)]
        wanted = expected(run, first, ranks)
        corrupted = row.all(data_k="corrupted")
        cells = {cell["data-k"]: cell.text for cell in row.all(data_k="*") if cell not in corrupted}
        assert cells == wanted, run.key


@pytest.mark.parametrize("table", tables(), ids="-".join)
def test_what_is_sorted_by_is_the_number_that_is_shown(table: tuple[str, str], root: Node, runs: Runs) -> None:
    for row in scores(root, table):
        found = runs[table][agent(row)].row
        for key in ("iou", "dice", "actions"):
            assert float(row.one(data_k=key)["data-v"]) == pytest.approx(found[key], abs=1e-6)
        for quality, noc in found["noc"].items():
            shown = row.one(data_k=f"noc{quality}")["data-v"]
            assert shown == ("" if noc["mean"] is None else f"{noc['mean']:.6f}")


@pytest.mark.parametrize("table", tables(), ids="-".join)
def test_dice_at_k_is_that_of_the_summary_in_table_and_drawing(table: tuple[str, str], root: Node, runs: Runs) -> None:
    for row in beside(root, table, "at"):
        found = runs[table][agent(row)].row["dice_at"]
        assert [cell.text for cell in row.all("td", data_k="*")] == [number(value) for value in found]
    lines = 0
    for panel in part(root, table).all("div", "pair"):
        _, drawn = panel.all("svg", "plot")
        levels = [float(path["d"].split()[1].split("h")[0]) for path in drawn.all("path", "grid")]
        zero, one = levels[0], levels[-1]
        for group in drawn.all("g", "series"):
            found = runs[table][panel["data-tool"], group["data-policy"]].row["dice_at"]
            heights = [float(point.split()[1]) for point in group.one("path", "line")["d"][1:].split("L")]
            assert [(zero - y) / (zero - one) for y in heights] == pytest.approx(found, abs=0.0005)
            assert group.one("text").text.endswith(f" {found[-1]:.2f}")
            lines += 1
    assert lines == len(runs[table])


@pytest.mark.parametrize("table", tables(), ids="-".join)
def test_dots_and_ceilings_lie_where_the_summaries_say(table: tuple[str, str], root: Node, runs: Runs) -> None:
    for panel in part(root, table).all("div", "pair"):
        drawn = panel.all("svg", "plot")[0]
        ticks = [float(path["d"].split()[0][1:]) for path in drawn.all("path", "grid")]

        def value(path: Node, ends: list[float] = [ticks[0], ticks[-1]]) -> float:  # noqa: B006
            return (float(path["d"].split()[0][1:]) - ends[0]) / (ends[1] - ends[0])

        for group in drawn.all("g", "series"):
            run = runs[table][panel["data-tool"], group["data-policy"]]
            assert value(group.one("path", "mark")) == pytest.approx(run.row["iou"], abs=0.0005)
            name, shown = (node.text for node in group.all("text"))
            assert (name.removesuffix("\N{DAGGER}"), shown) == (run.key[1], number(run.row["iou"]))
        (top,) = {round(value(path), 6) for path in drawn.all("path", "ceiling")}
        best = next(iter(runs[table].values())).others[panel["data-tool"], "BoxOnce"].ceiling
        assert top == pytest.approx(best.row["iou"], abs=0.0005)
        assert drawn.one("text", "oracle").text == f"ceiling {number(best.row['iou'])}"


@pytest.mark.parametrize("table", tables(), ids="-".join)
def test_gains_and_counts_of_turns_are_those_of_the_episodes(table: tuple[str, str], root: Node, runs: Runs) -> None:
    for row in beside(root, table, "gain"):
        episodes = runs[table][agent(row)].episodes.values()
        for k, cell in enumerate(row.all("td")[1:]):
            acted = [e for e in episodes if len(e.turns) > k and not ends(e, k)]
            if not acted:
                assert cell.text == "\N{EM DASH}"
                continue
            gained = [curves(e)[0][k + 1] - curves(e)[0][k] for e in acted]
            better, worse = sum(g > SMALL for g in gained), sum(g < -SMALL for g in gained)
            assert cell.text == f"{signed(float(np.mean(gained)))} {len(acted)}: {better} better, {worse} worse"
    for figure in part(root, table).one("div", "gains").all("figure"):
        episodes = list(runs[table][agent(figure)].episodes.values())
        counts = [int(node.text) for node in figure.all("text", "value") if node.text.isdigit() and node.text != "0"]
        longest = max(len(e.turns) for e in episodes)
        reached = [sum(len(e.turns) > k and not ends(e, k) for e in episodes) for k in range(longest)]
        assert counts == [n for n in reached if n]


@pytest.mark.parametrize("table", tables(), ids="-".join)
def test_episodes_shown_are_the_stored_ones(table: tuple[str, str], root: Node, runs: Runs) -> None:
    exhibits = part(root, table).all("article", "exhibit")
    assert len(exhibits) == 3
    for exhibit in exhibits:
        key = exhibit["aria-label"].rpartition(", ")[2]
        for strip in exhibit.all("div", "strip"):
            episode = runs[table][agent(strip)].episodes[key]
            assert strip.one("h5").one("b").text == number(curves(episode)[1][-1], 2)
            shown = [item.text for item in strip.one("ol", "reel").all("p")]
            assert [(int(words.split()[0]), words.split("IoU ")[1]) for words in shown] == [
                (turn, number(value, 2)) for turn, value in enumerate(episode.iou[1:], start=1)
            ]


def test_images_are_of_drawn_datasets_only(root: Node) -> None:
    for exhibit in root.all("article", "exhibit"):
        shown = [use["href"] for use in exhibit.all("use") if re.fullmatch(r"#[io]\d+", use["href"])]
        assert bool(shown) == exhibit["aria-label"].rpartition(", ")[2].startswith("Phantom/")
    used = {use["href"] for use in root.all("use")}
    assert all(f"#{image['id']}" in used for image in root.all("image"))


def test_the_papers_numbers_are_those_of_the_data_files(root: Node) -> None:
    wanted = grids(reported())
    assert len(wanted) == len(root.one(id="reported").all("div", "reported"))
    for grid in wanted:
        block = root.one(id=grid.id)
        assert f"{grid.source}, Table {grid.table}" in block.one("h3").text
        for row, line in zip(rows_of(block.one("table")), grid.lines, strict=True):
            assert row.one("th").text == line.setting
            shown = [cell.text for cell in row.all("td", data_k="*")]
            digits = [2 if metric in ("turns", "steps", "seconds") else 3 for _, _, metric in grid.columns]
            assert shown == [number(value, n) for value, n in zip(line.cells, digits, strict=True)]
    rows = [row for row in reported() if row.dataset == "BTCV"]
    (block,) = root.one(id="btcv").all("div", "reported")
    assert [(row.one("th").text, row.one(data_k="dice").text) for row in rows_of(block.one("table"))] == [
        (row.setting, number(row.metrics["dice"])) for row in rows
    ]


def test_the_papers_averages_are_there(root: Node) -> None:
    """MedSAM-Agent's Table 1: .794 and .705 over six modalities."""
    row = next(
        r for r in rows_of(root.one(id="reported-medsam-agent-1").one("table")) if r.one("th").text == "Ours-MedSAM2"
    )
    assert [cell.text for cell in row.all("td", data_k="*")][-2:] == ["0.794", "0.705"]


def test_the_totals_at_the_top_count_the_runs(root: Node) -> None:
    facts = {item.one("dt").text: item.one("dd").text for item in root.one("dl", "facts").all("div")}
    rows = [run for folder in find_runs(RESULTS) if (run := read_record(folder / "summary.json"))]
    assert facts["episodes"] == f"{sum(row['rows'][0]['episodes'] for row in rows):,}"
    agents = {(row["rows"][0]["tool"], row["rows"][0]["policy"]) for row in rows}
    assert facts["agents, a policy with a tool"] == str(len(agents))


@pytest.mark.skipif(not (RESULTS / "robust").is_dir(), reason="the suite robust has no frozen results")
def test_robustness_is_what_the_runs_on_corrupted_images_say(root: Node) -> None:
    found: dict[tuple[str, str, str, str], float] = {}
    for folder in find_runs(RESULTS / "robust"):
        (row,) = (read_record(folder / "summary.json") or {})["rows"]
        env, _, variant = folder.parent.name.partition("@")
        found[env.split("-")[1], row["tool"], row["policy"], variant or "clean"] = row["iou"]
    rows = rows_of(root.one("table", id="t-corrupted"))
    assert rows
    for row in rows:
        played = (row.all("td")[1].text, *agent(row))
        clean = found[*played, "clean"]
        by_severity: dict[str, list[float]] = {}
        for cell in row.all("td", data_k="*"):
            key = cell["data-k"]
            if key == "clean":
                assert cell.text == number(clean, 2)
                continue
            values = by_severity.setdefault(key[-1], [])
            if key.startswith("mean-"):
                value = float(np.mean(values)) if len(values) == len(CORRUPTIONS) else None
            elif (value := found.get((*played, key))) is not None:
                values.append(value)
            if value is None:  # not played; and a mean over some would be another number
                assert cell.text == "\N{EM DASH}"
                continue
            assert cell.text == f"{number(value, 2)} {signed(value - clean, 2)}"
    for row in rows_of(root.one("table", id="t-noisy")):
        dataset, tool, policy = row.all("td")[1].text, row["data-tool"], row.one("th").text
        for cell in row.all("td", data_k="*"):
            options = cell["data-k"]
            clean = found[dataset, tool, policy, "clean"]
            if options == "clean":
                assert cell.text == number(clean, 2)
            elif cell.text != "\N{EM DASH}":
                value = found[dataset, tool, f"{policy}:{options}", "clean"]
                assert cell.text == f"{number(value, 2)} {signed(value - clean, 2)}"
    for cell in (cell for row in rows_of(root.one("table", id="t-quick")) for cell in row.all(data_k="corrupted")):
        row = cell.parent
        assert row is not None
        kept = {
            s: [v for (*played, k), v in found.items() if played == ["Phantom", *agent(row)] and k.endswith(f"-{s}")]
            for s in "35"
        }
        if cell.text != "\N{EM DASH}":
            means = [float(np.mean(kept[s])) for s in "35"]
            clean = found["Phantom", *agent(row), "clean"]
            assert cell.text == f"{number(means[0], 2)}, {number(means[1], 2)} " + ", ".join(
                percent(mean / clean) for mean in means
            )
