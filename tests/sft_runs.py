"""What the tests of supervised training share: the cue task's data, small settings, and weights to compare."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg_gym.datasets.phantom import Phantom
from medseg_gym.rl.config import SFTConfig, read
from medseg_gym.types import Sample

ROOT = Path(__file__).resolve().parents[1]


def cue_task() -> Any:
    """baselines/cue_task.py as a module."""
    spec = importlib.util.spec_from_file_location("cue_task", ROOT / "baselines" / "cue_task.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(data: Path, out: Path, **given: Any) -> SFTConfig:
    """Steps of a fraction of a second on one thread, without validation."""
    small = {
        "preset": "tiny",
        "steps": 6,
        "batch": 4,
        "save_every": 2,
        "keep": 9,
        "validate_every": 0,
        "validate_cases": 4,
    }
    return read(SFTConfig, **{**small, "data": str(data), "out": str(out), **given})


def weights(out: Path, name: str = "final") -> bytes:
    return (out / name / "model.safetensors").read_bytes()


def full_grammar_data(path: Path, count: int = 8, tool: str = "Nano") -> Path:
    """Demonstrations by both strategies, of BTCV's slices where $MEDSEG_GYM_SAMPLES has some, else of drawn ones."""
    from medseg_gym import tools
    from medseg_gym.trajectories.sample import sample
    from medseg_gym.trajectories.store import write

    samples, segment = list(_cases(count // 2)), tools.make(tool)
    pairs = [
        (one, case.image)
        for strategy in ("box-to-point", "sequential-click")
        for one, case in zip(sample(segment, samples, strategy), samples, strict=True)
    ]
    # refused ones too: a random model is to learn words here, not outlines
    write(path, [(replace(one, dropped=""), image) for one, image in pairs if one.episode.turns], {})
    return path


def full_grammar_settings(data: Path, out: Path, **given: Any) -> SFTConfig:
    """MedSAM-Agent's protocol in the smallest pictures, 20 steps."""
    given = {
        "protocol": "medsam-agent",
        "env": "",
        "env_options": {"verbs": ["positive", "negative", "box", "stop"]},
        "steps": 20,
        "batch": 2,
        "micro_rows": 2,
        "max_chat_tokens": 8192,
        "save_every": 3,
        **given,
    }
    return settings(data, out, **given)


def _cases(count: int) -> Iterator[Sample]:
    folder = Path(os.environ.get("MEDSEG_GYM_SAMPLES", "")) / "imis-bench" / "BTCV"
    if not folder.is_dir():
        dataset = Phantom(task="ct", size=128)
        yield from (dataset[key] for key in dataset.keys("train")[:count])
        return
    import scipy.sparse

    from medseg_gym.images import read_image

    records = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["training"]
    for number, record in enumerate(records[:: max(1, len(records) // count)][:count]):
        masks = scipy.sparse.load_npz(folder / record["label"]).toarray().reshape(-1, 512, 512) > 0
        largest = max(masks, key=lambda mask: int(mask.sum()))
        image = read_image(folder / record["image"])
        yield Sample(f"BTCV/train-{number}/organ", image, largest, "organ", "organ in abdomen CT", str(number))
