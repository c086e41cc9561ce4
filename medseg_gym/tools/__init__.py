"""Loading tools: by catalogue id, by "module:Class" or as a ready object, one model and one cache a process."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from medseg_gym import plugins
from medseg_gym.errors import MedSegError, UnknownNameError, check_keywords, unknown
from medseg_gym.tools import weights
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.tools.cache import MAX_BYTES, CachedTool, EmbeddingCache
from medseg_gym.tools.cards import TOOLS, ToolCard
from medseg_gym.tools.disk_cache import DiskCache, open_disk_cache

__all__ = [
    "TOOLS",
    "CachedTool",
    "DiskCache",
    "EmbeddingCache",
    "SegmentationTool",
    "ToolCard",
    "available",
    "load",
    "make",
]

CACHING = ("cache_bytes", "disk_cache", "disk_bytes")  # keywords of `load` itself; the others are the tool's

_lock = threading.RLock()
_loaded: dict[tuple[str, str], CachedTool] = {}
_wrapped: weakref.WeakValueDictionary[int, CachedTool] = weakref.WeakValueDictionary()


def load(
    tool: str | SegmentationTool,
    *,
    cache_bytes: int = MAX_BYTES,
    disk_cache: bool | str | os.PathLike[str] = False,
    disk_bytes: int | None = None,
    **options: Any,
) -> CachedTool:
    """The tool behind its embedding cache. Equal names and options give the same object, for all envs of a process.

    `tool` is an id of the catalogue, "package.module:Class", a tool server's address ("http://127.0.0.1:8790"), or a
    ready tool (which takes no options). The options are the keywords of the tool's factory. Weights that are not there
    raise WeightsMissingError with the command. `cache_bytes` bounds the embeddings in memory. `disk_cache=True` also
    reads and keeps them on disk, in the data home, or in the folder it names; `disk_bytes` bounds those. `medseg-gym
    tools embed` fills it for a whole dataset.
    """
    if not isinstance(tool, str):
        return _wrap(tool, cache_bytes, disk_cache, disk_bytes, options)
    key = (
        tool,
        json.dumps(
            {**options, "cache_bytes": cache_bytes, "disk_cache": str(disk_cache), "disk_bytes": disk_bytes},
            sort_keys=True,
            default=repr,
        ),
    )
    factory = _factory(tool, options)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _cached(_made(tool, factory, options), cache_bytes, disk_cache, disk_bytes)
        return _loaded[key]


def make(tool: str, **options: Any) -> SegmentationTool:
    """A tool of its own, without a cache and not shared: for a look at it, or to wrap it otherwise."""
    return _checked(_made(tool, _factory(tool, options), options))


def available(tool: str) -> bool:
    """Whether a tool of the catalogue could be loaded here; looks at files only."""
    card = _card(tool)
    return bool(card.factory) and (not card.weights or weights.have_weights(tool))


def unload() -> None:
    """Forgets every loaded tool, so that their memory can be freed."""
    with _lock:
        _loaded.clear()


def _card(tool: str) -> ToolCard:
    if tool in TOOLS:
        return TOOLS[tool]
    added = plugins.names(plugins.TOOLS)
    if tool not in added:
        raise unknown("tool", tool, [*TOOLS, *added])
    return ToolCard(tool, tool, plugins.path(plugins.TOOLS, tool), False, "of another package")


def _factory(tool: str, options: dict[str, Any]) -> Callable[..., SegmentationTool]:
    if tool.startswith(("http://", "https://")):
        return _server(tool, options)
    path = tool if ":" in tool else _card(tool).factory
    if not path:
        raise weights.no_runtime(tool)
    module, _, attribute = path.partition(":")
    try:
        factory: Callable[..., SegmentationTool] = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there and lacks a dependency
        raise UnknownNameError(f"no tool at {tool!r} ({error}); wanted package.module:Class") from None
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise MedSegError(f"{tool!r} is not a tool class or a function that makes one") from None
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        check_keywords(tool, options, [*parameters, *CACHING])
    return factory


def _server(url: str, options: dict[str, Any]) -> Callable[..., SegmentationTool]:
    from medseg_gym.tools.serving.client import RemoteTool

    parameters = [name for name in inspect.signature(RemoteTool).parameters if name != "url"]
    check_keywords("tool server", options, [*parameters, *CACHING])
    return functools.partial(RemoteTool, url)


def _wrap(
    tool: SegmentationTool,
    cache_bytes: int,
    disk_cache: bool | str | os.PathLike[str],
    disk_bytes: int | None,
    options: dict[str, Any],
) -> CachedTool:
    if options:
        raise UnknownNameError(f"{', '.join(options)}: a ready tool takes no options; give them to its constructor")
    if isinstance(tool, CachedTool):
        return tool
    with _lock:
        cached = _wrapped.get(id(tool))
        if cached is None or cached.tool is not tool:
            cached = _wrapped[id(tool)] = _cached(tool, cache_bytes, disk_cache, disk_bytes)
        return cached


def _cached(
    tool: SegmentationTool,
    cache_bytes: int,
    disk_cache: bool | str | os.PathLike[str],
    disk_bytes: int | None,
) -> CachedTool:
    _checked(tool)
    if disk_cache and _remote(tool):
        raise MedSegError("a tool server keeps the embeddings; give disk_cache to the tool that it serves")
    # where the tool's own tensors lie; a cache in its memory of tensors in another would copy them at every question
    device = str(getattr(getattr(tool, "options", None), "device", "cpu"))
    disk = open_disk_cache(disk_cache, tool.fingerprint, max_bytes=disk_bytes, device=device)
    return CachedTool(tool, cache_bytes, disk=disk)


def _remote(tool: SegmentationTool) -> bool:
    return any(kind.__module__.startswith("medseg_gym.tools.serving") for kind in type(tool).__mro__)


def _checked(tool: SegmentationTool) -> SegmentationTool:
    wanted = ("name", "fingerprint", "prompts", "memory", "max_batch", "encode", "predict", "prior_shape")
    lacks = [attribute for attribute in wanted if not hasattr(tool, attribute)]
    if lacks:
        raise MedSegError(f"{type(tool).__name__} is not a segmentation tool: it lacks {', '.join(lacks)}")
    return tool


def _made(tool: str, factory: Callable[..., SegmentationTool], options: dict[str, Any]) -> SegmentationTool:
    try:
        return factory(**options)
    except TypeError as error:
        given = {name: value for name, value in options.items() if name != "token"} or "no options"
        raise MedSegError(f"tool {tool!r} cannot be made with {given}: {error}") from error
