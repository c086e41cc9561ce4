"""`medseg-gym data`: prepare, list, describe and check datasets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg_gym.cli_terminal import clean_errors, console, progress_bars
from medseg_gym.errors import MedSegError

if TYPE_CHECKING:
    from rich.console import Console

    from medseg_gym.datasets.importers import Skipped
    from medseg_gym.datasets.store import SplitCount, Store

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

EXAMPLES = 3  # skipped files shown for each reason


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A dataset of the catalogue, or a name for your own data.")],
    source: Annotated[Path, typer.Option("--from", help="The folder that holds its files.", show_default=False)],
    layout: Annotated[str | None, typer.Option(help="How the folder is laid out: biomedparse or imis-bench.")] = None,
    patient: Annotated[
        str | None, typer.Option(help="Regular expression over file stems, with a group (?P<patient>...).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a prepared dataset of other content.")] = False,
) -> None:
    """Turn a folder of images and masks into a prepared dataset."""
    from medseg_gym.datasets.prepare import prepare as run

    with clean_errors(), progress_bars() as bars:
        report = run(name, source, layout=layout, patient=patient, force=force, progress=partial(bars, "images"))
    out = console()
    was = "was prepared already, with the same content" if report.unchanged else "is prepared"
    out.print(f"{name} {was}: {report.images} images, {report.cases} cases", markup=False)
    out.print(_megabytes(report.path), markup=False, soft_wrap=True)
    _print_splits(out, report.splits)
    _print_skipped(out, report.skipped)


@app.command("list")
def list_() -> None:
    """List the datasets of the catalogue and those prepared here."""
    from rich.table import Table

    from medseg_gym.datasets import available, prepared
    from medseg_gym.datasets.cards import DATASETS

    table = Table("id", "title", "modality", "prepared", box=None, header_style="bold")
    table.add_column("cases", justify="right")
    for name in [*DATASETS, *(n for n in prepared() if n not in DATASETS)]:
        card = DATASETS.get(name)
        title, modality = (card.title, card.modality) if card else ("(your own)", "")
        if card is not None and not card.layout:
            state, cases = "built in", "endless"
        elif available(name):
            try:
                state, cases = "yes", str(len(_store(name)))
            except MedSegError:
                state, cases = "damaged", ""
        else:
            state, cases = "", ""
        table.add_row(name, title, modality, state, cases)
    console().print(table)


@app.command()
def info(name: Annotated[str, typer.Argument(help="A prepared dataset, or the path of an .h5 file.")]) -> None:
    """Show structures, splits, size and checksum of a prepared dataset."""
    from rich.table import Table

    from medseg_gym.datasets.base import SPLITS

    with clean_errors():
        store = _store(name)
        out = console()
        out.print(f"{store.name}: {len(store)} cases, {len(store.structures)} structures", markup=False)
        out.print(_megabytes(store.path), markup=False, soft_wrap=True)
        out.print(f"checksum {store.checksum}", markup=False, soft_wrap=True)
        _print_splits(out, store.splits())
        table = Table("structure", box=None, header_style="bold")
        for column in (*SPLITS, "all"):
            table.add_column(column, justify="right")
        for structure, counts in store.structure_counts().items():
            table.add_row(structure, *(str(counts[split]) for split in SPLITS), str(sum(counts.values())))
        out.print(table)


@app.command()
def verify(name: Annotated[str, typer.Argument(help="A prepared dataset, or the path of an .h5 file.")]) -> None:
    """Read every record of a prepared dataset and compare it with its checksums."""
    with clean_errors():
        store = _store(name)
        with progress_bars() as bars:
            problems = store.verify(partial(bars, "images"))
        if problems:
            shown = "\n".join(f"    {problem}" for problem in problems[:20])
            more = f"\n    and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise MedSegError(
                f"{store.path}: {len(problems)} problems\n{shown}{more}\n"
                f"Prepare it again: medseg-gym data prepare {store.name} --from FOLDER --force"
            )
        sound = f"{store.name} is sound: {len(store)} cases, checksum {store.checksum}"
        console().print(sound, markup=False, soft_wrap=True)


def _store(name: str) -> Store:
    from medseg_gym.datasets import load
    from medseg_gym.datasets.store import Store

    data = load(name)
    if not isinstance(data, Store):
        raise MedSegError(f"{name} is made as it is asked for; there is no file to look into")
    return data


def _print_splits(out: Console, splits: dict[str, SplitCount]) -> None:
    from rich.table import Table

    table = Table("split", box=None, header_style="bold")
    for column in ("patients", "images", "cases"):
        table.add_column(column, justify="right")
    for split, count in splits.items():
        table.add_row(split, str(count.patients), str(count.images), str(count.cases))
    out.print(table)


def _print_skipped(out: Console, skipped: tuple[Skipped, ...]) -> None:
    """Skipped files by reason, the most frequent first, with a few examples each."""
    if not skipped:
        out.print("nothing skipped")
        return
    by_reason: dict[str, list[str]] = {}
    for entry in skipped:
        by_reason.setdefault(entry.reason, []).append(entry.file)
    out.print(f"{len(skipped)} skipped:")
    for reason, files in sorted(by_reason.items(), key=lambda group: (-len(group[1]), group[0])):
        shown = ", ".join(files[:EXAMPLES]) + (", ..." if len(files) > EXAMPLES else "")
        out.print(f"  {len(files)} x {reason}: {shown}", markup=False, highlight=False, soft_wrap=True)


def _megabytes(path: Path) -> str:
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB)"
