"""The papers' cross-tool tables from our results: MedSAM-Agent's Table 2 and IBISAgent's Table 9."""

from __future__ import annotations

from medseg_gym.bench.leaderboard_records import Results, Row
from medseg_gym.tools.cards import TOOLS

DASH = "\N{EM DASH}"
Grid = tuple[str, list[str], list[list[str]]]  # title, head, body

TABLE_2 = "One policy, many tools (the form of MedSAM-Agent, Table 2)"
TABLE_9 = "Replacing the tool (the form of IBISAgent, Table 9)"


def cross_tables(results: Results) -> list[Grid]:
    """Both tables over the datasets that somebody played, per policy its tools by name.

    A tool that a policy has not been played with is a row of dashes, so that what is missing is seen; so is a tool
    that nobody played.
    """
    datasets = list(dict.fromkeys(name for table in results.tables for name in table.modality))
    rows = {(row.policy, row.tool): row for table in results.tables for row in table.rows}
    policies = sorted({policy for policy, _ in rows})
    tools = [tool for tool in TOOLS if any(entry.tool == tool for entry in results.suite.entries)]
    pairs = [(policy, tool) for policy in policies for tool in tools]
    second = [
        [
            policy,
            _title(tool, rows.get((policy, tool))),
            *(c for name in datasets for c in _dice_iou(rows.get((policy, tool)), name)),
        ]
        for policy, tool in pairs
    ]
    ninth = [
        [
            f"{policy} ({_title(tool, rows.get((policy, tool)))})",
            *(c for name in datasets for c in _iou_dsc_f1(rows.get((policy, tool)), name)),
        ]
        for policy, tool in pairs
    ]
    return [
        (TABLE_2, ["Policy", "Tool", *(f"{n} {m}" for n in datasets for m in ("Dice", "IoU"))], second),
        (TABLE_9, ["Method", *(f"{n} {m}" for n in datasets for m in ("IoU", "DSC", "F1"))], ninth),
    ]


def _title(tool: str, row: Row | None) -> str:
    return f"{TOOLS[tool].title}, trial" if row is not None and row.trial else TOOLS[tool].title


def _dice_iou(row: Row | None, name: str) -> list[str]:
    if row is None or name not in row.iou.datasets:
        return [DASH, DASH]
    return [f"{row.dice.datasets[name].mean:.3f}", f"{row.iou.datasets[name].mean:.3f}"]


def _iou_dsc_f1(row: Row | None, name: str) -> list[str]:
    if row is None or name not in row.iou.datasets:
        return [DASH, DASH, DASH]
    f1 = DASH if row.f1 is None else f"{100 * row.f1[name]:.2f}"
    return [f"{100 * row.iou.datasets[name].mean:.2f}", f"{100 * row.dice.datasets[name].mean:.2f}", f1]
