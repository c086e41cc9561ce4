"""The GRPO benchmark takes a step apart: spans are counted once, and every number it promises is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from medseg_gym.bench.throughput_grpo import covered, measure_grpo


def test_seconds_covered_by_spans_are_counted_once() -> None:
    assert covered([]) == 0
    # 0..3 from two that overlap, one within them, a gap, and 5..6 twice
    assert covered([(5, 6), (0, 2), (1, 3), (1, 1.5), (5, 6)]) == 4


@pytest.mark.slow
def test_a_small_step_gives_every_number() -> None:
    row = measure_grpo(answer_s=(0.01,), steps=2, prompts=1, rollouts=2, workers=2, size=64)
    (pace,) = row["paces"]
    assert (row["engine"], pace["encodes_per_episode"], pace["dropped_share"]) == ("fake", 0.5, 0.0)
    shares = [pace[name] for name in ("framework_share", "learner_share", "idle_tool", "idle_engine", "idle_learner")]
    assert all(0 <= share <= 1 for share in shares)
    assert pace["step_s"] == pytest.approx(pace["learn_s"] / pace["learner_share"])
    assert set(pace["latency_ms"]) == {"turn", "queue", "prefill", "decode", "env", "preprocessing", "env_queue"}
    assert pace["latency_ms"]["prefill"]["p50"] >= 10

    def finite(values: Mapping[str, Any]) -> bool:
        return all(finite(v) if isinstance(v, Mapping) else math.isfinite(v) for v in values.values())

    assert finite(pace)
