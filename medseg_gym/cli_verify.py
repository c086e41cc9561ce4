"""`leaderboard verify` and `rescore`: is a run what it says it is, and what would another reward have paid for it?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg_gym.cli_terminal import Progress, clean_errors, console, progress_bars
from medseg_gym.errors import BadDataError, MedSegError

if TYPE_CHECKING:
    from medseg_gym.bench.verify_findings import Report

# 1 and 2 are errors of use; 3, as in `data prepare`, means done, but not all of it
EXIT = {"exact": 0, "equivalent": 0, "consistent": 3, "different": 4, "incomplete": 5, "tampered": 6}
VERIFY_EPILOG = (
    "Exit code 0: exact, equivalent, or consistent with --no-replay. 3: consistent, but data or tool are not here to "
    "replay it. 4: different. 5: incomplete. 6: tampered. Of several runs, the worst."
)


def verify(
    directory: Annotated[Path, typer.Argument(help="A run's folder, or one with runs below it.")],
    cases: Annotated[int, typer.Option("--cases", help="Replay this many cases a policy; 0 means all.")] = 0,
    seed: Annotated[int | None, typer.Option("--seed", help="Draws these cases; by default nobody can know.")] = None,
    no_replay: Annotated[bool, typer.Option("--no-replay", help="Score the stored masks, play nothing.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole reports into this file.")] = None,
) -> None:
    """Check runs: files against each other, masks against the data, and every episode played again."""
    import json
    import secrets

    import numpy as np

    from medseg_gym.bench.rundir import write_whole
    from medseg_gym.bench.runs import find_runs
    from medseg_gym.bench.verify import verify as check

    with clean_errors():
        if cases < 0:
            raise MedSegError(f"--cases {cases}; wanted a whole number from 0 up")
        folders = find_runs(directory)
        if not folders:
            raise BadDataError(f"{directory}: no run in it or below; wanted a folder that evaluate wrote")
        drawn = secrets.randbits(32) if seed is None else seed
        if cases:
            print(f"cases drawn by --seed {drawn}")
        reports = []
        for folder in folders:
            place = folder.relative_to(directory).as_posix()
            with progress_bars() as progress:
                report = check(
                    folder,
                    cases=cases or None,
                    rng=np.random.default_rng(drawn),
                    play=not no_replay,
                    progress=partial(_progress, progress, "" if place == "." else place),
                )
            reports.append({**report.record(), "folder": place})
            _show(report, folder.name if place == "." else place)
        if json_file is not None:
            write_whole(json_file, json.dumps({"schema": 1, "reports": reports}, indent=1, ensure_ascii=False) + "\n")
    codes = [EXIT[report["verdict"]] for report in reports]
    if no_replay:
        codes = [0 if code == EXIT["consistent"] else code for code in codes]
    if max(codes):
        raise typer.Exit(max(codes))


def rescore(
    directory: Annotated[Path, typer.Argument(help="A run's folder.")],
    reward: Annotated[str, typer.Option("--reward", help="shaped, medsam-agent or ibis.")],
    timing: Annotated[str, typer.Option("--timing", help="dense or terminal; the reward's own by default.")] = "",
) -> None:
    """Work out what another reward would have paid for a run; write rewards-NAME.json beside its episodes."""
    import json

    from rich.markup import escape
    from rich.table import Table

    from medseg_gym.bench.rescore import needs_target, rescore_run
    from medseg_gym.bench.rundir import write_whole
    from medseg_gym.rewards import resolve

    with clean_errors():
        spec = resolve(reward, timing or None)
        scored = rescore_run(directory, spec)
        name = f"rewards-{spec.name}{f'-{timing}' if timing else ''}.json"
        write_whole(directory / name, json.dumps(scored, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    table = Table("env", "policy", box=None, header_style="bold", pad_edge=False)
    for column in ("cases", "stored reward", f"{spec.name}, {spec.timing}"):
        table.add_column(column, justify="right")
    for row in scored["rows"]:
        numbers = (row["stored"], row["reward"])
        shown = ("-" if value is None else f"{value:.3f}" for value in numbers)
        table.add_row(escape(row["env"]), escape(row["policy"]), str(row["episodes"]), *shown)
    out = console()
    out.print(table)
    for note in scored["notes"]:
        out.print(f"[yellow]note:[/yellow] {escape(note)}")
    print(f"written: {directory / name}")
    if scored["notes"] and needs_target(spec):
        raise typer.Exit(EXIT["consistent"])


def _progress(show: Progress, place: str, what: str, done: int, total: int) -> None:
    show(f"{place} {what}".strip(), done, total)


def _show(report: Report, place: str) -> None:
    """A run's verdict, what was looked at, and the findings."""
    colour = {"exact": "green", "equivalent": "green", "consistent": "yellow"}.get(report.verdict, "red")
    out = console()
    out.print(f"[{colour}]{report.verdict}[/{colour}]  ", end="")
    out.print(f"{place}: {report.episodes} episodes, {report.replayed} replayed", markup=False, soft_wrap=True)
    for what, how in report.checks.items():
        out.print(f"  {what}: {how}", markup=False, soft_wrap=True)
    for finding in report.findings:
        out.print(f"  {finding}", markup=False, highlight=False, soft_wrap=True)
    if report.left_out:
        out.print(f"  and {report.left_out} more findings")
