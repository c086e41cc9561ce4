"""Corrupted images: eight ways in which pictures are worse in a clinic than in a benchmark, in five severities each.

    noise       grain, alike in all channels of a grey picture
    blur        out of focus
    lowres      fewer pixels, grown again
    jpeg        blocks
    contrast    flattened around the picture's mean
    brightness  gamma: half the images darker, half brighter
    shading     a slow field, as coils, lamps and time gain leave
    occlusion   black stripes: lost lines, shadows

A spec names one, "noise-3"; severity 1 is hardly seen and 5 leaves the eye guessing. The target stays as it is. What is
drawn hangs on the seed and the image's own bytes, so all cases of an image share one picture (and one embedding), all
severities of a kind share one draw, and every policy sees the same. `dataset_options={"corruption": "noise-3"}` makes
any dataset so; its keys end in "@noise-3", and results of different corruptions never mix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from medseg_gym.datasets.base import Around, Dataset, WithStartMasks, check_structures
from medseg_gym.datasets.instructions import seeded
from medseg_gym.datasets.kinds import MARK, Grouped, Joined
from medseg_gym.errors import MedSegError, UnknownNameError, unknown
from medseg_gym.images import image_hash
from medseg_gym.types import Image, Mask, Sample

SEVERITIES = (1, 2, 3, 4, 5)
KEPT = 16  # corrupted images held: the structures of one image are asked for one after another


class Corrupted(Around):
    """A dataset with its images corrupted: "BTCV/001/slice-094/liver@noise-3" for "BTCV/001/slice-094/liver".

    It goes around kinds and words, so that a case's start mask and wording are those of the clean case.
    """

    def __init__(self, dataset: Dataset, corruption: str, *, seed: int = 0) -> None:
        self.kind, self.severity = parse(corruption)
        self.dataset, self.corruption, self.seed = dataset, corruption, seed
        self._mark = f"{MARK}{corruption}"
        self._kept: OrderedDict[str, Image] = OrderedDict()

    def keys(self, split: str, structures: Sequence[str] = ()) -> Sequence[str]:
        """The dataset's keys, marked, in its order."""
        check_structures(structures, self.structures)
        return Joined([(self.dataset.keys(split, structures), self._mark)])

    def __getitem__(self, key: str) -> Sample:
        sample = self.dataset[self._clean(key)]
        return replace(sample, key=key, image=self._image(sample.image))

    def start_mask(self, key: str) -> Mask | None:
        return self.dataset.start_mask(self._clean(key)) if isinstance(self.dataset, WithStartMasks) else None

    def siblings(self, key: str) -> dict[str, str]:
        """Structure -> key of every case of the same image; MedSegError where the dataset does not tell."""
        if not isinstance(self.dataset, Grouped):
            raise MedSegError(f"{self.name} has no siblings(key), so which structures share an image is not known")
        return {
            structure: f"{other}{self._mark}" for structure, other in self.dataset.siblings(self._clean(key)).items()
        }

    def _clean(self, key: str) -> str:
        if not key.endswith(self._mark):
            raise KeyError(f"no case {key!r}: the keys here end in {self._mark!r}")
        return key[: -len(self._mark)]

    def _image(self, image: Image) -> Image:
        identity = image_hash(image)
        if identity not in self._kept:
            self._kept[identity] = corrupt(image, self.corruption, seed=self.seed)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(identity)
        return self._kept[identity]


def specs(severities: Sequence[int] = SEVERITIES) -> tuple[str, ...]:
    """Every spec of these severities, kind by kind: "noise-1", "noise-2", ..."""
    return tuple(f"{kind}-{severity}" for kind in KINDS for severity in severities)


def parse(corruption: str) -> tuple[str, int]:
    """(kind, severity) of a spec such as "noise-3"; UnknownNameError for any other."""
    kind, _, severity = corruption.rpartition("-") if isinstance(corruption, str) else ("", "", "")
    if severity not in map(str, SEVERITIES):
        raise UnknownNameError(f"corruption={corruption!r}; wanted KIND-SEVERITY, as in 'noise-3', severity 1 to 5")
    if kind not in KINDS:
        raise unknown("corruption", kind, KINDS)
    return kind, int(severity)


def corrupt(image: Image, corruption: str, *, seed: int = 0) -> Image:
    """The (H, W, 3) image corrupted; read-only, a grey picture (equal channels) stays grey."""
    kind, severity = parse(corruption)
    rng = seeded(seed, "corruption", kind, image_hash(image))
    grey = bool((image[..., :1] == image).all())
    values = image[..., :1] if grey else image
    out = KINDS[kind](values.astype(np.float32) / 255, severity - 1, rng)
    out = np.clip(np.rint(out.reshape(values.shape) * 255), 0, 255).astype(np.uint8)
    out = np.ascontiguousarray(np.broadcast_to(out, image.shape))
    out.flags.writeable = False
    return out


# one function a kind: (H, W, C) float32 in [0, 1], C 1 or 3, and severity 0..4 -> the same shape or (H, W), not clipped


def _noise(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    return values + (0.02, 0.04, 0.07, 0.11, 0.16)[severity] * rng.standard_normal(values.shape, np.float32)


def _blur(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    import cv2

    share = (0.002, 0.004, 0.007, 0.011, 0.016)[severity]  # of the longer side, so that it means the same everywhere
    return cv2.GaussianBlur(values, (0, 0), max(0.4 + 0.2 * severity, share * max(values.shape)))


def _lowres(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    import cv2

    height, width = values.shape[:2]
    side = (160, 112, 80, 56, 40)[severity]  # pixels along the longer side; smaller images lose the same share
    shrink = min(side / max(height, width), (0.8, 0.6, 0.45, 0.33, 0.25)[severity])
    small = cv2.resize(
        values, (max(1, round(width * shrink)), max(1, round(height * shrink))), interpolation=cv2.INTER_AREA
    )
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _jpeg(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    import cv2

    quality = (50, 30, 20, 13, 9)[severity]
    pixels = np.rint(values * 255).astype(np.uint8)[..., ::-1]  # OpenCV's order
    _, coded = cv2.imencode(".jpg", np.ascontiguousarray(pixels), [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded: np.ndarray = np.asarray(cv2.imdecode(coded, cv2.IMREAD_UNCHANGED)).reshape(values.shape)
    return decoded[..., ::-1].astype(np.float32) / 255


def _contrast(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    mean = values.mean(axis=(0, 1))
    return mean + (0.75, 0.55, 0.4, 0.3, 0.2)[severity] * (values - mean)


def _brightness(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    gamma = (1.25, 1.5, 1.9, 2.5, 3.5)[severity]
    return values ** (gamma if rng.random() < 0.5 else 1 / gamma)


def _shading(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    depth = (0.25, 0.4, 0.55, 0.7, 0.85)[severity]
    height, width = values.shape[:2]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    waves = rng.uniform(0.5, 1.0)  # over the image's longer side
    along = (rows * np.sin(angle) + columns * np.cos(angle)) / max(height, width)
    field = 0.5 + 0.5 * np.sin(2 * np.pi * waves * along + phase)
    return values * (1 - depth * field[..., None])


def _occlusion(values: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Black stripes over a share of the rows, or of the columns; a heavier severity adds stripes to the lighter's."""
    share, count = (0.04, 0.08, 0.14, 0.22, 0.32)[severity], 24
    upright = rng.random() < 0.5
    length = values.shape[1] if upright else values.shape[0]
    order = rng.permutation(count)[: max(1, round(share * count))]
    edges = np.linspace(0, length, count + 1).round().astype(int)
    out = values.copy()
    for slot in order.tolist():
        lines = slice(edges[slot], max(edges[slot] + 1, edges[slot + 1]))
        out[(slice(None), lines) if upright else lines] = 0
    return out


KINDS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "lowres": _lowres,
    "jpeg": _jpeg,
    "contrast": _contrast,
    "brightness": _brightness,
    "shading": _shading,
    "occlusion": _occlusion,
}
