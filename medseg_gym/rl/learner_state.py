"""A learner's state on disk: what is trained, AdamW's moments, counters and torch's random state, without a pickle.

Tensors are whole, whatever number of ranks wrote them: "weight/NAME", "step/NAME", "exp_avg/NAME", "exp_avg_sq/NAME"
and "rng/cpu" in one file of safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_gym.errors import BadDataError

if TYPE_CHECKING:
    import torch

RECORD, TENSORS = "learner.json", "learner.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, eq=False)
class LearnerState:
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, Mapping[str, torch.Tensor]]  # of each parameter that was ever stepped: step and MOMENTS
    rng: torch.Tensor
    steps: int  # taken and skipped
    skipped: int


def write(folder: Path, state: LearnerState) -> None:
    """Writes the two files; that both are there whole or not at all is up to whoever made the folder."""
    from safetensors.torch import save_file

    tensors = {f"weight/{name}": value for name, value in state.weights.items()}
    for name, values in state.moments.items():
        tensors |= {f"{what}/{name}": value for what, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, "rng/cpu": state.rng}, folder / TENSORS)
    record = {"steps": state.steps, "skipped": state.skipped}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def read(folder: Path, wanted: Mapping[str, torch.Tensor]) -> LearnerState:
    """The state in a folder; BadDataError unless it is whole and of the parameters `wanted`, by name and shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / TENSORS)
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        counters = int(record["steps"]), int(record["skipped"])
        rng = tensors.pop("rng/cpu")
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            what, _, name = key.partition("/")
            if what == "weight":
                weights[name] = value
            else:
                moments.setdefault(name, {})[what] = value
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadDataError(f"{folder} holds no learner's state: {error!r}") from None
    if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in wanted.items()}:
        raise BadDataError(f"{folder} is of other parameters than the {len(wanted)} trained here; same settings?")
    for name, values in moments.items():
        whole = set(values) == {"step", *MOMENTS} and name in wanted
        if not whole or any(values[what].shape != wanted[name].shape for what in MOMENTS):
            raise BadDataError(f"{folder} holds no learner's state: the optimiser's for {name!r} does not fit")
    return LearnerState(weights, moments, rng, *counters)
