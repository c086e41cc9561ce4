"""SAM 2.1 on a GPU against the CPU: the same answers, batched, half precision, compiled, from embeddings elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.conformance import check_tool
from medseg_gym.tools.sam2 import Sam2Tool
from medseg_gym.tools.sam2_config import random_model, sam2_config
from medseg_gym.types import Box, Click, Embedding, Image, Prediction, Query

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False"),
]

TOLERANCE = 2e-2  # of the largest logit: convolutions run in TF32 on a GPU unless a program forbids it


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(
        sam2_config(
            128,
            width=32,
            mlp_dim=64,
            hidden_size=8,
            num_attention_heads=1,
            embed_dim_per_stage=[8, 16, 32, 64],
            num_attention_heads_per_stage=[1, 1, 2, 4],
            blocks_per_stage=[1, 1, 2, 1],
            global_attention_blocks=[3],
            window_size_per_stage=[8, 4, 4, 2],
        ),
        0,
    )


def pictures() -> list[Image]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((60, 90), (128, 128), (200, 40))]


def answers(model: Any, **options: Any) -> list[Prediction]:
    """Every kind of query on three images."""
    import copy

    tool = Sam2Tool(copy.deepcopy(model), **options)
    prior = np.random.default_rng(1).normal(0, 5, (32, 32)).astype(np.float32)
    sets = [(Click(5, 6),), (Box(3, 4, 30, 50), Click(20, 30, False))]
    return tool.predict([Query(e, p, old) for e in tool.encode(pictures()) for p in sets for old in (None, prior)])


def apart(a: list[Prediction], b: list[Prediction]) -> float:
    scale = max(np.abs(x.logits).max() for x in a)
    return max(float(np.abs(x.logits - y.logits).max() / scale) for x, y in zip(a, b, strict=True))


def test_the_gpu_answers_what_the_cpu_answers(model: Any) -> None:
    assert apart(answers(model), answers(model, device="cuda")) <= TOLERANCE


def test_compiling_changes_nothing_but_rounding(model: Any) -> None:
    assert apart(answers(model, device="cuda"), answers(model, device="cuda", compile=True)) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_and_halves_what_is_kept(model: Any, dtype: Any) -> None:
    import copy

    full, half = (Sam2Tool(copy.deepcopy(model), device="cuda", dtype=d) for d in ("float32", dtype))
    (a,), (b,) = full.encode(pictures()[:1]), half.encode(pictures()[:1])
    assert a.nbytes == 2 * b.nbytes
    (x,), (y,) = full.predict([Query(a, (Click(9, 9),))]), half.predict([Query(b, (Click(9, 9),))])
    assert np.abs(x.logits - y.logits).mean() < 0.2 * np.abs(x.logits).mean()


def test_it_conforms_on_the_gpu(model: Any) -> None:
    import copy

    check_tool(CachedTool(Sam2Tool(copy.deepcopy(model), device="cuda", max_batch=4)), tolerance=TOLERANCE)


def test_embeddings_that_lie_on_the_cpu_are_taken(model: Any) -> None:
    """As those read from a disk or sent by another process do."""
    import copy

    tool = Sam2Tool(copy.deepcopy(model), device="cuda")
    (here,) = tool.encode(pictures()[:1])
    moved = {name: level.cpu() for name, level in here.features.items()}
    there = Embedding(here.image, here.height, here.width, moved)
    (a,), (b,) = (tool.predict([Query(e, (Click(9, 9),))]) for e in (here, there))
    assert np.array_equal(a.logits, b.logits)
