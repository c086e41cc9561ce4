"""The papers' numbers as a page shows them: a grid a table of a paper, and the rows on one dataset of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medseg_gym.bench.reported import ReportedRow
from medseg_gym.datasets.cards import DATASETS

KINDS = {  # as tables say it
    "tool": "tool alone",
    "prompted": "untrained agent",
    "agent": "trained agent",
    "mllm": "own decoder",
}
METRICS = {"dice": "Dice", "iou": "IoU", "f1": "F1", "turns": "turns", "steps": "steps", "seconds": "seconds"}


@dataclass(frozen=True, slots=True)
class Line:
    """One setting of a paper's table."""

    setting: str
    kind: str
    tool: str
    note: str
    cells: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """One table of a paper, its datasets averaged where it has averages."""

    source: str
    table: str
    columns: tuple[tuple[str, str, str], ...]  # heading, modality ("" for the average over them), metric
    lines: tuple[Line, ...]

    @property
    def id(self) -> str:
        return f"reported-{self.source.lower()}-{self.table}"


def grids(rows: Sequence[ReportedRow]) -> list[Grid]:
    """Every table, in order; of those that print averages only these, so that they can be read beside ours."""
    by_table: dict[tuple[str, str], list[ReportedRow]] = {}
    for row in rows:
        by_table.setdefault((row.source, row.table), []).append(row)
    return [_grid(source, table, found) for (source, table), found in by_table.items()]


def on_dataset(rows: Sequence[ReportedRow], dataset: str) -> list[ReportedRow]:
    """What the papers report on one dataset of the catalogue; each setting once a table."""
    return [row for row in rows if row.dataset == dataset and {"dice", "iou"} & row.metrics.keys()]


def _grid(source: str, table: str, rows: Sequence[ReportedRow]) -> Grid:
    averages = [row for row in rows if not row.dataset]
    kept = averages or list(rows)
    columns = tuple(
        dict.fromkeys(
            (_heading(row), row.modality, metric) for row in kept for metric in METRICS if metric in row.metrics
        )
    )
    settings = dict.fromkeys((row.setting, row.kind, row.tool) for row in kept)
    lines = []
    for setting, kind, tool in settings:
        own = [row for row in kept if (row.setting, row.kind, row.tool) == (setting, kind, tool)]
        values = {(_heading(row), row.modality, metric): value for row in own for metric, value in row.metrics.items()}
        lines.append(
            Line(setting, KINDS.get(kind, kind), tool, own[0].note, tuple(values.get(column) for column in columns))
        )
    return Grid(source, table, columns, tuple(lines))


def _heading(row: ReportedRow) -> str:
    if row.dataset:
        return DATASETS[row.dataset].title if row.dataset in DATASETS else row.dataset
    return row.modality or "average"
