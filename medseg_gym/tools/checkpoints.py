"""Putting a checkpoint with its authors' key names into a model: every weight has a place, every place a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from medseg_gym.errors import BadDataError

SHOWN = 5  # keys an error names of each kind

Rename = Callable[[str], "str | Sequence[str] | None"]


def fill(
    model: Any, state: Mapping[str, Any], rename: Rename, *, ignore: Sequence[str] = (), source: str = "the checkpoint"
) -> None:
    """Puts a state dict into a model, whole or not at all; values are copied and become the model's dtypes.

    `rename` gives the model's name of a checkpoint's key, several names where the model keeps copies, and None for a
    key it does not know. `ignore` are fnmatch patterns of keys, of either side, that may be left over. Anything else
    left over on either side, a place given twice, and any other shape raise BadDataError, which begins with `source`.
    The model may lie on the meta device: what is put in replaces its parameters.
    """
    import torch

    places = model.state_dict()
    filled: dict[str, Any] = {}
    strangers: list[str] = []
    misfits: list[str] = []
    for key, value in state.items():
        if _matches(key, ignore):
            continue
        names = rename(key)
        names = [names] if isinstance(names, str) else list(names or ())
        if not names or not isinstance(value, torch.Tensor) or any(n not in places or n in filled for n in names):
            strangers.append(key)
            continue
        for name in names:
            filled[name] = value
            if value.shape != places[name].shape:
                misfits.append(f"{key} is {tuple(value.shape)}, wanted {tuple(places[name].shape)}")
    missing = [name for name in places if name not in filled and not _matches(name, ignore)]
    told = [
        f"{len(found)} {what} ({', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''})"
        for found, what in (
            (strangers, f"of its {len(state)} weights have no place in the model"),
            (misfits, "have another shape"),
            (missing, f"of the model's {len(places)} weights are not in it"),
        )
        if found
    ]
    if told:
        raise BadDataError(f"{source} does not fit: {'; '.join(told)}")
    own = {  # of a file's mapped memory and of whatever layout it had
        name: value.detach().to(places[name].dtype).clone(memory_format=torch.contiguous_format)
        for name, value in filled.items()
    }
    model.load_state_dict(own, strict=False, assign=True)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
