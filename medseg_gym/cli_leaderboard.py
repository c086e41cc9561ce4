"""`medseg-gym leaderboard`: list the suites, play one, build the pages, freeze results for publication."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from medseg_gym.cli_terminal import clean_errors, console, progress_bars
from medseg_gym.cli_verify import VERIFY_EPILOG, verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RESULTS = Path("runs/leaderboard")
BAD = ("refused", "failed")


@app.command("list")
def list_suites(
    suite: Annotated[str, typer.Argument(help="One suite, with every env and what it lacks.")] = "",
) -> None:
    """The suites, how much of each can be played here, and what is missing."""
    from rich.table import Table

    from medseg_gym.bench import suites

    with clean_errors():
        chosen = [suites.suite(suite)] if suite else list(suites.SUITES.values())
    out = console()
    if not suite:
        table = Table("suite", "envs here", "turns", "policies", "what it is", box=None, header_style="bold")
        for one in chosen:
            here = sum(suites.missing(entry) is None for entry in one.entries)
            turns = "/".join(str(h) for h in sorted({entry.horizon for entry in one.entries}))
            table.add_row(one.name, f"{here} of {len(one.entries)}", turns, str(len(one.policies)), one.about)
        out.print(table)
        out.print("what is missing of one: medseg-gym leaderboard list SUITE")
        return
    table = Table("env", "variant", "cases", "turns", "missing", box=None, header_style="bold")
    for entry in chosen[0].entries:
        lacks = suites.missing(entry)
        state = "[green]ready[/green]" if lacks is None else lacks.what
        cases = "all" if entry.cases is None else str(entry.cases)
        table.add_row(entry.env, entry.variant, cases, str(entry.horizon), state)
    out.print(table)
    out.print(f"policies: {', '.join(chosen[0].policies)}")
    gaps = [lacks for lacks in map(suites.missing, chosen[0].entries) if lacks is not None]
    for command in dict.fromkeys(command for lacks in gaps for command in lacks.commands):
        out.print(f"to get: {command}")


@app.command(epilog="Exit code 0: all that can be played here was. 1: a run was refused, or failed in every case.")
def run(
    suite: Annotated[str, typer.Option("--suite", help="A suite; `medseg-gym leaderboard list` has them.")],
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="A policy's name, or package.module:Class; several times. Else the suite's own."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the run folders lie; the same command resumes.")] = RESULTS,
    cases: Annotated[int, typer.Option("--cases", help="A trial with at most this many cases an env.")] = 0,
    tool: Annotated[list[str] | None, typer.Option("--tool", help="Only with these tools; several times.")] = None,
    num_envs: Annotated[int, typer.Option("--num-envs", help="Episodes under way at once.")] = 8,
    restart: Annotated[bool, typer.Option("--restart", help="Play again what is finished already.")] = False,
) -> None:
    """Play a suite. What is finished stays; a new policy joins what is there; what is missing is named."""
    from medseg_gym.bench.leaderboard import write_cross_tool
    from medseg_gym.bench.leaderboard_run import run_suite

    sys.path.insert(0, "")  # so that --policy my_module:Class finds a file beside the user
    with clean_errors(), progress_bars() as progress:
        outcomes = run_suite(
            suite,
            policy or (),
            out=out,
            cases=cases or None,
            tools=tool or (),
            num_envs=num_envs,
            restart=restart,
            progress=progress,
        )
    screen = console()
    envs = len({outcome.entry.folder for outcome in outcomes})
    ran = len({o.entry.folder for o in outcomes if o.state in ("played", "failed", "there")})
    now = sum(o.state in ("played", "failed") for o in outcomes)
    before = sum(o.state == "there" for o in outcomes)
    screen.print(f"{suite}: {ran} of {envs} envs ran; {now} runs played now, {before} were there before")
    missing: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for o in outcomes:
        if o.state == "missing" and o.entry.folder not in missing.setdefault((o.note, o.commands), []):
            missing[o.note, o.commands].append(o.entry.folder)
    for (why, commands), names in missing.items():
        screen.print(f"missing: {', '.join(names)}: {why}", markup=False)
        for command in commands:
            screen.print(f"         {command}", markup=False)
    for o in outcomes:
        if o.state in BAD:
            screen.print(f"{o.state}: {o.entry.folder}, {o.policy}: {o.note}", style="red", markup=False)
    if suite == "cross-tool" and ran:
        with clean_errors():
            screen.print(f"\n{write_cross_tool(out)}", markup=False, soft_wrap=True)
    if any(o.state in BAD for o in outcomes):
        raise typer.Exit(1)


@app.command()
def build(
    directories: Annotated[
        list[Path] | None, typer.Argument(help="Folders of results; several are shown together.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where LEADERBOARD.md and leaderboard.html go; else the first folder.")
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", help="The policy that others are compared with; else a table's first.")
    ] = "",
) -> None:
    """Write LEADERBOARD.md and leaderboard.html from run folders; plays nothing."""
    from medseg_gym.bench.leaderboard import build as write

    with clean_errors():
        built = write(directories or [RESULTS], out=out, baseline=baseline or None)
    screen = console()
    for one in built.results:
        screen.print(f"{one.suite.name}: {one.ran} of {len(one.suite.entries)} envs ran")
    for left in built.skipped:
        screen.print(f"left out: {left.folder}: {left.why}", style="yellow", markup=False)
    for file in built.files:
        screen.print(f"written: {file}", markup=False)


app.command(epilog=VERIFY_EPILOG)(verify)


@app.command()
def freeze(
    source: Annotated[Path, typer.Argument(help="The folder that `leaderboard run` wrote into.")] = RESULTS,
    out: Annotated[Path, typer.Option("--out", help="Where the frozen copies go.")] = Path("benchmarks/results"),
) -> None:
    """Copy finished runs as they are published: episodes gzipped, no times of single episodes."""
    from medseg_gym.bench.leaderboard_run import freeze as copy

    with clean_errors():
        written = copy(source, out)
    console().print(f"{len(written)} runs frozen in {out}", markup=False)
