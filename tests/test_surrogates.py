"""What bounds the ratio: PPO's clip from below, above and twice, GSPO's by the chat, and CISPO, SAPO and VESPO."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from medseg_gym.errors import MedSegError  # noqa: E402
from medseg_gym.rl.loss import IMPORTANCES, Objective, summary, token_losses  # noqa: E402

E = math.e


def losses(objective, new, **given):
    """Losses and their gradients by the new log-probabilities, and the statistics' means, all float64."""
    logprobs = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    tensors = {k: torch.tensor(v, dtype=torch.float64) if k != "lengths" else v for k, v in given.items()}
    values, sums = token_losses(objective, logprobs, **tensors)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    return values.tolist(), gradient.tolist(), summary({k: float(v) for k, v in sums.items()})


def logs(*ratios):
    """Log-probabilities whose ratios to log-probabilities of 0 are these."""
    return [math.log(ratio) for ratio in ratios]


def grpo(**options) -> Objective:
    return Objective("grpo", **{"importance": "none", **options})


def test_the_clipped_surrogate_of_good_and_bad_tokens():
    # ratios inside, above and below the bounds 0.8 and 1.28
    ratios = [1.1, 2.0, 0.5, 1.1, 2.0, 0.5]
    good_and_bad = [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    values, gradient, stats = losses(grpo(), logs(*ratios), advantages=good_and_bad, engine_logprobs=[0.0] * 6)
    assert values == pytest.approx([-1.1, -1.28, -0.5, 1.1, 2.0, 0.8])
    assert gradient == pytest.approx([-1.1, 0.0, -0.5, 1.1, 2.0, 0.0])  # d r / d log p = r, and 0 where it is cut
    assert stats["clip_share"] == pytest.approx(2 / 6)
    assert stats["ratio"] == pytest.approx(7.2 / 6) and stats["weight"] == 1 and stats["tokens"] == 6
    assert stats["surrogate"] == pytest.approx((-1.1 - 1.28 - 0.5 + 1.1 + 2.0 + 0.8) / 6)
    assert stats["nll"] == pytest.approx(-sum(logs(*ratios)) / 6)


def test_dual_clip_bounds_bad_tokens_alone():
    # at -2 the loss of a ratio of 5 would be 10; the bound is 3 x 2. Good tokens are bounded by 1.28 x 2 already.
    values, gradient, stats = losses(
        grpo(dual_clip=3.0), logs(5.0, 2.0, 5.0), advantages=[-2.0, -2.0, 2.0], engine_logprobs=[0.0] * 3
    )
    assert values == pytest.approx([6.0, 4.0, -2.56])
    assert gradient == pytest.approx([0.0, 4.0, 0.0])
    assert stats["clip_share"] == pytest.approx(2 / 3)


def test_a_ratio_by_the_sequence_is_its_tokens_geometric_mean():
    # GSPO: the first chat's ratio is (4 x 0.25 x 1.331)^(1/3) = 1.1, the second's 2, which is cut at 1.28
    values, gradient, stats = losses(
        grpo(ratio="sequence"),
        logs(4.0, 0.25, 1.331, 2.0),
        advantages=[1.0] * 4,
        engine_logprobs=[0.0] * 4,
        lengths=[3, 1],
    )
    assert values == pytest.approx([-1.1, -1.1, -1.1, -1.28])
    assert gradient == pytest.approx([-1.1, -1.1, -1.1, 0.0])  # three losses, each moved by a third of each token
    assert stats["clip_share"] == 0.25


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    values, gradient, stats = losses(
        grpo(surrogate="cispo"), logs(2.0, 0.5), advantages=[1.0, -1.0], engine_logprobs=[0.0, 0.0]
    )
    assert values == pytest.approx([-1.28 * math.log(2), 0.5 * math.log(0.5)])
    assert gradient == pytest.approx([-1.28, 0.5])
    assert stats["clip_share"] == 0.5


def test_sapo_is_a_sigmoid_of_slope_one_at_a_ratio_of_one():
    values, gradient, _ = losses(
        grpo(surrogate="sapo"), logs(1.0, 1.0, 2.0), advantages=[1.0, -1.0, 1.0], engine_logprobs=[0.0] * 3
    )
    # sigmoid(0) = 1/2, times 4 / 1 and 4 / 1.05; sigmoid(1) = 1 / (1 + 1/e)
    assert values == pytest.approx([-2.0, 2 / 1.05, -4 / (1 + 1 / E)])
    assert gradient[:2] == pytest.approx([-1.0, 1.0])


def test_vespo_weighs_with_the_chats_whole_ratio():
    # W = 2 x 1 of the chat, good: phi = exp(3 + 2 log 2 - 6); the second chat's W = 1: phi = 1 at A < 0
    values, gradient, _ = losses(
        grpo(surrogate="vespo"),
        logs(2.0, 1.0, 1.0),
        advantages=[1.0, 1.0, -0.5],
        engine_logprobs=[0.0] * 3,
        lengths=[2, 1],
    )
    phi = math.exp(3 + 2 * math.log(2) - 6)
    assert gradient == pytest.approx([-phi, -phi, 0.5]) and values[0] == pytest.approx(-phi * math.log(2))


def test_vespos_whole_ratio_holds_the_importance_weights():
    # new over old is 1, old over engine 2 and 0.25: W = 0.5, phi = exp(3 - 2 log 2 - 1.5)
    _, gradient, _ = losses(
        grpo(surrogate="vespo", importance="token"),
        [-1.0, -1.0],
        advantages=[1.0, 1.0],
        engine_logprobs=[-1 - math.log(2), -1 + math.log(4)],
        lengths=[2],
    )
    assert gradient == pytest.approx([-math.exp(3 - 2 * math.log(2) - 1.5)] * 2)


ON_POLICY = [
    (surrogate, ratio, importance)
    for surrogate in ("clip", "cispo", "sapo", "vespo")
    for ratio in ("token", "sequence")
    for importance in IMPORTANCES
    if surrogate != "vespo" or "sequence" not in (ratio, importance.removesuffix("_mask"))
]


@pytest.mark.parametrize(("surrogate", "ratio", "importance"), ON_POLICY)
def test_on_policy_every_objective_has_the_policy_gradient(surrogate, ratio, importance):
    """Before any update, with an engine that agrees, the gradient by a chat's summed log p is -A, whatever bounds."""
    new = [-1.0, -2.0, -0.5]
    _, gradient, stats = losses(
        Objective("grpo", surrogate=surrogate, ratio=ratio, importance=importance, dual_clip=3.0),
        new,
        advantages=[0.5, 0.5, -0.25],
        engine_logprobs=new,
        lengths=[2, 1],
    )
    assert gradient == pytest.approx([-0.5, -0.5, 0.25])
    assert stats["ratio"] == stats["weight"] == 1 and stats["clip_share"] == stats["truncated_share"] == 0


@pytest.mark.parametrize(
    "options", [{"ratio": "sequence"}, {"importance": "sequence"}, {"importance": "sequence_mask"}]
)
def test_vespo_by_the_sequence_is_refused(options):
    with pytest.raises(MedSegError, match="vespo sums"):
        Objective("grpo", surrogate="vespo", **options)
