"""Where a tool's weights are looked for, what counts as weights, and how a checkpoint file is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_gym import home
from medseg_gym.errors import BadDataError, WeightsMissingError

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_FILES = ("config.json", "model.safetensors")  # of a folder in transformers' format
SUFFIXES = (".pt", ".pth", ".safetensors")  # of a checkpoint file in its authors' own format
WRAPPERS = ("model", "state_dict", "model_state_dict")  # the levels that trainers put around a state dict
CHUNK = 1 << 20


def download_command(tool: str) -> str:
    """The command that gets a tool's weights."""
    return f"medseg-gym tools download {tool}"


def register_command(tool: str) -> str:
    """The command that takes weights the user already has."""
    return f"medseg-gym tools register {tool} --file PATH"


def have_weights(tool: str) -> bool:
    """Whether a tool's weights are there: downloaded, registered, or put into the data home. Looks at names only."""
    from medseg_gym.tools import records

    try:
        record = records.read(tool)
    except BadDataError:
        return False  # loading the tool says why
    return isinstance(checkpoint_at(home.weights_path(tool) if record is None else record.path), Path)


def find_weights(tool: str, given: str | Path | None = None) -> Path:
    """A tool's weights: a folder in transformers' format, or one checkpoint file in its authors' own.

    The given path, else what was downloaded or registered, else what lies in the data home. WeightsMissingError with
    the commands if there is nothing; BadDataError if a recorded file was changed since.
    """
    from medseg_gym.tools import records

    path = home.weights_path(tool) if given is None else Path(given).expanduser()
    if given is None and (record := records.read(tool)) is not None:
        records.check_unchanged(tool, record)
        path = record.path
    found = checkpoint_at(path)
    if isinstance(found, Path):
        return found
    raise WeightsMissingError(
        f"{tool} needs its weights: {found}; get them with `{download_command(tool)}`, take a file you have with "
        f"`{register_command(tool)}`, or name with weights=PATH a folder that has {' and '.join(CHECKPOINT_FILES)} "
        f"or a {', '.join(SUFFIXES)} file"
    )


def checkpoint_at(path: Path) -> Path | str:
    """The checkpoint a path leads to: the path itself, or the one checkpoint file of a folder; else what it lacks."""
    if path.is_file():
        return path if path.suffix in SUFFIXES else f"{path} is not a {', '.join(SUFFIXES)} file"
    lacks = [name for name in CHECKPOINT_FILES if not (path / name).is_file()]
    if not lacks:
        return path
    files = sorted(f for f in path.glob("*") if f.suffix in SUFFIXES and f.name not in CHECKPOINT_FILES and f.is_file())
    if len(files) == 1 and len(lacks) == len(CHECKPOINT_FILES):
        return files[0]
    if len(files) > 1:
        return f"{path} has several checkpoints ({', '.join(f.name for f in files[:4])})"
    return f"{path} has no {' and no '.join(lacks)}"


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """sha256 of a file, as 64 hex digits; `progress` is told the bytes of every piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors, .pt or .pth file, on the CPU, memory-mapped where the format allows it.

    A pickle is read with weights_only=True, which runs none of its code. A trainer's "model" or "state_dict" level and
    the "module." that data-parallel training puts before every name are taken off. Anything else is BadDataError.
    """
    path = Path(path)
    if not path.is_file():
        raise BadDataError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise BadDataError(f"{path}: not a readable safetensors file ({error})") from None
    if path.suffix not in SUFFIXES:
        raise BadDataError(f"{path}: weights are read from {', '.join(SUFFIXES)} files")
    return _state(path, _unpickled(path))


def _check_packed(path: Path) -> None:
    """BadDataError for an archive that would unpack to far more than it is: PyTorch packs nothing."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        return  # torch says what is wrong with it
    if unpacked > 2 * path.stat().st_size + 2**20:
        raise BadDataError(f"{path}: refused, an archive of {path.stat().st_size} bytes that unpacks to {unpacked}")


def _unpickled(path: Path) -> object:
    import pickle

    import torch

    _check_packed(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 is no zip archive, and cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        told = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))  # its first line tells how to run the code
        what = f"it calls {named[1]}" if named else told[1].strip() if told else "unlike any state dict"
        raise BadDataError(
            f"{path}: refused, this pickle holds more than weights ({what}) and could run code; have whoever made it "
            f"save the state dict alone, or as safetensors"
        ) from None
    except Exception as error:  # torch names a damaged archive by a dozen types
        first = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, LookupError):  # of the unpickler, about a byte: no word of use
            first = "neither PyTorch's archive nor a pickle"
        raise BadDataError(f"{path}: not a readable checkpoint ({first})") from None


def _state(path: Path, content: object) -> dict[str, Tensor]:
    import torch

    while isinstance(content, Mapping) and not all(isinstance(v, torch.Tensor) for v in content.values()):
        levels = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if len(levels) != 1:
            others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
            raise BadDataError(f"{path}: wanted tensors by name, or one of {', '.join(WRAPPERS)}; got {others[:4]}")
        content = content[levels[0]]
    if not isinstance(content, Mapping) or not content:
        raise BadDataError(f"{path}: wanted tensors by name; got {type(content).__name__}, {_size(content)}")
    names = [str(name) for name in content]
    lead = "module." if all(name.startswith("module.") for name in names) else ""
    return {name.removeprefix(lead): tensor for name, tensor in zip(names, content.values(), strict=True)}


def _size(content: object) -> str:
    return f"{len(content)} entries" if hasattr(content, "__len__") else "no state dict"


def no_runtime(tool: str) -> WeightsMissingError:
    """The error for a tool of the catalogue that this version lists and cannot run yet."""
    return WeightsMissingError(
        f"{tool}'s weights are not in this version yet; once they are, `{download_command(tool)}` gets them. "
        f"Tools that need none: Nano, GrabCut, Stub"
    )


def state_sha256(state: Mapping[str, Any]) -> str:
    """sha256 over the names, dtypes, shapes and bytes of a torch state dict, in name order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
