"""Draws README's picture: plays oracle episodes on Phantom with Nano into docs/episodes.png."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np

import medseg_gym  # noqa: F401 - registers the ids
from medseg_gym import policies
from medseg_gym.filmstrip import episode_panels, filmstrip, write_png

OUT = Path(__file__).resolve().parents[1] / "docs" / "episodes.png"
CASES = (  # one a modality, with the policy that plays it
    ("spleen", "OracleClicks", 0),
    ("right ventricle", "OracleBoxThenClicks", 0),
    ("lesion", "OracleClicks", 1),
    ("polyp", "OracleBoxThenClicks", 2),
)


def main() -> None:
    strips = []
    for structure, name, number in CASES:
        env = gym.make(
            "MedSeg-Phantom-Nano-v0", split="test", structures=(structure,), observation="dict", horizon=5
        ).unwrapped
        policy, rng = policies.make(name, env), np.random.default_rng(0)
        env.reset(seed=0, options={"sample": env.dataset.keys("test", (structure,))[number]})
        done = False
        while not done:
            *_, terminated, truncated, _ = env.step(policy.act([env.view()], [rng])[0].action)
            done = terminated or truncated
        episode = env.episode(policy=name)
        strips.append(filmstrip(episode_panels(env.dataset[episode.key], episode, size=200)))
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    OUT.parent.mkdir(exist_ok=True)
    print(write_png(OUT, np.concatenate(padded)))


if __name__ == "__main__":
    main()
