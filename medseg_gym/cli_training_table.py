"""What `medseg-gym grpo` shows while it runs: a bar over the iterations and a table of the newest numbers below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medseg_gym.cli_terminal import console

if TYPE_CHECKING:
    from rich.table import Table

Show = Callable[[int, int, Mapping[str, float]], None]
Rows = tuple[tuple[str, str, str], ...]  # (what it is called here, in the log, its form)

COLUMNS: dict[str, Rows] = {
    "episodes": (
        ("reward", "train/reward", "{:.3f}"),
        ("IoU", "train/iou", "{:.3f}"),
        ("validation IoU", "val/iou", "{:.3f}"),
        ("answers right", "train/vqa_accuracy", "{:.1%}"),
        ("validation answers", "val/vqa_accuracy", "{:.1%}"),
        ("actions", "train/turns", "{:.2f}"),
        ("unreadable", "train/unreadable", "{:.1%}"),
        ("dropped", "train/dropped", "{:.1%}"),
    ),
    "reward terms": (),  # as many as the reward has
    "groups and step": (
        ("trained", "groups/trained", "{:.0f}"),
        ("equal", "groups/equal", "{:.0f}"),
        ("spread", "groups/spread", "{:.3f}"),
        ("gradient norm", "learner/grad_norm", "{:.3g}"),
        ("mismatch KL", "learner/mismatch_kl", "{:.1e}"),
        ("clipped", "learner/clip_share", "{:.1%}"),
    ),
    "time": (
        ("seconds", "time/iteration", "{:.1f}"),
        ("tokens/s", "speed/completion_tokens_s", "{:.0f}"),
        ("engine idle", "idle/engine", "{:.0%}"),
        ("learner idle", "idle/learner", "{:.0%}"),
        ("workers idle", "idle/workers", "{:.0%}"),
    ),
}
TERM = "train/reward_"


@contextmanager
def training_table(label: str) -> Iterator[Show]:
    """Shows a run's progress on a terminal; nothing is drawn before the first numbers."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    live = Live(console=console(stderr=True), auto_refresh=False)
    task: Any = None
    seen: dict[str, float] = {}

    def show(step: int, steps: int, numbers: Mapping[str, float]) -> None:
        nonlocal task
        seen.update(numbers)
        if task is None:
            live.start()
            task = bars.add_task(label, total=steps)
        bars.update(task, completed=step)
        live.update(Group(bars, table(seen)), refresh=True)

    try:
        yield show
    finally:
        if task is not None:
            live.stop()


def table(numbers: Mapping[str, float]) -> Table:
    """The newest numbers of an iteration, by what they tell of; those that a run does not have are left out."""
    from rich.table import Table

    terms = tuple((name.removeprefix(TERM), name, "{:+.3f}") for name in numbers if name.startswith(TERM))
    outer = Table.grid(padding=(0, 4))
    cells = []
    for title, rows in COLUMNS.items():
        inner = Table(title, "", box=None, header_style="bold", padding=(0, 2, 0, 0))
        inner.columns[1].justify = "right"
        for words, name, form in rows or terms:
            if numbers.get(name) is not None:
                inner.add_row(words, form.format(numbers[name]))
        cells.append(inner)
    outer.add_row(*cells)
    return outer
