"""Fetching a tool's weights: goes on where it was cut off, and a file gets its name only with the right checksum."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from medseg_gym import home
from medseg_gym.errors import BadDataError, MedSegError, WeightsMissingError
from medseg_gym.tools import locks, records
from medseg_gym.tools.sources import Source, source_of
from medseg_gym.tools.weights import find_weights, register_command

CHUNK = 1 << 18
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row that brought nothing
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that another try may change

Progress = Callable[[str, int, int], None]  # (label, bytes done, bytes in all; 0 where not known)


class DownloadError(MedSegError):
    """The weights could not be fetched, or what came is not what was published."""


def download(tool: str, *, force: bool = False, progress: Progress | None = None, wait: float = 1.0) -> Path:
    """Fetches a tool's weights into the data home and records them; where they are, at once if they are there.

    What came before a cut stays in a `.part` file and is gone on from, by this call or a later one; `wait` seconds pass
    before a second try, twice as many before the next. DownloadError says why and what to do. Never asks anything.
    """
    source = source_of(tool)
    if not force and (there := _there(tool)) is not None:
        return there
    if not source.places:
        raise DownloadError(f"{tool}: {source.note}; then: `{register_command(tool)}`")
    folder = home.weights_path(tool)
    with locks.held(folder / ".lock") as ours:
        if not ours:
            raise DownloadError(f"another process is fetching {tool} into {folder}; wait for it")
        target = folder / source.file
        sha256 = _fetched(tool, source, target.with_name(f".{source.file}.part"), progress or _silent, wait)
        target.with_name(f".{source.file}.part").replace(target)
        record = records.WeightsRecord(
            path=target,
            files=(records.describe(target, sha256),),
            source={"repository": source.repository, "revision": source.revision, "checksum": source.checksum},
        )
        records.write(tool, record)
        return target


def _there(tool: str) -> Path | None:
    """What is there already; None too where it was changed since, which a download replaces."""
    try:
        return find_weights(tool)
    except (WeightsMissingError, BadDataError):
        return None


def _fetched(tool: str, source: Source, part: Path, progress: Progress, wait: float) -> str:
    """Fills `part` and gives its sha256; what does not match its published checksum is deleted."""
    left = source.size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(part.parent).free
    if left > free:
        raise DownloadError(
            f"{tool} needs {left / 1e6:.0f} MB more in {part.parent}, which has {free / 1e6:.0f} MB free"
        )
    while True:
        resumed = part.exists() and part.stat().st_size > 0
        reasons = []
        for url in source.urls:
            try:
                fetch(url, part, lambda done, total: progress(source.file, done, total), wait=wait, size=source.size)
                break
            except OSError as error:
                reasons.append(f"{url}: {_reason(error)}")
        else:
            kept = " What came is kept; the same command goes on from there." if part.exists() else ""
            raise DownloadError(
                f"could not fetch {tool}'s weights ({'; '.join(reasons)}).{kept} Without a network, bring "
                f"{source.file} ({source.repository} {source.revision}) from elsewhere and `{register_command(tool)}`"
            )
        got = _digests(part, lambda done, total: progress(f"checking {source.file}", done, total))
        kind, _, wanted = source.checksum.partition(":")
        if got[kind] == wanted:
            return got["sha256"]
        part.unlink()
        if not resumed:
            raise DownloadError(
                f"{source.file} is not the file that was published: its {kind} is {got[kind]}, wanted {wanted}. It was "
                f"deleted; try later, or bring the file from elsewhere and `{register_command(tool)}`"
            )
        # the earlier piece may have been of another file or damaged: once more, from the start


def fetch(url: str, part: Path, progress: Callable[[int, int], None], *, wait: float = 1.0, size: int = 0) -> None:
    """Appends to `part` what it lacks of the file at `url`; OSError after five tries in a row that brought nothing.

    A server that cannot be reached at all is asked once, one that had sent something five times. `size` is the file's
    where it is known, for servers that do not tell: a cut would pass for the end.
    """
    failed, reached = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _one_try(url, part, progress, size):
                return
            error: OSError = ConnectionResetError("the connection was cut")
            reached = True
        except urllib.error.HTTPError as answer:
            if answer.code not in PASSING:
                raise
            error, reached = answer, True
        except http.client.HTTPException as broken:
            error, reached = ConnectionError(f"{type(broken).__name__} {broken}".strip()), True
        except OSError as broken:
            error = broken
        brought = (part.stat().st_size if part.exists() else 0) > before
        reached = reached or brought
        failed = 1 if brought else failed + 1
        if failed >= ATTEMPTS or not reached:
            raise error
        time.sleep(wait * 2 ** (failed - 1))


def _one_try(url: str, part: Path, progress: Callable[[int, int], None], size: int) -> bool:
    """One request; whether the file is whole now."""
    from medseg_gym import __version__

    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": f"medseg-gym/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        return True  # nothing left to send: ours is whole or longer, which the checksum tells apart
    with answer, part.open("r+b" if have else "wb") as file:
        # a server that knows no ranges sends everything again
        start = have if answer.status == 206 and _starts_at(answer.headers.get("Content-Range"), have) else 0
        if answer.status == 206 and start != have:
            file.truncate(0)
            return False
        file.seek(start)
        file.truncate()
        length = int(answer.headers.get("Content-Length") or 0)
        total = _total(answer.headers.get("Content-Range")) or (start + length if length else size)
        done = start
        progress(done, total)
        while piece := answer.read(CHUNK):
            file.write(piece)
            done += len(piece)
            progress(done, total)
    return done >= total


def _starts_at(content_range: str | None, offset: int) -> bool:
    return (content_range or "").replace("=", " ").startswith(f"bytes {offset}-")


def _total(content_range: str | None) -> int:
    text = (content_range or "").rpartition("/")[2]
    return int(text) if text.isdigit() else 0


def _digests(path: Path, progress: Callable[[int, int], None]) -> dict[str, str]:
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            for digest in digests.values():
                digest.update(piece)
            done += len(piece)
            progress(done, total)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _reason(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _silent(label: str, done: int, total: int) -> None:
    pass
