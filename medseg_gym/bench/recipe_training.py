"""The reward ablation as a training, in small: one taught model, GRPO under each reward, and what it then does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.bench.recipe_rewards import without
from medseg_gym.bench.recipe_ways import ENV, TOOL, WAYS, demonstrate, keys, way
from medseg_gym.bench.rundir import write_whole
from medseg_gym.bench.runs import read_record
from medseg_gym.rewards import PRESETS, RewardSpec
from medseg_gym.types import Box, Episode

Say = Callable[[str, int, int], None]  # (reward, models trained, models)

REWARDS = (  # preset, and the term that is off
    ("medsam-agent", ""),
    ("medsam-agent", "improvement"),
    ("medsam-agent", "overshoot_iou"),
    ("medsam-agent", "action_cost"),
    ("shaped", ""),
    ("shaped", "tool_cost"),
)
COMMON: dict[str, Any] = {
    "env": ENV,
    "protocol": "tiny",
    "size": 64,
    "device": "cpu",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "micro_rows": 32,
    "max_new_tokens": 8,
    "max_chat_tokens": 512,
    "validate_every": 0,
}


@dataclass(frozen=True, slots=True)
class Training:
    """How much is trained: the same for every reward, all from one taught model."""

    demonstrations: int = 192
    steps: int = 150  # of supervised training
    batch: int = 16
    iterations: int = 8  # of GRPO
    prompts: int = 4
    rollouts: int = 8
    lr: float = 7e-4
    temperature: float = 0.7
    cases: int = 48  # unseen ones that the result is told of, sampled at the same temperature
    seed: int = 0

    def trial(self, cases: int) -> Training:
        """A step of everything, to see that it runs; its numbers mean nothing."""
        return replace(
            self, demonstrations=6, steps=1, batch=2, iterations=1, prompts=1, rollouts=2, cases=min(cases, self.cases)
        )


def rewards() -> list[tuple[str, str, RewardSpec]]:
    """(preset, the term that is off, its reward), "" for the whole."""
    return [(name, off, without(PRESETS[name], off) if off else PRESETS[name]) for name, off in REWARDS]


def trained_rows(folder: Path, training: Training, say: Say) -> list[dict[str, Any]]:
    """A row for the taught model and one for each reward; what is done is read again, what was cut off goes on."""
    from medseg_gym.bench.recipe_table import estimate
    from medseg_gym.bench.statistics import interval

    rows = []
    for name, off, found in _episodes(folder, training, say):
        patients = [patient for patient, *_ in found]
        row: dict[str, Any] = {
            "dataset": "Phantom",
            "tool": TOOL,
            "setting": (f"{name} without {off}" if off else name) or "taught only",
            "reward": name,
            "without": off,
            "cases": len(found),
            "patients": len(set(patients)),
        }
        columns = {"iou": (0.0, 1.0), "boxes": (0.0, np.inf), **dict.fromkeys((*WAYS, "other"), (0.0, 1.0))}
        for column, bounds in columns.items():
            values = [_value(column, *record) for _, *record in found]
            row[column] = estimate(interval(values, patients, np.random.default_rng(0), bounds=bounds))
        rows.append(row)
    return rows


def _value(column: str, iou: float, boxes: float, went: str) -> float:
    return {"iou": iou, "boxes": boxes}.get(column, float(went == column))


def _episodes(folder: Path, training: Training, say: Say) -> list[tuple[str, str, list[list[Any]]]]:
    """(reward, term off, [patient, IoU, boxes, way] a case) of every model, the taught one first."""
    wanted = rewards()
    say("taught", 0, len(wanted) + 1)
    taught = teach(folder / "taught", training)
    found = [("", "", _tried(taught, training))]
    for done, (name, off, spec) in enumerate(wanted, start=1):
        label = f"{name}-without-{off}" if off else name
        say(label, done, len(wanted) + 1)
        found.append((name, off, _tried(reinforce(folder / label, taught, spec, training), training)))
    say("done", len(wanted) + 1, len(wanted) + 1)
    return found


def teach(out: Path, training: Training) -> Path:
    """The folder of a random model of 0.2 million parameters after supervised training on the demonstrations."""
    from medseg_gym.rl.config import SFTConfig
    from medseg_gym.rl.sft import train

    if not (out / "final").exists():
        data = demonstrate(out / "demonstrations.h5", training.demonstrations)
        train(
            SFTConfig(
                model="tiny",
                out=str(out),
                data=str(data),
                seed=training.seed,
                steps=training.steps,
                batch=training.batch,
                lr=2e-3,
                schedule="cosine",
                **{**COMMON, "env_options": _options(PRESETS["shaped"])},
            )
        )
    return out / "final"


def reinforce(out: Path, model: Path, spec: RewardSpec, training: Training) -> Path:
    """The folder of the model after GRPO under a reward."""
    from medseg_gym.rl.config import GRPOConfig
    from medseg_gym.rl.grpo import train

    if not (out / "final").exists():
        chosen = out.parent / "keys.txt"
        if not chosen.exists():
            write_whole(chosen, "\n".join(keys("train", max(64, training.demonstrations))) + "\n")
        train(
            GRPOConfig(
                model=str(model),
                out=str(out),
                seed=training.seed,
                iterations=training.iterations,
                prompts=training.prompts,
                rollouts=training.rollouts,
                slots=training.prompts * training.rollouts,
                lr=training.lr,
                temperature=training.temperature,
                std=True,  # as both papers have it: what differs by a hundredth still decides
                weight_decay=0.0,
                gallery_every=0,
                keys_file=str(chosen),
                **{**COMMON, "env_options": _options(spec)},
            )
        )
    return out / "final"


def _options(spec: RewardSpec) -> dict[str, Any]:
    return {"dataset_options": {"task": "cue"}, "horizon": 4, "verbs": ("box", "stop"), "reward": spec}


def _tried(model: Path, training: Training) -> list[list[Any]]:
    """[patient, last IoU, boxes, way] of every unseen case, sampled with the same seeds whatever the weights."""
    file = model.parent / f"tried-{training.cases}.json"
    record = read_record(file)
    if record is None:
        episodes = asyncio.run(_play(model, training))
        rows = [
            [e.patient, e.iou[-1], float(sum(isinstance(turn.action, Box) for turn in e.turns)), way(e)]
            for e in episodes
        ]
        record = {"training": asdict(training), "rows": rows}
        write_whole(file, json.dumps(record) + "\n")
    rows = list(record["rows"])
    return rows


async def _play(model: Path, training: Training) -> Sequence[Episode]:
    from medseg_gym.rl.engines.hf import HFEngine
    from medseg_gym.rl.local_worker import LocalWorker
    from medseg_gym.rl.validate import validate

    engine = HFEngine(model, device="cpu")
    worker = LocalWorker(ENV, 16, "tiny", size=64, options=_options(PRESETS["shaped"]))
    limits: Mapping[str, Any] = {name: COMMON[name] for name in ("max_new_tokens", "max_chat_tokens")}
    try:
        found = await validate(
            [worker], engine, engine.tokens, keys("test", training.cases), temperature=training.temperature, **limits
        )
        return [rollout.episode for rollout in found.rollouts]
    finally:
        await engine.close()
        await worker.close()
