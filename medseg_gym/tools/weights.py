"""Where a tool's weights are looked for, what a complete checkpoint is, and what to do when there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_gym import home
from medseg_gym.errors import WeightsMissingError

CHECKPOINT_FILES = ("config.json", "model.safetensors")  # never a pickle: loading one can run code


def download_command(tool: str) -> str:
    """The command that gets a tool's weights."""
    return f"medseg-gym tools download {tool}"


def missing_files(folder: Path) -> list[str]:
    """The files a checkpoint folder lacks; empty means complete."""
    return [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]


def have_weights(tool: str) -> bool:
    """Whether a complete checkpoint of the tool lies in the data home."""
    return not missing_files(home.weights_path(tool))


def find_weights(tool: str, given: str | Path | None = None) -> Path:
    """The folder of a tool's checkpoint: the given one, else the data home's. WeightsMissingError if incomplete."""
    folder = home.weights_path(tool) if given is None else Path(given).expanduser()
    lacks = missing_files(folder)
    if lacks:
        raise WeightsMissingError(
            f"{tool} needs its weights: {folder} has no {' and no '.join(lacks)}; get them with "
            f"`{download_command(tool)}`, or name a folder that has {' and '.join(CHECKPOINT_FILES)} with weights=PATH"
        )
    return folder


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
