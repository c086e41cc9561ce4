"""The leaderboard's page: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medseg_gym.bench import leaderboard_figures as figures
from medseg_gym.bench import leaderboard_reported as papers
from medseg_gym.bench import leaderboard_text as text
from medseg_gym.bench.leaderboard_cross import cross_tables
from medseg_gym.bench.leaderboard_gallery import Gallery
from medseg_gym.bench.leaderboard_read import Skipped
from medseg_gym.bench.leaderboard_records import Results, Table
from medseg_gym.bench.leaderboard_robust import CLEAN, SEVERITIES, SUITE, corrupted, noisy
from medseg_gym.bench.leaderboard_svg import COLOURS, colour, styles
from medseg_gym.bench.leaderboard_turns import Turns, turns_of
from medseg_gym.bench.reported import MARK, ReportedRow
from medseg_gym.bench.statistics import Interval
from medseg_gym.bench.suites import CORRUPTIONS

TEMPLATES = Path(__file__).with_name("templates")


def page(
    results: Sequence[Results],
    skipped: Sequence[Skipped],
    *,
    galleries: Mapping[tuple[str, str], Gallery] | None = None,
    reported: Sequence[ReportedRow] = (),
) -> str:
    """The page as text; equal arguments give equal pages.

    `galleries` are the episodes to show, by suite and group; `reported` the papers' own numbers, which get no rank.
    """
    runs = [run for one in results for run in one.runs]
    rows = [row for one in results for table in one.tables for row in table.rows]
    look = styles(row.policy for row in rows)
    shown = galleries or {}
    robust = corrupted(results)
    script = (TEMPLATES / "leaderboard.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("leaderboard.html.j2")
        .render(
            results=results,
            boards={one.suite.name: [_board(one, table, look, robust) for table in one.tables] for one in results},
            galleries=shown,
            exhibits=[exhibit for gallery in shown.values() for exhibit in gallery.exhibits],
            robust=list(robust.values()),
            noisy=noisy(results),
            grids=papers.grids(reported),
            on_dataset=_on_dataset(results, reported),
            skipped=skipped,
            agents=len({(run.policy, run.entry.tool) for run in runs}),
            episodes=sum(len(run.cases) for run in runs),
            envs=len({(run.entry.env, run.entry.variant) for run in runs}),
            modalities=sorted({kind for one in results for table in one.tables for kind in table.modality.values()}),
            tools=list(dict.fromkeys(run.entry.tool for run in runs)),
            policies=list(dict.fromkeys(sorted({row.policy for row in rows}, key=lambda name: look[name]))),
            look=look,
            style=Markup((TEMPLATES / "leaderboard.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def differs(table: Table) -> str:
    """What a table's differences are to, in words."""
    others = list(dict.fromkeys(row.against for row in table.rows if row.against))
    if not others:
        return "none; no two agents played the same cases."
    return f"of final IoU, paired by case, to {others[0]}."


def ceilings(table: Table) -> str:
    """Which oracle is each tool's ceiling: "OracleClicks (Nano), BoxOnce (GrabCut)"."""
    return ", ".join(dict.fromkeys(f"{row.ceiling} ({row.tool})" for row in table.rows if row.ceiling))


def span(found: Interval | None, signed: bool = False) -> str:
    """ "[.650, .770]", or nothing where there is none."""
    if found is None or found.low is None or found.high is None:
        return ""
    write = text.signed if signed else text.number
    return f"[{write(found.low)}, {write(found.high)}]"


def exact(value: float | None) -> str:
    """A number for machines, or nothing: what sorting and tests read."""
    return "" if value is None else f"{value:.6f}"


def _board(results: Results, table: Table, look: Mapping[str, int], robust: Mapping[Any, Any]) -> dict[str, Any]:
    """One table with its figures: a panel a tool, in the table's order."""
    turns = turns_of(results, table)
    name = f"{results.suite.title}{f', {table.group}' if table.group else ''}"
    tools = list(dict.fromkeys(row.tool for row in table.rows))
    most = max((len(agent.gains) for agent in turns), default=0)
    only = next(iter(table.modality)) if len(table.modality) == 1 else ""
    return {
        "id": f"t-{results.suite.name}" + (f"-{place}" if (place := results.tables.index(table)) else ""),
        "table": table,
        "name": name,
        "turns": turns,
        "panels": [_panel(tool, name, table, turns, look) for tool in tools],
        "gains": [(agent, figures.turn_gains(agent, most, _gain_title(agent, name))) for agent in turns if agent.gains],
        "most": most,
        "robust": {
            (row.tool, row.policy): robust[only, row.tool, row.policy]
            for row in table.rows
            if (only, row.tool, row.policy) in robust and results.suite.name != SUITE
        },
        "corrupt": results.suite.name == SUITE and table.group != CLEAN,
    }


def _panel(tool: str, name: str, table: Table, turns: Sequence[Turns], look: Mapping[str, int]) -> dict[str, Any]:
    rows = [row for row in table.rows if row.tool == tool]
    agents = [agent for agent in turns if agent.tool == tool]
    return {
        "tool": tool,
        "dots": figures.ceiling_dots(
            rows, look, f"{name}, {tool}: final IoU of each policy beside the oracle's ceiling"
        ),
        "curves": figures.dice_curves(agents, look, f"{name}, {tool}: mean Dice of each policy after each action"),
    }


def _gain_title(agent: Turns, name: str) -> str:
    return f"{name}: what each turn of {agent.policy} with {agent.tool} gained; numbers in the table below"


def _on_dataset(results: Sequence[Results], reported: Sequence[ReportedRow]) -> dict[str, list[ReportedRow]]:
    """For each suite of a single dataset that was played, what the papers report on it."""
    found = {}
    for one in results:
        datasets = {run.entry.dataset for run in one.runs}
        rows = papers.on_dataset(reported, next(iter(datasets))) if len(datasets) == 1 else []
        if rows:
            found[one.suite.name] = rows
    return found


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("medseg_gym.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.number,
        "signed": text.signed,
        "percent": text.percent,
        "span": span,
        "distance": text.distance,
        "exact": exact,
        "colour": colour,
    }
    environment.globals |= {
        "differs": differs,
        "ceilings": ceilings,
        "marks": text.marks,
        "count_of": text.count_of,
        "group_title": text.group_title,
        "gaps_by_reason": text.gaps_by_reason,
        "origins": text.origins,
        "cross_tables": cross_tables,
        "COLOURS": COLOURS,
        "CORRUPTIONS": CORRUPTIONS,
        "SEVERITIES": SEVERITIES,
        "MARK": MARK,
        "KINDS": papers.KINDS,
        "METRICS": papers.METRICS,
    }
    return environment
