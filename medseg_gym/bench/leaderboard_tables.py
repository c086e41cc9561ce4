"""From the scores of every case to a leaderboard's numbers: means, intervals, ranks, ceilings and differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medseg_gym import metrics
from medseg_gym.bench.leaderboard_read import Case, Played
from medseg_gym.bench.leaderboard_records import Clicks, Gap, Results, Row, Table
from medseg_gym.bench.statistics import Interval, Scores
from medseg_gym.bench.statistics_agents import ceiling
from medseg_gym.bench.statistics_tables import Averages, averages, iqm, ranks
from medseg_gym.bench.suites import Entry, Suite, needed
from medseg_gym.bench.summary import NOC_THRESHOLDS

Agent = tuple[str, str]  # tool, policy
CaseId = tuple[str, int, str]  # dataset as titled, seed, key

# Those that see the target and prompt without noise; the best of them on a tool is the tool's ceiling.
CEILINGS = ("OracleClicks", "OracleBoxThenClicks", "XuClicks", "BoxOnce", "CentreClick")


def results_of(suite: Suite, played: Sequence[Played], *, baseline: str | None = None) -> Results:
    """A suite's tables from its runs, and the entries without one.

    Differences are taken to the first agent of a table, or to the policy `baseline` on the same tool.
    """
    place = {entry.folder: i for i, entry in enumerate(suite.entries)}
    played = sorted(played, key=lambda run: (place[run.entry.folder], run.policy))
    tables = []
    for group in suite.groups:
        runs = [run for run in played if run.entry.group == group]
        if runs:
            tables.append(_table(group, runs, baseline))
    there = {run.entry.folder for run in played}
    gaps = tuple(_gap(entry) for entry in suite.entries if entry.folder not in there)
    return Results(suite, tuple(tables), gaps, tuple(played))


def sees_target(policy: str) -> bool:
    """Whether a policy is one of those of the package that are built with the targets."""
    return policy.partition(":")[0] in (*CEILINGS, "TextOracle")


def is_ceiling(policy: str) -> bool:
    kind, _, options = policy.partition(":")
    return kind in CEILINGS and not any(noise in options for noise in ("jitter", "miss"))


def _gap(entry: Entry) -> Gap:
    """Says what it takes, not what this machine lacks: the same results then give the same page everywhere."""
    lacks = needed(entry)
    return Gap(entry, lacks.what, lacks.commands) if lacks else Gap(entry, "not played yet", ())


@dataclass(frozen=True, slots=True)
class _Group:
    """The runs of one table, by agent and case."""

    runs: Mapping[Agent, Sequence[Played]]
    scores: Mapping[Agent, Mapping[CaseId, Case]]
    patients: Mapping[CaseId, str]
    modality: Mapping[str, str]  # by dataset
    horizon: int

    def scores_of(self, values: Mapping[CaseId, float]) -> dict[str, Scores]:
        """Values by case as Scores by dataset."""
        parts: dict[str, Scores] = {}
        for c, value in values.items():
            part = parts.setdefault(c[0], Scores([], []))
            part.values.append(value)  # type: ignore[union-attr]
            part.patients.append(self.patients[c])  # type: ignore[attr-defined]
        return parts

    def averages(self, values: Mapping[CaseId, float], low: float = 0, high: float = 1) -> Averages:
        return averages(self.scores_of(values), self.modality, _rng(), bounds=(low, high))

    def mean(self, values: Mapping[CaseId, float]) -> float:
        """The averages' mean alone: case -> dataset -> modality -> overall."""
        return self.chain({name: float(np.mean(s.values)) for name, s in self.scores_of(values).items()})

    def chain(self, means: Mapping[str, float]) -> float:
        """Numbers by dataset -> modality -> overall."""
        kinds: dict[str, list[float]] = defaultdict(list)
        for name, mean in means.items():
            kinds[self.modality[name]].append(mean)
        return float(np.mean([np.mean(of_kind) for of_kind in kinds.values()]))


def _table(group: str, runs: Sequence[Played], baseline: str | None) -> Table:
    agents: dict[Agent, list[Played]] = defaultdict(list)
    for run in runs:
        agents[run.entry.tool, run.policy].append(run)
    found = _Group(
        agents,
        {agent: _by_case(of_agent) for agent, of_agent in agents.items()},
        _patients(runs),
        {run.entry.title: run.entry.modality for run in runs},
        max(run.entry.horizon for run in runs),
    )
    rows = _ranked([_row(found, agent) for agent in agents])
    first = (rows[0].tool, rows[0].policy)
    return Table(
        group,
        found.modality,
        tuple(
            replace(row, **_difference(found, (row.tool, row.policy), (row.tool, baseline), baseline))
            if baseline
            else replace(row, **_difference(found, (row.tool, row.policy), first, f"{first[1]} with {first[0]}"))
            for row in rows
        ),
    )


def _ranked(rows: list[Row]) -> list[Row]:
    """By rank, ties by mean IoU; those that have not played every dataset, or only a trial, come last without one."""
    order = ranks({str(i): row.iou.overall for i, row in enumerate(rows) if row.whole})
    rest = sorted((row for row in rows if not row.whole), key=lambda row: (-row.iou.overall.mean, row.tool, row.policy))
    return [*(replace(rows[int(i)], rank=rank) for i, rank in order.items()), *rest]


def _row(group: _Group, agent: Agent) -> Row:
    tool, policy = agent
    own, runs = group.scores[agent], group.runs[agent]
    played = tuple(name for name in group.modality if any(run.entry.title == name for run in runs))
    trial = any(run.trial for run in runs)

    def values(of: Callable[[Case], float]) -> dict[CaseId, float]:
        return {c: of(case) for c, case in own.items()}

    def measured(of: Callable[[Case], float | None]) -> float | None:
        """A mean over some of the cases would be another number: None where one lacks it."""
        found = {c: value for c, case in own.items() if (value := of(case)) is not None}
        return group.mean(found) if len(found) == len(own) else None

    iou, dice = values(lambda case: case.iou[-1]), values(lambda case: case.dice[-1])
    best = _ceiling(group, agent)
    f1 = _f1(own)
    seconds = [run.seconds for run in runs if run.seconds is not None]
    return Row(
        tool=tool,
        policy=policy,
        sees_target=sees_target(policy),
        rank=None,
        played=played,
        whole=len(played) == len(group.modality) and not trial,
        trial=trial,
        cases=len(own),
        patients=len({(c[0], group.patients[c]) for c in own}),
        iou=group.averages(iou),
        dice=group.averages(dice),
        iou_iqm=iqm(group.scores_of(iou), _rng(), bounds=(0, 1)),
        dice_iqm=iqm(group.scores_of(dice), _rng(), bounds=(0, 1)),
        nsd=measured(lambda case: case.nsd),
        hd95=_hd95(group, own),
        f1=f1,
        f1_mean=None if f1 is None else group.chain(f1),
        clicks=tuple(_clicks(group, own, quality) for quality in NOC_THRESHOLDS),
        actions=group.mean(values(lambda case: case.actions)),
        tool_calls=group.mean(values(lambda case: case.tool_calls)),
        failed=sum(case.ended == "failed" for case in own.values()),
        unreadable=sum(case.ended == "unreadable" for case in own.values()),
        unreadable_turns=sum(case.unreadable_turns for case in own.values()),
        seconds=float(np.mean(seconds)) if len(seconds) == len(runs) else None,
        ceiling=best,
        ceiling_iou=group.mean({c: group.scores[tool, best][c].iou[-1] for c in own}) if best else None,
        regret=_regret(group, own, group.scores[tool, best]) if best else None,
        against="",
        difference=None,
    )


def _ceiling(group: _Group, agent: Agent) -> str:
    """The name of the tool's best oracle on the agent's cases; "" where no oracle played all of them."""
    own = group.scores[agent]
    oracles: dict[str, Mapping[Hashable, Sequence[float]]] = {
        policy: {c: scores[c].iou for c in own}
        for (tool, policy), scores in group.scores.items()
        if tool == agent[0] and is_ceiling(policy) and own.keys() <= scores.keys()
    }
    return ceiling(oracles, group.horizon) if oracles else ""


def _regret(group: _Group, own: Mapping[CaseId, Case], above: Mapping[CaseId, Case]) -> Interval:
    """How much IoU per action, over the turns 1..horizon, an agent is below the ceiling."""
    lost = {
        c: metrics.auc(above[c].iou, group.horizon) - metrics.auc(case.iou, group.horizon) for c, case in own.items()
    }
    return group.averages(lost, -1, 1).overall


def _difference(group: _Group, agent: Agent, other: Agent, name: str) -> dict[str, Any]:
    """The paired difference in final IoU to another agent, where both played the very same cases."""
    own, against = group.scores[agent], group.scores.get(other, {})
    if agent == other or own.keys() != against.keys():
        return {"against": "", "difference": None}
    gaps = {c: case.iou[-1] - against[c].iou[-1] for c, case in own.items()}
    return {"against": name, "difference": group.averages(gaps, -1, 1).overall}


def _clicks(group: _Group, own: Mapping[CaseId, Case], quality: int) -> Clicks:
    found = {c: metrics.noc(case.iou, quality / 100) for c, case in own.items()}
    reached = [n for n in found.values() if n is not None]
    never = group.mean({c: float(n is None) for c, n in found.items()})
    return Clicks(quality, float(np.mean(reached)) if reached else None, never)


def _hd95(group: _Group, own: Mapping[CaseId, Case]) -> dict[str, float]:
    """The mean by unit, for mm and pixels have none in common; empty where a case was not measured."""
    by_unit: dict[str, dict[CaseId, float]] = defaultdict(dict)
    for c, case in own.items():
        if case.hd95 is None or case.unit is None:
            return {}
        by_unit[case.unit][c] = case.hd95
    return {unit: group.mean(by_unit[unit]) for unit in sorted(by_unit)}


def _f1(own: Mapping[CaseId, Case]) -> dict[str, float] | None:
    """F1 of mask-to-entity correspondence by dataset; None where a case has no counts."""
    counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for c, case in own.items():
        if case.entity is None:
            return None
        counts[c[0]].append(case.entity)
    return {name: metrics.entity_f1(of_dataset) for name, of_dataset in counts.items()}


def _by_case(runs: Sequence[Played]) -> dict[CaseId, Case]:
    return {(run.entry.title, seed, key): case for run in runs for (seed, key), case in run.cases.items()}


def _patients(runs: Sequence[Played]) -> dict[CaseId, str]:
    """Whose each case is; one that an agent could not read has its patient from the others, else it is its own."""
    found: dict[CaseId, str] = {}
    for c, case in (pair for run in runs for pair in _by_case([run]).items()):
        if case.patient or c not in found:
            found[c] = case.patient or c[2]
    return found


def _rng() -> np.random.Generator:
    """A fresh one an interval, so that no number hangs on what was computed before it."""
    return np.random.default_rng(0)
