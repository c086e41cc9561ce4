"""One writer at a time: an advisory lock on a file, which the system lets go of when its process ends, however."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def take(path: Path) -> int | None:
    """The descriptor that holds the lock of `path`, None if another holds it; os.close lets it go. The file stays.

    Where the system has no such locks (Windows, some network drives) everyone gets it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except (ImportError, OSError):
        pass
    return handle


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether the lock of `path` is this block's."""
    handle = take(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)
