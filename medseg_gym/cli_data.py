"""`medseg-gym data`: prepare, list, describe, check and look at datasets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg_gym.cli_terminal import clean_errors, console, progress_bars
from medseg_gym.errors import MedSegError

if TYPE_CHECKING:
    from rich.console import Console

    from medseg_gym.datasets.cards import DatasetCard
    from medseg_gym.datasets.duplicates import Pair
    from medseg_gym.datasets.importers import Skipped
    from medseg_gym.datasets.prepare import PrepareReport
    from medseg_gym.datasets.store import SplitCount, Store

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

EXAMPLES = 3  # files or pairs shown for each kind
NAMED = ("image", "mask", "structure", "window", "axis")  # options of layouts that are flags of their own
DAMAGED = 3  # exit code: the work was done, and something in the data is not as it should be

Name = Annotated[str, typer.Argument(help="A prepared dataset, or the path of an .h5 file.")]


@app.command(
    epilog="Exit code 0: all was taken. 3: prepared, but damaged files were left out. 1: nothing was prepared."
)
def prepare(
    name: Annotated[str, typer.Argument(help="A dataset of the catalogue, or a name for your own data.")],
    source: Annotated[Path, typer.Option("--from", help="The folder that holds its files.", show_default=False)],
    layout: Annotated[
        str | None, typer.Option(help="How the folder is laid out; `medseg-gym data layouts` lists them.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Where the images are, as 'images/{id}.png'.")] = None,
    mask: Annotated[str | None, typer.Option(help="Where the masks are, as 'masks/{id}.png'.")] = None,
    structure: Annotated[str | None, typer.Option(help="What is outlined: a name, or VALUE=NAME,...")] = None,
    window: Annotated[str | None, typer.Option(help="Intensities shown: a preset's name, LOW:HIGH, ...")] = None,
    axis: Annotated[str | None, typer.Option(help="Along which axis volumes are cut: axial, ...")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="key=value, further options of the layout; several times.")
    ] = None,
    patient: Annotated[
        str | None, typer.Option(help="Regular expression over file stems, with a group (?P<patient>...).")
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help='JSON file {"val": [patients], "test": [patients]}; all others train.')
    ] = None,
    modality: Annotated[str | None, typer.Option(help='The instructions\' modality, as "CT" or "endoscopy".')] = None,
    region: Annotated[str | None, typer.Option(help='The instructions\' region, as "abdomen".')] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes that import; the result is the same.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Shares out patients that no rule places.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a prepared dataset of other content.")] = False,
) -> None:
    """Turn a folder of images and masks into a prepared dataset. A run that was killed goes on when given again."""
    from medseg_gym.datasets.prepare import prepare as run

    named = dict(zip(NAMED, (image, mask, structure, window, axis), strict=True))
    with clean_errors(), progress_bars() as bars:
        report = run(
            name,
            source,
            layout=layout,
            options=_options({key: value for key, value in named.items() if value is not None}, option or ()),
            patient=patient,
            splits=None if splits is None else _read_splits(splits),
            modality=modality,
            region=region,
            force=force,
            seed=seed,
            jobs=jobs,
            progress=partial(bars, "images"),
        )
    _print_report(console(), name, report)
    if report.damaged:
        raise typer.Exit(DAMAGED)


@app.command()
def layouts() -> None:
    """List the layouts that `prepare` reads, and the options of each."""
    from medseg_gym.datasets.importers import LAYOUTS, importer

    out = console()
    for layout, text in LAYOUTS.items():
        out.print(f"{layout}: {text}", markup=False, soft_wrap=True)
        for name, told in importer(layout).OPTIONS.items():
            flag = f"--{name}" if name in NAMED else f"--option {name}="
            out.print(f"    {flag}  {told}", markup=False, soft_wrap=True)


@app.command("list")
def list_() -> None:
    """List the datasets of the catalogue, those of other packages and those prepared here."""
    from rich.table import Table

    from medseg_gym import plugins
    from medseg_gym.datasets import available, prepared
    from medseg_gym.datasets.cards import DATASETS

    table = Table("id", "title", "modality", "prepared", box=None, header_style="bold")
    table.add_column("cases", justify="right")
    added = plugins.names(plugins.DATASETS)
    for name in dict.fromkeys((*DATASETS, *added, *prepared())):
        card = DATASETS.get(name)
        title, modality = (card.title, card.modality) if card else ("(your own)", "")
        if card is not None and not card.layout:
            state, cases = "built in", "endless"
        elif card is None and name in added:
            title, state, cases = "(another package's)", "", ""
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
def card(name: Annotated[str, typer.Argument(help="A dataset of the catalogue.")]) -> None:
    """Print what is known of a dataset: where to get it, its terms, structures, rules and published numbers."""
    from medseg_gym.datasets import available
    from medseg_gym.datasets.cards import DATASETS
    from medseg_gym.errors import unknown

    with clean_errors():
        if name not in DATASETS:
            raise unknown("dataset", name, DATASETS)
        out = console()
        for line in _card_lines(DATASETS[name], available(name)):
            out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def info(name: Name) -> None:
    """Show structures, splits, size and checksum of a prepared dataset."""
    with clean_errors():
        store = _store(name)
        out = console()
        out.print(f"{store.name}: {len(store)} cases, {len(store.structures)} structures", markup=False)
        out.print(_megabytes(store.path), markup=False, soft_wrap=True)
        out.print(f"checksum {store.checksum}", markup=False, soft_wrap=True)
        _print_splits(out, store.splits())
        _print_structures(out, store.structure_counts(), store.structure_areas())


@app.command(epilog="Exit code 0: sound. 1: damaged. 3, with --strict: sound, but not what it should be.")
def verify(
    name: Name,
    strict: Annotated[
        bool, typer.Option("--strict", help="Also fail on other counts than published, and on near-duplicates.")
    ] = False,
) -> None:
    """Check a prepared dataset: checksums, counts against what was published, near-duplicates across splits."""
    from medseg_gym.datasets.duplicates import near_duplicates

    with clean_errors():
        store = _store(name)
        with progress_bars() as bars:
            problems = store.verify(partial(bars, "checksums"))
            pairs = () if problems else near_duplicates(store, partial(bars, "duplicates"))
        if problems:
            shown = "\n".join(f"    {problem}" for problem in problems[:20])
            more = f"\n    and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise MedSegError(
                f"{store.path}: {len(problems)} problems\n{shown}{more}\n"
                f"Prepare it again: medseg-gym data prepare {store.name} --from FOLDER --force"
            )
        out = console()
        out.print(f"{store.name} is sound: {len(store)} cases, checksum {store.checksum}", markup=False, soft_wrap=True)
        fits = _print_expected(out, store)
        _print_pairs(out, pairs)
        if strict and (pairs or not fits):
            raise typer.Exit(DAMAGED)


@app.command()
def preview(
    name: Annotated[str, typer.Argument(help="A dataset: prepared, built in, or the path of an .h5 file.")],
    out: Annotated[Path, typer.Option("--out", help="The PNG file to write.")],
    count: Annotated[int, typer.Option("--count", help="Cases to show, structure by structure in turns.")] = 24,
    columns: Annotated[int, typer.Option("--columns", help="Cases in a row.")] = 6,
    size: Annotated[int, typer.Option("--size", help="Pixels a side of each picture.")] = 256,
    split: Annotated[str | None, typer.Option("--split", help="Only this split: train, val or test.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the cases.")] = 0,
) -> None:
    """Write a contact sheet: cases with their masks laid over them."""
    from medseg_gym.datasets import load
    from medseg_gym.datasets.preview import contact_sheet
    from medseg_gym.filmstrip import write_png

    with clean_errors():
        sheet = contact_sheet(load(name), count, split=split, seed=seed, columns=columns, size=size)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_png(out, sheet)
        except OSError as error:
            raise MedSegError(f"cannot write {out}: {error.strerror or error}; give --out another place") from None
        console().print(f"{out} ({sheet.shape[1]} x {sheet.shape[0]} pixels)", markup=False, soft_wrap=True)


def _options(named: dict[str, str], further: Sequence[str]) -> dict[str, str]:
    """The layout's options from the flags with names of their own and from --option key=value."""
    options = dict(named)
    for text in further:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise MedSegError(f"--option {text!r}; wanted key=value")
        if key in options:
            raise MedSegError(f"option {key!r} came twice; give it once")
        options[key] = value
    return options


def _read_splits(path: Path) -> dict[str, Any]:
    from medseg_gym.datasets.importers import read_json

    return read_json(path, '{"val": [patients], "test": [patients]}')


def _store(name: str) -> Store:
    from medseg_gym.datasets import load
    from medseg_gym.datasets.store import Store

    data = load(name)
    if not isinstance(data, Store):
        raise MedSegError(f"{name} is made as it is asked for; there is no file to look into")
    return data


def _card_lines(card: DatasetCard, prepared: bool) -> list[str]:
    """What `card` prints; what is not known is said to be unknown."""
    structures = ", ".join(s.name if s.label is None else f"{s.label} {s.name}" for s in card.structures)
    lines = [
        f"{card.id}: {card.title}" if card.title != card.id else card.id,
        f"  modality    {' '.join(part for part in (card.region, card.modality) if part) or 'varies'}",
        f"  structures  {structures or 'as its files name them'}",
        f"  licence     {card.licence or 'not known for sure: ask the source'}",
        f"  citation    {card.citation or 'not known for sure'}",
        f"  get it      {'; '.join(part for part in (card.url, card.access) if part) or 'not known for sure'}",
        f"  layout      {card.layout or 'none'}",
        f"  patients    {card.patient_rule}",
        f"  splits      {card.split_rule}",
    ]
    for number in card.expected:
        how = {"equal": "cases", "at least": "cases drawn from it", "note": "cases"}[number.rule]
        lines.append(f"  published   {number.cases:,} {how} ({number.source}{number.what and ': ' + number.what})")
    if card.notes:
        lines.append(f"  note        {card.notes}")
    if not card.layout:  # nothing to get
        return [line for line in lines if line.split()[0] in (f"{card.id}", "modality", "licence", "note")]
    done = "it is prepared here" if prepared else f"medseg-gym data prepare {card.id} --from FOLDER"
    return [*lines, f"  prepare     {done}"]


def _print_report(out: Console, name: str, report: PrepareReport) -> None:
    was = "was prepared already, with the same content" if report.unchanged else "is prepared"
    out.print(f"{name} {was}: {report.images} images, {report.cases} cases", markup=False)
    if report.resumed:
        out.print(f"{report.resumed} files were imported by an earlier run that did not finish", markup=False)
    out.print(_megabytes(report.path), markup=False, soft_wrap=True)
    _print_splits(out, report.splits)
    patients = sum(count.patients for count in report.splits.values())
    if patients == report.images > 1:
        out.print("every image counts as a patient of its own; if some share one, say how with --patient")
    _print_structures(out, report.structures, report.areas)
    _print_skipped(out, report.skipped)


def _print_splits(out: Console, splits: dict[str, SplitCount]) -> None:
    from rich.table import Table

    table = Table("split", box=None, header_style="bold")
    for column in ("patients", "images", "cases"):
        table.add_column(column, justify="right")
    for split, count in splits.items():
        table.add_row(split, str(count.patients), str(count.images), str(count.cases))
    out.print(table)


def _print_structures(out: Console, structures: dict[str, dict[str, int]], areas: dict[str, float]) -> None:
    from rich.table import Table

    from medseg_gym.datasets.base import SPLITS

    table = Table("structure", box=None, header_style="bold")
    for column in (*SPLITS, "all", "median area"):
        table.add_column(column, justify="right")
    for structure, counts in structures.items():
        cells = (*(str(counts[split]) for split in SPLITS), str(sum(counts.values())), f"{areas[structure]:.0f} px")
        table.add_row(structure, *cells)
    out.print(table)


def _print_skipped(out: Console, skipped: tuple[Skipped, ...]) -> None:
    """Skipped files by reason, the most frequent first, with a few examples each; damaged ones are counted."""
    if not skipped:
        out.print("nothing skipped")
        return
    damaged = sum(entry.damaged for entry in skipped)
    by_reason: dict[str, list[str]] = {}
    for entry in skipped:
        by_reason.setdefault(entry.reason, []).append(entry.file)
    out.print(f"{len(skipped)} skipped" + (f", {damaged} of them damaged or unusable:" if damaged else ":"))
    for reason, files in sorted(by_reason.items(), key=lambda group: (-len(group[1]), group[0])):
        shown = ", ".join(files[:EXAMPLES]) + (", ..." if len(files) > EXAMPLES else "")
        out.print(f"  {len(files)} x {reason}: {shown}", markup=False, highlight=False, soft_wrap=True)


def _print_expected(out: Console, store: Store) -> bool:
    """Compares the number of cases with the published ones; whether all that can be compared agree."""
    from medseg_gym.datasets.cards import DATASETS

    card, here, fits = DATASETS.get(store.name), len(store), True
    for number in card.expected if card is not None else ():
        if number.rule == "note":
            continue
        good = here == number.cases if number.rule == "equal" else here >= number.cases
        fits &= good
        words = f"{number.cases:,} cases" if number.rule == "equal" else f"at least {number.cases:,} cases"
        where = f"{number.source}{number.what and ': ' + number.what}"
        out.print(f"{words} expected ({where}), {here:,} here: {'agrees' if good else 'differs'}", markup=False)
    return fits


def _print_pairs(out: Console, pairs: Sequence[Pair]) -> None:
    if not pairs:
        out.print("no near-duplicate images across splits")
        return
    out.print(f"{len(pairs)} near-duplicate images across splits:")
    for pair in pairs[: 3 * EXAMPLES]:
        text = f"  {pair.one} ({pair.one_split}) and {pair.other} ({pair.other_split}): {pair.correlation:.4f}"
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(pairs) > 3 * EXAMPLES:
        out.print("  ...")


def _megabytes(path: Path) -> str:
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB)"
