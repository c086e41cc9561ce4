"""Trains Nano: `python baselines/train_nano.py --samples FOLDER` writes weights, checkpoints and a log to --out.

A run that was cut off goes on exactly where its checkpoint stands. --minutes plans the steps from the first ones' pace.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--samples",
        type=Path,
        default=os.environ.get("MEDSEG_GYM_SAMPLES"),
        help="folder with pool/ and imis-bench/BTCV/",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument(
        "--data", choices=("all", "open"), default="all", help="open: permissive licences and drawings only"
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, help="instead of --steps: as many as fit")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--boxed", type=float, default=0.4)
    parser.add_argument("--widths", type=int, nargs=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--drawn", type=int, default=600, help="cases of Phantom; twice as many derived shapes")
    given = parser.parse_args(arguments)

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a shared machine threads that spin cost ten times the work

    import cv2
    import torch

    from medseg_gym.tools.nano_train import cases, evaluation, loop, synthetic

    torch.set_num_threads(given.threads)
    cv2.setNumThreads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    real: list[cases.Case] = []
    choosing: list = []
    if given.samples is not None:
        real, choosing = cases.real_cases(Path(given.samples), given.data)
    elif given.data == "all":
        parser.error("--data all needs --samples FOLDER (or MEDSEG_GYM_SAMPLES); --data open goes without")
    phantom = synthetic.phantom_cases(given.drawn, given.seed)
    derived = synthetic.derived_cases(real or phantom, 2 * given.drawn, given.seed)
    btcv = [case for case in real if case.source == "BTCV"]
    sources = [loop.Source(0.18, phantom), loop.Source(0.16, derived)]
    if btcv:
        sources.append(loop.Source(0.30, btcv))
    by_set: dict[str, list[cases.Case]] = {}
    for case in real:
        if case.source != "BTCV":
            by_set.setdefault(case.source, []).append(case)
    total = sum(len(found) ** 0.5 for found in by_set.values())
    sources += [loop.Source(0.36 * len(found) ** 0.5 / total, found) for found in by_set.values()]
    print(
        f"{len(real)} real cases of {len(by_set) + bool(btcv)} sets, {len(phantom)} of Phantom, "
        f"{len(derived)} derived, {len(choosing)} held out; {time.monotonic() - begun:.0f} s",
        flush=True,
    )

    plan = given.out / "plan.json"
    options = {"seed": given.seed, "batch": given.batch, "rate": given.rate, "boxed": given.boxed}
    if given.widths:
        options["widths"] = tuple(given.widths)
    steps = given.steps
    if given.minutes:
        if plan.is_file():
            steps = json.loads(plan.read_text())["steps"]
        else:
            trial = loop.Settings(steps=10**6, **options)
            state = loop.begin(trial, given.device)
            loop.train(state, sources, trial, until=5)
            first, at = state.step, time.monotonic()
            loop.train(state, sources, trial, until=first + 40)
            pace = (time.monotonic() - at) / (state.step - first)
            steps = max(100, int(given.minutes * 60 / pace))
            plan.write_text(json.dumps({"steps": steps, "seconds_a_step": pace}))
            print(f"{pace:.3f} s a step: {steps} steps", flush=True)
    settings = loop.Settings(steps=steps, **options)
    checkpoint, weights = given.out / "checkpoint.pt", given.out / "nano.safetensors"
    state = (
        loop.load_checkpoint(checkpoint, settings, given.device)
        if checkpoint.is_file()
        else loop.begin(settings, given.device)
    )
    about = {"settings": json.dumps(loop.asdict(settings)), "data": given.data}
    begun = time.monotonic()

    def report(state: loop.State, figures: Mapping[str, float]) -> None:
        told = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"{time.monotonic() - begun:6.0f} s  step {state.step}/{settings.steps}  {told}", flush=True)

    def save(state: loop.State) -> None:
        loop.save_checkpoint(checkpoint, state, settings)
        loop.write_weights(weights, state.averaged, {**about, "step": str(state.step)})

    loop.train(state, sources, settings, report=report, checkpoint=save)
    save(state)
    if choosing:
        from medseg_gym.tools.nano import Nano

        for start, scores in evaluation.means(evaluation.measure(Nano(weights=weights), choosing)).items():
            print(f"held out, {start} first: " + " ".join(f"{score:.3f}" for score in scores), flush=True)
    print(f"wrote {weights}")


if __name__ == "__main__":
    main()
