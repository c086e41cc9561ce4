"""The records every other module speaks in: cases, actions, tool states, views and episodes. Frozen, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Mask = NDArray[np.bool_]  # (H, W)
Logits = NDArray[np.float32]  # (H, W), or a tool's low resolution; a mask is logits > 0

Ended = Literal["stopped", "horizon", "unreadable", "failed"]

EPISODE_SCHEMA = 1


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One structure to outline in one image."""

    key: str  # "BTCV/0001/slice-080/spleen": unique, stable, sorts by patient
    image: Image  # (H, W, 3) uint8 RGB
    target: Mask  # (H, W) bool; never part of an observation; may be empty (absent structure)
    structure: str  # "right kidney"
    instruction: str  # "right kidney in abdomen CT"
    patient: str  # splits and confidence intervals cluster on it
    spacing_mm: tuple[float, float] | None = None  # row, column


@dataclass(frozen=True, slots=True)
class Click:
    """A point in pixels of the sample's own frame; positive adds, negative removes."""

    x: int
    y: int
    positive: bool = True


@dataclass(frozen=True, slots=True)
class Box:
    """Corners in pixels of the sample's own frame, inclusive, x1 <= x2 and y1 <= y2."""

    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The agent is content with the mask."""


@dataclass(frozen=True, slots=True)
class Undo:
    """Takes the last prompt back: the previous mask returns. With nothing to take back it only costs the turn."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question about the picture, which ends its episode; no action vector holds one."""

    text: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A completion no action could be read from. It costs a turn, changes nothing and calls no tool."""

    reason: str


Prompt = Click | Box
Action = Click | Box | Stop | Undo | Answer


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """All a tool knows about an image: a value, shared by every query about that image."""

    image: str  # sha256 of the image's shape and bytes
    height: int
    width: int
    features: Mapping[str, Any]  # the tool's own arrays or tensors; each has .nbytes

    @property
    def nbytes(self) -> int:
        return int(sum(array.nbytes for array in self.features.values()))


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One question to a tool: these prompts on this image, refining this prior."""

    embedding: Embedding
    prompts: tuple[Prompt, ...]  # never empty; at most one Box; oldest first
    prior: Logits | None = None  # the previous answer's low-resolution logits


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """A tool's answer."""

    logits: Logits  # (H, W) float32 at the image's size; the mask is logits > 0
    predicted_iou: float  # nan where the tool gives none
    prior: Logits  # (h, w) float32 at the tool's low resolution, fed to the next query


@dataclass(frozen=True, slots=True, eq=False)
class MaskState:
    """Where the outlining stands after some prompts; undo returns to the previous value."""

    prompts: tuple[Prompt, ...]
    mask: Mask  # (H, W); read-only
    prediction: Prediction | None  # None before the first prompt


@dataclass(frozen=True, slots=True, eq=False)
class Transition:
    """One executed action of one case."""

    sample: Sample
    before: MaskState
    action: Action | Unreadable
    after: MaskState


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a policy may see. It never holds the target."""

    key: str
    image: Image
    mask: Mask
    prompts: tuple[Prompt, ...]  # those in force now; undone ones are gone
    structure: str
    instruction: str
    turn: int  # actions taken so far
    horizon: int
    history: tuple[tuple[Mask, Action | Unreadable], ...] = ()  # per turn: the mask before the action, and the action
    decisions: tuple[Decision, ...] = ()  # per turn: what the policy itself answered; empty in a bare env


@dataclass(frozen=True, slots=True)
class Decision:
    """A policy's answer to a View; action None means the completion was unreadable, for the given reason."""

    action: Action | None
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    reason: str = ""
    costs: Mapping[str, float] = field(default_factory=dict, compare=False)  # tokens, seconds: not in the episode


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a stored episode."""

    action: Action | Unreadable
    reward: float
    terms: Mapping[str, float]  # named reward terms, adding up to reward
    tool_called: bool
    mask: Mapping[str, Any]  # the mask after the turn: COCO run lengths {"size": [H, W], "counts": str}
    text: str = ""  # the policy's completion, where it has one


@dataclass(frozen=True, slots=True)
class Episode:
    """The one record of an episode: written by evaluation, read by reports, replay and training."""

    env: str  # env id
    tool: str  # fingerprint: weights, preprocessing and switches
    policy: str
    case: int  # position in the run's case order
    key: str
    structure: str
    instruction: str
    patient: str
    seed: int
    horizon: int
    reward: str  # preset or spec name
    turns: tuple[Turn, ...]
    iou: tuple[float, ...]  # T + 1 values, the first before any action
    dice: tuple[float, ...]
    ended: Ended
    start: Mapping[str, Any] | None = None  # run lengths of a given start mask
    spacing_mm: tuple[float, float] | None = None
    error: str = ""  # what went wrong, when ended is "failed"
    schema: int = EPISODE_SCHEMA
    extra: Mapping[str, Any] = field(default_factory=dict)
