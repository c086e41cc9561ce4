"""Measures speed and prints it with the machine: `python benchmarks/throughput.py [env] [import] [tools]`.

Ratios taken within one run are what to quote: machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help="env, import, tools; all by default")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    known = {"env": env, "import": imports, "tools": tools}
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


def tools() -> dict:
    """Cached actions against encoding at every action, with SAM 2.1 tiny at full size and random weights."""
    from medseg_gym.bench.throughput_tools import measure_cache

    row = measure_cache()
    print("SAM2.1T, random weights, CPU")
    for name, value in row.items():
        print(f"  {name}: {value:.3f}" if isinstance(value, float) else f"  {name}: {value}")
    return row


if __name__ == "__main__":
    main()
