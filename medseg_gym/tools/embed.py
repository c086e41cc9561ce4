"""Encoding a dataset's images ahead of time: every distinct one once, onto disk, going on where it was stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medseg_gym.datasets.base import SPLITS, Dataset
from medseg_gym.errors import MedSegError
from medseg_gym.images import image_hash
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.tools.cards import TOOLS
from medseg_gym.tools.disk_cache import RESERVE, DiskCache

Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which images of a dataset are still to be encoded."""

    images: int  # distinct ones
    todo: tuple[str, ...]  # a key of each that is not on disk


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the rest will cost, judged by the first image."""

    left: int  # images after that one
    image_bytes: int
    image_seconds: float
    room: int  # bytes that may be written


def check_pays(tool: str) -> None:
    """Raises MedSegError for a tool whose encode costs no more than reading its result from a disk."""
    if tool in TOOLS and not TOOLS[tool].weights:
        raise MedSegError(
            f"{tool} encodes an image in milliseconds, no slower than an embedding is read from a disk: there is "
            f"nothing to gain. Tools with an image encoder: {', '.join(name for name in TOOLS if TOOLS[name].weights)}"
        )


def plan(disk: DiskCache, data: Dataset, splits: Sequence[str] = SPLITS, progress: Progress | None = None) -> Plan:
    """Looks at every image of the splits once, where the dataset tells which cases share one (`siblings`)."""
    siblings = getattr(data, "siblings", None)
    keys = [key for split in splits for key in data.keys(split)]
    known: set[str] = set()
    digests: set[str] = set()
    todo = []
    for done, key in enumerate(keys, start=1):
        if key not in known:
            known.update((key,) if siblings is None else siblings(key).values())
            digest = image_hash(data[key].image)
            if digest not in digests and not disk.has(digest):
                todo.append(key)
            digests.add(digest)
        if progress is not None:
            progress(done, len(keys))
    return Plan(len(digests), tuple(todo))


def embed(
    tool: SegmentationTool,
    disk: DiskCache,
    data: Dataset,
    todo: Sequence[str],
    *,
    estimate: Callable[[Estimate], None] | None = None,
    progress: Progress | None = None,
) -> int:
    """Encodes the image of every key of `todo` onto `disk`, in order; how many there were. What is written stays.

    `estimate` is told after the first image. MedSegError if the others do not fit, before any of them is encoded, and
    if the disk takes no more. A kill loses at most `tool.max_batch` images; `plan` leaves out the others next time.
    """
    done = 0
    while done < len(todo):
        keys = todo[done : done + (tool.max_batch if done else 1)]
        clock = time.perf_counter()
        embeddings = tool.encode([data[key].image for key in keys])
        seconds = time.perf_counter() - clock
        for embedding in embeddings:
            if not disk.put(embedding):
                raise MedSegError(
                    f"{disk.path} takes no more embeddings of {tool.name}: is the disk or its limit full? {done} were "
                    f"written and stay; the same command goes on"
                )
            done += 1
        if done == 1:
            size = disk.file(embeddings[0].image).stat().st_size
            ahead = Estimate(len(todo) - 1, size, seconds, _room(disk))
            if estimate is not None:
                estimate(ahead)
            if ahead.left * ahead.image_bytes > ahead.room:
                raise MedSegError(
                    f"{ahead.left} more images of {ahead.image_bytes / 1e6:.1f} MB do not fit into {disk.path}, which "
                    f"has room for {ahead.room / 1e9:.1f} GB; take another folder, fewer splits, or dtype float16"
                )
        if progress is not None:
            progress(done, len(todo))
    return done


def _room(disk: DiskCache) -> int:
    room = shutil.disk_usage(disk.path).free - RESERVE
    if disk.max_bytes is not None:
        room = min(room, disk.max_bytes - disk.size()[1])
    return max(0, room)
