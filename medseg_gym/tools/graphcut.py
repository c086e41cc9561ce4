"""Two steps of GrabCut as pure functions: colour evidence from soft labels, and the minimum cut of given log odds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg_gym.types import Image, Mask

Field = NDArray[np.float32]  # (h, w)

BINS = 48  # of a grey histogram
BINS_2D = 16  # each way, of a colour histogram
STEP = 12.0  # grey levels per unit of log odds in the cut
SMOOTHNESS = 0.5  # nats a cut edge between equal pixels costs
OPENCV_GAMMA = 50.0  # what such an edge costs inside cv2.grabCut; not a parameter there
FLOOR = 0.02  # share of probability spread over all colours


def colours(pixels: Image) -> tuple[NDArray[np.intp], tuple[int, int]]:
    """The (h, w) colour bin of each pixel of an RGB image, and the histogram's shape.

    Grey images give 48 grey levels; colours their two principal axes of this image, 16 bins each.
    """
    import cv2

    smooth = cv2.GaussianBlur(pixels, (0, 0), 1.0).astype(np.float32)
    if (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all():
        axes, bins = smooth[..., :1], BINS
    else:
        flat = smooth.reshape(-1, 3)
        flat = flat - flat.mean(axis=0)
        _, vectors = np.linalg.eigh(flat.T @ flat)
        axes, bins = (flat @ vectors[:, :0:-1]).reshape(*pixels.shape[:2], 2), BINS_2D
    low, high = np.percentile(axes.reshape(-1, axes.shape[2]), (1, 99), axis=0)
    index = np.clip((axes - low) / np.maximum(high - low, 8) * bins, 0, bins - 1).astype(np.intp)
    if axes.shape[2] == 1:
        return index[..., 0], (BINS, 1)
    return index[..., 0] * BINS_2D + index[..., 1], (BINS_2D, BINS_2D)


def colour_evidence(
    binned: tuple[NDArray[np.intp], tuple[int, int]], odds: Field, counted: Field | None = None, rounds: int = 2
) -> Field:
    """Log odds in [-3, 3] that a pixel's colour is the foreground's, given prior log odds: a few rounds of EM.

    `counted` in [0, 1] says how much each pixel has to say in the colour models; by default all count.
    """
    index, shape = binned
    evidence = np.zeros_like(odds)
    for _ in range(rounds):
        weight = 1 / (1 + np.exp(-(odds + evidence)))
        inside, outside = weight, 1 - weight
        if counted is not None:
            inside, outside = counted * inside, counted * outside
        evidence = np.clip(_log_histogram(index, inside, shape) - _log_histogram(index, outside, shape), -3, 3)
    return evidence.astype(np.float32)


def _log_histogram(index: NDArray[np.intp], weight: Field, shape: tuple[int, int]) -> Field:
    """The (h, w) log probability of each pixel's bin under a smoothed, weighted histogram."""
    import cv2

    counts = np.bincount(index.ravel(), weight.ravel(), shape[0] * shape[1]).reshape(shape)
    kernel = (13, 13) if shape[1] > 1 else (1, 13)
    counts = cv2.GaussianBlur(counts, kernel, 2.0, borderType=cv2.BORDER_REPLICATE).ravel()
    share = counts / max(float(counts.sum()), 1e-6) + FLOOR / counts.size
    log: Field = np.log(share / share.sum())[index]
    return log


def minimum_cut(pixels: Image, odds: Field) -> Mask:
    """The (h, w) mask of least cost: pixels pay against their log odds, edges pay where the grey level is even.

    cv2.grabCut finds the cut with frozen models: its first channel carries the odds, and one Gaussian a side, 128
    levels apart, makes its log ratio linear in them; the others carry grey, which only the edges see. Odds are
    clipped at +-10, which is final: a pixel's eight edges cost 3.4 together. Without both signs there is no cut.
    """
    import cv2

    mask: Mask = odds > 0
    if mask.all() or not mask.any():
        return mask
    level = np.clip(odds * STEP + 128, 0, 255).astype(np.uint8)
    grey = cv2.cvtColor(cv2.GaussianBlur(pixels, (0, 0), 1.0), cv2.COLOR_RGB2GRAY)
    labels = np.where(mask, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    image = np.dstack([level, grey, grey])
    cv2.grabCut(image, labels, None, _model(64), _model(192), 1, cv2.GC_EVAL_FREEZE_MODEL)
    return (labels & 1).astype(np.bool_)


def _model(mean: float) -> NDArray[np.float64]:
    """One of cv2.grabCut's five-component models with a single Gaussian: weights, means, covariances."""
    model = np.zeros((1, 65))
    model[0, 0] = 1
    model[0, 5:8] = mean, 128, 128
    # Log ratio per level = 128 / variance, and STEP levels are one unit of odds.
    variance = 128 * STEP * SMOOTHNESS / OPENCV_GAMMA
    model[0, 20:29] = np.diag([variance, 1e7, 1e7]).ravel()
    return model
