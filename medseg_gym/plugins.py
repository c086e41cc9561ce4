"""What other packages add: datasets and tools by entry point, listed by name and loaded when they are asked for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

from medseg_gym.errors import UnknownNameError

DATASETS = "medseg_gym.datasets"  # a callable whose keywords are the dataset's options; it gives a Dataset
TOOLS = "medseg_gym.tools"  # a callable whose keywords are the tool's options; it gives a SegmentationTool
_ID = re.compile(r"[A-Za-z0-9.]+")


def names(group: str) -> tuple[str, ...]:
    """The names of a group's entry points, sorted; nothing is imported. Names that ids cannot hold are left out."""
    return tuple(_points(group))


def path(group: str, name: str) -> str:
    """Where an entry point leads, as "module:attribute"."""
    point = _points(group)[name]
    return f"{point.module}:{point.attr}"


def factory(group: str, name: str) -> Callable[..., Any]:
    """What an entry point leads to."""
    point = _points(group)[name]
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(f"{name!r} of the group {group} is {point.value!r}: {error}") from error
    if not callable(found):
        raise UnknownNameError(f"{name!r} of the group {group} is {point.value!r}, which cannot be called: {found!r}")
    return found


@cache
def _points(group: str) -> dict[str, metadata.EntryPoint]:
    found: dict[str, metadata.EntryPoint] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda point: (point.name, point.value)):
        if _ID.fullmatch(point.name):
            found.setdefault(point.name, point)
        else:
            warnings.warn(
                f"the entry point {point.name!r} of {group} is left out; wanted letters, digits and dots", stacklevel=2
            )
    return found
