"""A policy in a plain Gymnasium loop: `python baselines/scripted.py --policy OracleClicks`."""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np

import medseg_gym  # noqa: F401 - registers the ids
from medseg_gym import policies
from medseg_gym.errors import MedSegError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="MedSeg-Phantom-Nano-v0")
    parser.add_argument("--policy", default="OracleBoxThenClicks")
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    try:
        env = gym.make(args.env, split="test", observation="dict")
        policy = policies.make(args.policy, env)
    except MedSegError as error:
        raise SystemExit(f"error: {error}") from None
    rng = np.random.default_rng(args.seed)
    env.reset(seed=args.seed)
    for episode in range(args.episodes):
        _, info = env.reset()
        total, done = 0.0, False
        while not done:
            decision = policy.act([env.unwrapped.view()], [rng])[0]
            _, reward, terminated, truncated, info = env.step(decision.action)
            total += float(reward)
            done = terminated or truncated
        print(
            f"{episode}: {info['instruction']:32} Dice {info['dice']:.3f}  actions {info['turn']}  return {total:.3f}"
        )


if __name__ == "__main__":
    main()
