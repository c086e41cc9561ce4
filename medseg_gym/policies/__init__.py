"""Policies: scripted baselines and oracles, the language model's protocols, and `make`, which finds them by name."""

from medseg_gym.policies.base import Policy, make, names

__all__ = ["Policy", "make", "names"]
