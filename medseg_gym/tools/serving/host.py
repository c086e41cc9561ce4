"""The tool host: a tool with the images and priors that were sent to it; the HTTP server and the Ray actor wrap it."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg_gym.errors import BadDataError
from medseg_gym.images import image_hash
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.tools.serving.batcher import Batcher, Job
from medseg_gym.tools.serving.limits import Limits
from medseg_gym.types import Image, Logits, Prediction, Prompt

PROTOCOL = 1  # of everything that host and client say to each other


class MissingError(Exception):
    """Images and priors that were named and are not there: never sent, or evicted since. Send them (again)."""

    def __init__(self, images: Sequence[str] = (), priors: Sequence[str] = ()) -> None:
        super().__init__(f"{len(images)} images and {len(priors)} priors are not here")
        self.images, self.priors = tuple(images), tuple(priors)


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A query as it travels: the image by its hash, the prior by its handle or as it is."""

    image: str
    prompts: tuple[Prompt, ...]
    prior: Logits | str | None = None


class Kept:
    """Arrays by name, at most `max_bytes` of them; the least recently used leave first. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._arrays: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._arrays)

    def get(self, name: str) -> np.ndarray | None:
        with self._lock:
            array = self._arrays.get(name)
            if array is not None:
                self._arrays.move_to_end(name)
            return array

    def put(self, name: str, array: np.ndarray) -> None:
        """Keeps it; one that is larger than all there may be is dropped."""
        with self._lock:
            old = self._arrays.pop(name, None)
            self.bytes += array.nbytes - (old.nbytes if old is not None else 0)
            self._arrays[name] = array
            while self.bytes > self.max_bytes:
                _, oldest = self._arrays.popitem(last=False)
                self.bytes -= oldest.nbytes


class ToolHost:
    """A tool, what was sent to it, and the batcher in front of it. Give it a CachedTool: it asks by image, always."""

    def __init__(
        self,
        tool: SegmentationTool,
        *,
        limits: Limits | None = None,
        max_batch: int | None = None,
        wait_ms: float = 3.0,
    ) -> None:
        self.tool = tool
        self.limits = limits or Limits()
        self.images = Kept(self.limits.image_bytes)
        self.priors = Kept(self.limits.prior_bytes)
        self.batcher = Batcher(tool, max_batch=max_batch, wait_ms=wait_ms, max_queue=self.limits.queue)

    def describe(self) -> dict[str, Any]:
        """What a client has to know, ready for JSON."""
        return {
            "protocol": PROTOCOL,
            "name": self.tool.name,
            "fingerprint": self.tool.fingerprint,
            "prompts": sorted(kind.__name__ for kind in self.tool.prompts),
            "memory": self.tool.memory,
            "max_batch": self.batcher.max_batch,
            "pads": bool(getattr(self.tool, "pads", False)),
            "limits": self.limits.told(),
        }

    def counters(self) -> dict[str, Any]:
        """What was asked, merged, encoded and is kept."""
        count: Any = getattr(self.tool, "counters", dict)
        return {
            "batcher": self.batcher.counters(),
            "cache": count(),
            "images": len(self.images),
            "image_bytes": self.images.bytes,
            "priors": len(self.priors),
            "prior_bytes": self.priors.bytes,
        }

    def put(self, name: str, image: Image) -> None:
        """Keeps an (H, W, 3) uint8 image under its hash; BadDataError if that is not its hash, or it is too large."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise BadDataError(f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}")
        if image.shape[0] * image.shape[1] > self.limits.pixels or image.nbytes > self.limits.image_bytes:
            raise BadDataError(f"{image.shape[1]}x{image.shape[0]} pixels; this server takes {self.limits.pixels}")
        if image.flags.writeable:
            image = image.copy()
            image.flags.writeable = False
        if image_hash(image) != name:
            raise BadDataError(f"the image sent as {name[:16]}... has another hash, {image_hash(image)[:16]}...")
        self.images.put(name, image)

    def keep_prior(self, prior: Logits) -> str:
        """The handle under which the server has a prior that it answered with; it never names another array."""
        handle = secrets.token_hex(16)
        self.priors.put(handle, prior)
        return handle

    def encode(self, names: Sequence[str], owner: Hashable) -> list[Future[Prediction | None]]:
        """Queues the images for encoding; MissingError if some are not here. The futures' results are None."""
        images = self._images(names, ())
        return self._submit([Job(owner, image) for image in images])

    def predict(self, asks: Sequence[Ask], owner: Hashable) -> list[Future[Prediction | None]]:
        """Queues the queries; MissingError if an image or prior is not here, BadDataError if a query asks nothing."""
        if not all(ask.prompts for ask in asks):
            raise BadDataError("a query without prompts; wanted one or more")
        priors = {ask.prior: self.priors.get(ask.prior) for ask in asks if isinstance(ask.prior, str)}
        images = self._images([ask.image for ask in asks], [name for name, prior in priors.items() if prior is None])
        jobs = [
            Job(owner, image, ask.prompts, priors[ask.prior] if isinstance(ask.prior, str) else ask.prior)
            for ask, image in zip(asks, images, strict=True)
        ]
        return self._submit(jobs)

    def close(self, timeout: float | None = None) -> None:
        """Answers what is queued and takes no more."""
        self.batcher.close(timeout)

    def _images(self, names: Sequence[str], lost_priors: Sequence[str]) -> list[Image]:
        found = {name: self.images.get(name) for name in names}
        lost = [name for name, image in found.items() if image is None]
        if lost or lost_priors:
            raise MissingError(lost, lost_priors)
        return [image for name in names if (image := found[name]) is not None]

    def _submit(self, jobs: Sequence[Job]) -> list[Future[Prediction | None]]:
        self.batcher.submit(jobs)
        return [job.answer for job in jobs]
