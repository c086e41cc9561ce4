"""Datasets by name: `load` gives one, `available` says whether its data is on this machine."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medseg_gym import plugins
from medseg_gym.datasets.base import Dataset
from medseg_gym.datasets.cards import DATASETS
from medseg_gym.errors import BadDataError, check_keywords, unknown
from medseg_gym.home import dataset_path, prepared

__all__ = ["available", "load", "prepared"]

_EVERY = ("kinds", "wording", "corruption", "case_seed")  # what every dataset takes
_loaded: dict[Any, Dataset] = {}


def load(
    dataset: str | os.PathLike[str] | Dataset,
    *,
    kinds: Sequence[str] = (),
    wording: Sequence[str] = (),
    corruption: str = "",
    case_seed: int = 0,
    **options: Any,
) -> Dataset:
    """The dataset of a name, a path of an `.h5` file, or the given object itself; one object a process and name.

    `kinds` are the kinds of cases it is to have (kinds.py), `wording` the families of instructions (instructions.py),
    `corruption` what is done to its images, as "noise-3" (corruptions.py), all drawn by `case_seed`; without, a case
    is as it was prepared. A store that was prepared again since the last call is opened anew.
    """
    if isinstance(case_seed, bool) or not isinstance(case_seed, int) or case_seed < 0:
        raise BadDataError(f"case_seed={case_seed!r}; wanted a whole number from 0 up")
    data = _load(dataset, options)
    if kinds:
        from medseg_gym.datasets.kinds import Kinds

        data = Kinds(data, kinds, seed=case_seed)
    if wording:
        from medseg_gym.datasets.instructions import Worded

        data = Worded(data, wording, seed=case_seed)
    if corruption:
        from medseg_gym.datasets.corruptions import Corrupted

        data = Corrupted(data, corruption, seed=case_seed)
    return data


def _load(dataset: str | os.PathLike[str] | Dataset, options: dict[str, Any]) -> Dataset:
    if not isinstance(dataset, str | os.PathLike):
        check_keywords("dataset", options, _EVERY)
        if not isinstance(dataset, Dataset):
            raise BadDataError(f"dataset={dataset!r}; wanted a name, the path of an .h5 file, or a Dataset")
        return dataset
    name = os.fspath(dataset)
    if name == "Phantom":
        from medseg_gym.datasets.phantom import Phantom

        check_keywords("Phantom", options, [*inspect.signature(Phantom).parameters, *_EVERY])
        return _once(("Phantom", repr(sorted(options.items()))), lambda: Phantom(**options))
    if name not in DATASETS and name in plugins.names(plugins.DATASETS):
        return _once((name, repr(sorted(options.items()))), lambda: _from_plugin(name, options))
    check_keywords("dataset", options, _EVERY)
    if name.endswith(".h5"):
        path, wanted = Path(name), None
    elif name in DATASETS or name in prepared():
        path, wanted = dataset_path(name), name
    else:
        raise unknown("dataset", name, [*DATASETS, *plugins.names(plugins.DATASETS), *prepared()])

    from medseg_gym.datasets.store import Store

    # A prepared file is replaced, never changed: its identity tells a new one from the one that is open.
    state = path.stat() if path.is_file() else None
    identity = None if state is None else (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)
    key = (str(path.absolute()), wanted)
    for old in [k for k in _loaded if k[:2] == key and k[2:] != (identity,)]:
        del _loaded[old]
    return _once((*key, identity), lambda: Store(path, wanted))


def available(name: str) -> bool:
    """Whether `load(name)` finds its data; opens nothing."""
    if name == "Phantom":
        return True
    if name.endswith(".h5"):
        return Path(name).is_file()
    if name in DATASETS:
        return dataset_path(name).is_file()
    return name in plugins.names(plugins.DATASETS) or name in prepared()


def _from_plugin(name: str, options: dict[str, Any]) -> Dataset:
    data = plugins.factory(plugins.DATASETS, name)(**options)
    if not isinstance(data, Dataset):
        raise BadDataError(f"{name} gave {data!r}; wanted a Dataset: name, structures, keys(split), [key]")
    return data


def _once(key: Any, make: Callable[[], Dataset]) -> Dataset:
    try:
        hash(key)
    except TypeError:
        return make()  # an option that does not hash
    if key not in _loaded:
        _loaded[key] = make()
    return _loaded[key]
