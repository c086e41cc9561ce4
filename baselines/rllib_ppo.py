"""PPO of RLlib (new API stack) on pixels: `python baselines/rllib_ppo.py` trains a small CNN to box one structure.

Needs the extra: `pip install -c constraints.txt '.[rllib]'` in a checkout. Starting Ray takes a minute or so. The env
is the native vector env with coarse actions. Writes the curve on held-out cases, its picture and the weights; a run
that was cut off goes on, from its last test.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.tune.registry import register_env

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ppo_task as task

from medseg_gym.envs.wrappers import rllib_env
from medseg_gym.policies.pixels import PixelNet, PixelSpec

STEPS = 4608
SETTINGS: dict[str, Any] = {
    "train_batch_size_per_learner": 256,
    "minibatch_size": 128,
    "num_epochs": 8,
    "lr": 2e-3,
    "gamma": 0.9,
    "lambda_": 0.9,
    "entropy_coeff": 0.03,
    "clip_param": 0.2,
    "use_kl_loss": False,
    "vf_loss_coeff": 0.5,
    "vf_clip_param": 10.0,
    "grad_clip": 0.5,
}
SLOTS = 8


def ppo(args: argparse.Namespace, data: Any, seed: int) -> PPOConfig:
    register_env("MedSeg", rllib_env)
    # the module's prefix makes Gymnasium import medseg_gym in every worker
    env = {"id": f"medseg_gym:{args.env}", "coarse": task.coarse(), "standardised": True}
    env |= {"dataset": data, **task.keywords(args)}
    model = DefaultModelConfig(
        conv_filters=[[*one, "valid"] for one in task.FILTERS],
        conv_activation="relu",
        head_fcnet_hiddens=[task.HIDDEN],
        head_fcnet_activation="relu",
        vf_share_layers=True,
    )
    return (
        PPOConfig()
        .environment("MedSeg", env_config=env)
        .env_runners(
            num_env_runners=args.runners,
            num_envs_per_env_runner=SLOTS,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length="auto",
        )
        .training(**SETTINGS)
        .rl_module(model_config=model)
        .debugging(seed=seed, log_level="ERROR")
    )


def exported(algorithm: Any, spec: PixelSpec) -> PixelNet:
    """The module's actor as a network that needs no RLlib. Its pictures are channels last to the end, ours first."""
    return exported_module(algorithm.get_module(), spec)


def exported_module(module: Any, spec: PixelSpec) -> PixelNet:
    state = {name: torch.as_tensor(value).clone() for name, value in module.get_state().items()}
    names = {f"conv{i}": f"encoder.encoder.net.0.cnn.{2 * i}" for i in range(len(task.FILTERS))}
    names |= {"hidden": "pi.net.mlp.0", "actions": "pi.net.mlp.2"}
    kinds = ("weight", "bias")
    weights = {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in names.items() for kind in kinds}
    hidden, flat = weights["hidden.weight"].shape
    channels = task.FILTERS[-1][0]
    side = int((flat // channels) ** 0.5)
    by_place = weights["hidden.weight"].reshape(hidden, side, side, channels)
    weights["hidden.weight"] = by_place.permute(0, 3, 1, 2).reshape(hidden, flat).contiguous()
    return PixelNet(spec, weights)


def train(args: argparse.Namespace, seed: int, data: Any, exam: task.Exam, spec: PixelSpec) -> tuple[PixelNet, Any]:
    """One seed's training; the network, and its record."""
    folder = (args.out / f"seed-{seed}").resolve()
    log, kept = folder / "curve.json", folder / "checkpoint"
    algorithm = ppo(args, data, seed).build_algo()
    curve, spent, steps = [], 0.0, 0
    if log.exists() and kept.exists():
        stored = json.loads(log.read_text(encoding="utf-8"))
        curve, spent, steps = stored["curve"], stored["cpu_s"], int(stored["curve"][-1]["steps"])
        algorithm.restore_from_path(str(kept))
    else:
        curve.append(exam.look(exported(algorithm, spec), 0))
    while steps < args.steps:
        due = min(steps + args.every, args.steps)
        begun = time.process_time()
        while steps < due:
            runners = algorithm.train()["env_runners"]
            steps = int(runners["num_env_steps_sampled_lifetime"])
        spent += time.process_time() - begun
        curve.append(exam.look(exported(algorithm, spec), steps))
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "part"
        shutil.rmtree(part, ignore_errors=True)
        algorithm.save_to_path(str(part))
        shutil.rmtree(kept, ignore_errors=True)
        part.rename(kept)
        log.write_text(json.dumps({"curve": curve, "cpu_s": spent}), encoding="utf-8")
        print(f"seed {seed}, {steps} steps, {spent:.0f} s: {curve[-1]}", flush=True)
    net = exported(algorithm, spec)
    algorithm.stop()
    return net, task.seed_record(exam, net, seed, curve, spent)


def main(arguments: list[str] | None = None) -> None:
    parser = task.parser(__doc__, "rllib", STEPS)
    parser.add_argument("--runners", type=int, default=0, help="processes that play; 0: this one")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so small a network is slower on several
    data = task.dataset(args)
    exam = task.Exam(args, data)
    spec = task.spec(args, f"RLlib PPO, {args.env}")
    told = task.record(args, exam, "ray", {"slots": SLOTS, "runners": args.runners, **SETTINGS})
    print({name: task.means(found) for name, found in exam.scripted.items()}, flush=True)
    ray.init(address="local", include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
    try:
        for seed in args.seeds:
            net, of_seed = train(args, seed, data, exam, spec)
            if not told["seeds"]:
                export = args.export or args.out / "ppo_rllib.safetensors"
                print(f"{export}: sha256 {net.save(export)}")
            told["seeds"].append(of_seed)
            task.write(told, args, "rllib", "PPO of RLlib")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
