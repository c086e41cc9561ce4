"""Learns the cue task: `python baselines/learn_cue.py` fine-tunes a random model, then trains it by GRPO, per seed.

Supervised training on demonstrations of which 55 % are right gives a model that is right about as often when it
samples; GRPO in the env, with the real tool, has to find out which answers pay. Both are told of by the mean IoU over
64 unseen cases, sampled at temperature 1 with the same seeds. Writes the numbers with their curves as JSON and a
picture. A run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a shared machine threads that spin cost ten times the work
sys.path.insert(0, str(Path(__file__).resolve().parent))

from cue_task import ENV, ENV_OPTIONS, PROTOCOL, SIZE, blind, unseen, write_demonstrations

SEEDS = (0, 1, 2)
DEMONSTRATIONS = 768
SFT: dict[str, Any] = {"steps": 240, "batch": 32, "lr": 1e-3}
GRPO: dict[str, Any] = {"iterations": 40, "prompts": 8, "rollouts": 8, "lr": 5e-4}
COMMON: dict[str, Any] = {
    "env": ENV,
    "env_options": ENV_OPTIONS,
    "protocol": PROTOCOL,
    "size": SIZE,
    "device": "cpu",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "micro_rows": 32,
    "max_new_tokens": 8,
    "max_chat_tokens": 512,
    "validate_temperature": 1.0,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/learn_cue"), help="the runs' folder")
    parser.add_argument("--result", type=Path, help="where the numbers go; default: the runs' folder")
    parser.add_argument("--picture", type=Path, help="where the curves go; default: beside the numbers")
    given = parser.parse_args(arguments)
    results = [learn(seed, given.out / f"seed-{seed}", say=print) for seed in given.seeds]
    file = given.result or given.out / "learn_cue.json"
    record = {**provenance(given.seeds), "blind": blind(unseen()), "seeds": results}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{file}\n{draw(record, given.picture or file.with_suffix('.png'))}")


def learn(
    seed: int,
    out: Path,
    *,
    sft: Mapping[str, Any] = SFT,
    grpo: Mapping[str, Any] = GRPO,
    demonstrations: int = DEMONSTRATIONS,
    validate_every: int = 10,
    say: Any = lambda line: None,
) -> dict[str, Any]:
    """Both trainings of a seed: mean IoU on the unseen cases after each, and GRPO's curve. What is done is read again.

    Times are a processor's, as on a shared machine others mean little.
    """
    from medseg_gym.rl.grpo import train
    from medseg_gym.rl.runlog import read_metrics

    done = out / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    begun = time.process_time()
    start = supervised(seed, out, sft, demonstrations)
    taught = time.process_time() - begun
    before = unseen_iou(start)
    say(f"seed {seed}: IoU {before:.3f} after supervised training, {taught:.0f} s of a processor")
    begun = time.process_time()
    train(grpo_config(seed, start, out / "grpo", grpo, validate_every), say=say)
    seconds = time.process_time() - begun
    after = unseen_iou(out / "grpo" / "final")
    say(f"seed {seed}: IoU {after:.3f} after GRPO, {seconds:.0f} s of a processor")
    records = read_metrics(out / "grpo")
    names = ("train/reward", "train/iou", "train/unreadable", "groups/played")
    result = {
        "seed": seed,
        "sft_iou": before,
        "grpo_iou": after,
        "gain": after - before,
        "sft_cpu_s": taught,
        "grpo_cpu_s": seconds,
        "curve": {name: [r[name] for r in records if name in r] for name in names},
        "validation": [[r["step"], r["val/iou"]] for r in records if "val/iou" in r],
    }
    done.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def supervised(seed: int, out: Path, settings: Mapping[str, Any] = SFT, demonstrations: int = DEMONSTRATIONS) -> Path:
    """The folder of a random model that was taught by the cue task's demonstrations."""
    from medseg_gym.rl.config import SFTConfig
    from medseg_gym.rl.sft import train

    data = out / "demonstrations.h5"
    if not data.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_demonstrations(data, demonstrations, seed)
    # a random vision tower has seen no picture yet, so that here it is trained as well
    free = {"freeze": (), "validate_every": 0, **settings}
    train(SFTConfig(model="tiny", out=str(out / "sft"), data=str(data), seed=seed, **{**COMMON, **free}))
    return out / "sft" / "final"


def grpo_config(seed: int, model: Path, out: Path, settings: Mapping[str, Any] = GRPO, validate_every: int = 0) -> Any:
    """The settings of a GRPO run on the cue task; `settings` replace them."""
    from medseg_gym.rl.config import GRPOConfig

    values = {
        **COMMON,
        "slots": 64,
        "weight_decay": 0.0,
        "save_every": 20,
        "gallery_every": 0,
        "validate_every": validate_every,
        **settings,
    }
    return GRPOConfig(model=str(model), out=str(out), seed=seed, **values)


def unseen_iou(folder: Path) -> float:
    """Mean IoU over the unseen cases, sampled at temperature 1 with the same seeds whatever the weights."""

    async def played() -> float:
        from medseg_gym.rl.engines.hf import HFEngine
        from medseg_gym.rl.local_worker import LocalWorker
        from medseg_gym.rl.validate import validate

        engine = HFEngine(folder, device="cpu")
        worker = LocalWorker(ENV, 32, PROTOCOL, size=SIZE, options=ENV_OPTIONS)
        limits = {name: COMMON[name] for name in ("max_new_tokens", "max_chat_tokens")}
        try:
            return (await validate([worker], engine, engine.tokens, unseen(), temperature=1.0, **limits)).iou
        finally:
            await engine.close()
            await worker.close()

    return asyncio.run(played())


def provenance(seeds: Sequence[int]) -> dict[str, Any]:
    import torch
    import transformers

    from medseg_gym.bench.evaluate import machine
    from medseg_gym.bench.provenance import commit

    return {
        **commit(),
        "command": f"python baselines/learn_cue.py --seeds {' '.join(map(str, seeds))}",
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "task": "Phantom cue, 64 unseen cases of the split test, sampled at T=1, seed 0",
        "demonstrations": DEMONSTRATIONS,
        "sft": SFT,
        "grpo": GRPO,
    }


def draw(record: Mapping[str, Any], path: Path) -> Path:
    """A picture of GRPO's validation over its iterations, a line a seed, over the best policy that does not look."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for colour, result in zip(colours, record["seeds"], strict=False):
        values = result["curve"]["train/iou"]
        window = 5
        smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
        axes.plot(range(1, len(values) + 1), smooth, color=colour, alpha=0.35, linewidth=1.2)
        steps, ious = zip(*result["validation"], strict=True)
        label = f"seed {result['seed']}: {result['sft_iou']:.2f} to {result['grpo_iou']:.2f} unseen"
        axes.plot(steps, ious, color=colour, marker="o", markersize=4, label=label)
    best = max(record["blind"].values())
    axes.axhline(best, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
    words = {"ha": "right", "va": "bottom", "color": "#555555", "fontsize": 9}
    axes.text(0.995, best + 0.01, "best constant action", transform=axes.get_yaxis_transform(), **words)
    axes.set(xlabel="iteration", ylabel="mean IoU at T=1", ylim=(0, 1.02), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.set_title("Cue task: dots are 64 validation cases, pale lines training episodes", fontsize=10, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
