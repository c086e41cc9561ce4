"""`medseg-gym sft` and `medseg-gym grpo`: training from a settings file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg_gym.cli_terminal import clean_errors, console, progress_bars
from medseg_gym.cli_training_table import training_table
from medseg_gym.errors import MedSegError

Show = Callable[[int, int, Mapping[str, float]], None]
LINE_EVERY = 10.0  # seconds between lines of progress where the output is no terminal

ConfigFile = Annotated[Path | None, typer.Option("--config", help="A TOML file with the run's settings.")]
Preset = Annotated[str, typer.Option("--preset", help="Settings that come along, below the file's own.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, above the file's; several times. The value is TOML.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder; the same command goes on with it.")]


def sft(config: ConfigFile = None, preset: Preset = "", setting: Setting = None, out: Out = None) -> None:
    """Fine-tune a vision-language model on trajectories; a killed run goes on by the same command."""
    from medseg_gym.rl.config import SFTConfig, read
    from medseg_gym.rl.sft import FINAL, train

    with clean_errors(), stoppable(), reading_bar() as progress, training_bar("sft") as show:
        settings = read(SFTConfig, config, **given(config, preset, setting, out))
        state = train(settings, show=show, say=say, progress=progress)
    if state.best is not None:
        print(f"best validation: IoU {state.best:.3f} at step {state.best_step}")
    print(f"written: {Path(settings.out) / FINAL}")


def grpo(config: ConfigFile = None, preset: Preset = "", setting: Setting = None, out: Out = None) -> None:
    """Train a vision-language model by GRPO in an env; a killed run goes on by the same command."""
    from medseg_gym.rl.config import GRPOConfig, read
    from medseg_gym.rl.grpo import BEST, FINAL, train

    shown = training_table if console(stderr=True).is_terminal else training_bar
    with clean_errors(), stoppable(), shown("grpo") as show:
        settings = read(GRPOConfig, config, **given(config, preset, setting, out))
        state = train(settings, show=show, say=say)
    if state.best is not None:
        print(f"best validation: IoU {state.best:.3f} at iteration {state.best_step}, in {Path(settings.out) / BEST}")
    print(f"written: {Path(settings.out) / FINAL}")


def given(config: Path | None, preset: str, setting: list[str] | None, out: Path | None) -> dict[str, Any]:
    """The settings of the command line, which stand above the file's."""
    if config is None and not preset:
        raise MedSegError("no settings; give --config FILE.toml, --preset NAME, or both")
    values: dict[str, Any] = {"preset": preset} if preset else {}
    for entry in setting or ():
        key, equals, text = entry.partition("=")
        if not equals or not key.strip():
            raise MedSegError(f"--set {entry!r}; wanted key=value, such as --set lr=1e-5")
        values[key.strip()] = _value(text.strip())
    if out is not None:
        values["out"] = str(out)
    return values


def say(line: str) -> None:
    """A line for people, above the progress bar."""
    console(stderr=True).print(line, markup=False, soft_wrap=True)


@contextmanager
def stoppable() -> Iterator[None]:
    """A run that was stopped ends with its signal's exit code, and says how to go on."""
    from transformers.utils import logging

    from medseg_gym.rl.stopping import Interrupted

    logging.disable_progress_bar()  # of every model that is loaded or written
    try:
        yield
    except Interrupted as stop:
        say("stopped and saved; give the same command again to go on")
        raise typer.Exit(128 + stop.signal if stop.signal else 1) from None


@contextmanager
def reading_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar that is gone once its work is done, as two bars at once would overwrite each other."""
    with ExitStack() as open_bars:
        bar: Callable[[str, int, int], None] | None = None

        def show(label: str, done: int, total: int) -> None:
            nonlocal bar
            bar = bar or open_bars.enter_context(progress_bars())
            bar(label, done, total)
            if done >= total:
                open_bars.close()
                bar = None

        yield show


@contextmanager
def training_bar(label: str) -> Iterator[Show]:
    """A bar over a run's steps with its loss, IoU and speed; a line now and then where the output is no terminal."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    out = console(stderr=True)
    numbers = TextColumn("{task.fields[numbers]}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), numbers, TimeRemainingColumn())
    bars = Bars(*columns, console=out, disable=not out.is_terminal)
    task: Any = None
    seen: dict[str, float] = {}
    told = -LINE_EVERY

    def show(step: int, steps: int, values: Mapping[str, float]) -> None:
        nonlocal task, told
        seen.update(values)
        words = in_words(seen)
        if out.is_terminal:
            if task is None:
                bars.start()
                task = bars.add_task(label, total=steps, numbers=words)
            bars.update(task, completed=step, total=steps, numbers=words)
        elif step == steps or time.monotonic() - told >= LINE_EVERY:
            told = time.monotonic()
            say(f"{label} {step}/{steps}  {words}")

    try:
        yield show
    finally:
        if task is not None:
            bars.stop()


SHOWN = {  # what the bar shows, where a run has it
    "train/loss": "loss {:.4f}",
    "train/reward": "reward {:.3f}",
    "train/iou": "IoU {:.3f}",
    "val/iou": "val IoU {:.3f}",
    "train/vqa_accuracy": "answers {:.0%} right",
    "val/vqa_accuracy": "val answers {:.0%} right",
    "train/turns": "{:.1f} actions",
    "train/unreadable": "{:.0%} unreadable",
    "train/dropped": "{:.0%} dropped",
    "learner/mismatch_kl": "mismatch {:.1e}",
    "learner/clip_share": "{:.1%} clipped",
    "idle/engine": "idle: engine {:.0%}",
    "idle/learner": "learner {:.0%}",
    "idle/workers": "workers {:.0%}",
    "speed/completion_tokens_s": "{:.0f} tokens/s",
    "speed/tokens_s": "{:.0f} tokens/s",
}


def in_words(values: Mapping[str, float]) -> str:
    """The numbers that a bar shows."""
    return "  ".join(form.format(values[name]) for name, form in SHOWN.items() if name in values)


def _value(text: str) -> Any:
    """A value as TOML reads it; a bare word is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
