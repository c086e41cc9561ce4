"""How a token is drawn from a seed: its score is the largest once the seed's own Gumbel noise is added to all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def generator(seed: int) -> torch.Generator:
    """The noise of one answer; on the CPU, so that a seed means the same on every device."""
    import torch

    return torch.Generator().manual_seed(seed)


def gumbel(random: torch.Generator, vocabulary: int) -> torch.Tensor:
    """(V,) float64 Gumbel noise for one token: score plus noise is largest at a sample of the scores' softmax."""
    import torch

    uniform = torch.rand(vocabulary, generator=random, dtype=torch.float64).clamp_(1e-300)
    return -(-uniform.log()).log()
