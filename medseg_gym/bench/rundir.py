"""A run's folder: its settings, its growing episodes.jsonl and times.jsonl, and what a kill leaves of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_gym.episodes import from_json, to_json
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.types import Episode

# run.json last: a kill in the middle of a restart then leaves a run that is resumed, not one without settings
FILES = ("report.html", "times.json", "summary.json", "times.jsonl", "episodes.jsonl", "run.json")


class RunDir:
    """Opens a folder for one run; the same settings again resume it, others are refused."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MedSegError(f"cannot make {path}: {error.strerror or error}; choose another --out") from None
        self._lock = _lock(path)
        try:
            if restart:
                for name in FILES:
                    (path / name).unlink(missing_ok=True)
            self._check_settings(settings)
            self.episodes: list[Episode] = self._complete_lines("episodes.jsonl", from_json)
            done = {(e.env, e.policy, e.case) for e in self.episodes}
            # keyed: a kill between the two appends leaves a time without its episode, which is then played again
            times = dict(self._complete_lines("times.jsonl", _timed))
            self.times = [record for key, record in times.items() if key in done]
        except BaseException:
            self.close()
            raise

    def append(self, episode: Episode, times: Mapping[str, Any]) -> None:
        """Adds one finished episode; it is in the file, whole, when this returns."""
        times = {"env": episode.env, "policy": episode.policy, "case": episode.case, **times}
        _append(self.path / "times.jsonl", json.dumps(times))
        _append(self.path / "episodes.jsonl", to_json(episode))
        self.episodes.append(episode)
        self.times.append(times)

    def write(self, name: str, record: Any) -> None:
        write_whole(self.path / name, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        file = self.path / "run.json"
        wanted = json.loads(json.dumps(settings))
        if not file.exists():
            if (self.path / "episodes.jsonl").exists():
                raise BadDataError(
                    f"{self.path} holds episodes.jsonl but no run.json; choose another --out, or use --restart"
                )
            self.write("run.json", wanted)
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadDataError(
                f"{file}: not JSON ({error}); choose another folder, or start over with --restart"
            ) from None
        if not isinstance(found, dict):
            raise BadDataError(f"{file}: not a run's settings; choose another --out, or use --restart")
        if found != wanted:
            differs = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
            raise MedSegError(
                f"{self.path} holds another run, with other {', '.join(differs)} than asked for now; "
                "choose another --out, or start this one over with --restart"
            )

    def _complete_lines(self, name: str, parse: Any) -> list[Any]:
        """The records of a file of lines; a last line that a kill or a full disk cut off is removed."""
        file = self.path / name
        if not file.exists():
            return []
        data = file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with file.open("r+b") as handle:
                handle.truncate(whole)
        records = []
        # bytes, because str.splitlines also splits at line separators that a policy's text may hold
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                records.append(parse(line.decode("utf-8")))
            except (BadDataError, ValueError, KeyError, TypeError) as error:
                raise BadDataError(f"{file}, line {number}: {error}; start the run over with --restart") from None
        return records


def _timed(line: str) -> tuple[tuple[str, str, int], dict[str, Any]]:
    record = json.loads(line)
    return (record["env"], record["policy"], record["case"]), record


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half. Lone surrogates become "?"."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8", errors="replace", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MedSegError(f"cannot write {path}: {error.strerror or error}; what was there is unchanged") from error


def _append(path: Path, line: str) -> None:
    try:
        with path.open("ab") as handle:
            handle.write(line.encode("utf-8") + b"\n")
    except OSError as error:
        raise MedSegError(
            f"cannot write {path}: {error.strerror or error}; make room and give the same command again to go on"
        ) from error


def _lock(path: Path) -> int | None:
    """An advisory lock on the folder, so that two runs never write into one; None where the system has none."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        handle = os.open(path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise MedSegError(f"cannot write into {path}: {error.strerror or error}; choose another --out") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise MedSegError(f"another run is writing into {path}; wait for it, or choose another --out") from None
    return handle
