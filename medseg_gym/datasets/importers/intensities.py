"""From stored intensities to 8 bits: named CT windows in Hounsfield units, percentiles for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from medseg_gym.errors import MedSegError, unknown

Window = tuple[float, float] | str  # (low, high), "percentile" or "full"

# level and width as radiologists quote them, here as the range low..high in HU
PRESETS: dict[str, tuple[float, float]] = {
    "abdomen": (-160, 240),  # level 40, width 400
    "liver": (-45, 105),  # 30, 150
    "lung": (-1350, 150),  # -600, 1500
    "mediastinum": (-125, 225),  # 50, 350
    "bone": (-500, 1300),  # 400, 1800
    "spine": (-75, 175),  # 50, 250
    "brain": (0, 80),  # 40, 80
    "vessels": (0, 600),  # 300, 600
}
WINDOW_HELP = (
    f"intensities shown: {', '.join(PRESETS)} (CT, HU), LOW:HIGH, full (minimum to maximum) or percentile (0.5 to 99.5 "
    "of what is not 0)"
)
MAX_COUNTED = 4_000_000  # values a percentile is taken of; larger arrays are read at regular steps

_REGIONS = {"chest": "mediastinum", "brain": "brain", "head": "brain", "liver": "liver", "spine": "spine"}
_LUNG = ("lung", "nodule", "covid", "airway", "bronch")


def parse_window(text: str) -> Window:
    """The window of an option's text."""
    if text in PRESETS:
        return PRESETS[text]
    if text in ("percentile", "full"):
        return text
    low, colon, high = text.partition(":")
    if not colon:
        raise unknown("window", text, [*PRESETS, "percentile", "full"])
    try:
        bounds = float(low), float(high)
    except ValueError:
        raise MedSegError(f"window {text!r}; wanted LOW:HIGH, two numbers, as -160:240") from None
    if not (np.isfinite(bounds).all() and bounds[0] < bounds[1]):
        raise MedSegError(f"window {text!r}; wanted LOW:HIGH with LOW below HIGH")
    return bounds


def window_for(modality: str, region: str, structures: Iterable[str]) -> Window:
    """The window where none is asked for: by region and structures for CT, percentiles otherwise."""
    if modality.casefold() != "ct":
        return "percentile"
    if any(part in name.casefold() for name in structures for part in _LUNG):
        return PRESETS["lung"]
    return PRESETS[_REGIONS.get(region.casefold(), "abdomen")]


def bounds(values: np.ndarray, window: Window) -> tuple[float, float]:
    """Low and high of a window for an array of any shape; (0, 0) where nothing in it is finite or other than 0."""
    if not isinstance(window, str):
        return window
    flat = values.reshape(-1)
    if window == "percentile" and flat.size > MAX_COUNTED:
        flat = flat[:: -(-flat.size // MAX_COUNTED)]
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat)]
    if window == "percentile":
        flat = flat[flat != 0]  # the air around a scan
    if flat.size == 0:
        return 0.0, 0.0
    if window == "full":
        return float(flat.min()), float(flat.max())
    low, high = np.percentile(flat, (0.5, 99.5))
    return float(low), float(high)


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of the values: low and below 0, high and above 255, linear between; not a number is 0."""
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    scaled = np.clip((values.astype(np.float32) - low) * (255 / (high - low)), 0, 255)
    return np.floor(np.nan_to_num(scaled) + 0.5).astype(np.uint8)
