"""How far a mask's contour runs from its target's: NSD and HD95, with the rule for empty masks, by MONAI."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medseg_gym.errors import MedSegError
from medseg_gym.types import Mask

TOLERANCE = 2.0  # in the unit: 2 mm where the spacing is known, else 2 pixels


@dataclass(frozen=True, slots=True)
class Surface:
    """Surface metrics of one mask; `hd95` and `tolerance` are in `unit`, and only equal units may be averaged."""

    nsd: float  # in [0, 1], higher is better
    hd95: float  # in [0, the image's diagonal], lower is better
    unit: Literal["mm", "px"]
    tolerance: float


def surface(
    mask: Mask, target: Mask, spacing_mm: tuple[float, float] | None = None, *, tolerance: float = TOLERANCE
) -> Surface:
    """NSD at a tolerance and HD95 of two (H, W) masks, in mm where `spacing_mm` (row, column) is known, else in pixels.

    NSD: the share of both contours' length that lies within `tolerance` of the other contour (Nikolov et al. 2018,
    arXiv 1809.04430). HD95: of the distances from each outline's pixels to the nearest of the other, the 95th
    percentile, the larger of both directions. Two empty masks: NSD 1, HD95 0. One empty: `worst`, so that nothing a
    mask could be is worse than a missed structure. Different shapes, and a spacing or tolerance that is not positive
    and finite, raise. About 50 ms at 512 x 512; the first call also imports MONAI.
    """
    if mask.shape != target.shape or mask.ndim != 2:
        raise ValueError(f"mask is {mask.shape}, target is {target.shape}; they must be (H, W) of one image")
    unit, spacing = _unit(spacing_mm)
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise MedSegError(f"tolerance={tolerance}; wanted a positive number of {unit}")
    drawn, present = bool(mask.any()), bool(target.any())
    if not drawn and not present:
        return Surface(1.0, 0.0, unit, tolerance)
    if not drawn or not present:
        return worst((mask.shape[0], mask.shape[1]), spacing_mm, tolerance=tolerance)
    try:
        from monai.metrics.hausdorff_distance import compute_hausdorff_distance
        from monai.metrics.surface_dice import compute_surface_dice
    except ImportError as error:
        raise MedSegError(
            f"surface metrics need MONAI ({error}); install it: pip install 'medseg-gym[surface]'"
        ) from None
    import torch

    # MONAI wants batch and channel; `include_background` because ours has the one channel only.
    a, b = (torch.from_numpy(np.array(m, dtype=np.bool_))[None, None] for m in (mask, target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI about a keyword that MONAI itself passes
        nsd = compute_surface_dice(a, b, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True)
        hd95 = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing)
    return Surface(float(nsd), float(hd95), unit, tolerance)


def worst(
    shape: tuple[int, int], spacing_mm: tuple[float, float] | None = None, *, tolerance: float = TOLERANCE
) -> Surface:
    """Of a missed structure, a mask of an absent one, and a failed episode: NSD 0, HD95 the image's diagonal."""
    unit, (row, column) = _unit(spacing_mm)
    return Surface(0.0, math.hypot(shape[0] * row, shape[1] * column), unit, tolerance)


def _unit(spacing_mm: tuple[float, float] | None) -> tuple[Literal["mm", "px"], tuple[float, float]]:
    if spacing_mm is None:
        return "px", (1.0, 1.0)
    row, column = (float(s) for s in spacing_mm)
    if not (math.isfinite(row) and math.isfinite(column) and row > 0 and column > 0):
        raise MedSegError(f"spacing_mm={spacing_mm!r}; wanted two positive numbers, row and column, or None")
    return "mm", (row, column)
