"""`medseg-gym tools`: which segmentation tools there are, and what each still needs."""

from __future__ import annotations

from typing import Annotated

import typer

from medseg_gym.cli_terminal import clean_errors, console
from medseg_gym.errors import MedSegError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("list")
def list_tools() -> None:
    """Every tool of the catalogue, and whether it runs here."""
    from rich.table import Table

    from medseg_gym import tools

    table = Table("tool", "runs here", "what it is", box=None, header_style="bold")
    for card in tools.TOOLS.values():
        if tools.available(card.id):
            state = "[green]yes[/green]"
        else:
            state = "needs weights" if card.factory else "[dim]not in this version[/dim]"
        table.add_row(card.id, state, card.summary)
    out = console()
    out.print(table)
    for card in tools.TOOLS.values():
        if card.licence:
            out.print(f"{card.id}: {card.licence}")


@app.command()
def download(tool: Annotated[str, typer.Argument(help="A tool of the catalogue.")]) -> None:
    """Say what a tool needs and where it belongs; this version fetches nothing by itself."""
    from medseg_gym import tools
    from medseg_gym.home import weights_path
    from medseg_gym.tools.weights import CHECKPOINT_FILES, no_runtime

    with clean_errors():
        if tools.available(tool):
            console().print(f"{tool} runs here; nothing to get")
            return
        if not tools.TOOLS[tool].factory:
            raise no_runtime(tool)
        raise MedSegError(
            f"this version downloads nothing; put {' and '.join(CHECKPOINT_FILES)} of a {tool} checkpoint in "
            f"transformers' format into {weights_path(tool)}"
        )
