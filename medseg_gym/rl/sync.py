"""How weights travel from the learner to the engines: published under a version, loaded and checked before any is used.

Every way of travelling is told apart by its WeightRef and ends in the same `check`: tensors of this process, or a file
of safetensors in a folder that both sides see (shared memory, such as a folder under /dev/shm). A device-to-device
transfer is one more field of WeightRef, one branch of `publish` and one of `load`.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_gym.errors import BadDataError, MedSegError, unknown
from medseg_gym.rl.engines.base import WeightRef

if TYPE_CHECKING:
    import torch

_FILE = re.compile(r"weights-(\d{8})-(full|part)\.safetensors")


def publish(
    weights: Mapping[str, torch.Tensor], version: int, full: bool, folder: str | Path | None = None
) -> WeightRef:
    """Makes weights known under a version: copies of the tensors, or with `folder` a file in it, written whole.

    Of the folder's older versions only the newest full one stays, which a restarted engine needs below a partial one.
    A version published again replaces itself. No weights, or such as are not floating point, raise BadDataError.
    """
    if not 0 <= version < 10**8:
        raise BadDataError(f"version={version}; wanted 0 to 99999999")
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise BadDataError(f"the weight {name} is {tensor.dtype}; wanted floating point")
    if not weights:
        raise BadDataError(f"version {version} has no weights; is everything frozen?")
    if folder is None:
        # Copies, as on a CPU a learner's own tensors go on changing under the reference.
        return WeightRef(version, full, {name: tensor.detach().clone() for name, tensor in weights.items()})
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        place = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, as tied weights do, and such as lie in strides
        kept[name] = tensor.detach().contiguous()
        if place in seen:
            kept[name] = kept[name].clone()
        seen.add(place)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".weights-", suffix=".tmp")
    os.close(handle)
    try:
        save_file(kept, temporary, metadata={"version": str(version), "full": str(int(full))})
        os.replace(temporary, folder / _name(version, full))
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _remove_old(folder, version, full)
    return WeightRef(version, full, folder=str(folder))


def load(source: WeightRef) -> dict[str, torch.Tensor]:
    """The tensors behind a reference, on the CPU. What is gone or is not what it says raises MedSegError."""
    if source.tensors is not None:
        return dict(source.tensors)
    if not source.folder:
        raise BadDataError(f"version {source.version} names neither tensors nor a folder")
    from safetensors import SafetensorError, safe_open

    path = file(source)
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            said = opened.metadata() or {}
            if said != {"version": str(source.version), "full": str(int(source.full))}:
                raise BadDataError(f"{path} says it is {said}; wanted version {source.version}, full={source.full}")
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except FileNotFoundError:
        raise MedSegError(f"{path} is gone: a newer version was published; publish again or load the newest") from None
    except SafetensorError as error:
        raise BadDataError(f"{path} is no whole safetensors file: {error}") from None


def file(source: WeightRef) -> Path:
    """Where a version lies that was published to a folder."""
    return Path(source.folder) / _name(source.version, source.full)


def newest(folder: str | Path) -> list[WeightRef]:
    """What an engine that begins afresh loads, in order: the newest full version, and a newer partial one."""
    found = sorted(
        (int(match[1]), match[2] == "full") for file in Path(folder).iterdir() if (match := _FILE.fullmatch(file.name))
    )
    fulls = [version for version, full in found if full]
    parts = [version for version, full in found if not full and version > max(fulls, default=-1)]
    refs = [WeightRef(max(fulls), True, folder=str(folder))] if fulls else []
    return refs + ([WeightRef(max(parts), False, folder=str(folder))] if parts else [])


def check(
    weights: Mapping[str, torch.Tensor], known: Mapping[str, Sequence[int]], full: bool, *, optional: Sequence[str] = ()
) -> None:
    """Raises unless every name is known and of its shape and, with `full`, none but the `optional` ones is missing.

    `known` gives the shapes by name; optional names are those of tied weights, which a checkpoint need not repeat.
    """
    for name, tensor in weights.items():
        if name not in known:
            raise unknown("weight", name, known)
        if tuple(tensor.shape) != tuple(known[name]):
            raise BadDataError(f"the weight {name} is {tuple(tensor.shape)}; the model's is {tuple(known[name])}")
        if not tensor.is_floating_point():
            raise BadDataError(f"the weight {name} is {tensor.dtype}; wanted floating point")
    if not weights:
        raise BadDataError("no weights came")
    missing = [name for name in known if name not in weights and name not in optional] if full else []
    if missing:
        raise BadDataError(
            f"{len(missing)} of {len(known)} weights are missing from what calls itself full, the first {missing[0]}"
        )


def _name(version: int, full: bool) -> str:
    return f"weights-{version:08d}-{'full' if full else 'part'}.safetensors"


def _remove_old(folder: Path, version: int, full: bool) -> None:
    """Keeps the version and, below a partial one, the newest full one at or before it.

    A reader that has an old file open keeps it; one that comes later is told that it is gone.
    """
    found = [
        (int(match[1]), match[2] == "full", file) for file in folder.iterdir() if (match := _FILE.fullmatch(file.name))
    ]
    base = max((v for v, whole, _ in found if whole and v <= version), default=-1)
    for v, whole, file in found:
        if not ((v == version and whole == full) or (not full and whole and v == base)):
            file.unlink(missing_ok=True)
