"""The real images Nano may learn from, and those it is measured on: which sets, which patients, and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import DataMissingError
from medseg_gym.images import read_grey, read_image
from medseg_gym.tools.nano_maps import pyramid
from medseg_gym.types import Image, Mask, Sample

UNSEEN = (  # never trained on; the benchmark's sets
    "CHAOS_CT_liver", "ISIC2017", "ISIC_HAM10000", "CVC-ClinicDB", "LASC2018_LeftAtrium", "Prostate_MRI",
    "OpticDisc_DRIONS-like", "LiverUS",
)  # fmt: skip
BTCV_TEST = ("028", "029", "030", "031", "032")  # patients
UNLICENSED = ("CXR_OpenIST", "CXR_lungseg2d_demo")  # nobody says what may be done with their images
# MedScribble gathers other collections. Its CHAOS livers are of an unseen set; its BTCV images name no patient.
MEDSCRIBBLE_OUT = ("CHAOS", "BTCV")
# Terms that allow any use of derived work (CC0, CC BY, CC BY-SA, MIT).
OPEN = ("MSD_Hippocampus", "MSD_Lung", "SCT_SpinalCord", "TNBC_nuclei", "TotalSegmentator", "CDD-CESM")
LONGEST = 640  # larger images are halved in size once, to save memory


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One structure of one image, ready to be seen through windows."""

    source: str  # its set
    name: str
    image: tuple[NDArray[Any], ...]  # pyramid, grey where the image is
    target: tuple[NDArray[Any], ...]  # pyramid of 0 and 255
    hull: NDArray[Any]  # (n, 2) convex hull of the target's pixel centres
    area: int  # the target's pixels

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image[0].shape[:2]


def make_case(source: str, name: str, image: Image, target: Mask) -> Case | None:
    """The case of an image and its target; None where the target has under 12 pixels."""
    import cv2

    if int(target.sum()) < 12:
        return None
    grey = image.ndim == 2 or bool((image == image[..., :1]).all())
    pixels = image if image.ndim == 2 else image[..., 0] if grey else image
    scale = min(1.0, LONGEST / max(pixels.shape[:2]))
    values = target.astype(np.uint8) * 255
    if scale < 1:
        size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        values = cv2.resize(values, size, interpolation=cv2.INTER_AREA)
    return Case(
        source,
        name,
        pyramid(np.ascontiguousarray(pixels)),
        pyramid(values),
        hull_of(values > 127),
        int((values > 127).sum()),
    )


def hull_of(mask: Mask) -> NDArray[Any]:
    """(n, 2) float: the convex hull of the mask's pixel centres; empty for an empty mask."""
    import cv2

    points = cv2.findNonZero(mask.view(np.uint8))
    return np.zeros((0, 2)) if points is None else cv2.convexHull(points)[:, 0].astype(np.float64)


def held_out(source: str, name: str) -> bool:
    """Whether a training set's image is kept for choosing between trainings: about one in ten, by its name."""
    if source == "BTCV":
        return name.split("/")[1] in ("025", "026", "027")
    stem = name.split("_slice")[0].split("_frame")[0].rsplit("_z", 1)[0]  # all slices of a patient go one way
    return int(hashlib.sha256(f"{source}/{stem}".encode()).hexdigest(), 16) % 10 == 0


def pool_samples(root: Path, names: Sequence[str]) -> Iterator[tuple[str, Sample]]:
    """(set, sample) of the pool's sets of these names, in the order of their index."""
    for name in names:
        folder = root / "pool" / name
        if not (folder / "index.json").is_file():
            raise DataMissingError(
                f"{folder} has no index.json; wanted the pool of real samples; name its parent folder with --samples"
            )
        for row in json.loads((folder / "index.json").read_text()):
            if name == "MedScribble" and row["origin"] in MEDSCRIBBLE_OUT:
                continue
            stem = Path(row["image"]).stem
            image, target = read_image(folder / row["image"]), read_grey(folder / row["mask"]) > 127
            yield name, Sample(f"{name}/{stem}/{row['target']}", image, target, row["target"], row["target"], stem)


def btcv_items(root: Path, test: bool) -> list[Any]:
    """The importer's items of the test patients, or of all others."""
    from medseg_gym.datasets.cards import DATASETS
    from medseg_gym.datasets.importers import importer

    items = importer("imis-bench").plan(root / "imis-bench" / "BTCV", DATASETS["BTCV"], {})[0]
    return [item for item in items if (item.patient in BTCV_TEST) is test]


def btcv_samples(root: Path, test: bool) -> Iterator[tuple[str, Sample]]:
    """("BTCV", sample) of the test patients, or of all others."""
    from medseg_gym.datasets.importers import RawCase, importer

    for item in btcv_items(root, test):
        for raw in importer("imis-bench").read(item):
            if not isinstance(raw, RawCase):
                continue
            for structure, mask in raw.masks.items():
                key = f"BTCV/{raw.patient}/{raw.name}/{structure}"
                yield "BTCV", Sample(key, raw.image, mask, structure, structure, raw.patient)


def training_sets(root: Path, data: str) -> list[str]:
    """The pool's sets that may be learned from: all but the unseen and the unlicensed, or the open ones alone."""
    if data == "open":
        return sorted(OPEN)
    found = sorted(path.name for path in (root / "pool").iterdir() if (path / "index.json").is_file())
    return [name for name in found if name not in UNSEEN + UNLICENSED]


def real_cases(root: Path, data: str = "all") -> tuple[list[Case], list[tuple[str, Sample]]]:
    """The cases to learn from and the samples held out for choosing. `data` is "all" or "open"."""
    pairs = list(pool_samples(root, training_sets(root, data)))
    if data == "all":
        pairs += list(btcv_samples(root, test=False))
    cases, choosing = [], []
    for source, sample in pairs:
        if held_out(source, sample.key if source == "BTCV" else sample.patient):
            choosing.append((source, sample))
        elif (case := make_case(source, sample.key, sample.image, sample.target)) is not None:
            cases.append(case)
    return cases, choosing
