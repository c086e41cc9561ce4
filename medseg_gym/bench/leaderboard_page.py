"""The leaderboard's page: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from medseg_gym.bench import leaderboard_text as text
from medseg_gym.bench.leaderboard_cross import cross_tables
from medseg_gym.bench.leaderboard_read import Skipped
from medseg_gym.bench.leaderboard_records import Results, Row, Table
from medseg_gym.bench.statistics import Interval


def page(results: Sequence[Results], skipped: Sequence[Skipped]) -> str:
    """The page as text; equal arguments give equal pages."""
    runs = [run for one in results for run in one.runs]
    return (
        _environment()
        .get_template("leaderboard.html.j2")
        .render(
            results=results,
            skipped=skipped,
            agents=len({(run.policy, run.entry.tool) for run in runs}),
            episodes=sum(len(run.cases) for run in runs),
            envs=len({(run.entry.env, run.entry.variant) for run in runs}),
        )
    )


def whisker(row: Row) -> dict[str, float | None]:
    """Where a row's IoU, its interval and its ceiling lie on a line of 100 units."""
    found = row.iou.overall
    return {
        "mean": _place(found.mean),
        "low": _place(found.mean if found.low is None else found.low),
        "high": _place(found.mean if found.high is None else found.high),
        "ceiling": None if row.ceiling_iou is None else _place(row.ceiling_iou),
    }


def differs(table: Table) -> str:
    """What a table's differences are to, in words."""
    others = list(dict.fromkeys(row.against for row in table.rows if row.against))
    if not others:
        return "none; no two agents played the same cases."
    return f"of final IoU, paired by case, to {others[0]}."


def span(found: Interval | None, signed: bool = False) -> str:
    """ "[.650, .770]", or nothing where there is none."""
    if found is None or found.low is None or found.high is None:
        return ""
    write = text.signed if signed else text.number
    return f"[{write(found.low)}, {write(found.high)}]"


def _place(value: float) -> float:
    return round(100 * value, 2)


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
    }
    environment.globals |= {
        "whisker": whisker,
        "differs": differs,
        "marks": text.marks,
        "count_of": text.count_of,
        "group_title": text.group_title,
        "gaps_by_reason": text.gaps_by_reason,
        "origins": text.origins,
        "cross_tables": cross_tables,
    }
    return environment
