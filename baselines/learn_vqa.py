"""Questions beside masks: `python baselines/learn_vqa.py` trains a tiny model with and without questions, per seed.

Both runs learn the cue task's demonstrations in the same order and number, then play the same number of mask groups by
GRPO; the mixed run has half as many questions about the same kind of picture on top. Told of are, on unseen pictures
and sampled at temperature 1 with the same seeds: the accuracy of answers, and the mean IoU of masks, which questions
must not cost. Writes the numbers with their curves as JSON and a picture. A run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a shared machine threads that spin cost ten times the work
sys.path.insert(0, str(Path(__file__).resolve().parent))

from cue_task import ENV, ENV_OPTIONS, PROTOCOL, RIGHT, SIZE, unseen, write_demonstrations
from learn_cue import COMMON, grpo_config, provenance, supervised

SEEDS = (0, 1, 2)
DIFFICULTY = 0.0  # stripes without noise, which a random model learns to see in half the steps
QUESTIONS = f"Phantom:task=cue,difficulty={DIFFICULTY}"
SHARE = 1 / 3
DEMONSTRATIONS = 768
SFT: dict[str, Any] = {"steps": 100, "batch": 32, "lr": 2e-3}  # chats of masks; half as many questions come on top
GRPO: dict[str, Any] = {"iterations": 8, "prompts": 8, "rollouts": 8, "lr": 5e-4}
RUNS = ("masks", "mixed")
OPTIONS = {**ENV_OPTIONS, "dataset_options": {"task": "cue", "difficulty": DIFFICULTY}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/learn_vqa"), help="the runs' folder")
    parser.add_argument("--result", type=Path, help="where the numbers go; default: the runs' folder")
    parser.add_argument("--picture", type=Path, help="where the curves go; default: beside the numbers")
    given = parser.parse_args(arguments)
    results = [learn(seed, given.out / f"seed-{seed}", say=print) for seed in given.seeds]
    file = given.result or given.out / "vqa.json"
    record = {
        **provenance(given.seeds),
        "command": f"python baselines/learn_vqa.py --seeds {' '.join(map(str, given.seeds))}",
        "task": "Phantom cue of difficulty 0; 64 unseen pictures, 3 questions about each, sampled at T=1, seed 0",
        "sft": SFT,
        "grpo": GRPO,
        "questions": QUESTIONS,
        "question_share": SHARE,
        "chance": blind(unseen_questions()),
        "seeds": results,
    }
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
    right: float = RIGHT,
    cases: int = 64,
    questions: str = QUESTIONS,
    say: Any = lambda line: None,
) -> dict[str, Any]:
    """Both runs of a seed, each after supervised training and after GRPO. What is done is read again."""
    from medseg_gym.rl.grpo import train
    from medseg_gym.rl.runlog import read_metrics

    done = out / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    result: dict[str, Any] = {"seed": seed}
    for name in RUNS:
        folder, begun = out / name, time.process_time()
        more: dict[str, Any] = {"env_options": OPTIONS}
        if name == "mixed":
            more |= {"questions": questions, "question_share": SHARE}
        wider = 1 if name == "masks" else 1 / (1 - SHARE)  # as many masks in both
        if not (data := folder / "demonstrations.h5").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_demonstrations(data, demonstrations, seed, right=right, difficulty=DIFFICULTY)
        start = supervised(seed, folder, {**sft, **more, "batch": round(sft["batch"] * wider)}, demonstrations)
        found: dict[str, Any] = {"sft": measured(start, cases, questions)}
        say(f"seed {seed}, {name}: {_words(found['sft'])} after supervised training")
        if grpo.get("iterations"):
            settings = {**grpo, **more, "prompts": round(grpo["prompts"] * wider)}
            train(grpo_config(seed, start, folder / "grpo", settings), say=say)
            found["grpo"] = measured(folder / "grpo" / "final", cases, questions)
            say(f"seed {seed}, {name}: {_words(found['grpo'])} after GRPO")
            records = read_metrics(folder / "grpo")
            names = ("train/iou", "train/vqa_accuracy")
            found["curve"] = {key: [r[key] for r in records if key in r] for key in names}
        result[name] = {**found, "cpu_s": round(time.process_time() - begun, 1)}
    done.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def unseen_questions(cases: int = 64, questions: str = QUESTIONS) -> list[str]:
    """The questions about the first `cases` unseen pictures of the cue task, one of each kind."""
    kinds = open_questions(questions).kinds
    pictures = [key.split("/")[2].split("-")[0] for key in unseen()[:cases]]
    return [f"PhantomQuestions/test/{int(number):06d}/{kind}" for number in pictures for kind in kinds]


def blind(keys: list[str]) -> float:
    """The accuracy of the best policy that never looks at the picture: each kind's most frequent answer."""
    questions = open_questions(QUESTIONS)
    answers: dict[str, Counter[str]] = {}
    for key in keys:
        asked = questions.question(key)
        answers.setdefault(asked.kind, Counter())[asked.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(keys)


def measured(folder: Path, cases: int = 64, questions: str = QUESTIONS) -> dict[str, float]:
    """Mean IoU and accuracy on the unseen pictures, sampled at temperature 1 with the same seeds."""

    async def played() -> dict[str, float]:
        from medseg_gym.rl.engines.hf import HFEngine
        from medseg_gym.rl.local_worker import LocalWorker
        from medseg_gym.rl.validate import validate

        engine = HFEngine(folder, device="cpu")
        worker = LocalWorker(ENV, 32, PROTOCOL, size=SIZE, options=OPTIONS, questions=questions)
        limits = {name: COMMON[name] for name in ("max_new_tokens", "max_chat_tokens")}
        asked = unseen_questions(cases, questions)
        try:
            found = await validate(
                [worker], engine, engine.tokens, unseen(), temperature=1.0, questions=asked, **limits
            )
        finally:
            await engine.close()
            await worker.close()
        return {"iou": found.iou, **found.questions}

    return asyncio.run(played())


def draw(record: Mapping[str, Any], path: Path) -> Path:
    """A picture of both numbers after each training, a line a seed, with questions and without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained", sharex=True)
    looks = {"masks": ("#777777", "without questions"), "mixed": ("#0072b2", "with questions")}
    for axes, name, title in zip(both, ("vqa_accuracy", "iou"), ("accuracy of answers", "mean IoU"), strict=True):
        for run, (colour, label) in looks.items():
            for number, result in enumerate(record["seeds"]):
                stages = [stage for stage in ("sft", "grpo") if stage in result[run]]
                values = [result[run][stage][name] for stage in stages]
                axes.plot(stages, values, color=colour, marker="o", markersize=5, label="" if number else label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(ylim=(0, 1.02), xlim=(-0.3, 1.3))
        axes.set_xticks([0, 1], ["after SFT", "after GRPO"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
    both[0].axhline(record["chance"], color="#777777", linewidth=1, linestyle=(0, (4, 3)))
    both[0].text(1.28, record["chance"] - 0.03, "never looks", ha="right", va="top", color="#555555", fontsize=9)
    both[1].legend(frameon=False, loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)
    return path


def open_questions(spec: str) -> Any:
    from medseg_gym.datasets import vqa

    return vqa.open_questions(spec)


def _words(found: Mapping[str, float]) -> str:
    return f"accuracy {found['vqa_accuracy']:.3f}, IoU {found['iou']:.3f}"


if __name__ == "__main__":
    main()
