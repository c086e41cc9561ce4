"""The loss of a token, in supervised training and in GRPO, from its log-probabilities: pure, without a model.

A step's loss is the plain sum over its tokens of `Row.weights` times what stands here, so it is the same however its
rows are split over micro-batches and ranks. With new, old and engine for the log-probabilities of a sampled token under
the weights being trained, those before the update and those of the engine as it sampled, and A for its advantage:

    supervised    -new
    GRPO          w * surrogate(r, A) + kl * k3          MedSAM-Agent, equation 6: GRPO (arXiv 2402.03300, equation 3)
    r             exp(new - old); GSPO (arXiv 2507.18071): exp of the chat's mean of new - old
    surrogate     -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO's, with the bounds apart as in DAPO (arXiv
                  2503.14476); no more than dual_clip |A| where A < 0 (Ye et al., arXiv 1912.09729); others in
                  `surrogates`
    w             min(exp(old - engine), cap), which no gradient flows through: truncated importance sampling between
                  engine and learner (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
                  training"); "sequence": of the chat's sum of old - engine; "_mask": 0 above the cap, as if it had not
                  been sampled
    k3            exp(reference - new) - (reference - new) - 1 (Schulman 2020, "Approximating KL divergence"); with
                  `kl_ratio` times r, so that its gradient is the divergence's own (DeepSeek-V3.2, arXiv 2512.02556)

Where `importance` is "none", w is 1 and the engine's log-probabilities are old; where it is "ignore", w is 1 and what
the engine said does not count, as in verl by default. Where old is not given it is new without its gradient: r is then
1, as in the first step on a batch. Log-ratios are bounded by 20 before they are exponentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.rl.config import Common, GRPOConfig, SFTConfig
from medseg_gym.rl.surrogates import SURROGATES, LogRatios, chat_sums

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("sft", "grpo")
LEVELS = ("token", "sequence")
IMPORTANCES = ("none", "ignore", *LEVELS, "token_mask", "sequence_mask")


@dataclass(frozen=True)
class Objective:
    """What is minimised. There is no top_p and no top_k: ratios need the distribution that was sampled from."""

    kind: Literal["sft", "grpo"]
    temperature: float = 1.0  # log-probabilities are of the distribution at this temperature
    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0  # 0 is off
    ratio: str = "token"  # or "sequence"
    kl: float = 0.0
    kl_ratio: bool = False
    importance: str = "token"  # or "sequence", "token_mask", "sequence_mask", "none", "ignore"
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        for name, choice, known in (
            ("objective", self.kind, KINDS),
            ("surrogate", self.surrogate, tuple(SURROGATES)),
            ("ratio", self.ratio, LEVELS),
            ("importance", self.importance, IMPORTANCES),
        ):
            if choice not in known:
                raise unknown(name, choice, known)
        for name, value, fits, wanted in (
            ("temperature", self.temperature, self.temperature > 0, "above 0"),
            ("clip_low", self.clip_low, 0 <= self.clip_low <= 1, "0 to 1"),
            ("clip_high", self.clip_high, self.clip_high >= 0, "0 or more"),
            ("dual_clip", self.dual_clip, self.dual_clip == 0 or self.dual_clip > 1, "0 (off) or above 1"),
            ("kl", self.kl, self.kl >= 0, "0 or more"),
            ("importance_cap", self.importance_cap, self.importance_cap >= 1, "1 or more"),
        ):
            if not fits:
                raise MedSegError(f"{name}={value!r}; wanted {wanted}")
        if self.surrogate == "vespo" and "sequence" in (self.ratio, self._level):
            raise MedSegError("vespo sums ratios and importance over a chat itself; wanted both by the token")

    @classmethod
    def of(cls, config: Common) -> Objective:
        """The objective that a run's settings ask for; in supervised training the temperature is 1."""
        if isinstance(config, SFTConfig):
            return cls("sft")
        if not isinstance(config, GRPOConfig):
            raise MedSegError(f"no objective for a {type(config).__name__}; wanted SFTConfig or GRPOConfig")
        return cls(
            "grpo",
            temperature=config.temperature,
            surrogate=config.surrogate,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ratio=config.ratio,
            kl=config.kl,
            kl_ratio=config.kl_ratio,
            importance=config.importance,
            importance_cap=config.importance_cap,
        )

    @property
    def by_chat(self) -> bool:
        """Whether a token's loss hangs on the other tokens of its chat, so that `lengths` are needed."""
        return "sequence" in (self.ratio, self._level) or self.surrogate == "vespo"

    @property
    def _level(self) -> str:
        return self.importance.removesuffix("_mask")


def token_losses(
    objective: Objective,
    logprobs: Tensor,
    *,
    advantages: Tensor | None = None,
    engine_logprobs: Tensor | None = None,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each trained token and the sums of its statistics, which add up over micro-batches and ranks.

    All tensors are (N,): the trained tokens of a micro-batch, one chat after the other; N may be 0. `logprobs` alone
    carries a gradient. `lengths` says how many tokens each chat has, where the objective is over whole chats. What an
    objective needs and is not given raises MedSegError. For the statistics' means see `summary`.
    """
    if objective.kind == "sft":
        return -logprobs, {"tokens": _count(logprobs), "nll": -logprobs.detach().sum()}
    if advantages is None or engine_logprobs is None:
        raise MedSegError("GRPO needs each row's advantages and the engine's log-probabilities")
    if objective.kl and reference is None:
        raise MedSegError(f"kl={objective.kl} needs the reference policy's log-probabilities in each row")
    if objective.by_chat and (lengths is None or sum(lengths) != len(logprobs)):
        raise MedSegError(f"this objective is over whole chats; wanted their lengths, adding up to {len(logprobs)}")
    new = logprobs.detach()
    before = (new if old is None else old) if objective.importance != "none" else engine_logprobs
    ratios = LogRatios(logprobs, logprobs - before, tuple(lengths or ()), objective.ratio == "sequence")
    drift = before - engine_logprobs
    weights, truncated = _importance(objective, drift, lengths)
    losses, clipped = SURROGATES[objective.surrogate](ratios, advantages, objective, weights)
    stats = {
        "tokens": _count(new),
        "surrogate": losses.detach().sum(),
        "nll": -new.sum(),
        "ratio": ratios.ratio.detach().sum(),
        "clipped": clipped.sum(),
        "mismatch_kl": _k3((new if old is None else old) - engine_logprobs).sum(),
        "weight": weights.sum(),
        "truncated": truncated.sum(),
    }
    if objective.kl:
        assert reference is not None
        divergence = _k3(reference - logprobs)
        stats["kl"] = divergence.detach().sum()
        losses = losses + objective.kl * (divergence * ratios.ratio if objective.kl_ratio else divergence)
    return losses, stats


def summary(sums: Mapping[str, float]) -> dict[str, float]:
    """The statistics of a step per token, of the sums over its micro-batches and ranks; without a token only `tokens`.

    nll: mean -log p, which for sampled tokens estimates the entropy. surrogate: mean loss before the KL term. ratio:
    mean r. clip_share: tokens whose gradient the surrogate's bounds cut off. mismatch_kl: KL of the learner's from the
    engine's distribution, k3 on the sampled tokens. weight: mean w; truncated_share: tokens whose weight was above the
    cap. kl: k3 against the reference policy. tokens: how many.
    """
    tokens = sums["tokens"]
    if not tokens:
        return {"tokens": 0.0}
    names = {"clipped": "clip_share", "truncated": "truncated_share"}
    means = {names.get(name, name): float(value / tokens) for name, value in sums.items()}
    return {**means, "tokens": float(tokens)}


def _importance(objective: Objective, drift: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """w of each token, and 1 where it was above the cap."""
    import torch

    if objective.importance in ("none", "ignore"):
        return torch.ones_like(drift), torch.zeros_like(drift)
    if objective.importance.startswith("sequence"):
        drift = chat_sums(drift, tuple(lengths or ()))
    weights = drift.clamp(-20, 20).exp()
    over = weights > objective.importance_cap
    bound = 0.0 if objective.importance.endswith("_mask") else objective.importance_cap
    return torch.where(over, bound, weights), over.to(weights.dtype)


def _k3(difference: Tensor) -> Tensor:
    """exp(d) - d - 1, which is 0 at 0 and positive elsewhere."""
    bounded = difference.clamp(-20, 20)
    return bounded.expm1() - bounded


def _count(values: Tensor) -> Tensor:
    import torch

    return torch.tensor(float(len(values)), device=values.device)
