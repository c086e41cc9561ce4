"""AdamW over named parameters, sharded or not: the schedule, the clipping, the skipped step, and its state on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medseg_gym.rl import sharding
from medseg_gym.rl.config import Common
from medseg_gym.rl.learner_state import MOMENTS, LearnerState

if TYPE_CHECKING:
    import torch


def learning_rate(config: Common, step: int, total: int) -> float:
    """The rate of optimiser step `step`, from 0, of `total`: a linear warmup to `lr`, then the schedule.

    "linear" and "cosine" fall to what would be 0 at step `total`; past it the rate is 0.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return config.lr * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class Optimiser:
    """AdamW (arXiv 1711.05101) on what is trained; vectors, which are norms and biases, do not decay."""

    def __init__(self, named: Mapping[str, torch.Tensor], config: Common, total_steps: int) -> None:
        import torch

        self.named, self.config, self.total_steps = dict(named), config, total_steps
        self.steps = 0  # taken and skipped
        self.skipped = 0
        matrices = [p for p in self.named.values() if p.ndim > 1]
        vectors = [p for p in self.named.values() if p.ndim <= 1]
        groups = [(matrices, config.weight_decay), (vectors, 0.0)]
        self.adamw = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters],
            lr=learning_rate(config, 0, total_steps),
            betas=config.betas,
            foreach=True,
        )

    def step(self, loss: float) -> dict[str, float]:
        """Clips the gradients to `grad_clip` (0: not at all) and takes a step; frees them either way.

        `loss` is the step's over all ranks. Where it or the gradient's norm is not finite nothing is changed but the
        counters, on every rank alike. What is returned: grad_norm before clipping, lr, skipped (1 or 0).
        """
        gradients = [sharding.local(p.grad) for p in self.named.values() if p.grad is not None]
        norm = self._norm(gradients)
        rate = learning_rate(self.config, self.steps, self.total_steps)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            if 0 < self.config.grad_clip < norm:
                for gradient in gradients:
                    gradient.mul_(self.config.grad_clip / norm)
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        self.skipped += not finite
        return {"grad_norm": norm, "lr": rate, "skipped": float(not finite)}

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        import torch

        device = next(iter(self.named.values())).device
        squares = [torch.linalg.vector_norm(gradient).square() for gradient in gradients]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
        return float(sharding.summed(total).sqrt())

    def moments(self, keep: bool = True) -> dict[str, dict[str, torch.Tensor]]:
        """AdamW's state by parameter name, whole, on the CPU. Every rank has to call it; without `keep` for nothing."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in self.named.items():
            for what, value in self.adamw.state.get(parameter, {}).items():
                if (full := sharding.whole(value, keep)) is not None:
                    found.setdefault(name, {})[what] = full
        return found

    def load(self, state: LearnerState) -> None:
        """Takes moments and counters, which may have been written at another number of ranks."""
        self.adamw.state.clear()
        for name, values in state.moments.items():
            parameter: Any = self.named[name]
            self.adamw.state[parameter] = {
                "step": values["step"].clone(),
                **{what: sharding.placed(values[what], parameter) for what in MOMENTS},
            }
        self.steps, self.skipped = state.steps, state.skipped
