"""learn: one optimiser step of GRPO from an iteration's groups, counted in the run's State."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import MedSegError
from medseg_gym.rl import invariants
from medseg_gym.rl.batch import plan, rows_of
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.groups import Groups
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.ranks import LearnerHandle

Advantages = NDArray[np.float64] | None  # of a member's turns; None where it is not trained

NOT_FINITE = 3  # optimiser steps in a row that may be skipped as not finite before the run ends


@dataclass(slots=True)
class State:
    """Where a run stands, beside the learner: a checkpoint's record."""

    step: int = 0  # iterations done
    version: int = 0  # of the weights: how often they were changed
    not_finite: int = 0  # optimiser steps skipped in a row
    best: float | None = None  # mean IoU of the best validation
    best_step: int = 0
    worse: int = 0  # validations since
    validated: int = -1  # the iteration whose validation was taken in last
    stopped: str = ""  # why the run ended early
    frozen: str = ""  # digest of the weights that are not trained


async def learn(
    state: State,
    config: GRPOConfig,
    learner: LearnerHandle,
    groups: Groups,
    by_group: Sequence[Sequence[Advantages]],
    *,
    stale: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """What the learner says of its step on the groups, whose turns have these advantages; nothing where there is
    nothing to learn from. `stale` groups were sampled by other weights than are trained."""
    given = [values for group in by_group for values in group]
    if not groups.trained or not (config.kl or any(values is not None and values.any() for values in given)):
        # Not a step of zeros: it would still decay the weights and follow the optimiser's momentum.
        say(
            f"iteration {state.step + 1}: no step, as all advantages are 0: of {len(groups.played)} groups "
            f"{groups.equal or len(groups.trained)} have equal rewards and {groups.short} fewer than two members"
        )
        return {}
    rows = rows_of([member for group in groups.trained for member in group], given, config)
    if config.kl:
        found = await learner.reference_logprobs([row.sequence for row in rows], temperature=config.temperature)
        rows = [replace(row, reference=values) for row, values in zip(rows, found, strict=True)]
    planned = plan(rows, config.ranks, config.micro_rows, config.micro_tokens)
    invariants.check_plan(planned, rows)
    learned = await learner.step(planned, Objective.of(config))
    if learned.get("skipped"):
        state.not_finite += 1
        say(f"iteration {state.step + 1}: step skipped, loss or gradient were not finite")
        if state.not_finite == NOT_FINITE:
            raise MedSegError(
                f"{NOT_FINITE} optimiser steps in a row were not finite; the weights are those before them. Lower "
                "lr or grad_clip, or take dtype float32, and go on from the last checkpoint in a new folder"
            )
        return learned
    state.not_finite = 0
    if said := invariants.mismatch_fault(learned["mismatch_kl"], config.dtype == "float32" and not stale):
        say(f"iteration {state.step + 1}: {said}")
    state.version += 1
    return learned
