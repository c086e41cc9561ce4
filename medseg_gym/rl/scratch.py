"""Folders in shared memory that are gone with the process that made them, at the latest when another makes one."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX, LOCK = "medseg-gym-scratch-", ".lock"


def make_scratch(root: str | Path | None = None) -> Path:
    """A new folder under `root`, by default the machine's shared memory, else its temporary folder.

    A process that is killed leaves its folder behind, which may hold all of a model's weights: those of processes that
    are no more are removed first. A lock that ends with the process says which these are.
    """
    place = Path(root or ("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()))
    remove_left(place)
    handle, lock = tempfile.mkstemp(dir=place, prefix=PREFIX, suffix=LOCK)  # the handle stays open with the process
    _hold(handle)
    folder = Path(lock.removesuffix(LOCK))
    folder.mkdir(mode=0o700)  # after the lock is held, so that no folder of a living process is without
    return folder


def remove_left(root: Path) -> None:
    """Removes the folders of this user's processes that have ended."""
    for folder in root.glob(f"{PREFIX}*"):
        lock = folder.with_name(folder.name + LOCK)
        if not folder.is_dir():
            continue
        with suppress(OSError):  # another's, or gone meanwhile
            handle = os.open(lock, os.O_RDWR)
            try:
                if _hold(handle):
                    shutil.rmtree(folder, ignore_errors=True)
                    os.unlink(lock)
            finally:
                os.close(handle)


def remove_scratch(folder: Path) -> None:
    """Removes a folder of this process."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + LOCK).unlink(missing_ok=True)


def _hold(handle: int) -> bool:
    """Whether the lock could be had; where there are no such locks it never can."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
