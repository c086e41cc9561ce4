"""Datasets by name: `load` gives one, `available` says whether its data is on this machine."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medseg_gym.datasets.base import Dataset
from medseg_gym.datasets.cards import DATASETS
from medseg_gym.errors import BadDataError, check_keywords, unknown
from medseg_gym.home import dataset_path, home

_loaded: dict[Any, Dataset] = {}


def load(dataset: str | os.PathLike[str] | Dataset, **options: Any) -> Dataset:
    """The dataset of a name, a path of an `.h5` file, or the given object itself; one object a process and name.

    A store that was prepared again since the last call is opened anew.
    """
    if not isinstance(dataset, str | os.PathLike):
        check_keywords("dataset", options, ())
        if not isinstance(dataset, Dataset):
            raise BadDataError(f"dataset={dataset!r}; wanted a name, the path of an .h5 file, or a Dataset")
        return dataset
    name = os.fspath(dataset)
    if name == "Phantom":
        from medseg_gym.datasets.phantom import Phantom

        check_keywords("Phantom", options, inspect.signature(Phantom).parameters)
        return _once(("Phantom", repr(sorted(options.items()))), lambda: Phantom(**options))
    check_keywords("dataset", options, ())
    if name.endswith(".h5"):
        path, wanted = Path(name), None
    elif name in DATASETS or name in prepared():
        path, wanted = dataset_path(name), name
    else:
        raise unknown("dataset", name, [*DATASETS, *prepared()])

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
    return dataset_path(name).is_file() if name in DATASETS else name in prepared()


def prepared() -> tuple[str, ...]:
    """The names of the stores in the data home, sorted."""
    folder = home() / "datasets"
    return tuple(sorted(path.stem for path in folder.glob("*.h5") if not path.name.startswith(".")))


def _once(key: Any, make: Callable[[], Dataset]) -> Dataset:
    try:
        hash(key)
    except TypeError:
        return make()  # an option that does not hash
    if key not in _loaded:
        _loaded[key] = make()
    return _loaded[key]
