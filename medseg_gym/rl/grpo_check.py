"""check: the settings that no GRPO run can have, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.rl.advantages import CREDITS
from medseg_gym.rl.batch import NORMALISERS
from medseg_gym.rl.config import PLACEMENTS, GRPOConfig
from medseg_gym.rl.curriculum import CURRICULA
from medseg_gym.rl.engines.builds import BUILDS
from medseg_gym.rl.loss import Objective


def check(config: GRPOConfig) -> None:
    """MedSegError for settings that no run can have; said before anything is loaded."""
    least = {"iterations": 1, "prompts": 1, "rollouts": 2, "resample": 0, "save_every": 1, "keep": 1, "patience": 0}
    least |= {"validate_every": 0, "validate_cases": 1, "gallery_every": 0, "workers": 1, "max_new_tokens": 1}
    least |= {"engines": 1, "tool_actors": 0, "seed": 0, "ranks": 1, "micro_rows": 1, "micro_tokens": 1, "lr": 0}
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise MedSegError(f"{name}={getattr(config, name)}; wanted {lowest} or more")
    known_by_name: Mapping[str, Iterable[str]] = {
        "credit": CREDITS,
        "normaliser": NORMALISERS,
        "curriculum": CURRICULA,
        "engine": BUILDS,
        "placement": PLACEMENTS,
    }
    for name, known in known_by_name.items():
        if getattr(config, name) not in known:
            raise unknown(name, getattr(config, name), known)
    if not config.env:  # a dataclass cannot take back the default that it inherits
        raise MedSegError('episodes are played in an env: give an id as env = "...", such as MedSeg-Phantom-Nano-v0')
    if config.staleness not in (0, 1):
        raise MedSegError(f"staleness={config.staleness}; wanted 0, or 1 to play an iteration's groups one step early")
    if config.staleness and config.importance == "ignore":
        raise MedSegError(
            'staleness=1 trains on what the weights before have sampled, which importance="ignore" takes for what the '
            'present ones have; give importance="token", "sequence", or "none", whose ratio is to the engine\'s'
        )
    if config.patience and not config.validate_every:
        raise MedSegError(f"patience={config.patience} counts validations; give validate_every, or patience=0")
    Objective.of(config)
