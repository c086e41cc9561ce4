"""Demonstrations on BTCV by each strategy with Nano and GrabCut: `python baselines/trajectories.py --json FILE`.

Writes the trajectories into --out (the same command goes on with what a kill left), prints their statistics, and keeps
those with where they come from in --json. The hard set of each tool is written beside the trajectories.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from medseg_gym.bench.evaluate import machine, versions
from medseg_gym.bench.provenance import commit, weights_sha256
from medseg_gym.bench.rundir import write_whole
from medseg_gym.cli_terminal import clean_errors, progress_bars
from medseg_gym.cli_trajectories import print_statistics
from medseg_gym.trajectories.hard import ROUNDS, hard_keys, write_keys
from medseg_gym.trajectories.run import TIMES, run
from medseg_gym.trajectories.store import Trajectories
from medseg_gym.trajectories.strategies import STRATEGIES

TOOLS = ("Nano", "GrabCut")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="BTCV", help="a dataset of the catalogue")
    parser.add_argument("--tool", action="append", help="several times; Nano and GrabCut")
    parser.add_argument("--cases", type=int, default=500, help="cases tried by each strategy with each tool")
    parser.add_argument("--split", default="train", help="train, val, test or all")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=Path("runs/trajectories"), help="where the trajectories go")
    parser.add_argument("--json", type=Path, help="keep the statistics in this file")
    given = parser.parse_args()
    tools = given.tool or list(TOOLS)
    with clean_errors(), progress_bars() as progress:
        record = run(
            [f"MedSeg-{given.dataset}-{tool}-v0" for tool in tools],
            STRATEGIES,
            out=given.out,
            cases=given.cases,
            split=given.split,
            workers=given.workers,
            progress=progress,
        )
    print_statistics(record)
    hard = {}
    for env in record["settings"]["envs"]:
        keys = hard_keys(Trajectories(given.out).records(), env=env["env"])
        write_keys(given.out / f"hard-{env['tool']}.txt", keys)
        hard[env["env"]] = len(keys)
        print(f"{env['env']}: {len(keys)} cases took {ROUNDS[0]} to {ROUNDS[1]} rounds both ways")
    if given.json:
        keep(given.json, given, tools, record, hard)


def keep(file: Path, given: argparse.Namespace, tools: list[str], record: dict[str, Any], hard: dict[str, int]) -> None:
    """The statistics with what they come from; no folder of this machine is named."""
    words = ["python", "baselines/trajectories.py", "--dataset", given.dataset, "--cases", str(given.cases)]
    words += [word for tool in tools for word in ("--tool", tool)]
    words += ["--split", given.split, "--workers", str(given.workers), "--json", "benchmarks/results/trajectories.json"]
    result = {
        "what": "trajectories by strategy; turns and overlaps are of those kept, iou_tried of all",
        "command": shlex.join(words),
        **commit(),
        "machine": machine(),
        "versions": versions(),
        "weights_sha256": {tool: weights_sha256(tool) for tool in tools},
        **{name: record[name] for name in ("settings", "rows", "modalities")},
        "hard": hard,
        "times": json.loads((given.out / TIMES).read_text(encoding="utf-8"))["rows"],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
