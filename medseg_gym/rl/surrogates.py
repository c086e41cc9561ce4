"""What GRPO maximises in place of the reward: PPO's clipped ratio, and the softer bounds of CISPO, SAPO and VESPO.

Each takes the log-ratios of a micro-batch's tokens, their advantages, the objective and the importance weights between
engine and learner, all (N,); it gives the losses, weights applied, and 1 where a bound cut a token's gradient off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from medseg_gym.rl.loss import Objective

SAPO_TEMPERATURES = 1.0, 1.05  # of positive and of negative advantages: TRL's defaults
VESPO_SHAPES = (2.0, 3.0), (3.0, 2.0)  # k and l of positive and of negative advantages: likewise
VESPO_LEAST = math.log(1e-8)


@dataclass(frozen=True, eq=False)
class LogRatios:
    """The tokens of some chats, one after the other."""

    logprobs: Tensor  # (N,) under the weights being trained
    differences: Tensor  # (N,) from those before the update
    lengths: tuple[int, ...]  # tokens of each chat; empty where no chat is needed as a whole
    by_chat: bool  # one ratio for all tokens of a chat

    @cached_property
    def ratio(self) -> Tensor:
        """(N,) new over old probability of a token, or the geometric mean of its chat's."""
        differences = self.differences
        if self.by_chat:
            differences = chat_sums(differences, self.lengths) / _repeated(self.lengths, differences)
        return differences.clamp(-20, 20).exp()


Surrogate = Callable[[LogRatios, "Tensor", "Objective", "Tensor"], tuple["Tensor", "Tensor"]]


def clipped(ratios: LogRatios, advantages: Tensor, objective: Objective, weights: Tensor) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), and no more than dual_clip |A| where A < 0."""
    import torch

    ratio = ratios.ratio
    free = -ratio * advantages
    bound = -ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantages
    losses = torch.maximum(free, bound)
    cut = bound > free
    if objective.dual_clip:
        most = -objective.dual_clip * advantages
        over = (advantages < 0) & (losses > most)
        losses = torch.where(over, most, losses)
        cut = cut | over
    return losses * weights, cut.to(losses.dtype)


def cispo(ratios: LogRatios, advantages: Tensor, objective: Objective, weights: Tensor) -> tuple[Tensor, Tensor]:
    """-min(r, 1 + clip_high) A log p, no gradient through the ratio: no token's gradient is cut off, only bounded
    (MiniMax-M1, arXiv 2506.13585)."""
    ratio = ratios.ratio.detach()
    most = 1 + objective.clip_high
    return -ratio.clamp(max=most) * advantages * ratios.logprobs * weights, (ratio > most).to(ratio.dtype)


def sapo(ratios: LogRatios, advantages: Tensor, objective: Objective, weights: Tensor) -> tuple[Tensor, Tensor]:
    """-(4 / t) sigmoid(t (r - 1)) A: a bound that sets in smoothly (arXiv 2511.20347)."""
    import torch

    above, below = SAPO_TEMPERATURES
    temperature = torch.where(advantages > 0, above, below)
    losses = -torch.sigmoid(temperature * (ratios.ratio - 1)) * 4 / temperature * advantages
    return losses * weights, torch.zeros_like(losses)


def vespo(ratios: LogRatios, advantages: Tensor, objective: Objective, weights: Tensor) -> tuple[Tensor, Tensor]:
    """-phi(W) A log p with phi(W) = exp(l + k log W - l W), of the chat's whole ratio W, importance weights included
    (arXiv 2602.10693)."""
    import torch

    (k_above, l_above), (k_below, l_below) = VESPO_SHAPES
    k = torch.where(advantages >= 0, k_above, k_below)
    scale = torch.where(advantages >= 0, l_above, l_below)
    whole = chat_sums(ratios.differences.detach().clamp(-20, 20), ratios.lengths)
    whole = (whole + chat_sums(weights.log().clamp(VESPO_LEAST, 20), ratios.lengths)).clamp(VESPO_LEAST, 20)
    phi = (scale + k * whole - scale * whole.exp()).exp()
    return -phi * advantages * ratios.logprobs, torch.zeros_like(phi)


SURROGATES: dict[str, Surrogate] = {"clip": clipped, "cispo": cispo, "sapo": sapo, "vespo": vespo}


def chat_sums(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(N,) at each token the sum over its chat. Chat by chat, as scattered adds on a GPU differ from run to run."""
    import torch

    parts = values.split(list(lengths))
    return torch.cat([part.sum().expand(len(part)) for part in parts]) if parts else values


def _repeated(lengths: tuple[int, ...], like: Tensor) -> Tensor:
    import torch

    counts = torch.tensor(lengths, dtype=torch.long, device=like.device)
    return counts.repeat_interleave(counts).to(like.dtype)
