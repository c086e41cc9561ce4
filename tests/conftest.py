"""What the tests share: a small dataset made by hand, the tools that run anywhere, and where real samples may lie."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from medseg_gym.datasets.base import check_split, check_structures
from medseg_gym.tools.cards import TOOLS
from medseg_gym.types import Sample

ROOT = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # Ray would join the cluster of the tests in the process beside this one
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")  # short, as its sockets' paths must be
    atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

HAVE_TORCH = find_spec("torch") is not None  # the environment with the newest Gymnasium is small, and has none
WITHOUT_WEIGHTS = [
    card.id for card in TOOLS.values() if card.factory and not card.weights and (HAVE_TORCH or card.id != "Nano")
]


class Blobs:
    """Six 48 x 64 cases a split: an ellipse ("disc") and a rectangle ("bar") in each of three images."""

    name = "Blobs"
    structures = ("bar", "disc")

    def __init__(self, height: int = 48, width: int = 64, absent: bool = False) -> None:
        self.height, self.width, self.absent = height, width, absent

    def keys(self, split: str, structures: Sequence[str] = ()) -> tuple[str, ...]:
        check_split(split)
        check_structures(structures, self.structures)
        kept = structures or self.structures
        return tuple(f"Blobs/{split}-{i}/{s}" for i in range(3) for s in self.structures if s in kept)

    def __getitem__(self, key: str) -> Sample:
        try:
            _, patient, structure = key.split("/")
            split, number = patient.split("-")
            check_split(split)
            i = int(number)
        except ValueError:
            raise KeyError(key) from None
        if structure not in self.structures or i not in range(3):
            raise KeyError(key)
        h, w = self.height, self.width
        rows, columns = np.mgrid[:h, :w]
        cy, cx = h * (3 + i) / 10, w * (4 + i) / 12
        disc = ((rows - cy) / (h / 5)) ** 2 + ((columns - cx) / (w / 6)) ** 2 <= 1
        bar = (rows > 0.7 * h) & (rows <= 0.9 * h) & (columns > 0.1 * w) & (columns < (0.4 + 0.1 * i) * w)
        image = np.full((h, w, 3), 40 + 10 * i, np.uint8)
        image[disc] = (200, 180, 170)
        image[bar] = (120, 200, 120)
        target = np.zeros((h, w), np.bool_) if self.absent else (disc if structure == "disc" else bar)
        image.flags.writeable = target.flags.writeable = False
        return Sample(
            key=key,
            image=image,
            target=target,
            structure=structure,
            instruction=f"{structure} in drawing",
            patient=patient,
        )


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data home of the test's own; ids that what is prepared there registers go with it."""
    monkeypatch.setenv("MEDSEG_GYM_HOME", str(tmp_path / "home"))
    before = set(gym.registry)
    yield tmp_path / "home"
    for name in set(gym.registry) - before:
        del gym.registry[name]


def samples_folder() -> Path:
    """Where real samples lie, $MEDSEG_GYM_SAMPLES; skips the test where there are none."""
    folder = os.environ.get("MEDSEG_GYM_SAMPLES", "")
    if not folder or not (Path(folder) / "imis-bench").is_dir():
        pytest.skip(f"real samples not found in {folder!r}; set MEDSEG_GYM_SAMPLES to their folder")
    return Path(folder)


@pytest.fixture(scope="session")
def samples() -> Path:
    return samples_folder()
