"""Embeddings on disk: the bits that were written, nothing stale, nothing half written, and any number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import Blobs

from medseg_gym import tools
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.home import embeddings_path
from medseg_gym.images import image_hash
from medseg_gym.tools import disk_cache as module
from medseg_gym.tools.base import advance, empty_state
from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.disk_cache import DiskCache
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Embedding, Image

FINGERPRINT = "Counting:0123456789abcdef"
HASH = "ab" * 32


class Counting(Stub):
    """A Stub that counts the images it encodes, with an embedding of the image itself and its mean."""

    def __init__(self, fingerprint: str = FINGERPRINT, max_batch: int = 1) -> None:
        super().__init__(max_batch=max_batch)
        self.fingerprint = fingerprint
        self.encoded: list[str] = []
        self.batches: list[int] = []

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        self.encoded += [image_hash(image) for image in images]
        self.batches.append(len(images))
        return [
            Embedding(image_hash(i), i.shape[0], i.shape[1], {"pixels": i.copy(), "mean": np.array(i.mean())})
            for i in images
        ]


def images(count: int) -> list[Image]:
    return [np.full((4, 5, 3), value, np.uint8) for value in range(count)]


def embedding(**features: Any) -> Embedding:
    return Embedding(HASH, 3, 4, features)


def back(folder: Path, **features: Any) -> Embedding:
    assert DiskCache(FINGERPRINT, folder).put(embedding(**features))
    read = DiskCache(FINGERPRINT, folder).get(HASH)
    assert read is not None and (read.image, read.height, read.width) == (HASH, 3, 4)
    assert list(read.features) == list(features)
    return read


# --- what comes back


def test_arrays_come_back_with_their_bits_types_and_order(tmp_path: Path) -> None:
    bits = np.array([0x7FC00001, 0x80000000, 0x00000001, 0x7F800000], np.uint32).view(np.float32)  # nan, -0, tiny, inf
    features = {
        "floats": bits.reshape(2, 2),
        "scalar": np.array(2.5),
        "mask": np.eye(3, dtype=np.bool_),
        "fortran": np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4)),
        "view": np.arange(24, dtype=np.uint8).reshape(4, 6)[::2, ::-1],
        "empty": np.zeros((0, 3), np.float16),
        "big": np.arange(3, dtype=">i4"),
    }
    read = back(tmp_path, **features)
    for name, value in features.items():
        got = read.features[name]
        assert type(got) is np.ndarray and got.dtype == value.dtype and got.shape == value.shape, name
        assert got.tobytes() == value.tobytes(), name
    assert read.features["fortran"].flags.f_contiguous and read.features["floats"].flags.c_contiguous
    assert read.nbytes == sum(v.nbytes for v in features.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "uint8", "int64", "bool"])
def test_tensors_come_back_with_their_bits_types_and_layout(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    base = torch.from_numpy(np.random.default_rng(0).integers(-3, 4, (1, 6, 5, 4)).astype(np.float32) / 3)
    plain = base.to(getattr(torch, dtype))
    features = {
        "plain": plain,
        "channels_last": plain.contiguous(memory_format=torch.channels_last),
        "permuted": plain.permute(3, 0, 2, 1),
        "scalar": plain[0, 0, 0, 0],
        "empty": plain[:0],
        "part": plain[:, 2:4],
    }
    with torch.inference_mode():
        read = back(tmp_path, **features)
    for name, value in features.items():
        got = read.features[name]
        assert type(got) is torch.Tensor and got.dtype == value.dtype and got.shape == value.shape, name
        assert torch.equal(got, value) and got.device.type == "cpu", name
    for name in ("plain", "channels_last", "permuted", "part"):
        assert read.features[name].stride() == features[name].stride(), name
    gaps = back(tmp_path, gaps=plain[:, ::2, 1:]).features["gaps"]
    assert torch.equal(gaps, plain[:, ::2, 1:]) and gaps.is_contiguous()


def test_bfloat16_lies_in_the_file_as_uint16_with_its_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value = torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16)
    read = back(tmp_path, level=value).features["level"]
    with h5py.File(DiskCache(FINGERPRINT, tmp_path).file(HASH)) as file:
        assert file["0"].dtype == np.uint16 and file["0"].attrs["dtype"] == "bfloat16"
        assert file["0"][0] == 0x3F80
    assert torch.equal(read.view(torch.uint16), value.view(torch.uint16))


def test_a_handle_or_an_object_is_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(FINGERPRINT, tmp_path)
    for strange in ("a handle", [1, 2], np.array([{}]), np.array(["text"])):
        assert not cache.put(embedding(ok=np.zeros(2), strange=strange))
    assert cache.size() == (0, 0) and cache.get(HASH) is None


def test_replay_from_disk_is_bit_exact_with_a_network(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from test_sam2 import tiny_config

    from medseg_gym.tools.sam2 import Sam2Tool

    tool = Sam2Tool.from_config(tiny_config(), 0, dtype="bfloat16")
    data = Blobs()
    keys = data.keys("test")[:2]
    samples = [data[key] for key in keys]

    def play(cached: CachedTool) -> list[Any]:
        states = [empty_state(s) for s in samples]
        out = []
        for prompt in (Box(5, 6, 40, 30), Click(20, 20), Click(3, 3, False)):
            states = advance(cached, samples, states, [prompt] * 2)
            out += [s.prediction.logits.tobytes() for s in states if s.prediction is not None]
        return out

    first = CachedTool(tool, disk=DiskCache(tool.fingerprint, tmp_path))
    again = CachedTool(tool, disk=DiskCache(tool.fingerprint, tmp_path))
    assert play(CachedTool(tool)) == play(first) == play(again)
    assert (first.counters()["encodes"], again.counters()["encodes"], again.counters()["disk_hits"]) == (1, 0, 1)


# --- as a second tier


def test_what_one_tool_encoded_another_process_of_it_reads(tmp_path: Path) -> None:
    a, b, c = images(3)
    one, two = Counting(), Counting()
    first = CachedTool(one, disk=DiskCache(FINGERPRINT, tmp_path))
    first.encode([a, b, a])
    assert first.counters() == {
        "hits": 1,
        "misses": 2,
        "encodes": 2,
        "evictions": 0,
        "bytes": 2 * 68,
        "images": 2,
        "disk_hits": 0,
        "disk_writes": 2,
        "disk_damaged": 0,
    }
    second = CachedTool(two, disk=DiskCache(FINGERPRINT, tmp_path))
    got = second.encode([c, b, a, c])
    assert [e.image for e in got] == [image_hash(i) for i in (c, b, a, c)]
    assert np.array_equal(got[1].features["pixels"], b) and got[1].features["mean"] == 1
    assert two.encoded == [image_hash(c)]
    counters = second.counters()
    assert [counters[k] for k in ("hits", "misses", "encodes", "disk_hits", "disk_writes")] == [1, 3, 1, 2, 1]
    second.encode([a, b])
    assert second.disk is not None and second.disk.hits == 2  # memory is asked first


def test_a_batch_is_written_as_many_at_a_time_as_the_tool_takes(tmp_path: Path) -> None:
    tool = Counting(max_batch=2)
    CachedTool(tool, disk=DiskCache(FINGERPRINT, tmp_path)).encode(images(5))
    assert tool.batches == [2, 2, 1] and DiskCache(FINGERPRINT, tmp_path).size()[0] == 5


def test_other_weights_or_switches_are_never_read(tmp_path: Path) -> None:
    (image,) = images(1)
    CachedTool(Counting(), disk=DiskCache(FINGERPRINT, tmp_path)).encode([image])
    other = Counting("Counting:ffffffffffffffff")
    CachedTool(other, disk=DiskCache(other.fingerprint, tmp_path)).encode([image])
    assert len(other.encoded) == 1
    with pytest.raises(ValueError, match=r"the disk cache is for Counting:0123"):
        CachedTool(other, disk=DiskCache(FINGERPRINT, tmp_path))
    # even under the other's name: the stamp inside tells
    mine = DiskCache(FINGERPRINT, tmp_path)
    theirs = DiskCache(other.fingerprint, tmp_path)
    theirs.file(image_hash(image)).write_bytes(mine.file(image_hash(image)).read_bytes())
    assert theirs.get(image_hash(image)) is None and theirs.damaged == 1
    wrong = DiskCache(FINGERPRINT, tmp_path)
    wrong.file(HASH).parent.mkdir()
    wrong.file(HASH).write_bytes(mine.file(image_hash(image)).read_bytes())
    assert wrong.get(HASH) is None


def test_load_takes_the_data_homes_cache_or_a_folder(home: Path, tmp_path: Path) -> None:
    (image,) = images(1)
    tool = tools.load("Stub", disk_cache=True)
    tool.encode([image])
    assert tool.disk is not None and tool.disk.path == embeddings_path() / "Stub" / tool.fingerprint.split(":")[1]
    assert tool.disk.has(image_hash(image)) and tool is tools.load("Stub", disk_cache=True)
    elsewhere = tools.load("Stub", disk_cache=str(tmp_path / "e"), disk_bytes=7)
    assert elsewhere is not tool and elsewhere.disk is not None and elsewhere.disk.max_bytes == 7
    assert tools.load("Stub").disk is None and tools.load("Stub") is not tool
    assert tools.load(Counting(), disk_cache=str(tmp_path)).disk is not None
    with pytest.raises(BadDataError, match="disk_cache=3; wanted True, False or a folder"):
        tools.load("Stub", disk_cache=3)  # type: ignore[arg-type]
    tools.unload()


# --- damage, limits, processes


def test_a_damaged_file_counts_as_not_there_and_is_written_again(tmp_path: Path) -> None:
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    digest = image_hash(image)
    CachedTool(Counting(), disk=DiskCache(FINGERPRINT, tmp_path)).encode([image])
    file = DiskCache(FINGERPRINT, tmp_path).file(digest)
    whole = file.read_bytes()
    at = whole.index(bytes(image.data))  # a byte of the data itself, which HDF5 does not check
    flipped = whole[:at] + b"\x80" + whole[at + 1 :]
    for damage in (flipped, whole[: len(whole) // 2], b"", b"not hdf5 at all", bytes(len(whole))):
        file.write_bytes(damage)
        assert DiskCache(FINGERPRINT, tmp_path).has(digest) == (damage is flipped)  # its bytes are not read for that
        tool = Counting()
        cached = CachedTool(tool, disk=DiskCache(FINGERPRINT, tmp_path))
        assert np.array_equal(cached.encode([image])[0].features["pixels"], image)
        assert len(tool.encoded) == 1 and cached.counters()["disk_damaged"] == 1
        assert DiskCache(FINGERPRINT, tmp_path).get(digest) is not None


def test_no_more_than_the_limit_is_written_and_what_is_there_is_still_read(tmp_path: Path) -> None:
    pictures = images(6)
    probe = DiskCache(FINGERPRINT, tmp_path / "probe")
    CachedTool(Counting(), disk=probe).encode(pictures[:1])
    size = probe.size()[1]
    cache = DiskCache(FINGERPRINT, tmp_path / "c", max_bytes=3 * size + size // 2)
    with pytest.warns(UserWarning, match="the limit of .* bytes is reached"):
        CachedTool(Counting(), disk=cache).encode(pictures)
    assert cache.size() == (3, 3 * size) and cache.writes == 3
    tool = Counting()
    again = CachedTool(tool, disk=DiskCache(FINGERPRINT, tmp_path / "c", max_bytes=0))
    with pytest.warns(UserWarning):
        again.encode(pictures)
    assert again.counters()["disk_hits"] == 3 and tool.encoded == [image_hash(i) for i in pictures[3:]]
    (tmp_path / "c" / "Counting").rename(tmp_path / "elsewhere")  # a user makes room
    assert cache.put(Counting().encode(pictures[:1])[0])
    with pytest.raises(ValueError, match="max_bytes is -1"):
        DiskCache(FINGERPRINT, max_bytes=-1)


def test_a_full_or_unwritable_disk_is_a_warning_and_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    cached = CachedTool(Counting(), disk=DiskCache(FINGERPRINT, tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep embeddings"):
        assert len(cached.encode(images(2))) == 2
    monkeypatch.setattr(module, "RESERVE", 1 << 62)
    with pytest.warns(UserWarning, match="the disk has less than"):
        assert not DiskCache(FINGERPRINT, tmp_path).put(embedding(a=np.zeros(1)))


def test_a_draft_that_a_killed_process_left_is_never_read_and_goes_after_an_hour(tmp_path: Path) -> None:
    cache = DiskCache(FINGERPRINT, tmp_path)
    draft = cache.file(HASH).with_name(f".{HASH}.h5.1.1.part")
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"half")
    assert cache.get(HASH) is None and cache.size() == (0, 0) and draft.exists()
    os.utime(draft, (time.time() - 3700,) * 2)
    cache.size()
    assert not draft.exists()


WRITER = """
    import sys
    import numpy as np
    from medseg_gym.tools.disk_cache import DiskCache
    from medseg_gym.types import Embedding
    cache = DiskCache({fingerprint!r}, sys.argv[1])
    for number in range(int(sys.argv[2]), int(sys.argv[3])):
        features = {{"level": np.full(300_000, number, np.int32)}}
        assert cache.put(Embedding(f"{{number:064x}}", 2, 2, features))
        print(number, flush=True)
"""


def writer(folder: Path, first: int, stop: int) -> subprocess.Popen[str]:
    code = textwrap.dedent(WRITER).format(fingerprint=FINGERPRINT)
    words = [sys.executable, "-c", code, str(folder), str(first), str(stop)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def check(folder: Path, numbers: Sequence[int]) -> int:
    """How many of the embeddings are there; each of those must be whole."""
    cache = DiskCache(FINGERPRINT, folder)
    there = 0
    for number in numbers:
        found = cache.get(f"{number:064x}")
        if found is not None:
            there += 1
            assert (found.features["level"] == number).all() and found.features["level"].shape == (300_000,)
    assert cache.damaged == 0
    return there


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_whole_embeddings_only(tmp_path: Path) -> None:
    done = 0
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = writer(tmp_path, done, 10_000)
        assert process.stdout is not None
        for _ in range(3):
            done = int(process.stdout.readline()) + 1
        time.sleep(float(rng.uniform(0, 0.02)))  # into the middle of a write
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert check(tmp_path, range(done + 50)) >= done
    rest = writer(tmp_path, done, done + 3)
    assert rest.wait() == 0 and check(tmp_path, range(done + 3)) == done + 3
    assert rest.stdout is not None
    rest.stdout.close()


@pytest.mark.slow
def test_several_writers_and_readers_at_once(tmp_path: Path) -> None:
    writers = [writer(tmp_path, 0, 25), writer(tmp_path, 0, 25), writer(tmp_path, 10, 35)]
    while any(process.poll() is None for process in writers):
        check(tmp_path, range(35))
    for process in writers:
        assert process.returncode == 0 and process.stdout is not None
        process.stdout.close()
    assert check(tmp_path, range(35)) == 35
    assert not list(tmp_path.rglob("*.part"))


def test_a_tool_server_is_not_given_a_disk_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote(Stub):
        __module__ = "medseg_gym.tools.serving.client"

    with pytest.raises(MedSegError, match="give disk_cache to the tool that it serves"):
        tools.load(Remote(), disk_cache=True)
