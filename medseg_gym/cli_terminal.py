"""What every command shares on the terminal: the console, a progress bar, and errors without tracebacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from medseg_gym.errors import MedSegError

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]  # (label, done, total)


def console(stderr: bool = False) -> Console:
    """The console; wide enough for a table where the output goes into a file."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 140)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar a label; nothing is shown before there is progress, so an early error stands alone."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Bars(*columns, console=console(stderr=True))
    tasks: dict[str, Any] = {}

    def show(label: str, done: int, total: int) -> None:
        if label not in tasks:
            bars.start()
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()


@contextmanager
def clean_errors() -> Iterator[None]:
    """A user's mistake is one red message and exit code 1; ^C is 130; anything else keeps its traceback."""
    try:
        yield
    except MedSegError as error:
        sys.stdout.flush()
        console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console(stderr=True).print("interrupted; give the same command again to go on")
        raise typer.Exit(130) from None
