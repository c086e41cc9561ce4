"""PPO of Stable-Baselines3 on pixels: `python baselines/sb3_ppo.py` trains a small CNN to box one structure.

Needs the extra: `pip install -c constraints.txt '.[sb3]'` in a checkout. The env is the native vector env with coarse
actions. Writes the curve on held-out cases, its picture and the weights; a run that was cut off goes on, from its last
test.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ppo_task as task

import medseg_gym  # noqa: F401 - registers the ids
from medseg_gym.envs.coarse import VectorCoarseGrid
from medseg_gym.envs.sb3 import SB3VecEnv
from medseg_gym.envs.wrappers import VectorStandardised
from medseg_gym.policies.pixels import PixelNet, PixelSpec

STEPS = 4608
SETTINGS: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 128,
    "n_epochs": 6,
    "learning_rate": 1e-3,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "ent_coef": 0.03,
}
SLOTS = 8


class SmallCNN(BaseFeaturesExtractor):
    """Convolutions and one hidden layer, a small part of Stable-Baselines3's own; pictures come channels last."""

    def __init__(self, observation_space: gym.spaces.Box, features_dim: int = task.HIDDEN) -> None:
        super().__init__(observation_space, features_dim)
        layers: list[torch.nn.Module] = []
        channels = observation_space.shape[-1]
        for out, kernel, stride in task.FILTERS:
            layers += [torch.nn.Conv2d(channels, out, kernel, stride), torch.nn.ReLU()]
            channels = out
        self.cnn = torch.nn.Sequential(*layers, torch.nn.Flatten())
        with torch.no_grad():
            flat = self.cnn(torch.zeros(1, *observation_space.shape).permute(0, 3, 1, 2)).shape[1]
        self.linear = torch.nn.Sequential(torch.nn.Linear(flat, features_dim), torch.nn.ReLU())

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.linear(self.cnn(observations.permute(0, 3, 1, 2)))


def vec_env(args: argparse.Namespace, data: Any) -> SB3VecEnv:
    made = gym.make_vec(
        args.env,
        num_envs=SLOTS,
        vectorization_mode="vector_entry_point",
        autoreset_mode="SameStep",
        dataset=data,
        **task.keywords(args),
    )
    return SB3VecEnv(VectorStandardised(VectorCoarseGrid(made, **task.coarse())))


def new_model(env: Any, seed: int) -> PPO:
    # pictures are floats already, so the network is given them as they are
    kwargs = {"features_extractor_class": SmallCNN, "net_arch": [], "normalize_images": False}
    return PPO("CnnPolicy", env, policy_kwargs=kwargs, seed=seed, device="cpu", **SETTINGS)


def exported(model: PPO, spec: PixelSpec) -> PixelNet:
    """The model's actor as a network that needs no Stable-Baselines3."""
    state = model.policy.state_dict()
    names = {f"conv{i}": f"features_extractor.cnn.{2 * i}" for i in range(len(task.FILTERS))}
    names |= {"hidden": "features_extractor.linear.0", "actions": "action_net"}
    kinds = ("weight", "bias")
    weights = {f"{ours}.{kind}": state[f"{theirs}.{kind}"].clone() for ours, theirs in names.items() for kind in kinds}
    return PixelNet(spec, weights)


def train(args: argparse.Namespace, seed: int, data: Any, exam: task.Exam, spec: PixelSpec) -> tuple[PixelNet, Any]:
    """One seed's training; the network, and its record."""
    folder = args.out / f"seed-{seed}"
    log, file = folder / "curve.json", folder / "model.zip"
    env = vec_env(args, data)
    if log.exists() and file.exists():
        stored = json.loads(log.read_text(encoding="utf-8"))
        curve, spent = stored["curve"], stored["cpu_s"]
        model = PPO.load(file, env, device="cpu")
    else:
        model = new_model(env, seed)
        curve, spent = [exam.look(exported(model, spec), 0)], 0.0
    while model.num_timesteps < args.steps:
        begun = time.process_time()
        model.learn(min(args.every, args.steps - model.num_timesteps), reset_num_timesteps=False)
        spent += time.process_time() - begun
        curve.append(exam.look(exported(model, spec), model.num_timesteps))
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder / "part.zip")
        (folder / "part.zip").replace(file)
        log.write_text(json.dumps({"curve": curve, "cpu_s": spent}), encoding="utf-8")
        print(f"seed {seed}, {model.num_timesteps} steps, {spent:.0f} s: {curve[-1]}", flush=True)
    net = exported(model, spec)
    return net, task.seed_record(exam, net, seed, curve, spent)


def main(arguments: list[str] | None = None) -> None:
    args = task.parser(__doc__, "sb3", STEPS).parse_args(arguments)
    torch.set_num_threads(1)  # so small a network is slower on several
    data = task.dataset(args)
    exam = task.Exam(args, data)
    spec = task.spec(args, f"Stable-Baselines3 PPO, {args.env}")
    told = task.record(args, exam, "stable-baselines3", {"slots": SLOTS, **SETTINGS})
    print({name: task.means(found) for name, found in exam.scripted.items()}, flush=True)
    for seed in args.seeds:
        net, of_seed = train(args, seed, data, exam, spec)
        if not told["seeds"]:
            export = args.export or args.out / "ppo_sb3.safetensors"
            print(f"{export}: sha256 {net.save(export)}")
        told["seeds"].append(of_seed)
        task.write(told, args, "sb3", "PPO of Stable-Baselines3")


if __name__ == "__main__":
    main()
