"""GRPO with a paper's whole grammar, on CT slices with Nano: that the loop's invariants hold, not that it learns.

At this size nothing is learned of where an organ lies. Supervised training comes before, because a random model's
answers are never read: without it every group is equal and no step is made. Its two cases are those GRPO then plays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym import datasets, tools
from medseg_gym.datasets.prepare import prepare
from medseg_gym.rl.config import GRPOConfig, SFTConfig
from medseg_gym.rl.grpo import train
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.rl.sft import train as train_supervised
from medseg_gym.trajectories.sample import sample
from medseg_gym.trajectories.store import write
from medseg_gym.trajectories.strategies import Settings
from medseg_gym.types import Sample

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # minutes where others share the processor

COMMON: dict[str, Any] = {
    "env": "MedSeg-BTCV-Nano-v0",
    "env_options": {"verbs": ("positive", "negative", "box", "stop"), "horizon": 2},
    "protocol": "medsam-agent",
    "size": 64,
    "device": "cpu",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "max_new_tokens": 96,
    "max_chat_tokens": 8192,
    "validate_every": 0,
}


@pytest.fixture
def btcv(samples: Path, home: Path, tmp_path: Path) -> Any:
    """The slices of two patients, in a home of this test's own."""
    source, part = samples / "imis-bench" / "BTCV", tmp_path / "BTCV"
    listed = json.loads((source / "dataset.json").read_text())
    chosen = [pair for pair in listed["training"] if "ABD_001" in pair["image"] or "ABD_002" in pair["image"]]
    for pair in chosen:
        for name in (pair["image"], pair["label"]):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, part / name)
    (part / "dataset.json").write_text(json.dumps({**listed, "training": chosen}))
    prepare("BTCV", part)
    return datasets.load("BTCV")


def taught(cases: Sequence[Sample], out: Path) -> Path:
    """A model that has the box and the stop of these cases nearly by heart."""
    boxed = sample(tools.make("Nano"), cases, "box-to-point", Settings(horizon=2), env=COMMON["env"])
    write(out / "boxes.h5", [(t, case.image) for t, case in zip(boxed, cases, strict=True)], {"cases": len(cases)})
    settings = {"steps": 110, "batch": 1, "lr": 4e-3, "schedule": "linear", "freeze": ()}
    train_supervised(SFTConfig(model="tiny", out=str(out / "sft"), data=str(out / "boxes.h5"), **settings, **COMMON))
    return out / "sft" / "final"


def test_five_iterations_on_ct_slices_hold_every_invariant(btcv: Any, tmp_path: Path) -> None:
    """The run raises at the first group, plan, version or mismatch that is wrong; see invariants.py for the list."""
    keys = list(btcv.keys("train"))[:10:9]
    folder = taught([btcv[key] for key in keys], tmp_path)
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    more = {
        "iterations": 5,
        "prompts": 2,
        "rollouts": 4,
        "slots": 8,
        "temperature": 0.8,
        "lr": 1e-4,
        "gallery_every": 5,
    }
    config = GRPOConfig(
        model=str(folder), out=str(tmp_path / "grpo"), keys_file=str(tmp_path / "keys.txt"), **more, **COMMON
    )
    state = train(config)
    records = read_metrics(tmp_path / "grpo")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert state.version >= 3, "groups had no spread, so too few steps were made to have shown anything"
    assert min(record["train/unreadable"] for record in records) < 0.9
    for record in records:
        assert record["train/dropped"] == 0
        assert record.get("learner/mismatch_kl", 0.0) < 1e-6
        assert all(value is None or np.isfinite(value) for value in record.values())
