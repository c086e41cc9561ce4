"""PPO of RLlib (new API stack) on the native vector env: `python baselines/rllib_ppo.py`.

Needs the extra: `pip install -c constraints.txt '.[rllib]'` in a checkout. Starting Ray takes a minute or so.
"""

from __future__ import annotations

import argparse

import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env

from medseg_gym.envs.wrappers import rllib_env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="MedSeg-Phantom-Stub-v0")
    parser.add_argument("--structure", default="liver")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--runners", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2048, help="env-steps an iteration; 256 for a first look")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    register_env("MedSeg", rllib_env)
    ray.init(include_dashboard=False)
    config = (
        PPOConfig()
        # the module's prefix makes Gymnasium import medseg_gym in every worker; 64 is a size RLlib has filters for
        .environment("MedSeg", env_config={"id": f"medseg_gym:{args.env}", "size": 64, "structures": (args.structure,)})
        .env_runners(
            num_env_runners=args.runners, num_envs_per_env_runner=16, gym_env_vectorize_mode="vector_entry_point"
        )
        .training(train_batch_size_per_learner=args.batch, minibatch_size=min(256, args.batch), num_epochs=4)
        .debugging(seed=args.seed)
    )
    algorithm = config.build_algo()
    for iteration in range(args.iterations):
        runners = algorithm.train()["env_runners"]
        print(f"{iteration}: mean return {runners['episode_return_mean']:.3f}")
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
