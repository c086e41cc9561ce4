"""Measures speed and prints it with the machine: `python benchmarks/throughput.py [env] [import] [tools] [grpo]`.

Ratios taken within one run are what to quote: machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help="env, import, tools, grpo; all by default")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--model", default="", metavar="DIR", help="grpo: a checkpoint folder in place of a fake engine"
    )
    parser.add_argument("--device", default="cpu", help="grpo: where model and tool run, cpu or cuda")
    args = parser.parse_args()
    known = {"env": env, "import": imports, "tools": tools, "grpo": lambda: grpo(args.model, args.device)}
    for section in args.sections:
        if section not in known:
            parser.error(f"unknown section {section!r}; known: {', '.join(known)}")
    from medseg_gym.bench.evaluate import machine

    print(machine())
    results = {"machine": machine()}
    for section in args.sections or known:
        results[section] = known[section]()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as handle:
            json.dump(results, handle, indent=1)


def env() -> list[dict]:
    """An env-step beside the tool, on one core."""
    import cv2

    from medseg_gym.bench.throughput import env_step

    cv2.setNumThreads(1)
    print("env-step beside the tool, one core (median)")
    rows = []
    for size in (256, 512):
        for slots in (0, 8):
            row = env_step(size, slots=slots)
            rows.append(row)
            kind = f"vector, {slots} slots" if slots else "single"
            print(f"  {size} px, {kind:16} {row['ms_per_step']:.3f} ms   (bare array work {row['bare_ms']:.3f} ms)")
    return rows


def imports() -> dict:
    """`import medseg_gym` in a fresh interpreter."""
    from medseg_gym.bench.throughput import import_seconds

    row = import_seconds()
    print(f"import medseg_gym: {row['seconds']:.2f} s, torch loaded: {row['torch_loaded']}")
    return row


def tools() -> list[dict]:
    """Ways of asking SAM 2.1 tiny (full size, random weights), on the CPU, and on a GPU where there is one."""
    import torch

    from medseg_gym.bench.throughput_tools import measure_tools

    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        row = measure_tools(device=device)
        if device == "cuda":
            row["gpu"] = torch.cuda.get_device_name()
        rows.append(row)
        print(f"{row['tool']}, {device}, images of {row['side']} pixels")
        print(f"  encode {row['encode_s']:.3f} s, decode {row['decode_s']:.4f} s")
        for name, value in row["actions_per_s"].items():
            print(f"  {name:16} {value:9.3f} actions a second")
        print(f"  warm is {row['gain']:.1f} times encode_always, {row['share_of_limit']:.2f} of the limit (wanted: .9)")
        print(
            f"  the server adds {row['server_added_s'] * 1000:.1f} ms an action, {row['server_share']:.1%} of a decode"
        )
    return rows


def grpo(model: str, device: str) -> dict:
    """A GRPO step taken apart, with a fake engine on the CPU, or a checkpoint and SAM 2.1 tiny on a device."""
    from medseg_gym.bench.throughput_grpo import measure_grpo

    row = measure_grpo(model, device=device)
    print(f"GRPO step, {row['engine']} engine, {row['prompts']} x {row['rollouts']} episodes, {row['size']} px")
    for pace in row["paces"]:
        name = model if model else f"answers in {pace['answer_s']} s"
        core = f", {pace['framework_core_ms_per_turn']:.1f} ms of a core a turn" if not model else ""
        print(f"  {name}: framework {pace['framework_share']:.1%} of a step beside the learner{core}")
        print(
            f"    {pace['env_steps_per_s']:.1f} env-steps/s, {pace['sampled_tokens_per_s']:.0f} sampled and "
            f"{pace['prompt_tokens_per_s']:.0f} prompt tokens/s, {pace['encodes_per_episode']:.2f} encodes an episode"
        )
        if "step_s" in pace:
            idle = ", ".join(f"{role} {pace[f'idle_{role}']:.0%}" for role in ("tool", "engine", "learner"))
            print(f"    step {pace['step_s']:.1f} s, learner {pace['learner_share']:.0%} of it; idle: {idle}")
            print(f"    sync {pace['sync_s']:.3f} s")
        print(f"    RSS {pace['rss_mb_per_step']:+.1f} MB a step")
        for part, times in pace["latency_ms"].items():
            print(f"    {part:14} " + "  ".join(f"{name} {value:8.1f} ms" for name, value in times.items()))
        if slow := pace.get("one_slow_worker"):
            print(f"    beside a worker {slow['slower_by_s']:.1f} s slower a turn, others keep {slow['ratio']:.0%}")
    return row


if __name__ == "__main__":
    main()
