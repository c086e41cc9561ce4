"""What `sb3_ppo.py` and `rllib_ppo.py` share: the task, the held-out cases, the record of a training and its picture.

A network sees a picture of 32 x 32 pixels and boxes one structure; after the box the episode is over. The optic disc
lies at the left or the right of a fundus photograph, so that no constant action finds it, and a click at its centre
(CentreClick, which sees the target) leaves Nano at an IoU of about .63. For another env or structure see to CELLS and
SIZES: the best box of the grid has to be better than what the network is to beat.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.policies.base import Policy
from medseg_gym.policies.pixels import PixelNet, PixelPolicy, PixelSpec
from medseg_gym.types import Sample

ENV = "MedSeg-Phantom-Nano-v0"
STRUCTURE = "optic disc"
SIZE = 32  # pixels a side of the picture
HORIZON = 1  # one decision an episode: where the box goes, and which
TEST_HORIZON = 5  # as on the leaderboard: a box, then the stop
VERBS = ("box",)
CELLS = 9
SIZES = (0.16,)  # side of the box in sides of the image: 41 pixels of Phantom's 256
FILTERS = ((16, 4, 2), (32, 4, 2), (32, 3, 1))  # channels, kernel, stride, without padding: 32 pixels become 4
HIDDEN = 64
SPLIT = "test"  # of the cases that results are told of
SCRIPTED = ("CentreClick", "BoxOnce")


class Remembered:
    """A dataset whose drawn or read cases are kept in memory: training comes back to each of them many times."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._kept = dataset, {}
        self.name, self.structures = dataset.name, dataset.structures

    def keys(self, split: str, structures: Sequence[str] = ()) -> Sequence[str]:
        return self._dataset.keys(split, structures)

    def __getitem__(self, key: str) -> Sample:
        if key not in self._kept:
            self._kept[key] = self._dataset[key]
        return self._kept[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, (self._dataset,)  # what is kept stays here


def parser(doc: str, library: str, steps: int) -> argparse.ArgumentParser:
    """The arguments of both scripts."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--env", default=ENV)
    made.add_argument("--structure", default=STRUCTURE)
    made.add_argument("--steps", type=int, default=steps, help="env-steps of training, a seed")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--images", type=int, default=1536, help="Phantom's images to train on; 0: as many as there are")
    made.add_argument("--test", type=int, default=128, help="held-out cases")
    made.add_argument("--every", type=int, default=512, help="env-steps between two tests")
    made.add_argument("--out", type=Path, default=Path(f"runs/ppo_{library}"), help="the run's folder; resumed")
    made.add_argument("--result", type=Path, help="where the numbers go; default: the run's folder")
    made.add_argument("--export", type=Path, help="where the first seed's weights go; default: the run's folder")
    return made


def dataset(args: argparse.Namespace) -> Remembered:
    """The id's dataset, kept in memory."""
    import gymnasium as gym

    from medseg_gym import datasets

    name = gym.spec(args.env).kwargs["dataset"]
    few = {"cases": {"train": args.images}} if name == "Phantom" and args.images else {}
    return Remembered(datasets.load(name, **few))


def spec(args: argparse.Namespace, trained: str) -> PixelSpec:
    strides = tuple(stride for _, _, stride in FILTERS)
    return PixelSpec(args.structure, SIZE, strides, HORIZON, VERBS, CELLS, SIZES, trained)


def coarse() -> dict[str, Any]:
    """CoarseGrid's arguments."""
    return {"verbs": VERBS, "cells": CELLS, "sizes": SIZES}


def keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The training env's arguments beside its dataset."""
    return {"structures": (args.structure,), "size": SIZE, "horizon": HORIZON}


class Exam:
    """The held-out cases, and what a policy earns on them; the scripted ones' results are taken at once."""

    def __init__(self, args: argparse.Namespace, data: Any) -> None:
        import gymnasium as gym

        from medseg_gym import policies
        from medseg_gym.bench.cases import choose_cases

        options = {"structures": (args.structure,), "size": SIZE, "horizon": TEST_HORIZON, "split": SPLIT}
        self.env = gym.make(args.env, dataset=data, **options)
        self.keys = choose_cases(data, SPLIT, (args.structure,), args.test, seed=0)[0]
        self.patients = {key: data[key].patient for key in self.keys}
        self.scripted = {name: self.play(policies.make(name, self.env)) for name in SCRIPTED}

    def play(self, policy: Policy) -> dict[str, list[float]]:
        """IoU, Dice, return and turns of every case, in the order of the keys."""
        found: dict[str, list[float]] = {"iou": [], "dice": [], "return": [], "turns": []}
        rng = np.random.default_rng(0)
        for key in self.keys:
            _, info = self.env.reset(seed=0, options={"sample": key})
            total, done = 0.0, False
            while not done:
                action = policy.act([self.env.unwrapped.view()], [rng])[0].action
                _, reward, terminated, truncated, info = self.env.step(action)
                total, done = total + float(reward), terminated or truncated
            for name, value in zip(found, (info["iou"], info["dice"], total, info["turn"]), strict=True):
                found[name].append(float(value))
        return found

    def look(self, net: PixelNet, steps: int) -> dict[str, float]:
        """One point of the curve."""
        return {"steps": steps, **means(self.play(PixelPolicy(net, name="trained")))}

    def against(self, ious: Sequence[float], name: str) -> dict[str, float | int | None]:
        """The paired difference of these IoUs to a scripted policy's, with its 95 % interval."""
        from medseg_gym.bench.statistics import difference

        pairs = [dict(zip(self.keys, values, strict=True)) for values in (ious, self.scripted[name]["iou"])]
        found = difference(pairs[0], pairs[1], self.patients, np.random.default_rng(0)).interval
        return {"mean": found.mean, "low": found.low, "high": found.high, "cases": found.cases}

    def blind(self, net: PixelNet) -> float:
        """The mean IoU of one box drawn on every case: the best of the four that the network draws most."""
        drawn: Counter[Any] = Counter()
        policy = PixelPolicy(net, name="trained")
        for key in self.keys:
            self.env.reset(seed=0, options={"sample": key})
            drawn[policy.act([self.env.unwrapped.view()], [np.random.default_rng(0)])[0].action] += 1
        return max(self._constant(action) for action, _ in drawn.most_common(4))

    def _constant(self, action: Any) -> float:
        found = []
        for key in self.keys:
            self.env.reset(seed=0, options={"sample": key})
            found.append(float(self.env.step(action)[4]["iou"]))
        return float(np.mean(found))


def means(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in found.items()}


def seed_record(exam: Exam, net: PixelNet, seed: int, curve: list[dict[str, float]], cpu_s: float) -> dict[str, Any]:
    """What is told of one seed."""
    ious = exam.play(PixelPolicy(net, name="trained"))["iou"]
    return {
        "seed": seed,
        "cpu_s": cpu_s,
        "curve": curve,
        "against": {name: exam.against(ious, name) for name in SCRIPTED},
        "best_single_box_iou": exam.blind(net),
    }


def record(args: argparse.Namespace, exam: Exam, library: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of all seeds."""
    from medseg_gym.bench.evaluate import machine
    from medseg_gym.bench.provenance import commit

    names = ("medseg-gym", "torch", "gymnasium", library)
    return {
        **commit(),
        "command": shlex.join(["python", f"baselines/{Path(sys.argv[0]).name}", *_told(sys.argv[1:])]),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "env": args.env,
        "structure": args.structure,
        "test": {"split": SPLIT, "cases": len(exam.keys), "seed": 0, "horizon": TEST_HORIZON},
        "settings": {
            "size": SIZE,
            "horizon": HORIZON,
            "coarse": coarse(),
            "filters": FILTERS,
            "hidden": HIDDEN,
            "images": args.images,
            **settings,
        },
        "scripted": {name: means(found) for name, found in exam.scripted.items()},
        "seeds": [],
    }


def _told(words: Sequence[str]) -> list[str]:
    """The arguments without those that say where files go."""
    kept, skip = [], False
    for word in words:
        if word.partition("=")[0] in ("--out", "--result", "--export"):
            skip = "=" not in word
        elif skip:
            skip = False
        else:
            kept.append(word)
    return kept


def write(told: Mapping[str, Any], args: argparse.Namespace, library: str, title: str) -> None:
    """The record as JSON, and its picture beside it."""
    file = args.result or args.out / f"ppo_{library}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    print(f"{file}\n{draw(told, file.with_suffix('.png'), title)}")


def draw(told: Mapping[str, Any], path: Path, title: str) -> Path:
    """Mean IoU on the held-out cases over training, a line a seed, with the scripted policies' levels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for colour, one in zip(("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"), told["seeds"], strict=False):
        steps, ious = [p["steps"] for p in one["curve"]], [p["iou"] for p in one["curve"]]
        label = f"seed {one['seed']}: {ious[-1]:.3f}"
        axes.plot(steps, ious, color=colour, marker="o", markersize=3.5, label=label)
    words: dict[str, Any] = {"ha": "left", "va": "bottom", "color": "#555555", "fontsize": 9}
    levels = {f"{name} (sees the target)": found["iou"] for name, found in told["scripted"].items()}
    levels["best single box"] = max(one["best_single_box_iou"] for one in told["seeds"])
    for name, level in levels.items():
        axes.axhline(level, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
        axes.text(0.005, level + 0.006, f"{name} {level:.3f}", transform=axes.get_yaxis_transform(), **words)
    axes.set(xlabel="env-steps", ylabel="mean IoU", ylim=(0, 1.02), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.set_title(f"{title}: {told['structure']}, {told['test']['cases']} test cases", fontsize=10, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)
    return path
