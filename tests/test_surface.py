"""NSD and HD95: by hand, against an implementation from the definitions, and the rule for empty masks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest

from medseg_gym.errors import MedSegError
from medseg_gym.surface import Surface, surface, worst
from medseg_gym.types import Mask

EMPTY = np.zeros((12, 16), np.bool_)


def dots(*places: tuple[int, int]) -> Mask:
    mask = EMPTY.copy()
    for place in places:
        mask[place] = True
    return mask


def blob(generator: np.random.Generator, shape: tuple[int, int] = (28, 36)) -> Mask:
    """A few discs and rectangles, some of them cut off by the border, with holes and single pixels."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, np.bool_)
    for _ in range(3):
        y, x, r = generator.integers(shape[0]), generator.integers(shape[1]), generator.integers(1, 9)
        mask |= (rows - y) ** 2 + (columns - x) ** 2 <= r * r
    y, x = generator.integers(shape[0]), generator.integers(shape[1])
    mask[y : y + 5, x : x + 4] ^= True
    return mask ^ (generator.random(shape) < 0.01)


def contour(mask: Mask, spacing: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Nikolov's contour, slowly: (N, 2) pixel corners where the four around them differ, and the length at each."""
    padded = np.pad(mask, 1)
    places, lengths = [], []
    for y in range(mask.shape[0] + 1):
        for x in range(mask.shape[1] + 1):
            a, b, c, d = padded[y, x], padded[y, x + 1], padded[y + 1, x], padded[y + 1, x + 1]
            count = int(a) + int(b) + int(c) + int(d)
            if count in (0, 4):
                continue
            if count in (1, 3):  # a corner is cut off
                length = math.hypot(*spacing) / 2
            elif a == d:  # two corners that touch: both are cut off
                length = math.hypot(*spacing)
            else:
                length = spacing[1] if a == b else spacing[0]
            places.append((y * spacing[0], x * spacing[1]))
            lengths.append(length)
    return np.array(places), np.array(lengths)


def outline(mask: Mask, spacing: tuple[float, float]) -> np.ndarray:
    """(N, 2) places of the mask's pixels that have a neighbour outside it."""
    p = np.pad(mask, 1)
    inside = p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return np.argwhere(mask & ~inside) * spacing


def nearest(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(places[:, None] - others[None]).sum(axis=2)).min(axis=1)


def from_definitions(mask: Mask, target: Mask, spacing: tuple[float, float], tolerance: float) -> tuple[float, float]:
    (a, length_a), (b, length_b) = contour(mask, spacing), contour(target, spacing)
    within = length_a[nearest(a, b) <= tolerance].sum() + length_b[nearest(b, a) <= tolerance].sum()
    edge_a, edge_b = outline(mask, spacing), outline(target, spacing)
    hd95 = max(np.percentile(nearest(edge_a, edge_b), 95), np.percentile(nearest(edge_b, edge_a), 95))
    return within / (length_a.sum() + length_b.sum()), hd95


@pytest.mark.slow  # MONAI takes seconds to import
def test_two_pixels_by_hand() -> None:
    """Three columns apart. Of a pixel's four corners two are 2 from the other pixel's, and two are 3."""
    found = surface(dots((5, 5)), dots((5, 8)), tolerance=2)
    assert found == Surface(nsd=0.5, hd95=3.0, unit="px", tolerance=2)
    assert surface(dots((5, 5)), dots((5, 8)), tolerance=3).nsd == 1
    assert surface(dots((5, 5)), dots((5, 8)), tolerance=1.9).nsd == 0


@pytest.mark.slow
def test_spacing_turns_pixels_into_mm() -> None:
    """Rows of 3 mm, columns of .5 mm: three columns are 1.5 mm, one row is 3 mm."""
    across = surface(dots((5, 5)), dots((5, 8)), (3.0, 0.5))
    assert (across.nsd, across.hd95, across.unit) == (1.0, 1.5, "mm")
    down = surface(dots((5, 5)), dots((6, 5)), (3.0, 0.5))
    assert down.hd95 == 3.0
    assert down.nsd == pytest.approx(0.5)  # the two corners that both pixels share


@pytest.mark.slow
def test_hd95_forgives_the_farthest_5_per_cent() -> None:
    """A speck of 1 pixel far off, beside an outline of 36 pixels: below 5 per cent of them, so nothing; of 12, much."""
    target = EMPTY.copy()
    target[0:11, 0:9] = True
    assert surface(target | dots((11, 15)), target).hd95 == 0
    target = EMPTY.copy()
    target[0:4, 0:4] = True
    assert surface(target | dots((11, 15)), target).hd95 > 3


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0), (0.7, 1.3), (2.5, 0.4)])
def test_agrees_with_the_definitions(spacing: tuple[float, float] | None) -> None:
    generator = np.random.default_rng(8)
    for _ in range(12):
        mask, target = blob(generator), blob(generator)
        # no distance equals it, so that rounding decides nothing
        tolerance = float(generator.uniform(0.55, 4))
        found = surface(mask, target, spacing, tolerance=tolerance)
        nsd, hd95 = from_definitions(mask, target, spacing or (1.0, 1.0), tolerance)
        assert found.nsd == pytest.approx(nsd, abs=1e-5)
        assert found.hd95 == pytest.approx(hd95, rel=1e-5)
        assert found.unit == ("px" if spacing is None else "mm")
        turned = surface(target, mask, spacing, tolerance=tolerance)
        assert (turned.nsd, turned.hd95) == pytest.approx((found.nsd, found.hd95))


@pytest.mark.slow
def test_the_border_of_the_image_is_a_contour() -> None:
    full = np.ones((10, 10), np.bool_)
    assert surface(full, full).nsd == 1
    inner = np.pad(np.ones((4, 4), np.bool_), 3)
    assert surface(full, inner, tolerance=1).nsd == 0


@pytest.mark.slow
def test_equal_masks_are_perfect_and_masks_stay_as_they_were() -> None:
    mask = blob(np.random.default_rng(1))
    mask.flags.writeable = False
    assert surface(mask, mask) == Surface(1.0, 0.0, "px", 2.0)


def test_two_empty_masks_agree() -> None:
    assert surface(EMPTY, EMPTY) == Surface(1.0, 0.0, "px", 2.0)
    assert surface(EMPTY, EMPTY, (1.0, 2.0), tolerance=1) == Surface(1.0, 0.0, "mm", 1)


def test_one_empty_mask_scores_the_worst_there_is() -> None:
    """12 x 16 pixels: a diagonal of 20; in mm of 1 by 2: the root of 144 + 1024."""
    for mask, target in ((EMPTY, dots((3, 3))), (dots((3, 3)), EMPTY)):
        assert surface(mask, target) == worst((12, 16)) == Surface(0.0, 20.0, "px", 2.0)
        assert surface(mask, target, (1.0, 2.0)).hd95 == pytest.approx(1168**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [None, (2.5, 0.4)])
def test_a_missed_structure_never_raises_a_score(spacing: tuple[float, float] | None) -> None:
    """Whatever masks an agent draws, emptying any of them improves neither mean; left out as nan, it would."""
    generator = np.random.default_rng(9)
    targets = [blob(generator) for _ in range(4)]
    corners = np.zeros((28, 36), np.bool_)
    corners[0, 0] = True  # as far from a target in the other corner as a mask can be
    targets.append(corners[::-1, ::-1])
    masks = [*(blob(generator) for _ in range(4)), corners]
    found = [surface(m, t, spacing) for m, t in zip(masks, targets, strict=True)]
    for i, target in enumerate(targets):
        missed = [*found[:i], surface(np.zeros_like(target), target, spacing), *found[i + 1 :]]
        assert np.mean([s.nsd for s in missed]) <= np.mean([s.nsd for s in found])
        assert np.mean([s.hd95 for s in missed]) > np.mean([s.hd95 for s in found])
    assert np.mean([s.hd95 for s in found[:-1]]) < np.mean([s.hd95 for s in found])  # what leaving out would give


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask is \(12, 16\), target is \(16, 12\)"):
        surface(EMPTY, EMPTY.T)
    for spacing in ((0.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(MedSegError, match="two positive numbers"):
            surface(EMPTY, EMPTY, spacing)
    for tolerance in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(MedSegError, match="positive number of px"):
            surface(EMPTY, EMPTY, tolerance=tolerance)


def test_scores_go_into_json() -> None:
    assert json.loads(json.dumps(asdict(surface(EMPTY, dots((1, 1)))), allow_nan=False))["unit"] == "px"


def test_empty_masks_and_imports_need_no_monai() -> None:
    code = (
        "import sys; sys.modules['monai'] = None; import numpy as np; from medseg_gym.surface import surface\n"
        "m = np.zeros((4, 4), bool); assert surface(m, m).nsd == 1; assert surface(m, ~m).nsd == 0\n"
        "try: surface(~m, ~m)\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'medseg-gym[surface]'" in done.stdout
