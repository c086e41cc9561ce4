"""PPO of Stable-Baselines3 on pixels: `python baselines/sb3_ppo.py`.

Needs the extra: `pip install -c constraints.txt '.[sb3]'` in a checkout.
"""

from __future__ import annotations

import argparse

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import medseg_gym  # noqa: F401 - registers the ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="MedSeg-Phantom-Stub-v0")
    parser.add_argument("--structure", default="liver")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", default="runs/sb3_ppo")
    args = parser.parse_args()

    # size 84 is what Stable-Baselines3's default CNN takes; one structure, because pixels alone do not name it
    options = {"size": 84, "structures": (args.structure,)}
    train = make_vec_env(args.env, n_envs=8, seed=args.seed, env_kwargs=options)
    test = make_vec_env(args.env, n_envs=8, seed=args.seed, env_kwargs={**options, "split": "test"})
    model = PPO("CnnPolicy", train, n_steps=128, batch_size=256, n_epochs=4, seed=args.seed, verbose=1)
    before = evaluate_policy(model, test, n_eval_episodes=64)
    model.learn(args.steps)
    after = evaluate_policy(model, test, n_eval_episodes=64)
    model.save(args.save)
    print(
        f"mean test return: {before[0]:.3f} untrained, {after[0]:.3f} after {args.steps} steps; saved {args.save}.zip"
    )


if __name__ == "__main__":
    main()
