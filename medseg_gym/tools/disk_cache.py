"""Embeddings on disk: one HDF5 file an image under the tool's fingerprint, whole or not there, checked when read."""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym import home
from medseg_gym.errors import BadDataError
from medseg_gym.types import Embedding

SCHEMA = 1
RESERVE = 1 << 30  # bytes that stay free on the disk, whatever the limit says
ABANDONED = 3600.0  # seconds after which a draft is that of a process that was killed


class DiskCache:
    """The embeddings of one tool, by image hash. A value read back has the bits, layout and dtype of the one written.

    They lie in `folder` (default: the data home's), below the tool's name and the digits of its fingerprint, so other
    weights, preprocessing or switches never meet them. A file is written beside its place and renamed: any number of
    processes may read and write at once, and a kill leaves a draft that nobody reads. A file that is damaged, or is
    not this tool's, counts as not there and is written again. Beyond `max_bytes`, or when the disk has less than a
    GiB left, nothing more is written. Embeddings that are not made of arrays or tensors are not kept.
    """

    def __init__(
        self, fingerprint: str, folder: str | Path | None = None, *, max_bytes: int | None = None, device: str = "cpu"
    ) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}; wanted 0 or more")
        name, _, digits = fingerprint.rpartition(":")
        top = home.embeddings_path() if folder is None else Path(folder).expanduser()
        self.fingerprint, self.max_bytes, self.device = fingerprint, max_bytes, device
        self.path = top / _file_name(name or "tool") / _file_name(digits)
        self.hits = self.writes = self.damaged = 0
        self._bytes: int | None = None  # in the folder, as far as this process knows
        self._lock = threading.Lock()
        self._told = False

    def __repr__(self) -> str:
        return f"DiskCache({str(self.path)!r})"

    def file(self, image: str) -> Path:
        """Where the embedding of an image lies, or would."""
        return self.path / image[:2] / f"{image}.h5"

    def has(self, image: str) -> bool:
        """Whether there is a whole file for an image, of this tool; its arrays are not read, `get` checks them."""
        import h5py

        try:
            with h5py.File(self.file(image), "r", locking=False) as handle:
                _check_stamp(handle, self.fingerprint, image)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError):
            return False
        return True

    def get(self, image: str) -> Embedding | None:
        """The embedding of an image hash, None if it is not there or not as it was written."""
        import h5py

        file = self.file(image)
        if not file.is_file():
            return None
        try:
            with h5py.File(file, "r", locking=False) as handle:  # finished files are never changed
                embedding = _read(handle, self.fingerprint, image, self.device)
        except FileNotFoundError:
            return None
        except (OSError, KeyError, ValueError, TypeError, RuntimeError):  # h5py's words for damage
            with self._lock:
                self.damaged += 1
            return None
        with self._lock:
            self.hits += 1
        return embedding

    def put(self, embedding: Embedding) -> bool:
        """Keeps an embedding; whether it did. A full or read-only disk is told once as a warning, and is no error."""
        if not all(_is_plain(value) for value in embedding.features.values()):
            return False
        target = self.file(embedding.image)
        draft = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not self._room(embedding.nbytes):
                return False
            try:
                self._write(draft, embedding)
                size = draft.stat().st_size
                if not self._room(size):  # the file's own words about the arrays count too
                    return False
                draft.replace(target)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            self._tell(f"cannot keep embeddings in {self.path}: {error.strerror or error}")
            return False
        with self._lock:
            self.writes += 1
            self._bytes = None if self._bytes is None else self._bytes + size
        return True

    def size(self) -> tuple[int, int]:
        """Files and bytes in the folder now. Drafts that a killed process left an hour ago or more are deleted."""
        files = total = 0
        for entry in self.path.glob("*/*"):
            try:
                state = entry.stat()
                if entry.name.endswith(".part"):
                    if time.time() - state.st_mtime > ABANDONED:
                        entry.unlink()
                elif entry.suffix == ".h5":
                    files, total = files + 1, total + state.st_size
            except OSError:
                continue  # renamed or deleted meanwhile
        return files, total

    def _write(self, draft: Path, embedding: Embedding) -> None:
        import h5py

        with h5py.File(draft, "w", locking=False) as handle:
            _write(handle, self.fingerprint, embedding)

    def _room(self, wanted: int) -> bool:
        if shutil.disk_usage(self.path).free < wanted + RESERVE:
            self._tell(f"{self.path}: the disk has less than {RESERVE >> 20} MiB left; no more embeddings are kept")
            return False
        if self.max_bytes is None:
            return True
        with self._lock:
            if self._bytes is None or self._bytes + wanted > self.max_bytes:
                self._bytes = self.size()[1]  # other processes write, and users delete
            fits = self._bytes + wanted <= self.max_bytes
        if not fits:
            self._tell(f"{self.path}: the limit of {self.max_bytes} bytes is reached; no more embeddings are kept")
        return fits

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(text, stacklevel=3)


def open_disk_cache(
    where: bool | str | os.PathLike[str], fingerprint: str, *, max_bytes: int | None = None, device: str = "cpu"
) -> DiskCache | None:
    """The DiskCache of a `disk_cache` option: False is none, True the data home's, a path another folder."""
    if where is False or where is None:
        return None
    if where is not True and not isinstance(where, str | os.PathLike):
        raise BadDataError(f"disk_cache={where!r}; wanted True, False or a folder")
    return DiskCache(fingerprint, None if where is True else Path(where), max_bytes=max_bytes, device=device)


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text).lstrip(".") or "_"


def _is_plain(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    # asked by name, since a tool without torch is not to load it
    return f"{type(value).__module__}.{type(value).__name__}" == "torch.Tensor" and str(value.layout) == "torch.strided"


def _write(handle: Any, fingerprint: str, embedding: Embedding) -> None:
    handle.attrs.update(
        schema=SCHEMA,
        fingerprint=fingerprint,
        image=embedding.image,
        height=embedding.height,
        width=embedding.width,
    )
    for number, (name, value) in enumerate(embedding.features.items()):
        flat, about = _flat(value)
        data = handle.create_dataset(str(number), data=flat)
        data.attrs.update(name=name, checksum=zlib.crc32(flat.data if flat.size else b""), **about)


def _check_stamp(handle: Any, fingerprint: str, image: str) -> None:
    stamp = (int(handle.attrs["schema"]), handle.attrs["fingerprint"], handle.attrs["image"])
    if stamp != (SCHEMA, fingerprint, image):
        raise ValueError(f"stamped {stamp}")


def _read(handle: Any, fingerprint: str, image: str, device: str) -> Embedding:
    _check_stamp(handle, fingerprint, image)
    features: dict[str, Any] = {}
    for number in range(len(handle)):
        data = handle[str(number)]
        flat = np.empty(data.shape, data.dtype)
        if flat.size:
            data.read_direct(flat)
        if zlib.crc32(flat.data if flat.size else b"") != int(data.attrs["checksum"]):
            raise ValueError(f"{data.attrs['name']} is not what was written")
        features[data.attrs["name"]] = _shaped(flat, data.attrs, device)
    return Embedding(image, int(handle.attrs["height"]), int(handle.attrs["width"]), features)


def _flat(value: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The memory of an array or tensor as a flat array of a type HDF5 has, and what makes it whole again.

    The layout is kept, since kernels round differently over another one: a replay would no longer be bit-exact.
    """
    about: dict[str, Any]
    if isinstance(value, np.ndarray):
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        flat = np.ravel(value, order=order)  # type: ignore[call-overload]
        about = {"kind": "numpy", "dtype": value.dtype.str, "shape": value.shape, "order": order}
        return np.ascontiguousarray(flat), about
    import torch

    tensor = value.detach()
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0 or length != tensor.numel():
        tensor = tensor.contiguous()  # with gaps, or a view that repeats itself: no layout to keep
    flat = tensor.as_strided((tensor.numel(),), (1,)).cpu()
    about = {"kind": "torch", "dtype": str(tensor.dtype).removeprefix("torch."), "shape": tuple(tensor.shape)}
    about["stride"] = tensor.stride()
    try:
        array = flat.numpy()
    except TypeError:  # bfloat16 and the 8-bit floats, which numpy does not have: their bytes
        array = flat.view({1: torch.uint8, 2: torch.uint16}[flat.element_size()]).numpy()
    return array, about


def _shaped(flat: np.ndarray, about: Any, device: str) -> Any:
    shape = tuple(int(n) for n in about["shape"])
    if about["kind"] == "numpy":
        return flat.astype(np.dtype(about["dtype"]), copy=False).reshape(shape, order=about["order"])
    import torch

    dtype = getattr(torch, about["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {about['dtype']!r}")
    tensor = torch.from_numpy(flat).view(dtype)
    return tensor.as_strided(shape, tuple(int(n) for n in about["stride"])).to(device)
