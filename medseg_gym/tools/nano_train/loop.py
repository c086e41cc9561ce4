"""The training loop: batches that depend on seed and step alone, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medseg_gym.errors import BadDataError
from medseg_gym.tools.nano_net import WIDTHS, NanoNet
from medseg_gym.tools.nano_train.cases import Case
from medseg_gym.tools.nano_train.sessions import Session, answer, look_at, start

TURNS = (2, 3, 4, 6)  # answers a batch is asked for
TURN_SHARES = (0.25, 0.35, 0.25, 0.15)
COOLING = 0.35  # of a run's steps


@dataclass(frozen=True, slots=True)
class Settings:
    """What determines a run beside its cases; a checkpoint of other settings is refused."""

    seed: int = 0
    steps: int = 8000  # optimiser steps; each is one answer of a whole batch
    batch: int = 24
    rate: float = 2e-3
    decay: float = 0.02
    average: float = 0.998  # of the weights kept at each step, once past the first few hundred
    boxed: float = 0.4  # share of sessions that start with a box
    widths: tuple[int, int, int, int] = WIDTHS


@dataclass(slots=True)
class State:
    """All that changes while training."""

    step: int
    batch: int
    model: NanoNet
    averaged: dict[str, Tensor]
    optimiser: torch.optim.AdamW


@dataclass(frozen=True, slots=True)
class Source:
    """Cases of one kind and the share of sessions that are drawn from them."""

    share: float
    cases: Sequence[Case]


def begin(settings: Settings, device: str = "cpu") -> State:
    """The state before the first step."""
    torch.manual_seed(settings.seed)
    model = NanoNet(settings.widths).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.99))
    averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return State(0, 0, model, averaged, optimiser)


def train(
    state: State,
    sources: Sequence[Source],
    settings: Settings,
    *,
    until: int | None = None,
    report: Callable[[State, Mapping[str, float]], None] | None = None,
    every: int = 50,
    checkpoint: Callable[[State], None] | None = None,
    save_seconds: float = 180,
) -> None:
    """Trains `state` up to step `until` (the end by default), batch by batch; checkpoints fall between batches.

    A batch is begun whole whatever `until` says, so a run stops at the first batch's end at or past it.
    """
    shares = np.array([source.share for source in sources])
    shares = shares / shares.sum()
    until = settings.steps if until is None else until
    totals: dict[str, float] = {}
    saved = begun = time.monotonic()
    shown = state.step
    while state.step < until:
        for name, value in _batch(state, sources, shares, settings).items():
            totals[name] = totals.get(name, 0.0) + value
        now = time.monotonic()
        if report is not None and state.step - shown >= every:
            count = state.step - shown
            report(state, {**{name: value / count for name, value in totals.items()}, "seconds": (now - begun) / count})
            totals, shown, begun = {}, state.step, now
        if checkpoint is not None and now - saved > save_seconds:
            checkpoint(state)
            saved = now


def _batch(state: State, sources: Sequence[Source], shares: Any, settings: Settings) -> dict[str, float]:
    """One batch of sessions from their first prompt to their last: an optimiser step a turn. Sums of the figures."""
    rng = np.random.default_rng([settings.seed, 77, state.batch])
    sessions = [_draw(sources, shares, rng, settings) for _ in range(settings.batch)]
    turns = int(rng.choice(TURNS, p=TURN_SHARES))
    sums = {"loss": 0.0, "dice": 0.0, "box": 0.0, "click": 0.0, "data": 0.0}
    boxed = np.array([session.box is not None for session in sessions])
    device = next(state.model.parameters()).device
    for turn in range(turns):
        begun = time.monotonic()
        seen = [look_at(session, rng) for session in sessions]
        inputs = (
            torch.from_numpy(np.stack([s[0] for s in seen])).to(device).contiguous(memory_format=torch.channels_last)
        )
        targets = torch.from_numpy(np.stack([s[1] for s in seen])).to(device, torch.float32)
        areas = torch.tensor([s[2] for s in seen], device=device)
        sums["data"] += time.monotonic() - begun
        for group in state.optimiser.param_groups:
            group["lr"] = rate_at(state.step, settings)
        state.model.train()
        logits, quality = state.model(inputs)
        loss, overlap = losses(logits, quality, targets, areas)
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), 2.0)
        state.optimiser.step()
        state.step += 1
        _average(state, settings)
        begun = time.monotonic()
        for session, given in zip(sessions, logits.detach().cpu().numpy(), strict=True):
            answer(session, given, rng)
        sums["data"] += time.monotonic() - begun
        sums["loss"] += float(loss.detach())
        sums["dice"] += float(overlap.mean())
        if turn == 0:  # per step, like the other figures
            sums["box"] += turns * (float(overlap[boxed].mean()) if boxed.any() else 0.0)
            sums["click"] += turns * (float(overlap[~boxed].mean()) if not boxed.all() else 0.0)
    state.batch += 1
    return sums


def losses(logits: Tensor, quality: Tensor, targets: Tensor, areas: Tensor) -> tuple[Tensor, Tensor]:
    """2 BCE + soft Dice + half |IoU error|, and each window's Dice (B,); all windows count alike.

    The IoU is with the whole target, `areas` (B,) window pixels, so that a window which cuts it off is known as worse.
    """
    chance = torch.sigmoid(logits)
    soft = 1 - (2 * (chance * targets).sum((1, 2)) + 1) / (chance.sum((1, 2)) + targets.sum((1, 2)) + 1)
    with torch.no_grad():
        hard = (logits > 0).float()
        both, total = (hard * targets).sum((1, 2)), hard.sum((1, 2)) + targets.sum((1, 2))
        union = hard.sum((1, 2)) + torch.maximum(areas, targets.sum((1, 2))) - both
        iou, dice = both / (union + 1e-6), (2 * both + 1e-6) / (total + 1e-6)
    loss = 2 * F.binary_cross_entropy_with_logits(logits, targets) + soft.mean() + 0.5 * (quality - iou).abs().mean()
    return loss, dice


def rate_at(step: int, settings: Settings) -> float:
    """A linear warm-up over 100 steps, then level, then over the last COOLING of the run a cosine down to a hundredth.

    Level, so that a run may be given more or fewer steps while it is under way (Haegele et al. 2024).
    """
    cooled = (step - cooling_from(settings)) / max(1, settings.steps - cooling_from(settings))
    fall = 0.5 * (1 + float(np.cos(np.pi * min(1.0, max(0.0, cooled)))))
    return settings.rate * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * fall)


def cooling_from(settings: Settings) -> int:
    """The step at which the rate begins to fall."""
    return round(settings.steps * (1 - COOLING))


def _average(state: State, settings: Settings) -> None:
    kept = min(settings.average, state.step / (state.step + 10))
    with torch.no_grad():
        for name, value in state.model.state_dict().items():
            state.averaged[name].lerp_(value, 1 - kept)


def _draw(sources: Sequence[Source], shares: Any, rng: np.random.Generator, settings: Settings) -> Session:
    cases = sources[int(rng.choice(len(sources), p=shares))].cases
    return start(cases[int(rng.integers(len(cases)))], rng, bool(rng.random() < settings.boxed))


def save_checkpoint(path: Path, state: State, settings: Settings) -> None:
    """Writes everything a run needs to go on to `path`; the file there is whole at any time."""
    record = {
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "step": state.step,
        "batch": state.batch,
        "model": state.model.state_dict(),
        "averaged": state.averaged,
        "optimiser": state.optimiser.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(record, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, settings: Settings, device: str = "cpu") -> State:
    """The state a checkpoint holds; BadDataError if it is damaged or of other settings.

    `steps` alone may differ, as long as the rate has begun to fall in neither run: up to there the two are the same.
    """
    try:
        record = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise BadDataError(f"{path}: not a readable checkpoint ({error}); delete it to begin anew") from None
    made = Settings(**json.loads(record["settings"]))
    made = replace(made, widths=tuple(made.widths))  # type: ignore[arg-type]
    level = record["step"] <= min(cooling_from(made), cooling_from(settings))
    if made != settings and not (level and replace(made, steps=settings.steps) == settings):
        raise BadDataError(
            f"{path}: is of {made} at step {record['step']}; this run has {settings}; choose another --out"
        )
    state = begin(settings, device)
    state.model.load_state_dict(record["model"])
    state.averaged = record["averaged"]
    state.optimiser.load_state_dict(record["optimiser"])
    state.step, state.batch = record["step"], record["batch"]
    return state


def write_weights(path: Path, averaged: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """The averaged weights as fp16 safetensors with `about` in the header."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tensors = {name: value.to("cpu", torch.float16).contiguous() for name, value in averaged.items()}
    save_file(tensors, partial, metadata=dict(about))
    os.replace(partial, path)
