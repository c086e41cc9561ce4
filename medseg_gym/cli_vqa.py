"""`medseg-gym data prepare-vqa` and `medseg-gym evaluate-vqa`: questions about pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg_gym.cli_terminal import clean_errors, console, progress_bars

EXAMPLES = 5  # skipped records that are shown
DAMAGED = 3  # exit code: the work was done, and something in the data is not as it should be


def prepare_vqa(
    name: Annotated[str, typer.Argument(help="What the set is to be called, as VQA-RAD.")],
    source: Annotated[Path, typer.Option("--from", help="The folder that holds its files.", show_default=False)],
    layout: Annotated[str, typer.Option(help="vqa-rad, slake, pathvqa, omnimedvqa or json.")],
    split: Annotated[
        str, typer.Option(help="patient: no patient and no picture on two sides; published: as the source has it.")
    ] = "patient",
    patient: Annotated[
        str | None, typer.Option(help="Regular expression over pictures' paths, with a group (?P<patient>...).")
    ] = None,
    language: Annotated[str, typer.Option(help="Of SLAKE's questions: en, zh or all.")] = "en",
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: vqa/NAME in the data home.")] = None,
    seed: Annotated[int, typer.Option(help="Shares out patients that no published split places.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a prepared set of other content.")] = False,
) -> None:
    """Turn a published folder of questions about pictures into a prepared set."""
    from medseg_gym.datasets.vqa_prepare import prepare_vqa as run

    with clean_errors(), progress_bars() as bars:
        report = run(
            name,
            source,
            layout=layout,
            split=split,
            patient=patient,
            language=language,
            out=out,
            force=force,
            seed=seed,
            progress=partial(bars, "pictures"),
        )
    said = console()
    sides = ", ".join(f"{count} {side}" for side, count in report.splits.items())
    said.print(f"{name}: {report.questions} questions ({sides}) about {report.pictures} pictures")
    said.print(f"{report.closed} closed, {report.questions - report.closed} open")
    said.print(f"{report.path}{' (unchanged)' if report.unchanged else ''}", markup=False, soft_wrap=True)
    if report.two_sided:
        kept = "kept so, by --split published" if split == "published" else "each put on one side, by a hash"
        said.print(f"the published split has {report.two_sided} patients or pictures on two sides: {kept}")
    for damaged, word in ((True, "left out as damaged"), (False, "left out")):
        those = [entry for entry in report.skipped if entry.damaged is damaged]
        if those:
            said.print(f"{len(those)} {word}:")
            for entry in those[:EXAMPLES]:
                said.print(f"    {entry.file}: {entry.reason}", markup=False, soft_wrap=True)
            if len(those) > EXAMPLES:
                said.print("    ...")
    if report.damaged:
        raise typer.Exit(DAMAGED)


def evaluate_vqa(
    questions: Annotated[
        str, typer.Option("--questions", help='A prepared set, a folder or JSONL file, or "Phantom:task=mixed".')
    ],
    policy: Annotated[
        list[str],
        typer.Option("--policy", help="MajorityAnswer, RandomAnswer, vlm:..., vlm-local:...; several times."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write into; the same command resumes it.")],
    tool: Annotated[str, typer.Option("--tool", help="The tool an agent may use before it answers.")] = "Nano",
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    cases: Annotated[int, typer.Option("--cases", help="How many questions of the split; 0 means all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the questions and drives the policies.")] = 0,
    horizon: Annotated[int, typer.Option("--horizon", help="Turns a question may take, its answer included.")] = 5,
    num_envs: Annotated[int, typer.Option("--num-envs", help="Questions under way at once.")] = 8,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what --out holds and start over.")] = False,
) -> None:
    """Ask policies questions about pictures; write answers.jsonl and summary.json."""
    from medseg_gym.bench.vqa import evaluate_vqa as run

    sys.path.insert(0, "")  # so that --policy my_module:Class finds a file beside the user
    with clean_errors(), progress_bars() as progress:
        found = run(
            questions,
            policy,
            out=out,
            tool=tool,
            split=split,
            cases=cases or None,
            seed=seed,
            horizon=horizon,
            num_envs=num_envs,
            restart=restart,
            progress=progress,
        )
    _print(found.summary, found.directory)
    if any(row["ended"]["failed"] == sum(row["ended"].values()) for row in found.summary["rows"]):
        console(stderr=True).print("error: a policy failed at every question, see the notes above", style="red")
        raise typer.Exit(1)


def _print(summary: Mapping[str, Any], directory: Path) -> None:
    from rich.table import Table

    table = Table("policy", box=None, header_style="bold")
    for name in ("questions", "accuracy", "closed", "open", "unanswered", "used the tool", "turns"):
        table.add_column(name, justify="right")
    for row in summary["rows"]:
        asked = row["accuracy"]["cases"]
        table.add_row(
            row["policy"],
            str(asked),
            _interval(row["accuracy"]),
            _interval(row["closed"]),
            _interval(row["open"]),
            str(asked - row["answered"]),
            f"{row['used_the_tool']:.0%}",
            f"{row['turns']:.2f}",
        )
    out = console()
    out.print(table)
    for note in summary["notes"]:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    out.print(f"exact match, 95 % intervals over patients: {directory / 'summary.json'}", markup=False, soft_wrap=True)


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
