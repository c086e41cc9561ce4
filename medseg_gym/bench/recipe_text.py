"""A recipe's record as Markdown: our rows, what was not run, and the papers' numbers, marked as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medseg_gym.bench.leaderboard_text import DASH, grid, number, signed
from medseg_gym.bench.reported import MARK
from medseg_gym.bench.statistics import FEW_PATIENTS

NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "actions": "actions",
    "tool_calls": "tool calls",
    "seconds": "s/case",
    "turns": "turns",
    "steps": "steps",
    "f1": "F1",
}


def markdown(record: Mapping[str, Any]) -> str:
    """The whole of table.md; equal records give equal text."""
    parts = [f"# {record['title']}", record["about"], f"Beside the papers: {record['differs']}"]
    parts.append("## Run here\n\n" + _origin(record))
    parts.append(_ours(record))
    if record["overall"]:
        parts.append("Over the real datasets (dataset, then modality, then all):\n\n" + _overall(record["overall"]))
    if record["not_run"]["arms"]:
        parts.append(_left(record["not_run"]))
    if record["reported"]:
        parts.append(f"## The papers' numbers: {MARK}\n\n" + _reported(record["reported"]))
    return "\n\n".join(parts) + "\n"


def _origin(record: Mapping[str, Any]) -> str:
    commits = ", ".join(
        (str(c["commit"])[:10] if c["commit"] else "no checkout") + (" with changes" if c["changed"] else "")
        for c in record["commits"]
    )
    trial = " **A trial, with fewer cases than the recipe has.**" if record["trial"] else ""
    played = f"`{record['command']}`; commit {commits}; {', '.join(record['machines'])}; {record['seconds']:.0f} s"
    few = f"`few` says that they come from fewer than {FEW_PATIENTS} patients."
    return f"{played}.{trial} Brackets are 95 % intervals clustered by patient; {few}"


def _ours(record: Mapping[str, Any]) -> str:
    if record["kind"] == "rewards":
        return _rewards(record["rows"])
    if record["kind"] == "training":
        return _trained(record)
    columns = record["columns"]
    head = ["data", "tool", "setting", *(NAMES[c] for c in columns), "difference in IoU", "cases"]
    body = [
        [
            row["dataset"],
            row["tool"],
            row["setting"],
            *(bracketed(row[c], digits(c)) for c in columns),
            DASH
            if row["difference"] is None
            else f"{bracketed(row['difference'], sign=True)} to {row['difference']['to']}",
            _cases(row) + (f", {row['failed']} failed" if row["failed"] else ""),
        ]
        for row in record["rows"]
    ]
    return grid(head, body)


def _against(found: Mapping[str, Any] | None) -> str:
    return DASH if found is None else f"{bracketed(found, sign=True)} to {found['to']}"


def _cases(row: Mapping[str, Any]) -> str:
    few = ", few" if row["patients"] < FEW_PATIENTS else ""
    return f"{row['cases']} of {row['patients']} patients{few}"


def _rewards(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["data", "tool", "reward", "pays most", "its IoU", "its actions", "the oracle earns", "best paid exploit"]
    head += ["it earns", "more than the oracle", "exploits paid more", "cases"]
    body = []
    for row in rows:
        cells = [row["dataset"], row["tool"], row["reward"] + (f" without {row['without']}" if row["without"] else "")]
        cells += [row["pays_most"], bracketed(row["iou"]), bracketed(row["actions"], 2), bracketed(row["oracle_earns"])]
        if "exploit" in row:
            cells += [row["exploit"], bracketed(row["exploit_earns"]), bracketed(row["difference"], sign=True)]
            cells += [str(len(row["paid_more"]))]
        else:
            cells += [DASH] * 4
        body.append([*cells, _cases(row)])
    return grid(head, body)


def _trained(record: Mapping[str, Any]) -> str:
    columns = record["columns"]
    body = [[row["setting"], *(bracketed(row[c]) for c in columns), _cases(row)] for row in record["rows"]]
    how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record["training"].items())
    return f"{grid(['reward', *(NAMES.get(c, c) for c in columns), 'cases'], body)}\n\nTrained with: {how}."


def _overall(rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        [row["tool"], row["setting"], bracketed(row["dice"]), bracketed(row["iou"]), ", ".join(row["datasets"])]
        for row in rows
    ]
    return grid(["tool", "setting", "Dice", "IoU", "datasets"], body)


def _left(lacks: Mapping[str, Any]) -> str:
    lines = [f"Not run: {lacks['arms']} of {lacks['of']} arms.", ""]
    if lacks["tools"]:
        lines.append(f"- Tools without weights here (`medseg-gym tools download NAME`): {', '.join(lacks['tools'])}")
    if lacks["datasets"]:
        names = ", ".join(lacks["datasets"])
        lines.append(f"- Data that is not prepared here (`medseg-gym data prepare NAME --from FOLDER`): {names}")
    if lacks["agent"]:
        lines.append("- An agent: `--agent 'vlm:model=NAME,base_url=URL'`, with a server behind it")
    return "\n".join(lines)


def _reported(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    head = ["paper", "table", "row", "tool", "data", *(NAMES[name] for name in names)]
    body = [
        [
            row["source"],
            row["table"],
            row["setting"],
            row["tool"] or DASH,
            row["dataset"] or row["modality"] or "all six modalities",
            *(number(row["metrics"].get(name), digits(name, row["source"])) for name in names),
        ]
        for row in rows
    ]
    return grid(head, body)


def bracketed(found: Mapping[str, Any], digits: int = 3, *, sign: bool = False) -> str:
    """ "0.712 [0.650, 0.770]"; the mean alone where one patient gives no interval."""
    write = signed if sign else number
    if found["low"] is None or found["high"] is None:
        return write(found["mean"], digits)
    return f"{write(found['mean'], digits)} [{write(found['low'], digits)}, {write(found['high'], digits)}]"


def digits(name: str, source: str = "") -> int:
    """Decimals of a number: as the papers print theirs, where a paper is named."""
    if name in ("actions", "tool_calls", "turns", "steps"):
        return 2
    if name == "seconds":
        return 2 if source else 3
    return 4 if source == "IBISAgent" else 3
