"""The embedding cache: every distinct image is encoded once, within a byte limit, whoever asks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

from medseg_gym.images import image_hash
from medseg_gym.tools.base import Memory, SegmentationTool
from medseg_gym.tools.disk_cache import DiskCache
from medseg_gym.types import Embedding, Image, Prediction, Prompt, Query

MAX_BYTES = 2 * 1024**3  # 128 images of SAM 2.1 at 1024x1024 in float32


class EmbeddingCache:
    """Embeddings by key, the least recently used leave first; the bytes kept never exceed `max_bytes`. Thread-safe.

    `hits` are images answered from here (also one that another thread was already encoding), `misses` the others,
    `encodes` those that were encoded; the rest of the misses came from a disk. 0 bytes keep nothing and still share
    within a call.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}; wanted 0 or more")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.encodes = self.evictions = self.bytes = 0
        self._kept: OrderedDict[Hashable, Embedding] = OrderedDict()
        self._coming: dict[Hashable, Future[Embedding | None]] = {}
        self._lock = threading.Lock()

    def get(
        self,
        keys: Sequence[Hashable],
        encode: Callable[[list[int]], Sequence[Embedding]],
        stored: Callable[[int], Embedding | None] | None = None,
    ) -> list[Embedding]:
        """One embedding a key, in order. `encode` gets the positions of the distinct missing keys, in order, but for
        those for which `stored` has an embedding from a slower place.

        What it raises reaches the caller; nothing is kept then, and other threads that waited encode for themselves.
        """
        found: dict[Hashable, Embedding] = {}
        waiting: dict[Hashable, Future[Embedding | None]] = {}
        mine: dict[Hashable, int] = {}
        with self._lock:
            for position, key in enumerate(keys):
                if key in self._kept:
                    self._kept.move_to_end(key)
                    found[key] = self._kept[key]
                    self.hits += 1
                elif key in self._coming:  # by another thread, or by this call as an earlier position
                    waiting[key] = self._coming[key]
                    self.hits += 1
                else:
                    mine[key] = position
                    self._coming[key] = Future()
                    self.misses += 1
        # A thread always finishes its own encodes before it waits for another's, so two cannot block each other.
        if mine:
            found.update(self._encode(mine, encode, stored))
        for key, future in waiting.items():
            embedding = future.result()
            if embedding is None:  # the thread that was encoding it failed
                with self._lock:
                    self.hits -= 1
                embedding = self.get([key], lambda _, key=key: encode([keys.index(key)]))[0]  # type: ignore[misc]
            found[key] = embedding
        return [found[key] for key in keys]

    def counters(self) -> dict[str, int]:
        """A snapshot of hits, misses, encodes, evictions, bytes and images kept."""
        with self._lock:
            return {
                "hits": self.hits,
                "misses": self.misses,
                "encodes": self.encodes,
                "evictions": self.evictions,
                "bytes": self.bytes,
                "images": len(self._kept),
            }

    def clear(self) -> None:
        """Forgets every embedding; the counters of work done stay."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def _encode(
        self,
        mine: dict[Hashable, int],
        encode: Callable[[list[int]], Sequence[Embedding]],
        stored: Callable[[int], Embedding | None] | None,
    ) -> dict[Hashable, Embedding]:
        new: dict[Hashable, Embedding] = {}
        encoded = 0
        try:
            if stored is not None:
                read = {key: stored(position) for key, position in mine.items()}
                new = {key: embedding for key, embedding in read.items() if embedding is not None}
            missing = {key: position for key, position in mine.items() if key not in new}
            if missing:
                new.update(dict(zip(missing, encode(list(missing.values())), strict=True)))
            encoded = len(missing)
        finally:
            with self._lock:
                self.encodes += encoded
                for key in mine:
                    if key in new:
                        self._keep(key, new[key])
                    self._coming.pop(key).set_result(new.get(key))
        return new

    def _keep(self, key: Hashable, embedding: Embedding) -> None:
        if embedding.nbytes > self.max_bytes:
            return
        while self.bytes + embedding.nbytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= oldest.nbytes
            self.evictions += 1
        self._kept[key] = embedding
        self.bytes += embedding.nbytes


class CachedTool:
    """A tool whose `encode` looks in a cache first; in all else the tool itself. Keys are fingerprint + image hash."""

    def __init__(
        self,
        tool: SegmentationTool,
        max_bytes: int = MAX_BYTES,
        *,
        cache: EmbeddingCache | None = None,
        disk: DiskCache | None = None,
    ) -> None:
        if disk is not None and disk.fingerprint != tool.fingerprint:
            raise ValueError(f"the disk cache is for {disk.fingerprint}; the tool is {tool.fingerprint}")
        self.tool = tool
        self.cache = cache if cache is not None else EmbeddingCache(max_bytes)
        self.disk = disk

    def __repr__(self) -> str:
        return f"CachedTool({self.tool.fingerprint}, {self.cache.max_bytes} bytes)"

    @property
    def name(self) -> str:
        return self.tool.name

    @property
    def fingerprint(self) -> str:
        return self.tool.fingerprint

    @property
    def prompts(self) -> frozenset[type[Prompt]]:
        return self.tool.prompts

    @property
    def memory(self) -> Memory:
        return self.tool.memory

    @property
    def max_batch(self) -> int:
        return self.tool.max_batch

    @property
    def pads(self) -> bool:
        return getattr(self.tool, "pads", False)

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        """One embedding an image, in order; each distinct image that is not kept, here or on disk, is encoded once."""
        prefix = self.tool.fingerprint
        hashes = [image_hash(image) for image in images]
        keys = [(prefix, digest) for digest in hashes]
        if (disk := self.disk) is None:
            return self.cache.get(keys, lambda positions: self.tool.encode([images[i] for i in positions]))

        def encode(positions: list[int]) -> list[Embedding]:
            # as many at a time as the tool takes: a kill loses no more than those
            new: list[Embedding] = []
            for start in range(0, len(positions), self.max_batch):
                new += self.tool.encode([images[i] for i in positions[start : start + self.max_batch]])
                for embedding in new[start:]:
                    disk.put(embedding)
            return new

        return self.cache.get(keys, encode, lambda position: disk.get(hashes[position]))

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        return self.tool.predict(queries)

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        return self.tool.prior_shape(height, width)

    def counters(self) -> dict[str, int]:
        """The cache's counters; with a disk cache also what was read from it, written and found damaged."""
        counters = self.cache.counters()
        if self.disk is not None:
            counters.update(disk_hits=self.disk.hits, disk_writes=self.disk.writes, disk_damaged=self.disk.damaged)
        return counters
