"""Clocked: a tool that counts what it was asked, and the seconds that took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from medseg_gym.tools.base import SegmentationTool
from medseg_gym.types import Embedding, Image, Prediction, Query


class Clocked:
    """A tool that counts its own work: the same answers, with what was encoded and asked and how long that took."""

    def __init__(self, tool: SegmentationTool) -> None:
        self._tool = tool
        self.encodes = self.tool_calls = self.queries = 0
        self.busy_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool, name)

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        begun = time.perf_counter()
        try:
            return self._tool.encode(images)
        finally:
            self.encodes += len(images)
            self.busy_s += time.perf_counter() - begun

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        begun = time.perf_counter()
        try:
            return self._tool.predict(queries)
        finally:
            self.tool_calls += 1
            self.queries += len(queries)
            self.busy_s += time.perf_counter() - begun

    def counters(self) -> dict[str, float]:
        """encodes and misses (images encoded here), hits (queries whose image was there), tool_calls, busy_s."""
        return {
            "encodes": self.encodes,
            "misses": self.encodes,
            "hits": max(0, self.queries - self.encodes),
            "tool_calls": self.tool_calls,
            "queries": self.queries,
            "busy_s": self.busy_s,
        }
