"""Gymnasium environments in which an agent segments medical images by prompting a segmentation model.

Importing registers every `MedSeg-<Dataset>-<Tool>-v0` id; nothing heavy is loaded before an env is made.
"""

from __future__ import annotations

from typing import Any

from medseg_gym.registration import catalogue, env_id, register
from medseg_gym.types import Box, Click, Decision, Episode, Sample, Stop, Undo, Unreadable, View

__version__ = "0.1.0"
__all__ = [
    "Box",
    "Click",
    "Decision",
    "Episode",
    "Sample",
    "Stop",
    "Undo",
    "Unreadable",
    "View",
    "__version__",
    "catalogue",
    "env_id",
    "evaluate",
]

register()


def evaluate(*args: Any, **kwargs: Any) -> Any:
    """Evaluates policies on envs and writes episodes, summary and report; see medseg_gym.bench.evaluate.evaluate."""
    from medseg_gym.bench.evaluate import evaluate as run

    return run(*args, **kwargs)
