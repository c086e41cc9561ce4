"""Reading run folders: settings, episodes (plain or gzipped), summary and times, with limits on their size."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from medseg_gym.episodes import from_json
from medseg_gym.errors import BadDataError
from medseg_gym.types import Episode

EPISODES = ("episodes.jsonl", "episodes.jsonl.gz")  # the first that is there counts
MAX_BYTES = 2**30  # of episodes, unpacked
MAX_RECORD = 2**26  # bytes of any other file
_CHUNK = 2**20


class Run(NamedTuple):
    """What a run's folder holds; without a summary it was not finished."""

    settings: dict[str, Any]
    episodes: list[Episode]
    summary: dict[str, Any] | None
    times: dict[str, Any] | None


def read_run(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Run:
    """The run of a folder that evaluate, or `leaderboard freeze`, wrote.

    BadDataError names the file, and the line, that is missing, cut off, over `max_bytes` unpacked, or not what it
    should be. Summary and times may be missing (None): an unfinished run has neither.
    """
    folder = Path(path)
    settings = read_record(folder / "run.json")
    if settings is None:
        raise BadDataError(f"{folder / 'run.json'}: no such file; wanted a folder that evaluate wrote")
    episodes = read_episodes(folder, max_bytes=max_bytes)
    return Run(settings, episodes, read_record(folder / "summary.json"), read_record(folder / "times.json"))


def find_runs(root: str | Path) -> list[Path]:
    """The run folders at and below a folder, sorted by path; none where it is not there. Links are not followed."""
    found = (Path(folder) for folder, _, files in os.walk(root) if "run.json" in files)
    return sorted(found, key=lambda folder: folder.as_posix())


def read_episodes(folder: Path, *, max_bytes: int = MAX_BYTES) -> list[Episode]:
    """The episodes of a run's folder, in the file's order; an unfinished run may have none."""
    file = next((folder / name for name in EPISODES if (folder / name).is_file()), None)
    if file is None:
        raise BadDataError(f"{folder}: neither {' nor '.join(EPISODES)}; wanted a folder that evaluate wrote")
    episodes = []
    for number, line in enumerate(_lines(file, max_bytes), start=1):
        try:
            episode = from_json(line.decode("utf-8"))
            turns = len(episode.turns)
            if not len(episode.iou) == len(episode.dice) == turns + 1:
                raise BadDataError(f"{turns} turns with {len(episode.iou)} IoU and {len(episode.dice)} Dice values")
        except (BadDataError, UnicodeDecodeError) as error:
            raise BadDataError(f"{file}, line {number}: {error}") from None
        episodes.append(episode)
    return episodes


def read_record(file: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is no such file."""
    try:
        with file.open("rb") as handle:
            data = handle.read(MAX_RECORD + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadDataError(f"{file}: {error.strerror or error}") from None
    if len(data) > MAX_RECORD:
        raise BadDataError(f"{file}: over {MAX_RECORD} bytes")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"{file}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadDataError(f"{file}: a {type(record).__name__}; wanted an object")
    return record


def _lines(file: Path, max_bytes: int) -> Iterator[bytes]:
    """The lines of a plain or gzipped file without their newline; never more than `max_bytes` are unpacked."""
    rest, seen = b"", 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                seen += len(chunk)
                if seen > max_bytes:
                    raise BadDataError(f"{file}: over {max_bytes} bytes of episodes; split the run, or raise the limit")
                *whole, rest = (rest + chunk).split(b"\n")  # bytes: str.splitlines splits at what texts may hold
                yield from whole
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadDataError(f"{file}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise BadDataError(f"{file}: {error.strerror or error}") from None
    if rest:
        raise BadDataError(f"{file}: its last line is cut off; give the same evaluate command again to go on")
