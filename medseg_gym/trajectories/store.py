"""Trajectories on disk: `TrajectoryWriter` adds whole files to a folder, `Trajectories` reads them as one sequence.

A kill loses what was added since the last file and nothing else: a file that has its name is complete.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medseg_gym.errors import BadDataError, DataMissingError, MedSegError
from medseg_gym.tools import locks
from medseg_gym.trajectories.codec import Head
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.shard import MAX_SETTINGS, Entry, Shard, entry_of, write_shard
from medseg_gym.types import Image

SHARD = 256  # trajectories a file: what a kill costs at most
CACHE_BYTES = 64 * 2**20  # of decoded images
OPEN_FILES = 16
_GLOB = "trajectories-*.h5"

Pair = tuple[Trajectory, Image]


class TrajectoryWriter:
    """A context manager that adds trajectories to a folder, made if need be; what is there already is gone on with.

    Only one writer at a time; a folder of other settings is refused. Leaving the block, by an exception too, writes
    what was added: each is whole. `stored` is what the folder held when it was opened.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], *, shard: int = SHARD) -> None:
        if shard < 1:
            raise MedSegError(f"shard={shard!r}; wanted at least 1 trajectory a file")
        self.folder, self._shard = Path(folder), shard
        self._settings = settings_text(settings)
        self._waiting: list[Entry] = []
        self._lock: int | None = None
        self._open = False

    def __enter__(self) -> Self:
        try:
            self._lock = locks.take(self.folder / ".lock")
        except OSError as error:
            raise MedSegError(f"cannot write into {self.folder}: {error.strerror or error}; choose another") from None
        if self._lock is None:
            raise MedSegError(f"another run is writing into {self.folder}; wait for it, or choose another folder")
        try:
            files = files_of(self.folder)
            self.stored = Trajectories(*files)
            for path, settings in zip(files, self.stored.settings_texts, strict=True):
                if settings != self._settings:
                    raise MedSegError(f"{path} was made with other settings: {_differences(settings, self._settings)}")
        except BaseException:
            self._unlock()
            raise
        self._next = 1 + max((_number(path) for path in files), default=-1)
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self._open = False
            self.stored.close()
            self._unlock()

    def add(self, trajectory: Trajectory, image: Image) -> None:
        """One trajectory with its (H, W, 3) image."""
        self.add_all([trajectory], image)

    def add_all(self, trajectories: Sequence[Trajectory], image: Image) -> None:
        """Trajectories of one image that belong together: after a kill all of them are there, or none."""
        if not self._open:
            raise MedSegError("the writer is not open; use it as `with TrajectoryWriter(...) as writer`")
        self._waiting += [entry_of(trajectory, image) for trajectory in trajectories]
        if len(self._waiting) >= self._shard:
            self.flush()

    def flush(self) -> None:
        """Writes a file of what was added since the last one; nothing to write is no file."""
        if not self._waiting or not self._open:
            return
        write_shard(self.folder / f"trajectories-{self._next:06d}.h5", self._waiting, self._settings)
        self._next += 1
        self._waiting = []

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Trajectories(Sequence[Pair]):
    """Files, or all files of folders, as one sequence of (Trajectory, (H, W, 3) image), each read when asked for.

    Files are opened at first use, in every process anew. Images decoded last are kept, and shared by their
    trajectories; they are read-only. A folder without trajectories is an empty sequence.
    """

    def __init__(self, *paths: str | os.PathLike[str], cache_bytes: int = CACHE_BYTES) -> None:
        self.files = tuple(file for path in paths for file in files_of(Path(path)))
        self._cache_bytes = cache_bytes
        self._shards: dict[int, Shard] = {}  # least recently used first
        self._cache: dict[str, Image] = {}  # likewise
        heads: list[Head] = []
        texts, counts = [], []
        for number in range(len(self.files)):
            shard = self._shard(number)
            heads += shard.heads
            texts.append(shard.settings)
            counts.append(len(shard))
        self._ends = list(accumulate(counts))
        self.settings_texts: tuple[str, ...] = tuple(texts)
        self._heads = tuple(heads)
        self._chosen: tuple[int, ...] = tuple(range(len(heads)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_cache": {}}

    def __repr__(self) -> str:
        return f"Trajectories({len(self)} in {len(self.files)} files)"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Pair:  # type: ignore[override]
        """A trajectory and its image; BadDataError where the file is damaged there."""
        file, row = self._place(self._chosen[number])
        shard = self._shard(file)
        return shard.trajectory(row), self._image(shard, shard.image_of(row))

    def trajectory(self, number: int) -> Trajectory:
        """A trajectory without its image, which is not read."""
        file, row = self._place(self._chosen[number])
        return self._shard(file).trajectory(row)

    def __iter__(self) -> Iterator[Pair]:
        return (self[number] for number in range(len(self)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def records(self) -> Iterator[Trajectory]:
        """All trajectories, without their images."""
        return (self.trajectory(number) for number in range(len(self)))

    @property
    def heads(self) -> tuple[Head, ...]:
        """Key, strategy, kind, why it was dropped and how many turns, of each."""
        return tuple(self._heads[i] for i in self._chosen)

    @property
    def keys(self) -> tuple[str, ...]:
        """The case of each."""
        return tuple(head.key for head in self.heads)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings they were made with, those that are the same in all files; {} without files."""
        every = [json.loads(text) for text in dict.fromkeys(self.settings_texts)]
        first = every[0] if every else {}
        return {name: v for name, v in first.items() if all(name in s and s[name] == v for s in every)}

    def select(self, wanted: Callable[[Head], bool]) -> Trajectories:
        """Those that are wanted, by what the index tells of them."""
        chosen = Trajectories.__new__(Trajectories)
        chosen.__dict__ = {**self.__getstate__(), "_shards": {}, "_cache": {}}
        chosen._chosen = tuple(i for i in self._chosen if wanted(self._heads[i]))
        return chosen

    def kept(self) -> Trajectories:
        """Those that no filter refused."""
        return self.select(lambda head: not head.dropped)

    def sha(self, number: int) -> str:
        """The hash of a trajectory's image, without reading it."""
        file, row = self._place(self._chosen[number])
        shard = self._shard(file)
        return shard.sha(shard.image_of(row))

    def close(self) -> None:
        """Closes the files; the next use opens them again."""
        for shard in self._shards.values():
            if shard.pid == os.getpid():
                shard.close()
        self._shards, self._cache = {}, {}

    def _place(self, number: int) -> tuple[int, int]:
        file = bisect_right(self._ends, number)
        return file, number - (self._ends[file - 1] if file else 0)

    def _shard(self, number: int) -> Shard:
        shard = self._shards.pop(number, None)
        if shard is None or shard.pid != os.getpid():
            shard = Shard(self.files[number])
        self._shards[number] = shard
        if len(self._shards) > OPEN_FILES:
            self._shards.pop(next(iter(self._shards))).close()
        return shard

    def _image(self, shard: Shard, number: int) -> Image:
        sha = shard.sha(number)
        image = self._cache.pop(sha, None)
        if image is None:
            image = shard.image(number)
        self._cache[sha] = image
        total = sum(other.nbytes for other in self._cache.values())
        while total > self._cache_bytes and len(self._cache) > 1:
            total -= self._cache.pop(next(iter(self._cache))).nbytes
        return image


def write(path: str | os.PathLike[str], pairs: Sequence[Pair], settings: Mapping[str, Any]) -> None:
    """One file of trajectories, whatever its name; an existing one is replaced at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, [entry_of(*pair) for pair in pairs], settings_text(settings))


def files_of(path: Path) -> list[Path]:
    """The file itself, or a folder's files in the order they were written."""
    if path.is_dir():
        return sorted(path.glob(_GLOB), key=_number)
    if not path.exists():
        raise DataMissingError(
            f"no trajectories at {path}; make some with: medseg-gym trajectories --env ID --strategy NAME --out {path}"
        )
    return [path]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as they are stored: equal settings give equal text. MedSegError where JSON cannot hold them."""
    try:
        text = json.dumps(dict(settings), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MedSegError(f"settings: {error}; wanted what JSON can hold") from None
    if len(text.encode()) > MAX_SETTINGS:
        raise MedSegError(f"settings of {len(text)} characters; at most {MAX_SETTINGS}")
    return text


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("trajectories-")
    if not digits.isdecimal():
        raise BadDataError(f"{path}: a file's name ends in a number here; rename it or give it by itself")
    return int(digits)


def _differences(found: str, wanted: str) -> str:
    one, other = json.loads(found), json.loads(wanted)
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    said = [f"{name} is {_brief(one.get(name))}, now {_brief(other.get(name))}" for name in names[:5]]
    return "; ".join(said) + "; choose another folder, or the same settings"


def _brief(value: Any) -> str:
    """A setting on one line of an error; long ones, as what identifies an env, are cut."""
    told = repr(value)
    return told if len(told) <= 100 else f"{told[:97]}..."
