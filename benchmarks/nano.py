"""Measures Nano, GrabCut and the box's ellipse on sets Nano never saw: `python benchmarks/nano.py --samples FOLDER`.

Dice after a tight box or a centre click, and after four of the oracle's error clicks on each; nothing is undone.
Means are over datasets, each dataset counting once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (("box", "box", 0), ("box+4", "box", 4), ("click", "click", 0), ("click+4", "click", 4))
WANTED = {  # what the shipped variant has to reach
    "unseen": {"box": 0.84, "box+4": 0.89, "click": 0.60, "click+4": 0.84},
    "BTCV test": {"box": 0.80, "box+4": 0.87, "click": 0.50, "click+4": 0.78},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--samples",
        type=Path,
        default=os.environ.get("MEDSEG_GYM_SAMPLES"),
        help="folder with pool/ and imis-bench/BTCV/",
    )
    parser.add_argument("--weights", type=Path, help="another weight file than the shipped one")
    parser.add_argument("--open-weights", type=Path, help="the weights of --data open, measured beside")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "nano.json")
    parser.add_argument("--every", type=int, default=1, help="only every n-th case; for a quick look")
    parser.add_argument("--no-baselines", action="store_true", help="no GrabCut and no ellipse")
    parser.add_argument("--add", action="store_true", help="measure --open-weights only, into an --out that is there")
    given = parser.parse_args()
    if given.samples is None:
        parser.error("--samples FOLDER is needed (or MEDSEG_GYM_SAMPLES)")

    from medseg_gym.bench.evaluate import machine, versions  # noqa: F401  # missing parts should tell before the work
    from medseg_gym.tools.cache import CachedTool
    from medseg_gym.tools.grabcut import GrabCut
    from medseg_gym.tools.nano import Nano

    cases = list(test_samples(Path(given.samples)))[:: given.every]
    nano = Nano() if given.weights is None else Nano(weights=given.weights)
    tools: dict[str, Any] = {} if given.add else {"Nano": nano}
    if given.open_weights:
        tools["Nano, open data"] = Nano(weights=given.open_weights)
    baselines = not given.no_baselines and not given.add
    if baselines:
        tools["GrabCut"] = GrabCut()
    results: dict[str, Any] = {}
    for name, tool in tools.items():
        begun = time.monotonic()
        results[name] = summary(scores(CachedTool(tool), cases))
        show(name, results[name], time.monotonic() - begun)
    if baselines:
        results["ellipse in the box"] = summary(ellipses(cases))
        show("ellipse in the box", results["ellipse in the box"], 0)
    if given.add:
        record = json.loads(given.out.read_text())
        if record["about"]["fingerprint"] != nano.fingerprint:
            parser.error(f"{given.out} was measured with other weights; run without --add")
        record["results"] |= results
        given.out.write_text(json.dumps(record, indent=1) + "\n")
        return
    record = {
        "what": "mean Dice; 'unseen' and 'BTCV test' are means over datasets",
        "wanted": WANTED,
        "results": results,
        "speed": speed(nano),
        "about": about(nano, given.weights),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {given.out}")


def test_samples(root: Path) -> Iterator[tuple[str, Any]]:
    """(dataset, sample) of everything Nano never saw."""
    import numpy as np

    from medseg_gym.datasets.cards import DATASETS
    from medseg_gym.datasets.importers import RawCase, importer
    from medseg_gym.images import read_grey
    from medseg_gym.tools.nano_train.cases import UNSEEN, btcv_samples, pool_samples
    from medseg_gym.types import Sample

    yield from pool_samples(root, UNSEEN)
    pairs = root / "tif-pairs" / "CVC-ClinicDB"
    for path in sorted((pairs / "Original").glob("*.tif"), key=lambda p: int(p.stem)):
        mask = read_grey(pairs / "Ground Truth" / path.name) > 127
        # Three samples a pixel tagged as grey: Pillow refuses that. The pixels are uncompressed RGB after the header.
        image = np.frombuffer(path.read_bytes(), np.uint8, 3 * mask.size, offset=8).reshape(*mask.shape, 3)
        yield "CVC-ClinicDB (tif)", Sample(f"CVC-tif/{path.stem}", image, mask, "polyp", "polyp", path.stem)
    layout, card = importer("biomedparse"), DATASETS["BTCV"]
    for item in layout.plan(root / "biomedparse" / "demo", card, {})[0]:
        for raw in layout.read(item):
            if isinstance(raw, RawCase):
                for structure, mask in raw.masks.items():
                    if mask.any():
                        yield (
                            "BiomedParse",
                            Sample(
                                f"BiomedParse/{raw.name}/{structure}",
                                raw.image,
                                mask,
                                structure,
                                structure,
                                raw.patient,
                            ),
                        )
    yield from btcv_samples(root, test=True)


def scores(tool: Any, cases: list[tuple[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    from medseg_gym.tools.nano_train.evaluation import measure

    return measure(tool, cases)


def ellipses(cases: list[tuple[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    from medseg_gym.metrics import dice
    from medseg_gym.tools.nano_train.evaluation import ellipse

    found: dict[str, dict[str, list[list[float]]]] = {}
    for source, sample in cases:
        found.setdefault(source, {"box": []})["box"].append([dice(ellipse(sample), sample.target)])
    return found


def summary(found: dict[str, dict[str, list[list[float]]]]) -> dict[str, Any]:
    """Per dataset the mean Dice after each action from each start; then the two means over datasets."""
    import numpy as np

    sets = {
        source: {start: np.mean(rows, axis=0).round(4).tolist() for start, rows in starts.items()}
        | {"cases": len(next(iter(starts.values())))}
        for source, starts in found.items()
    }
    groups = {"unseen": [s for s in sets if s != "BTCV"], "BTCV test": [s for s in sets if s == "BTCV"]}
    means = {
        group: {
            start: np.mean([sets[s][start] for s in names], axis=0).round(4).tolist()
            for start in sets[names[0]]
            if start != "cases"
        }
        for group, names in groups.items()
        if names
    }
    table = {
        group: {
            column: starts[start][at] for column, start, at in COLUMNS if start in starts and at < len(starts[start])
        }
        for group, starts in means.items()
    }
    return {"table": table, "means": means, "datasets": sets}


def show(name: str, result: dict[str, Any], seconds: float) -> None:
    print(f"{name} ({seconds:.0f} s)")
    for group, row in result["table"].items():
        print(f"  {group:24}" + "  ".join(f"{column} {value:.3f}" for column, value in row.items()))
    for source, starts in result["datasets"].items():
        cells = "  ".join(
            f"{start} " + " ".join(f"{v:.3f}" for v in values) for start, values in starts.items() if start != "cases"
        )
        print(f"    {source:22}{starts['cases']:4}  {cells}", flush=True)


def speed(tool: Any) -> dict[str, float]:
    """Milliseconds of an encode and of each kind of decode on a 512 x 512 image: the median, 2 threads."""
    import statistics

    import numpy as np
    import torch

    from medseg_gym.types import Box, Click, Query

    torch.set_num_threads(2)
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)

    def median(call: Any) -> float:
        call()
        times = []
        for _ in range(40):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return round(1000 * statistics.median(times), 2)

    embedding = tool.encode([image])[0]
    boxed = Query(embedding, (Box(100, 100, 250, 220),))
    prior = tool.predict([boxed])[0].prior
    later = Query(embedding, (Box(100, 100, 250, 220), Click(150, 150), Click(240, 110, False)), prior)
    first = Query(embedding, (Click(200, 200),))
    return {
        "encode_ms": median(lambda: tool.encode([image])),
        "decode_box_ms": median(lambda: tool.predict([boxed])),
        "decode_later_click_ms": median(lambda: tool.predict([later])),
        "decode_first_click_ms": median(lambda: tool.predict([first])),
    }


def about(tool: Any, weights: Path | None) -> dict[str, Any]:
    import hashlib
    import sys

    from medseg_gym.bench.evaluate import machine, versions
    from medseg_gym.tools.nano import WEIGHTS

    path = weights or WEIGHTS
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "weights_bytes": path.stat().st_size,
        "fingerprint": tool.fingerprint,
        "commit": commit,
        "command": "python " + " ".join(sys.argv),
        "machine": machine(),
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
