"""Questions beside masks, learned for real: a tiny random model answers, and outlines no worse than without them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tensorboard")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # minutes where others share the processor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def learn_vqa() -> Iterator[ModuleType]:
    """baselines/learn_vqa.py, which is no package."""
    import torch

    spec = importlib.util.spec_from_file_location("learn_vqa", ROOT / "baselines" / "learn_vqa.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "baselines"))
    spec.loader.exec_module(module)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(before)


def test_mixed_batches_teach_answers_and_leave_masks_no_worse(learn_vqa: ModuleType, tmp_path: Path) -> None:
    """The recipe's supervised part, shortened: answers beat an agent that never looks, masks keep their IoU."""
    short = {"steps": 48, "batch": 16, "lr": 2e-3}
    asked = f"{learn_vqa.QUESTIONS},kinds=side"
    given = {"demonstrations": 128, "right": 1.0, "cases": 32, "questions": asked}
    found = learn_vqa.learn(0, tmp_path, sft=short, grpo={}, **given)
    masks, mixed = found["masks"]["sft"], found["mixed"]["sft"]
    chance = learn_vqa.blind(learn_vqa.unseen_questions(32, asked))
    print(f"chance {chance:.3f}, masks {masks}, mixed {mixed}")
    assert masks["vqa_accuracy"] == 0  # nothing was asked of it, and it has no words for an answer
    assert mixed["vqa_accuracy"] > chance + 0.2
    assert mixed["iou"] > 0.5
    assert mixed["iou"] >= masks["iou"] - 0.05
