"""Weights the user already has: taken as a tool's after a look into them, and later compared with what they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from medseg_gym import home
from medseg_gym.errors import BadDataError, MedSegError, WeightsMissingError
from medseg_gym.tools import cards, records, sources
from medseg_gym.tools.weights import CHECKPOINT_FILES, checkpoint_at, file_sha256, find_weights, read_state

Status = Literal["ok", "changed", "missing", "unrecorded"]
Progress = Callable[[str, int, int], None]  # (label, bytes done, bytes in all)


def register(
    tool: str, path: str | Path, *, copy: bool = False, check: bool = True, progress: Progress | None = None
) -> records.WeightsRecord:
    """Records a file or folder as a tool's weights, by path, size, time and sha256.

    It must be readable as weights, without running any code in it, and (`check`) load as the tool; else BadDataError
    with the reason, and nothing is recorded. `copy` puts a copy into the data home, else the path must stay.
    """
    sources.source_of(tool)
    path = Path(path).expanduser().absolute()
    found = checkpoint_at(path) if path.exists() else f"{path} does not exist"
    if not isinstance(found, Path):
        raise BadDataError(f"{found}; register takes a checkpoint file, or a folder in transformers' format")
    read_state(_weights_in(found))
    if check:
        _loads(tool, found)
    files = [found] if found.is_file() else [found / name for name in CHECKPOINT_FILES]
    hashes = [_hash(file, progress) for file in files]
    if copy:
        found, files = _copied(tool, found, files, hashes, progress)
    described = tuple(records.describe(file, digest) for file, digest in zip(files, hashes, strict=True))
    record = records.WeightsRecord(path=found, files=described, source={})
    records.write(tool, record)
    return record


def published(tool: str, record: records.WeightsRecord) -> bool | None:
    """Whether a record's file is the one its authors published; None where no sha256 of that is known."""
    kind, _, wanted = sources.source_of(tool).checksum.partition(":")
    return any(file.sha256 == wanted for file in record.files) if kind == "sha256" else None


def verify(tool: str, *, progress: Progress | None = None) -> list[tuple[Path, Status]]:
    """Every file of a tool's weights, read again: "ok", "changed" or "missing"; "unrecorded" if put there by hand.

    A file with its recorded bytes and another time (a copy, a restored backup) is "ok" and its record is renewed.
    """
    sources.source_of(tool)
    record = records.read(tool)
    if record is None:
        try:
            return [(find_weights(tool), "unrecorded")]
        except WeightsMissingError:
            return [(home.weights_path(tool), "missing")]
    told: list[tuple[Path, Status]] = []
    files = []
    for file in record.files:
        there = file.path.is_file()
        same = there and _hash(file.path, progress) == file.sha256
        told.append((file.path, "ok" if same else "changed" if there else "missing"))
        files.append(records.describe(file.path, file.sha256) if same else file)
    if tuple(files) != record.files:
        records.write(tool, replace(record, files=tuple(files)))
    return told


def _weights_in(path: Path) -> Path:
    return path if path.is_file() else path / CHECKPOINT_FILES[1]


def _loads(tool: str, path: Path) -> None:
    from medseg_gym.tools import make

    if not cards.TOOLS[tool].factory:
        return
    try:
        make(tool, weights=path)
    except Exception as error:  # whatever a loader says, the user is to read it
        first = str(error) if isinstance(error, MedSegError) else f"{type(error).__name__}: {error}"
        raise BadDataError(f"{path} does not load as {tool}, nothing was recorded: {first}") from error


def _hash(path: Path, progress: Progress | None) -> str:
    total, done = path.stat().st_size, 0

    def told(piece: int) -> None:
        nonlocal done
        done += piece
        if progress is not None:
            progress(f"checking {path.name}", done, total)

    return file_sha256(path, told)


def _copied(
    tool: str, found: Path, files: list[Path], hashes: list[str], progress: Progress | None
) -> tuple[Path, list[Path]]:
    folder = home.weights_path(tool)
    folder.mkdir(parents=True, exist_ok=True)
    copies = [folder / file.name for file in files]
    for file, target, digest in zip(files, copies, hashes, strict=True):
        if target.exists() and target.samefile(file):
            continue
        draft = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(file, draft)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise BadDataError(f"cannot copy {file} to {folder}: {error.strerror or error}") from None
        if _hash(draft, progress) != digest:
            draft.unlink()
            raise BadDataError(f"{file} changed while it was copied; nothing was recorded")
        draft.replace(target)
    return (copies[0] if found.is_file() else folder), copies
