"""`medseg-gym recipe`: list the papers' experiments, show what one is, run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from medseg_gym.cli_terminal import clean_errors, console, progress_bars

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("list")
def list_recipes() -> None:
    """Every recipe, which of the papers' tables it is, and how much of it can be run here."""
    from rich.table import Table

    from medseg_gym.bench.recipe_run import lacking
    from medseg_gym.bench.recipes import RECIPES

    table = Table("recipe", "arms here", "corresponds to", "what it is", box=None, header_style="bold")
    for one in RECIPES.values():
        here = sum(lacking(arm) is None for arm in one.arms)
        found = dict.fromkeys(f"{printed.source} {printed.table}" for printed in one.printed)
        state = "trains here" if one.kind == "training" else f"{here} of {len(one.arms)}"
        table.add_row(one.name, state, ", ".join(found), one.title)
    out = console()
    out.print(table)
    out.print("what one plays and needs: medseg-gym recipe show NAME; run it: medseg-gym recipe run NAME")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A recipe; `medseg-gym recipe list` has them.")]) -> None:
    """What a recipe plays, what each arm lacks here, and the papers' rows it is held beside."""
    from rich.table import Table

    from medseg_gym.bench.recipe_run import lacking
    from medseg_gym.bench.recipes import recipe
    from medseg_gym.bench.reported import MARK

    with clean_errors():
        one = recipe(name)
    out = console()
    out.print(f"{one.title}\n\n{one.about}\n\nBeside the papers: {one.differs}\n", markup=False)
    table = Table("setting", "env", "policy", "cases", "turns", "missing", box=None, header_style="bold")
    for arm in one.arms:
        lacks = lacking(arm)
        table.add_row(
            arm.setting,
            arm.entry.env,
            (arm.policy or "--agent") + (f" watching {arm.watches}" if arm.watches else ""),
            "all" if arm.entry.cases is None else str(arm.entry.cases),
            str(arm.entry.horizon),
            "[green]ready[/green]" if lacks is None else lacks.why,
        )
    if one.arms:
        out.print(table)
    for printed in one.printed:
        rows = printed.rows()
        out.print(f"{printed.source}, Table {printed.table}: {len(rows)} rows beside it, {MARK}")


@app.command(epilog="Exit code 0: all that can be played here was. 1: nothing could be, or a setting was refused.")
def run(
    names: Annotated[
        list[str] | None, typer.Argument(help="Recipes; none with --all.", show_default=False, metavar="NAME...")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Where the episodes lie, shared by recipes; the same command resumes.")
    ] = Path("runs/recipes"),
    results: Annotated[
        Path | None, typer.Option("--results", help="Where NAME/table.md and NAME/result.json go; else --out.")
    ] = None,
    cases: Annotated[int, typer.Option("--cases", help="A trial with at most this many cases a dataset.")] = 0,
    agent: Annotated[
        str, typer.Option("--agent", help="The policy a recipe leaves open: vlm:model=NAME,base_url=URL")
    ] = "",
    num_envs: Annotated[int, typer.Option("--num-envs", help="Episodes under way at once.")] = 8,
    everything: Annotated[bool, typer.Option("--all", help="Every recipe.")] = False,
) -> None:
    """Run recipes: what can be played here is, the rest is named; each ends with a table and the papers' rows."""
    from medseg_gym.bench.recipe_run import run_recipe
    from medseg_gym.bench.recipes import RECIPES, recipe
    from medseg_gym.errors import MedSegError

    sys.path.insert(0, "")  # so that --agent my_module:Class finds a file beside the user
    with clean_errors():
        if bool(names) == everything:
            raise MedSegError(f"name recipes, or give --all; there are {', '.join(RECIPES)}")
        chosen = [recipe(name) for name in (RECIPES if everything else names or ())]
        for one in chosen:
            with progress_bars() as progress:
                result = run_recipe(
                    one,
                    out=out,
                    results=results,
                    cases=cases or None,
                    agent=agent if one.needs_agent or not everything else "",
                    num_envs=num_envs,
                    progress=progress,
                )
            lacks = result.record["not_run"]
            left = f", {lacks['arms']} of {lacks['of']} arms not run" if lacks["arms"] else ""
            console().print(f"{one.name}: {result.markdown}{left}", markup=False, soft_wrap=True)
