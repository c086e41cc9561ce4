"""The record of a tool's weights: which files, from where, with which checksums; written by download and register."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg_gym import home
from medseg_gym.errors import BadDataError

NAME = "weights.json"  # in the tool's folder of the data home, beside what was downloaded
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One recorded file. Size and time tell quickly that it is still the file that was hashed."""

    path: Path  # absolute
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WeightsRecord:
    """What was downloaded or registered as a tool's weights."""

    path: Path  # what the tool loads: a folder, or one file
    files: tuple[WeightFile, ...]
    source: Mapping[str, str]  # repository, revision, url; empty for a registered file

    @property
    def registered(self) -> bool:
        return not self.source


def record_path(tool: str) -> Path:
    """The record's own place."""
    return home.weights_path(tool) / NAME


def write(tool: str, record: WeightsRecord) -> Path:
    """Writes the record whole. Paths inside the tool's folder are kept relative, so the data home can be moved."""
    target = record_path(tool)
    folder = target.parent
    content = {
        "schema": SCHEMA,
        "tool": tool,
        "path": _relative(record.path, folder),
        "source": dict(record.source),
        "files": [{**asdict(file), "path": _relative(file.path, folder)} for file in record.files],
    }
    folder.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{NAME}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(target)
    return target


def read(tool: str) -> WeightsRecord | None:
    """The record of a tool, None without one. A file that is not one raises BadDataError."""
    source = record_path(tool)
    try:
        content: Any = json.loads(source.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, wanted {SCHEMA}")
        return WeightsRecord(
            path=_absolute(content["path"], source.parent),
            files=tuple(
                WeightFile(_absolute(f["path"], source.parent), int(f["size"]), int(f["mtime_ns"]), str(f["sha256"]))
                for f in content["files"]
            ),
            source={str(k): str(v) for k, v in content["source"].items()},
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadDataError(
            f"{source}: not a record of weights ({error!r}); delete it, then download or register {tool} again"
        ) from None


def describe(path: Path, sha256: str) -> WeightFile:
    """The entry of a file whose sha256 is known."""
    state = path.stat()
    return WeightFile(path.absolute(), state.st_size, state.st_mtime_ns, sha256)


def check_unchanged(tool: str, record: WeightsRecord) -> None:
    """BadDataError for the first recorded file that is not as it was by size and time; missing ones pass."""
    for file in record.files:
        try:
            state = file.path.stat()
        except OSError:
            continue  # find_weights says what is missing
        if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns):
            raise BadDataError(
                f"{file.path} was changed since it was recorded as {tool}'s weights; `medseg-gym tools verify {tool}` "
                f"compares its sha256 and clears this if the bytes are the same, else register or download it again"
            )


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.absolute(), folder.absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _absolute(text: str, folder: Path) -> Path:
    path = Path(text)
    return path if path.is_absolute() else folder / path
