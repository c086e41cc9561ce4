"""`medseg-gym trajectories`: sample demonstrations, look at them, choose the hard cases, export them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg_gym.cli_serve import tool_options
from medseg_gym.cli_terminal import clean_errors, console, progress_bars
from medseg_gym.cli_trajectory_files import export, thoughts
from medseg_gym.errors import MedSegError

if TYPE_CHECKING:
    from medseg_gym.trajectories.store import Trajectories

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Argument(help="A folder that `medseg-gym trajectories --out` wrote.")]


@app.callback(invoke_without_command=True, epilog="The same command goes on with what a kill left.")
def trajectories(
    context: typer.Context,
    env: Annotated[list[str] | None, typer.Option("--env", help="An env id; may be given several times.")] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", help="box-to-point, sequential-click or xu; may be given several times."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write into.")] = None,
    cases: Annotated[int, typer.Option("--cases", help="How many cases of the split; 0 means all.")] = 0,
    split: Annotated[str, typer.Option("--split", help="train, val, test, or all three.")] = "train",
    seed: Annotated[int, typer.Option("--seed", help="Chooses the cases and drives the strategies.")] = 0,
    workers: Annotated[int, typer.Option("--workers", help="Processes; on one GPU one is best.")] = 1,
    at_once: Annotated[int, typer.Option("--at-once", help="Cases of one tool call; more on a GPU.")] = 16,
    structure: Annotated[
        list[str] | None, typer.Option("--structure", help="Only cases of this structure; several times.")
    ] = None,
    horizon: Annotated[int, typer.Option("--horizon", help="Turns of an episode; 0: 5, and for xu 21.")] = 0,
    reward: Annotated[str, typer.Option("--reward", help="shaped, medsam-agent or ibis.")] = "shaped",
    dataset: Annotated[str, typer.Option("--dataset", help="For MedSeg-v0: a prepared dataset or a path.")] = "",
    tool: Annotated[str, typer.Option("--tool", help="For MedSeg-v0: a tool id or package.module:Class.")] = "",
    tool_option: Annotated[
        list[str] | None, typer.Option("--tool-option", help="NAME=VALUE of the tool, as device=cuda; several times.")
    ] = None,
    dataset_option: Annotated[
        list[str] | None, typer.Option("--dataset-option", help="NAME=VALUE of the dataset; several times.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--setting", help="NAME=VALUE as min_gain=0.02, or --setting list; several times."),
    ] = None,
    self_correction: Annotated[
        float, typer.Option("--self-correction", help="Share of cases with a mistake that is taken back.")
    ] = 0.0,
    wrong_start: Annotated[
        float, typer.Option("--wrong-start", help="Share of cases that begin with a mask of something else.")
    ] = 0.0,
) -> None:
    """Sample demonstrations by strategies that see the target; or `info`, `hard`, `thoughts`, `export` of them."""
    if context.invoked_subcommand is not None:
        if env or strategy or out:
            context.fail(f"--env, --strategy and --out do not go with {context.invoked_subcommand}")
        return
    if setting == ["list"]:
        list_settings()
        return
    if not (env or strategy or out):
        print(context.get_help())
        raise typer.Exit
    missing = [name for name, value in (("--env", env), ("--strategy", strategy), ("--out", out)) if not value]
    if missing:
        context.fail(f"missing {', '.join(missing)}")
    assert env and strategy and out

    sys.path.insert(0, "")  # so that --tool my_module:Class finds a file beside the user
    with clean_errors(), progress_bars() as progress:
        from medseg_gym.trajectories.run import run

        settings = {"horizon": horizon, "self_correction": self_correction, "wrong_start": wrong_start}
        options: dict[str, Any] = {"reward": reward, "dataset": dataset, "tool": tool, "structures": structure or ()}
        options["tool_options"] = tool_options(tool_option or [])
        options["dataset_options"] = tool_options(dataset_option or [])
        record = run(
            env,
            strategy,
            out=out,
            cases=cases or None,
            split=split,
            seed=seed,
            workers=workers,
            at_once=at_once,
            settings={**{k: v for k, v in settings.items() if v}, **tool_options(setting or [])},
            progress=progress,
            **{name: value for name, value in options.items() if value},
        )
    print_statistics(record)
    print(f"statistics: {out / 'statistics.json'}")


@app.command()
def info(directory: Folder) -> None:
    """What a folder holds: tried, kept and dropped, lengths and overlaps, by strategy."""
    from medseg_gym.trajectories.statistics import statistics

    with clean_errors():
        stored = _stored(directory)
        print_statistics({"settings": stored.settings, **statistics(stored.records(), stored.settings.get("envs", []))})


@app.command()
def hard(
    directory: Folder,
    out: Annotated[Path, typer.Option("--out", help="The file of keys, one a line; a GRPO run's keys_file.")],
    env: Annotated[str, typer.Option("--env", help="Whose trajectories count, where there are several envs.")] = "",
    low: Annotated[int, typer.Option("--low", help="The fewest rounds, the stop counted.")] = 3,
    high: Annotated[int, typer.Option("--high", help="The most rounds.")] = 5,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", help="Under each of these; box-to-point and sequential-click by default."),
    ] = None,
) -> None:
    """The hard set: the cases that took 3 to 5 rounds under both of MedSAM-Agent's strategies."""
    from medseg_gym.trajectories.hard import hard_keys, write_keys

    with clean_errors():
        chosen = {"strategies": tuple(strategy)} if strategy else {}
        keys = hard_keys(_stored(directory).records(), low=low, high=high, env=env, **chosen)
        write_keys(out, keys)
    print(f"{len(keys)} cases: {out}")


app.command()(thoughts)
app.command()(export)


def list_settings() -> None:
    """The settings of the strategies with their defaults."""
    from dataclasses import fields

    from medseg_gym.trajectories.strategies import Settings

    for field in fields(Settings):
        print(f"{field.name}={field.default}")


def print_statistics(record: Mapping[str, Any]) -> None:
    """The tables of a run on the terminal: by env and strategy, then by modality."""
    out = console()
    for title, rows, names in (
        ("", record["rows"], ("dataset", "tool", "strategy")),
        ("by modality", record["modalities"], ("modality", "tool", "strategy")),
    ):
        if title and len({row["dataset"] for row in record["rows"]}) < 2:
            continue
        if title:
            out.print(title)
        out.print(_table(rows, names))
    for told in record["settings"].get("envs", []):
        for note in told.get("notes", []):
            out.print(f"note: {note}", style="yellow", markup=False)


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    numbers = ("tried", "kept", "", "dropped", "turns", "IoU mean", "median", "Dice mean", "median")
    for column in (*names, *numbers):
        table.add_column(column, justify="left" if column in (*names, "dropped") else "right", no_wrap=True)
    for row in rows:
        dropped = ", ".join(f"{why} {n}" for why, n in row["dropped"].items())
        table.add_row(
            *(escape(str(row[name]) or "-") for name in names),
            str(row["tried"]),
            str(row["kept"]),
            f"{row['kept'] / max(1, row['tried']):.0%}",
            dropped or "-",
            _number(row["turns"], 2),
            *(_number(row[name][kind], 3) for name in ("iou", "dice") for kind in ("mean", "median")),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _stored(directory: Path) -> Trajectories:
    """The trajectories of a folder; MedSegError where it holds none."""
    from medseg_gym.trajectories.store import Trajectories

    stored = Trajectories(directory)
    if not len(stored):
        raise MedSegError(
            f"no trajectories in {directory}; the same command that began it goes on, or make some with: "
            f"medseg-gym trajectories --env ID --strategy NAME --out {directory}"
        )
    return stored
