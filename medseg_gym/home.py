"""Where prepared datasets, weights and caches lie on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def home() -> Path:
    """`$MEDSEG_GYM_HOME`, else the user's cache folder; not created here."""
    if given := os.environ.get("MEDSEG_GYM_HOME"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "medseg-gym"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "medseg-gym"
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "medseg-gym"


def dataset_path(name: str) -> Path:
    """The store of a prepared dataset."""
    return home() / "datasets" / f"{name}.h5"


def prepared() -> tuple[str, ...]:
    """The names of the stores in the data home, sorted; a look at file names, nothing is opened."""
    try:
        names = os.listdir(home() / "datasets")
    except OSError:  # not there, or not ours to read
        return ()
    return tuple(sorted(name[: -len(".h5")] for name in names if name.endswith(".h5") and not name.startswith(".")))


def weights_path(tool: str) -> Path:
    """The folder of a tool's weights, and of the record of where they came from or lie."""
    return home() / "weights" / tool


def embeddings_path() -> Path:
    """The folder of the embeddings that are kept on disk."""
    return home() / "embeddings"
