"""Loading tools: by catalogue id, by "module:Class" or as a ready object, one model and one cache a process."""

from __future__ import annotations

import importlib
import inspect
import json
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

__all__ = ["TOOLS", "CachedTool", "EmbeddingCache", "SegmentationTool", "ToolCard", "available", "load"]

_lock = threading.RLock()
_loaded: dict[tuple[str, str], CachedTool] = {}
_wrapped: weakref.WeakValueDictionary[int, CachedTool] = weakref.WeakValueDictionary()


def load(tool: str | SegmentationTool, *, cache_bytes: int = MAX_BYTES, **options: Any) -> CachedTool:
    """The tool behind its embedding cache. Equal names and options give the same object, for all envs of a process.

    `tool` is an id of the catalogue, "package.module:Class", or a ready tool (which takes no options). The options
    are the keywords of the tool's factory. Weights that are not there raise WeightsMissingError with the command.
    """
    if not isinstance(tool, str):
        return _wrap(tool, cache_bytes, options)
    factory = _factory(tool, options)
    key = (tool, json.dumps({**options, "cache_bytes": cache_bytes}, sort_keys=True, default=repr))
    with _lock:
        if key not in _loaded:
            _loaded[key] = CachedTool(_checked(_made(tool, factory, options)), cache_bytes)
        return _loaded[key]


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
        check_keywords(tool, options, [*parameters, "cache_bytes"])
    return factory


def _wrap(tool: SegmentationTool, cache_bytes: int, options: dict[str, Any]) -> CachedTool:
    if options:
        raise UnknownNameError(f"{', '.join(options)}: a ready tool takes no options; give them to its constructor")
    if isinstance(tool, CachedTool):
        return tool
    with _lock:
        cached = _wrapped.get(id(tool))
        if cached is None or cached.tool is not tool:
            cached = _wrapped[id(tool)] = CachedTool(_checked(tool), cache_bytes)
        return cached


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
        raise MedSegError(f"tool {tool!r} cannot be made with {options or 'no options'}: {error}") from error
