"""Checkpoints of a run: folders that are there whole or not at all, and which settings a resumed run has to share."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medseg_gym.errors import MedSegError
from medseg_gym.rl.config import Common

RECORD = "record.json"
SCHEMA = 1
_NAME = re.compile(r"step-(\d{8,12})")

# What may change between a run and its continuation: none of these has a part in what is trained.
FREE: tuple[str, ...] = ("out", "gallery_every", "keep", "save_every", "wandb", "device")
FREE += ("cluster", "engines", "engine_options", "weights_folder", "tool_actors", "placement")
FREE += ("worker_cpus", "engine_cpus", "engine_gpus", "learner_cpus", "learner_gpus", "tool_cpus", "tool_gpus")
FREE += ("call_timeout", "patience_s")
QUESTIONS = ("questions", "question_share", "validate_questions")  # free where none are asked
LENGTHS = ("epochs", "steps", "iterations")  # free too where the learning rate does not hang on the number of steps


def save(root: Path, step: int, write: Callable[[Path], object], record: Mapping[str, Any], keep: int = 0) -> Path:
    """Writes a checkpoint by `write(folder)`; it is on disk, whole, when this returns. Keeps the newest `keep`, 0 all.

    `record` is what `latest` gives back, JSON. A checkpoint of this step that is there already is left as it is.
    """
    place, part = root / f"step-{step:08d}", root / f".part-{step:08d}"
    if _believed(place) is not None:
        return place
    try:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        files = sorted(path for path in part.rglob("*") if path.is_file())
        sizes = {path.relative_to(part).as_posix(): path.stat().st_size for path in files}
        whole = {"schema": SCHEMA, "step": step, "files": sizes, "run": dict(record)}
        (part / RECORD).write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        commit(part, place)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise MedSegError(
            f"cannot write {place}: {error.strerror or error}; make room, then give the same command again to go on"
        ) from error
    if keep:
        prune(root, keep)
    return place


def latest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its record with "step" in it; None where there is none."""
    for step in sorted(_steps(root), reverse=True):
        found = _believed(root / f"step-{step:08d}")
        if found is not None:
            return root / f"step-{step:08d}", {**found["run"], "step": int(found["step"])}
    return None


def prune(root: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` that are whole, and what kills have left half-written."""
    whole = [step for step in sorted(_steps(root)) if _believed(root / f"step-{step:08d}") is not None]
    for step in set(_steps(root)) - set(whole[-keep:]):
        gone = root / f".gone-{step:08d}"  # renamed first: a kill while files are removed leaves no half checkpoint
        os.replace(root / f"step-{step:08d}", gone)
    for left in [*root.glob(".gone-*"), *root.glob(".part-*")]:
        shutil.rmtree(left, ignore_errors=True)


def replace_folder(place: Path, write: Callable[[Path], object]) -> Path:
    """Writes a folder by `write(folder)` and puts it where another one may be: a reader finds one of the two, whole.

    Between two renames there is none for a moment; a kill there leaves the old one as ".old-NAME".
    """
    part, old = place.with_name(f".part-{place.name}"), place.with_name(f".old-{place.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    commit(part, place)
    shutil.rmtree(old, ignore_errors=True)
    return place


async def filled(
    place: Callable[[Callable[[Path], None]], Path], fill: Callable[[Path], Coroutine[Any, Any, None]]
) -> None:
    """Has a folder put in its place in a thread, where it is filled by a coroutine, which runs in this loop."""
    loop = asyncio.get_running_loop()

    def write(folder: Path) -> None:
        asyncio.run_coroutine_threadsafe(fill(folder), loop).result()

    await asyncio.to_thread(place, write)


def commit(part: Path, place: Path) -> None:
    """Gives a folder its name once all in it is on disk."""
    for path in sorted(part.rglob("*")):
        _sync(path)
    _sync(part)
    os.replace(part, place)
    _sync(place.parent)


def binding(config: Common) -> dict[str, Any]:
    """The settings that a continuation has to share with the run it continues, as JSON has them."""
    free = FREE + (LENGTHS if config.schedule == "constant" and not config.warmup else ())
    if not config.questions:  # runs begun before there were any go on
        free = (*free, *QUESTIONS)
    return json.loads(json.dumps({name: value for name, value in asdict(config).items() if name not in free}))


def digest(config: Common) -> str:
    """A hash of the binding settings, for a checkpoint's record."""
    return hashlib.sha256(json.dumps(binding(config), sort_keys=True).encode()).hexdigest()


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(match[1]) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]


def _believed(place: Path) -> dict[str, Any] | None:
    """The whole record of a checkpoint whose files are as long as it says; None for anything else."""
    try:
        found = json.loads((place / RECORD).read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA or not isinstance(found["run"], dict) or not isinstance(found["step"], int):
            return None
        if all((place / name).stat().st_size == size for name, size in found["files"].items()):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _sync(path: Path) -> None:
    """Puts a file or a folder's names on disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
