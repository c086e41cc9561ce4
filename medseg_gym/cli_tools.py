"""`medseg-gym tools`: which segmentation tools there are, their weights, and embeddings made ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg_gym.cli_serve import serve, tool_options
from medseg_gym.cli_terminal import Progress, clean_errors, console, progress_bars

if TYPE_CHECKING:
    from medseg_gym.tools.embed import Estimate

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(serve)

WRONG = 3  # exit code: the work was done, and some weights are not as they should be

Tool = Annotated[str, typer.Argument(help="A tool of the catalogue; `medseg-gym tools list` has them.")]


@app.command("list")
def list_tools() -> None:
    """Every tool of the catalogue, whether it runs here, and where its weights come from."""
    from rich.markup import escape
    from rich.table import Table

    from medseg_gym import tools
    from medseg_gym.tools.sources import SOURCES

    table = Table("tool", "runs here", "what it is", "weights", box=None, header_style="bold")
    for card in tools.TOOLS.values():
        source = SOURCES.get(card.id)
        if tools.available(card.id):
            state = "[green]yes[/green]"
        elif source is not None and not source.places:
            state = "register weights"
        else:
            state = "download weights" if card.factory else "[dim]not in this version[/dim]"
        size = f", {source.size / 1e6:,.0f} MB" if source is not None and source.size else ""
        table.add_row(card.id, state, card.summary, "" if source is None else escape(f"{source.repository}{size}"))
    out = console()
    out.print(table)
    licences = {card.id: card.licence for card in tools.TOOLS.values() if card.licence}
    licences.update({name: f"weights {source.licence}" for name, source in SOURCES.items()})
    for licence in dict.fromkeys(licences.values()):
        out.print(escape(f"{', '.join(name for name in licences if licences[name] == licence)}: {licence}"))
    out.print("medseg-gym tools download TOOL gets weights, medseg-gym tools register TOOL --file PATH takes yours")


@app.command()
def download(
    tool: Tool,
    force: Annotated[bool, typer.Option("--force", help="Fetch them again although they are there.")] = False,
) -> None:
    """Get a tool's weights and check them; a download that was cut off goes on when the command is given again."""
    from medseg_gym import tools
    from medseg_gym.tools.download import download as run

    with clean_errors():
        if tool in tools.TOOLS and not tools.TOOLS[tool].weights:
            console().print(f"{tool} runs here; nothing to get")
            return
        with _byte_bars() as bars:
            path = run(tool, force=force, progress=bars)
        console().print(f"{tool}: {path}", markup=False, soft_wrap=True)


@app.command()
def register(
    tool: Tool,
    file: Annotated[
        Path, typer.Option("--file", help="A .pt, .pth or .safetensors file, or a folder in transformers' format.")
    ],
    copy: Annotated[bool, typer.Option("--copy", help="Copy it into the data home; otherwise it must stay.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Load the tool with it once.")] = True,
) -> None:
    """Take weights you already have as a tool's. No code in them is run; a file that does is refused."""
    from medseg_gym.tools import register as library

    with clean_errors():
        with _byte_bars() as bars:
            record = library.register(tool, file, copy=copy, check=check, progress=bars)
        match = library.published(tool, record)
        told = {True: "the file its authors published", False: "not the file its authors published", None: ""}[match]
        console().print(f"{tool}: {record.path}" + (f" ({told})" if told else ""), markup=False, soft_wrap=True)


@app.command(epilog="Exit code 0: all are as recorded. 3: a file was changed or is missing. 1: another error.")
def verify(
    tool: Annotated[str, typer.Argument(help="A tool; without one, all that have recorded weights.")] = "",
) -> None:
    """Read weights again and compare them with the checksums of when they were downloaded or registered."""
    from medseg_gym.tools import records
    from medseg_gym.tools import register as library
    from medseg_gym.tools.sources import SOURCES

    wrong = 0
    with clean_errors():
        chosen = [tool] if tool else [name for name in SOURCES if records.read(name) is not None]
        if not chosen:
            console().print("no weights were downloaded or registered yet")
        for name in chosen:
            with _byte_bars() as bars:
                told = library.verify(name, progress=bars)
            for path, status in told:
                wrong += status in ("changed", "missing")
                note = "put there by hand; register it to have it checked" if status == "unrecorded" else ""
                console().print(f"{name}: {status} {path} {note}".rstrip(), markup=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(WRONG)


@app.command(epilog="Give the same command again after a kill: images that are there are not encoded again.")
def embed(
    dataset: Annotated[str, typer.Option("--dataset", help="A prepared dataset, or the path of an .h5 file.")],
    tool: Annotated[str, typer.Option("--tool", help="A tool id, or package.module:Class.")],
    split: Annotated[
        list[str] | None, typer.Option("--split", help="train, val or test; several times; all by default.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float16 halves the space; the tool's own by default.")] = "",
    device: Annotated[str, typer.Option("--device", help="As cuda; the tool's own by default.")] = "",
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE of the tool, as multimask=false; several times.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--folder", help="Instead of the data home's.")] = None,
    max_gb: Annotated[float, typer.Option("--max-gb", help="No more than this on disk; 0: no limit.")] = 0.0,
) -> None:
    """Encode every image of a dataset onto disk, for envs and evaluations with disk_cache."""
    from medseg_gym import datasets, tools
    from medseg_gym.datasets.base import SPLITS, check_split
    from medseg_gym.tools import embed as library

    with clean_errors():
        library.check_pays(tool)
        for name in split or ():
            check_split(name)
        options = {**tool_options(option or []), **{k: v for k, v in (("dtype", dtype), ("device", device)) if v}}
        where: dict[str, Any] = {"disk_cache": True if folder is None else str(folder.absolute())}
        data = datasets.load(dataset)
        made = tools.load(tool, **options, **where, disk_bytes=int(max_gb * 1e9) or None)
        assert made.disk is not None
        with progress_bars() as bars:
            ahead = library.plan(made.disk, data, split or SPLITS, partial(bars, "looking"))
            library.embed(
                made.tool, made.disk, data, ahead.todo, estimate=_tell_estimate, progress=partial(bars, "encoding")
            )
        files, size = made.disk.size()
        console().print(
            f"{data.name}: {ahead.images} images, {len(ahead.todo)} encoded now; {made.disk.path} has {files} "
            f"embeddings, {size / 1e9:.2f} GB\nuse them by tool_options={ {**options, **where}!r}",
            markup=False,
            soft_wrap=True,
        )


def _tell_estimate(estimate: Estimate) -> None:
    if estimate.left:
        console(stderr=True).print(
            f"{estimate.left} more images of {estimate.image_bytes / 1e6:.1f} MB: about "
            f"{estimate.left * estimate.image_bytes / 1e9:.2f} GB, with room for {estimate.room / 1e9:.1f} GB, and "
            f"{estimate.left * estimate.image_seconds / 60:.0f} minutes one by one",
            markup=False,
            soft_wrap=True,
        )


@contextmanager
def _byte_bars() -> Iterator[Progress]:
    """A bar a label, in bytes; nothing is shown before there is progress, so an early error stands alone."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Bars(*columns, TimeRemainingColumn(), console=console(stderr=True))
    tasks: dict[str, Any] = {}

    def show(label: str, done: int, total: int) -> None:
        if label not in tasks:
            bars.start()
            tasks[label] = bars.add_task(label, total=total or None)
        bars.update(tasks[label], completed=done, total=total or None)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
