"""The embedding cache: one encode per distinct image, the byte limit, threads, counters; and the sharing of load()."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from medseg_gym.images import image_hash
from medseg_gym.tools.cache import CachedTool, EmbeddingCache
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Embedding, Image, Query

BYTES = 100  # of every embedding of Counting


class Counting(Stub):
    """A Stub that counts what it encodes; every embedding has 100 bytes."""

    def __init__(self, fail: int = 0) -> None:
        super().__init__()
        self.encoded: list[str] = []
        self.calls = 0
        self.fail = fail
        self.hold = threading.Event()
        self.hold.set()
        self.started = threading.Event()

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        self.calls += 1
        self.started.set()
        self.hold.wait(10)
        if self.fail:
            self.fail -= 1
            raise RuntimeError("out of memory")
        self.encoded += [image_hash(image) for image in images]
        return [
            Embedding(image_hash(image), image.shape[0], image.shape[1], {"bytes": np.zeros(BYTES, np.uint8)})
            for image in images
        ]


def images(count: int) -> list[Image]:
    return [np.full((4, 5, 3), value, np.uint8) for value in range(count)]


def test_a_batch_with_repeats_encodes_each_distinct_image_once_and_keeps_the_order() -> None:
    tool = Counting()
    cached = CachedTool(tool)
    a, b, c = images(3)
    embeddings = cached.encode([b, a, b.copy(), c, a])
    assert [e.image for e in embeddings] == [image_hash(i) for i in (b, a, b, c, a)]
    assert tool.calls == 1 and tool.encoded == [image_hash(i) for i in (b, a, c)]
    assert embeddings[0] is embeddings[2]
    assert cached.counters() == {"hits": 2, "misses": 3, "encodes": 3, "evictions": 0, "bytes": 300, "images": 3}


def test_a_second_call_encodes_only_what_is_new() -> None:
    tool = Counting()
    cached = CachedTool(tool)
    a, b, c = images(3)
    cached.encode([a, b])
    cached.encode([c, b, a])
    assert tool.encoded == [image_hash(i) for i in (a, b, c)]
    cached.encode([])
    assert cached.counters()["hits"] == 2


def test_the_least_recently_used_leaves_first() -> None:
    tool = Counting()
    cached = CachedTool(tool, 2 * BYTES)
    a, b, c = images(3)
    cached.encode([a])
    cached.encode([b])
    cached.encode([a])  # b is now the oldest
    cached.encode([c])
    assert cached.counters()["evictions"] == 1
    cached.encode([a])
    assert len(tool.encoded) == 3
    cached.encode([b])
    assert len(tool.encoded) == 4


def test_the_bytes_kept_never_exceed_the_limit_even_within_a_batch() -> None:
    cached = CachedTool(Counting(), 250)
    embeddings = cached.encode(images(5))
    assert len(embeddings) == 5
    assert cached.counters() == {"hits": 0, "misses": 5, "encodes": 5, "evictions": 3, "bytes": 200, "images": 2}


def test_an_embedding_larger_than_the_limit_is_returned_and_not_kept() -> None:
    tool = Counting()
    cached = CachedTool(tool, BYTES - 1)
    (image,) = images(1)
    assert cached.encode([image, image])[0].nbytes == BYTES
    cached.encode([image])
    assert tool.calls == 2
    assert cached.counters()["bytes"] == 0 and cached.counters()["evictions"] == 0


def test_two_threads_that_ask_at_once_share_one_encode() -> None:
    tool = Counting()
    tool.hold.clear()
    cached = CachedTool(tool)
    (image,) = images(1)
    answers: list[Embedding] = []
    threads = [threading.Thread(target=lambda: answers.extend(cached.encode([image]))) for _ in range(4)]
    threads[0].start()
    assert tool.started.wait(10)
    for thread in threads[1:]:
        thread.start()
    while cached.counters()["hits"] < 3:
        pass
    tool.hold.set()
    for thread in threads:
        thread.join(10)
    assert len(tool.encoded) == 1 and len(answers) == 4 and all(a is answers[0] for a in answers)


def test_a_failed_encode_reaches_the_caller_and_leaves_nothing_behind() -> None:
    tool = Counting(fail=1)
    cached = CachedTool(tool)
    (image,) = images(1)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached.encode([image])
    assert cached.counters()["encodes"] == 0
    assert cached.encode([image])[0].image == image_hash(image)


def test_a_thread_that_waited_for_a_failed_encode_encodes_itself() -> None:
    tool = Counting(fail=1)
    tool.hold.clear()
    cached = CachedTool(tool)
    (image,) = images(1)
    failed: list[BaseException] = []
    answers: list[Embedding] = []

    def first() -> None:
        try:
            cached.encode([image])
        except RuntimeError as error:
            failed.append(error)

    one, two = threading.Thread(target=first), threading.Thread(target=lambda: answers.extend(cached.encode([image])))
    one.start()
    assert tool.started.wait(10)
    two.start()
    while cached.counters()["hits"] < 1:
        pass
    tool.hold.set()
    one.join(10)
    two.join(10)
    assert len(failed) == 1 and len(answers) == 1
    assert cached.counters() == {"hits": 0, "misses": 2, "encodes": 1, "evictions": 0, "bytes": 100, "images": 1}


def test_tools_with_other_fingerprints_do_not_share_embeddings() -> None:
    cache = EmbeddingCache()
    one, two = Counting(), Counting()
    two.fingerprint = "Stub:other"
    (image,) = images(1)
    CachedTool(one, cache=cache).encode([image])
    CachedTool(two, cache=cache).encode([image])
    assert one.encoded == two.encoded and cache.counters()["images"] == 2


def test_clear_frees_the_bytes() -> None:
    cached = CachedTool(Counting())
    cached.encode(images(2))
    cached.cache.clear()
    assert cached.counters()["bytes"] == 0 and cached.counters()["images"] == 0


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes is -1"):
        EmbeddingCache(-1)


def test_predictions_pass_through() -> None:
    cached = CachedTool(Stub())
    (embedding,) = cached.encode([np.zeros((4, 6, 3), np.uint8)])
    (prediction,) = cached.predict([Query(embedding, (Box(1, 1, 2, 2),))])
    assert np.count_nonzero(prediction.logits > 0) == 4
    assert cached.prior_shape(4, 6) == (4, 6)
    assert (cached.name, cached.memory, cached.max_batch) == ("Stub", "cumulative", 1)
