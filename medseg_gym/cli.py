"""The command line: medseg-gym envs | evaluate | report | serve | data ... | tools ..."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg_gym import __version__
from medseg_gym.cli_data import app as data_app
from medseg_gym.cli_leaderboard import app as leaderboard_app
from medseg_gym.cli_recipe import app as recipe_app
from medseg_gym.cli_serve_env import serve
from medseg_gym.cli_terminal import clean_errors, console, progress_bars
from medseg_gym.cli_tools import app as tools_app
from medseg_gym.cli_train import grpo, sft
from medseg_gym.cli_trajectories import app as trajectories_app
from medseg_gym.cli_verify import rescore
from medseg_gym.cli_vqa import evaluate_vqa, prepare_vqa
from medseg_gym.errors import MedSegError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Mapping

app = typer.Typer(
    help="Gymnasium environments for agents that segment medical images by prompting a segmentation model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data", help="Prepare, list and check datasets.")
app.add_typer(leaderboard_app, name="leaderboard", help="Play suites, build the leaderboard, freeze results.")
app.add_typer(recipe_app, name="recipe", help="The papers' experiments, each in one command.")
app.add_typer(tools_app, name="tools", help="List tools, get their weights, embed datasets, serve.")
app.add_typer(trajectories_app, name="trajectories")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"medseg-gym {__version__}")
        raise typer.Exit


@app.command()
def envs(
    text: Annotated[str, typer.Argument(help="Only ids that contain this text, whatever the case.")] = "",
    ready: Annotated[bool, typer.Option("--ready", help="Only ids whose data and weights are there.")] = False,
) -> None:
    """List every env id with its dataset and tool, and whether data and weights are there."""
    from rich.table import Table

    from medseg_gym import datasets, tools
    from medseg_gym.registration import added, catalogue

    pairs = [*catalogue(), *added()]
    with_data = {name: datasets.available(name) for name in dict.fromkeys(d for _, d, _ in pairs)}
    with_weights = {name: tools.available(name) for name in dict.fromkeys(t for _, _, t in pairs)}
    table = Table("env id", "dataset", "tool", "data", "weights", box=None, header_style="bold")
    shown = 0
    for env_id, dataset, tool in pairs:
        there = with_data[dataset] and with_weights[tool]
        if text.casefold() not in env_id.casefold() or (ready and not there):
            continue
        shown += 1
        table.add_row(env_id, dataset, tool, _yes(with_data[dataset]), _yes(with_weights[tool]))
    out = console()
    out.print(table)
    out.print(f"{shown} ids; data by `medseg-gym data prepare`, and MedSeg-v0 takes any dataset= and tool=")


@app.command()
def evaluate(
    env: Annotated[list[str], typer.Option("--env", help="An env id; may be given several times.")],
    policy: Annotated[
        list[str],
        typer.Option("--policy", help="A policy's name, or package.module:Class; may be given several times."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write into; the same command resumes it.")],
    cases: Annotated[int, typer.Option("--cases", help="How many cases of the split; 0 means all.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the cases and drives the policies.")] = 0,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    dataset: Annotated[str, typer.Option("--dataset", help="For MedSeg-v0: a prepared dataset or a path.")] = "",
    tool: Annotated[str, typer.Option("--tool", help="For MedSeg-v0: a tool id or package.module:Class.")] = "",
    horizon: Annotated[int, typer.Option("--horizon", help="Turns an episode may take.")] = 5,
    reward: Annotated[str, typer.Option("--reward", help="shaped, medsam-agent or ibis.")] = "shaped",
    structure: Annotated[
        list[str] | None, typer.Option("--structure", help="Only cases of this structure; several times.")
    ] = None,
    verb: Annotated[
        list[str] | None,
        typer.Option("--verb", help="Allow only positive, negative, box, stop or undo; may be given several times."),
    ] = None,
    stop_after_repeats: Annotated[
        int, typer.Option("--stop-after-repeats", help="End after so many identical actions in a row; 0 is never.")
    ] = 0,
    on_unreadable: Annotated[
        str, typer.Option("--on-unreadable", help="explain: the model is told why; end: the episode ends.")
    ] = "explain",
    num_envs: Annotated[int, typer.Option("--num-envs", help="Episodes under way at once.")] = 8,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what --out holds and start over.")] = False,
) -> None:
    """Play policies on envs; write episodes.jsonl, summary.json and report.html."""
    from medseg_gym.bench.evaluate import evaluate as run

    options: dict[str, Any] = {"horizon": horizon, "reward": reward, "stop_after_repeats": stop_after_repeats}
    options["on_unreadable"] = on_unreadable
    given = {"dataset": dataset, "tool": tool, "structures": tuple(structure or ()), "verbs": tuple(verb or ())}
    options.update({name: value for name, value in given.items() if value})
    sys.path.insert(0, "")  # so that --policy my_module:Class finds a file beside the user
    with clean_errors(), progress_bars() as progress:
        result = run(
            env,
            policy,
            out=out,
            cases=cases or None,
            seed=seed,
            split=split,
            num_envs=num_envs,
            restart=restart,
            progress=progress,
            **options,
        )
    print_summary(result.summary)
    print(f"report: {result.report}")
    if any(row["ended"]["failed"] == row["episodes"] for row in result.summary["rows"]):
        console(stderr=True).print("error: a policy failed in every case, see the notes above", style="red")
        raise typer.Exit(1)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A folder that evaluate wrote.")],
) -> None:
    """Write report.html of a folder again, from its episodes."""
    import json

    from medseg_gym import datasets
    from medseg_gym.bench.report import write_report

    with clean_errors():
        file = directory / "summary.json"
        if not file.is_file():
            raise MedSegError(f"{file} is not there; finish the run first: medseg-gym evaluate ... --out {directory}")
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
            known = {
                row["env"]: datasets.load(row["dataset"], **(row.get("dataset_options") or {}))
                for row in rows
                if datasets.available(row["dataset"])
            }
        except UnknownNameError:
            known = {}  # a dataset of someone's own, which the report says it cannot show
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MedSegError(f"{file} is not a summary ({error!r}); run evaluate again") from None
        print(f"report: {write_report(directory, known)}")


app.command()(rescore)
app.command()(sft)
app.command()(grpo)
app.command()(serve)
app.command()(evaluate_vqa)
data_app.command()(prepare_vqa)


def print_summary(summary: Mapping[str, Any]) -> None:
    """The table of an evaluation on the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("env", "policy", "cases", "Dice", "IoU", "NoC@85", "NoF@85", "actions", "tool calls", "reward"):
        table.add_column(column, justify="left" if column in ("env", "policy") else "right", no_wrap=True)
    for row in summary["rows"]:
        noc = row["noc"]["85"]
        table.add_row(
            escape(row["env"]),
            escape(row["policy"]),
            str(row["episodes"]),
            f"{row['dice']:.3f}",
            f"{row['iou']:.3f}",
            "-" if noc["mean"] is None else f"{noc['mean']:.2f}",
            f"{noc['nof']:.0%}",
            f"{row['actions']:.2f}",
            f"{row['tool_calls']:.2f}",
            f"{row['reward']:.3f}",
        )
    out = console()
    out.print(table)
    for note in summary["notes"]:
        out.print(f"[yellow]note:[/yellow] {escape(note)}")


def _yes(there: bool) -> str:
    return "[green]yes[/green]" if there else "[dim]no[/dim]"


def main() -> None:
    app()
