"""Kinds of cases beyond outlining from scratch: refine a mask, mistrust a wrong one, see that a structure is absent.

    scratch       the case as it is
    refine        begins with the target, degraded: its IoU with the target lies in REFINE_IOU
    inconsistent  begins with the mask of another structure of the same image (IBISAgent, appendix D.5)
    absent        asks for a structure that the image has no mask of; the empty mask, at once, is right

A dataset that has a method `start_mask(key)` gives the env its cases' start masks; `Kinds` is such a dataset. All that
is drawn hangs on the seed and the key alone: a group shares one start, and so do the policies of an evaluation.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol, cast, overload, runtime_checkable

import numpy as np

from medseg_gym.datasets.base import Around, Dataset, check_structures
from medseg_gym.datasets.instructions import seeded
from medseg_gym.errors import MedSegError, UnknownNameError, unknown
from medseg_gym.metrics import iou
from medseg_gym.types import Mask, Sample

KINDS = ("scratch", "refine", "inconsistent", "absent")
REFINE_IOU = (0.3, 0.85)
MARK = "@"  # between a case's own key and its kind
TRIES = 40


@runtime_checkable
class Grouped(Protocol):
    """A dataset that tells which cases share an image."""

    def siblings(self, key: str) -> dict[str, str]:
        """Structure -> key of every case of the same image, this one included."""
        ...


class Kinds(Around):
    """A dataset with other kinds of its cases: "BTCV/001/slice-094/liver@refine" beside "BTCV/001/slice-094/liver".

    "inconsistent" and "absent" need a dataset with `siblings`. They have no case of an image without a second
    structure, or with all of them. An absent structure is one without a mask: use that kind only where every structure
    that is in an image is outlined, and not on data prepared with empty=keep, whose empty masks count as masks. Words
    go around kinds, not the other way: `Worded(Kinds(dataset))`.
    """

    def __init__(self, dataset: Dataset, kinds: Sequence[str] = KINDS, *, seed: int = 0) -> None:
        if isinstance(kinds, str) or not kinds:
            raise UnknownNameError(f"kinds={kinds!r}; wanted a list of some of: {', '.join(KINDS)}")
        for kind in kinds:
            if kind not in KINDS:
                raise unknown("kind of case", kind, KINDS)
        if {"inconsistent", "absent"} & set(kinds) and not isinstance(dataset, Grouped):
            raise MedSegError(
                f"{dataset.name} has no siblings(key), so which structures share an image is not known; "
                "the kinds inconsistent and absent need that"
            )
        self.dataset, self.kinds, self.seed = dataset, tuple(dict.fromkeys(kinds)), seed

    def keys(self, split: str, structures: Sequence[str] = ()) -> Sequence[str]:
        """Kind by kind, each in the dataset's order."""
        check_structures(structures, self.structures)
        return Joined([self._of_kind(kind, split, structures) for kind in self.kinds])

    def __getitem__(self, key: str) -> Sample:
        base, kind = self._parse(key)
        sample = self.dataset[base]
        if kind == "scratch":
            return sample
        if kind != "absent":
            return replace(sample, key=key)
        structure = self._missing(base)
        empty = np.zeros_like(sample.target)
        empty.flags.writeable = False
        where = sample.instruction.removeprefix(sample.structure)
        wording = f"{structure}{where}" if where != sample.instruction else structure
        return replace(sample, key=key, target=empty, structure=structure, instruction=wording)

    def start_mask(self, key: str) -> Mask | None:
        """The (H, W) mask an episode of this case begins with; None for the empty one."""
        base, kind = self._parse(key)
        if kind == "refine":
            target = self.dataset[base].target
            return degrade(target, seeded(self.seed, kind, base)) if target.any() else None
        if kind == "inconsistent":
            others = self._others(base)
            return self.dataset[others[int(seeded(self.seed, kind, base).integers(len(others)))]].target
        return None

    def _parse(self, key: str) -> tuple[str, str]:
        """The dataset's own key, and the kind."""
        base, mark, kind = key.rpartition(MARK)
        base, kind = (base, kind) if mark and kind in KINDS[1:] else (key, "scratch")
        if kind not in self.kinds:
            raise KeyError(f"no case {key!r}: its kind is {kind}, those here are {', '.join(self.kinds)}")
        return base, kind

    def _of_kind(self, kind: str, split: str, structures: Sequence[str]) -> tuple[Sequence[str], str]:
        """A split's cases of a kind: the dataset's own keys, and what stands behind them."""
        if kind == "scratch":
            return self.dataset.keys(split, structures), ""
        if kind == "refine":
            return self.dataset.keys(split, structures), f"{MARK}{kind}"
        if kind == "inconsistent":
            return [key for key in self.dataset.keys(split, structures) if self._others(key)], f"{MARK}{kind}"
        firsts = dict.fromkeys(min(self._siblings(key).values()) for key in self.dataset.keys(split))  # one an image
        found = [key for key in firsts if self._lacks(key)]
        return [key for key in found if not structures or self._missing(key) in structures], f"{MARK}{kind}"

    def _siblings(self, key: str) -> dict[str, str]:
        return cast(Grouped, self.dataset).siblings(key)

    def _others(self, key: str) -> list[str]:
        return [other for other in self._siblings(key).values() if other != key]

    def _lacks(self, key: str) -> list[str]:
        """The structures without a case in the image of a key."""
        there = self._siblings(key)
        return [structure for structure in self.structures if structure not in there]

    def _missing(self, key: str) -> str:
        lacks = self._lacks(key)
        if not lacks:
            raise KeyError(f"no structure is absent from the image of {key!r}")
        return lacks[int(seeded(self.seed, "absent", key).integers(len(lacks)))]


class Joined(Sequence[str]):
    """Sequences of keys one after the other, each key with its sequence's ending; made as they are asked for."""

    def __init__(self, parts: Sequence[tuple[Sequence[str], str]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(keys) for keys, _ in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        at = range(len(self))[at]
        part = bisect_right(self._ends, at)
        keys, ending = self._parts[part]
        return f"{keys[at - (self._ends[part] - len(keys))]}{ending}"

    def __iter__(self) -> Iterator[str]:
        for keys, ending in self._parts:
            for key in keys:
                yield f"{key}{ending}"


def degrade(target: Mask, rng: np.random.Generator) -> Mask:
    """A mask that is wrong as a hasty one is: shrunk, grown, moved, cut or spilled, its IoU within REFINE_IOU.

    Where no try comes to lie there (a target of a pixel or two), the nearest one that is not the target; an empty
    target, and one that fills a single-pixel image, come back as they are.
    """
    low, high = REFINE_IOU
    best, best_miss = target, np.inf
    if not target.any():
        return target
    for _ in range(TRIES):
        mask = _WAYS[int(rng.integers(len(_WAYS)))](target, rng)
        overlap = iou(mask, target)
        miss = max(low - overlap, overlap - high, 0.0)
        if mask.any() and overlap < 1 and miss < best_miss:
            best, best_miss = mask, miss
        if best_miss == 0:
            break
    best = best.copy()
    best.flags.writeable = False
    return best


def _reach(target: Mask) -> float:
    """The radius of a disc of the target's area."""
    return float(np.sqrt(np.count_nonzero(target) / np.pi))


def _brush(radius: int) -> np.ndarray:
    rows, columns = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (rows**2 + columns**2 <= radius**2 + radius * 0.5).astype(np.uint8)


def _shrink(target: Mask, rng: np.random.Generator) -> Mask:
    import cv2

    radius = 1 + int(rng.integers(1 + int(_reach(target) / 3)))
    bordered = np.pad(target.astype(np.uint8), 1)  # the image's edge is an edge of the target
    return cv2.erode(bordered, _brush(radius), borderValue=0)[1:-1, 1:-1] > 0


def _grow(target: Mask, rng: np.random.Generator) -> Mask:
    import cv2

    radius = 1 + int(rng.integers(1 + int(_reach(target) / 2)))
    return cv2.dilate(target.astype(np.uint8), _brush(radius)) > 0


def _move(target: Mask, rng: np.random.Generator) -> Mask:
    angle, way = rng.uniform(0, 2 * np.pi), max(1.0, _reach(target) * rng.uniform(0.2, 0.8))
    return _shifted(target, round(way * np.sin(angle)), round(way * np.cos(angle)))


def _cut(target: Mask, rng: np.random.Generator) -> Mask:
    """Only the part on one side of a line through one of the target's pixels."""
    pixels = np.argwhere(target)
    row, column = pixels[int(rng.integers(len(pixels)))]
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.ogrid[: target.shape[0], : target.shape[1]]
    return target & ((rows - row) * np.sin(angle) + (columns - column) * np.cos(angle) >= 0)


def _spill(target: Mask, rng: np.random.Generator) -> Mask:
    """A disc more, around one of the target's pixels."""
    pixels = np.argwhere(target)
    row, column = pixels[int(rng.integers(len(pixels)))]
    radius = max(1.0, _reach(target) * rng.uniform(0.5, 1.3))
    rows, columns = np.ogrid[: target.shape[0], : target.shape[1]]
    return target | ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2)


def _shifted(mask: Mask, down: int, right: int) -> Mask:
    """The mask moved, without what leaves the image."""
    height, width = mask.shape
    out = np.zeros_like(mask)
    rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    source = slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0))
    if abs(down) < height and abs(right) < width:
        out[rows, columns] = mask[source]
    return out


_WAYS: tuple[Callable[[Mask, np.random.Generator], Mask], ...] = (_shrink, _grow, _move, _cut, _spill)
