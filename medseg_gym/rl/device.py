"""The device that a part of training runs on, by its name in the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medseg_gym.errors import MedSegError

if TYPE_CHECKING:
    import torch


def device_named(name: str) -> torch.device:
    """The device; "" takes a GPU where there is one. One that torch does not know or has not raises MedSegError."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise MedSegError(f"device={name!r}; wanted cpu, cuda, cuda:1 or such, or none for what there is") from None
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise MedSegError(f"device={name!r}, but this torch has {count} GPUs; give another, or none for what there is")
    return device
