"""The numbers that the papers print, table by table: reported by their authors, not run here, never ranked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MARK = "reported, not run here"
FOLDER = Path(__file__).parent

# tool: a tool with the target's point or box in one turn; prompted: an untrained model operates the tool; agent: a
# model trained to; mllm: a language model that draws masks by a decoder of its own
KINDS = ("tool", "prompted", "agent", "mllm")


@dataclass(frozen=True, slots=True)
class ReportedRow:
    """One setting of one table on one dataset, or averaged."""

    source: str  # "MedSAM-Agent" or "IBISAgent"
    table: str
    setting: str  # the row's name as printed, without citations
    tool: str  # an id of ours where the paper's tool is one; "" where the method has no tool, or the paper does not say
    kind: str  # one of KINDS
    dataset: str  # an id of the catalogue; a test set that is not in it by the paper's name; "" for an average
    modality: str  # as the catalogue words it; "" where a test set has several, and for the average over modalities
    metrics: Mapping[str, float]  # "dice", "iou", "f1" in [0, 1]; "turns", "steps", "seconds"; no entry for a lost cell
    note: str = ""

    @property
    def overall(self) -> bool:
        """Whether it is the average over all modalities."""
        return not self.dataset and not self.modality


@dataclass(frozen=True, slots=True)
class Inconsistency:
    """A printed number that other printed numbers contradict; the rows keep it as it is printed."""

    source: str
    table: str
    setting: str
    column: str  # the dataset, or the modality of an average
    metric: str
    printed: float  # this and the next two on the scale of ReportedRow
    expected: float
    difference: float
    why: str


@cache
def reported() -> tuple[ReportedRow, ...]:
    """Every row of every table, in the tables' order; a row whose cells are all lost is left out."""
    return tuple(row for table in tables() for row in _rows(table))


@cache
def inconsistencies() -> tuple[Inconsistency, ...]:
    """Where the papers' own numbers do not add up."""
    return tuple(
        Inconsistency(
            source=table["source"],
            table=table["table"],
            setting=found["setting"],
            column=found["column"],
            metric=found["metric"],
            printed=_scaled(found["printed"], table["scale"]),
            expected=_scaled(found["expected"], table["scale"]),
            difference=_scaled(found["difference"], table["scale"]),
            why=found["why"],
        )
        for table in tables()
        for found in table.get("inconsistent", ())
    )


@cache
def tables() -> tuple[dict[str, Any], ...]:
    """The data files as they are: columns, rows of values as printed (None: lost), notes; by paper and number."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in FOLDER.glob("*.json")]
    return tuple(sorted(found, key=lambda table: (table["source"] != "MedSAM-Agent", int(table["table"]))))


def _rows(table: Mapping[str, Any]) -> list[ReportedRow]:
    rows = []
    for row in table["rows"]:
        for column, values in zip(table["columns"], row["values"], strict=True):
            metrics = {
                name: value if name in ("turns", "steps", "seconds") else _scaled(value, table["scale"])
                for name, value in zip(table["metrics"], values, strict=True)
                if value is not None
            }
            variant = column.get("variant")
            if metrics:
                rows.append(
                    ReportedRow(
                        source=table["source"],
                        table=table["table"],
                        setting=f"{row['setting']}, {variant}" if variant else row["setting"],
                        tool=row["tool"],
                        kind=row["kind"],
                        dataset=column.get("dataset", ""),
                        modality=column.get("modality", ""),
                        metrics=metrics,
                        note=table["notes"].get(row["setting"], ""),
                    )
                )
    return rows


def _scaled(value: float, scale: float) -> float:
    """Per cent as a share, without the noise of the division."""
    return round(value / scale, 6)
