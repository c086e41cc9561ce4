"""What RemoteTool and ActorTool share: a tool that lives elsewhere and answers as if it were here."""

from __future__ import annotations

import abc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from medseg_gym.errors import BadDataError, MedSegError, ToolUnavailableError
from medseg_gym.images import image_hash
from medseg_gym.tools.base import Memory
from medseg_gym.tools.serving.host import PROTOCOL, Ask, MissingError
from medseg_gym.types import Box, Click, Embedding, Image, Logits, Prediction, Prompt, Query

PIXELS = "pixels"  # the one feature of a remote embedding: the image, to be sent again after an eviction
ROUNDS = 8  # of sending what is missing, before giving up
ENCODE_BATCHES = 4  # one call has at most so many batches of images encoded
SHARE = 4  # one call names at most 1 / SHARE of the image bytes that the server keeps
KINDS: dict[str, type[Prompt]] = {"Box": Box, "Click": Click}
T = TypeVar("T")


class ServerError(MedSegError, RuntimeError):
    """A tool server that does not do what it should."""


class UnreachableError(ServerError, ToolUnavailableError):
    """A tool server that cannot be reached, or answers nobody: no query is to blame, and a later run may find it."""


class RefusedError(MedSegError, ValueError):
    """A request that the tool server, or its tool, does not take."""


class ToolChangedError(ServerError, ToolUnavailableError):
    """The server came back with another tool, or with other weights or settings."""


class Remote(abc.ABC):
    """A SegmentationTool whose work is done by a ToolHost elsewhere. An embedding is a handle: the image, by its hash.

    Pure as every tool: what the host has evicted or forgotten is sent again. Every answer carries the fingerprint of
    the tool that gave it, which has to stay the one that was first told (ToolChangedError). Thread-safe.
    """

    def __init__(self) -> None:
        told = self._describe()
        try:
            if told["protocol"] != PROTOCOL:
                raise ServerError(f"{self} speaks protocol {told['protocol']}, this version {PROTOCOL}; update one")
            self.name: str = told["name"]
            self.fingerprint: str = told["fingerprint"]
            self.prompts: frozenset[type[Prompt]] = frozenset(KINDS[kind] for kind in told["prompts"])
            self.memory: Memory = told["memory"]
            self.max_batch: int = told["max_batch"]
            self.pads: bool = told["pads"]
            self.limits: Mapping[str, int] = {name: int(value) for name, value in told["limits"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ServerError(f"{self} does not describe itself as a tool server does ({error!r})") from None
        self._shapes: dict[tuple[int, int], tuple[int, int]] = {}
        self._priors = _Handles()

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        """One handle an image, in order; the host has encoded them all by then."""
        handles = [_handle(image) for image in images]
        # A few batches a call, or hundreds of slow encodes would outlast the client's patience with one request.
        few = ENCODE_BATCHES * self.max_batch
        for part in self._parts(handles, lambda handle: (handle.image, handle.nbytes, 0), few):
            self._encode_part({handle.image: handle.features[PIXELS] for handle in part})
        return handles

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """One prediction a query, in order."""
        answers: list[Prediction] = []
        for part in self._parts(queries, self._weight):
            answers += self._predict_part(part)
        return answers

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the low-resolution logits for an (H, W) image; asked once a size."""
        if (height, width) not in self._shapes:
            self._shapes[height, width] = self._prior_shape(height, width)
        return self._shapes[height, width]

    @abc.abstractmethod
    def _describe(self) -> Mapping[str, Any]:
        """ToolHost.describe() of the host."""

    @abc.abstractmethod
    def _put(self, name: str, image: Image) -> None:
        """Sends an image."""

    @abc.abstractmethod
    def _encode(self, names: Sequence[str]) -> str:
        """Has images encoded and gives the fingerprint; MissingError if some have to be sent first."""

    @abc.abstractmethod
    def _predict(
        self, asks: Sequence[Ask], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Prediction], list[str], str]:
        """Predictions, handles of their (read-only) priors, fingerprint; MissingError as with `_encode`."""

    @abc.abstractmethod
    def _prior_shape(self, height: int, width: int) -> tuple[int, int]: ...

    def _encode_part(self, pixels: Mapping[str, Image]) -> None:
        self._with_what_is_missing(lambda _: self._same(self._encode(list(pixels))), pixels)

    def _predict_part(self, queries: Sequence[Query]) -> list[Prediction]:
        pixels = {query.embedding.image: query.embedding.features[PIXELS] for query in queries}
        sizes = [(query.embedding.height, query.embedding.width) for query in queries]

        def ask(lost: frozenset[str]) -> list[Prediction]:
            asks = [Ask(q.embedding.image, tuple(q.prompts), self._prior(q.prior, lost)) for q in queries]
            answers, handles, fingerprint = self._predict(asks, sizes)
            self._same(fingerprint)
            for answer, handle in zip(answers, handles, strict=True):
                self._priors.remember(answer.prior, handle)
            return answers

        return self._with_what_is_missing(ask, pixels)

    def _prior(self, prior: Logits | None, lost: frozenset[str]) -> Logits | str | None:
        if prior is None:
            return None
        handle = self._priors.of(prior)
        return prior if handle is None or handle in lost else handle

    def _with_what_is_missing(self, call: Callable[[frozenset[str]], T], pixels: Mapping[str, Image]) -> T:
        """The call's result; images that are missing are sent, and lost handles of priors given to the next try."""
        lost: frozenset[str] = frozenset()
        for _ in range(ROUNDS):
            try:
                return call(lost)
            except MissingError as missing:
                strange = set(missing.images) - set(pixels)
                if strange:
                    raise ServerError(f"{self} asks for images that it was not asked about") from None
                lost |= set(missing.priors)
                for name in missing.images:
                    self._put(name, pixels[name])
        raise ServerError(
            f"{self} evicts images faster than they can be sent; give it more room for images, or fewer clients"
        )

    def _same(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise ToolChangedError(
                f"{self} answers as {fingerprint} and was {self.fingerprint}: its tool has changed under way; "
                "begin again with a new process, env or tool"
            )

    def _parts(
        self, items: Sequence[T], weight: Callable[[T], tuple[str, int, int]], most_items: int | None = None
    ) -> Iterator[list[T]]:
        """The items in runs that one call may hold; `weight` gives image, its bytes, and bytes of body and answer."""
        longest = min(self.limits["queries"], most_items or self.limits["queries"])
        most = max(1, self.limits["image_bytes"] // SHARE)
        traffic = min(self.limits["body_bytes"], self.limits["answer_bytes"]) // 2
        part: list[T] = []
        images: dict[str, int] = {}
        moved = 0
        for item in items:
            image, size, bytes_ = weight(item)
            full = len(part) >= longest or moved + bytes_ > traffic
            if part and (full or sum(images.values()) + (0 if image in images else size) > most):
                yield part
                part, images, moved = [], {}, 0
            part.append(item)
            images[image] = size
            moved += bytes_
        if part:
            yield part

    def _weight(self, query: Query) -> tuple[str, int, int]:
        embedding = query.embedding
        if PIXELS not in embedding.features:
            raise BadDataError(f"{self} did not make this embedding; encode the image with the tool that is asked")
        priors = 0 if query.prior is None else query.prior.size * 4
        return embedding.image, embedding.nbytes, embedding.height * embedding.width * 4 + 2 * priors + 4096


class _Handles:
    """Which handle the host gave to an array; only read-only arrays are remembered, while they live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[np.ndarray], str]] = {}
        self._lock = threading.Lock()

    def of(self, array: np.ndarray) -> str | None:
        with self._lock:
            entry = self._known.get(id(array))
        return entry[1] if entry is not None and entry[0]() is array and not array.flags.writeable else None

    def remember(self, array: np.ndarray, handle: str) -> None:
        key = id(array)

        def forget(gone: weakref.ref[np.ndarray]) -> None:
            if (entry := self._known.get(key)) is not None and entry[0] is gone:  # the id may be another's by now
                self._known.pop(key, None)

        with self._lock:
            self._known[key] = weakref.ref(array, forget), handle


def _handle(image: Image) -> Embedding:
    if image.flags.writeable:  # whoever owns it may change it before it has to be sent again
        image = image.copy()
        image.flags.writeable = False
    return Embedding(image_hash(image), image.shape[0], image.shape[1], {PIXELS: image})
