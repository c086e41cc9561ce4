"""The loss of a token: numbers worked by hand for every branch, and gradients held to finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_rollouts import made_rollout

torch = pytest.importorskip("torch")

from medseg_gym.errors import MedSegError, UnknownNameError  # noqa: E402
from medseg_gym.rl.advantages import advantages  # noqa: E402
from medseg_gym.rl.batch import filler, flatten, plan, rows_of  # noqa: E402
from medseg_gym.rl.config import Common, GRPOConfig, SFTConfig, read  # noqa: E402
from medseg_gym.rl.loss import Objective, summary, token_losses  # noqa: E402

CONFIG = GRPOConfig(model="tiny", out="out", env="MedSeg-Phantom-Stub-v0")
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


def test_supervised_loss_is_the_negative_log_likelihood():
    values, gradient, stats = losses(Objective("sft"), [-0.5, -2.0])
    assert values == [0.5, 2.0] and gradient == [-1.0, -1.0]
    assert stats == {"nll": 1.25, "tokens": 2.0}


def test_token_weights_are_truncated_and_carry_no_gradient():
    # old / engine are 1.5 and 4, the latter truncated to 2; new / old are 1.1
    values, gradient, stats = losses(
        grpo(importance="token"),
        [math.log(1.1) - 1] * 2,
        advantages=[1.0, 1.0],
        old=[-1.0, -1.0],
        engine_logprobs=[-1 - math.log(1.5), -1 - math.log(4)],
    )
    assert values == pytest.approx([-1.65, -2.2]) and gradient == pytest.approx([-1.65, -2.2])
    assert stats["weight"] == pytest.approx(1.75) and stats["truncated_share"] == 0.5
    # k3 of log 1.5 and log 4: x - 1 - log x
    assert stats["mismatch_kl"] == pytest.approx((0.5 - math.log(1.5) + 3 - math.log(4)) / 2)


def test_sequence_weights_are_of_the_chats_sum():
    # the first chat's is 1.5 x 0.5 = 0.75, the second's 3, truncated to 2
    engine = [-math.log(1.5), -math.log(0.5), -math.log(3)]
    values, _, stats = losses(
        grpo(importance="sequence"),
        [0.0] * 3,
        advantages=[1.0] * 3,
        old=[0.0] * 3,
        engine_logprobs=engine,
        lengths=[2, 1],
    )
    assert values == pytest.approx([-0.75, -0.75, -2.0])
    assert stats["truncated_share"] == pytest.approx(1 / 3)


def test_masked_weights_leave_out_what_is_above_the_cap():
    # token by token 1.5 and 4, of which the cap of 2 drops the latter; the chat's are 6, and drop both
    given = {"advantages": [1.0, 1.0], "old": [0.0, 0.0], "engine_logprobs": [-math.log(1.5), -math.log(4)]}
    values, gradient, stats = losses(grpo(importance="token_mask"), [0.0, 0.0], **given)
    assert values == pytest.approx([-1.5, 0.0]) and gradient == pytest.approx([-1.5, 0.0])
    assert stats["truncated_share"] == 0.5
    values, _, stats = losses(grpo(importance="sequence_mask"), [0.0, 0.0], **given, lengths=[2])
    assert values == pytest.approx([0.0, 0.0]) and stats["truncated_share"] == 1


def test_without_old_the_ratio_is_one_and_the_gradient_the_policys():
    values, gradient, stats = losses(
        grpo(importance="token"), [-1.0, -3.0], advantages=[0.5, -0.25], engine_logprobs=[-1.0, -3.0]
    )
    assert values == [-0.5, 0.25] and gradient == [-0.5, 0.25]
    assert stats["ratio"] == 1 and stats["mismatch_kl"] == 0 and stats["clip_share"] == 0


def test_without_importance_the_engine_is_the_old_policy():
    # old is not asked: the ratio is to the engine's 0, not to -1
    values, _, stats = losses(grpo(), logs(1.1), advantages=[1.0], engine_logprobs=[0.0], old=[-1.0])
    assert values == pytest.approx([-1.1])
    assert stats["mismatch_kl"] == pytest.approx(math.exp(-1) + 1 - 1)


def test_an_ignored_engine_changes_nothing_but_the_mismatch():
    # 1.1 is to the learner's own -1, with no weight for the engine's -2
    given = {"advantages": [1.0], "engine_logprobs": [-2.0]}
    values, gradient, stats = losses(grpo(importance="ignore"), [math.log(1.1) - 1], old=[-1.0], **given)
    assert values == pytest.approx([-1.1]) and gradient == pytest.approx([-1.1])
    assert stats["weight"] == 1 and stats["mismatch_kl"] == pytest.approx(E - 1 - 1)
    assert losses(grpo(importance="ignore"), [-1.0], **given)[0] == [-1.0]  # without old the ratio is 1


def test_kl_is_k3_against_the_reference():
    # reference / new is e: e - 1 - 1; its gradient by log p is 1 - e
    values, gradient, stats = losses(grpo(kl=0.1), [-2.0], advantages=[0.0], engine_logprobs=[-2.0], reference=[-1.0])
    assert values == pytest.approx([0.1 * (E - 2)]) and gradient == pytest.approx([0.1 * (1 - E)])
    assert stats["kl"] == pytest.approx(E - 2)


def test_kl_weighed_by_the_ratio_has_the_divergences_own_gradient():
    """Over all tokens of a softmax, the mean gradient is that of KL(policy | reference); plain k3's is not."""
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)
    (wanted,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    zeros = torch.zeros(3, dtype=torch.float64)
    got = {}
    for weighed in (True, False):
        objective = Objective("grpo", kl=1.0, kl_ratio=weighed)
        values, _ = token_losses(
            objective, policy, advantages=zeros, engine_logprobs=policy.detach(), reference=reference
        )
        (got[weighed],) = torch.autograd.grad((policy.detach().exp() * values).sum(), logits, retain_graph=True)
    assert got[True].tolist() == pytest.approx(wanted.tolist(), rel=1e-9)
    assert got[False].tolist() != pytest.approx(wanted.tolist(), rel=1e-2)


OBJECTIVES = {
    "sft": Objective("sft"),
    "clip": grpo(),
    "dual clip": grpo(dual_clip=1.5),
    "token weights": grpo(importance="token", importance_cap=1.2),
    "token mask": grpo(importance="token_mask", importance_cap=1.2),
    "sequence weights": grpo(importance="sequence"),
    "sequence ratio": grpo(ratio="sequence"),
    "kl": grpo(kl=0.3),
    "kl by ratio": grpo(kl=0.3, kl_ratio=True, importance="token"),
    "sapo": grpo(surrogate="sapo"),
    "all by sequence": grpo(ratio="sequence", importance="sequence", kl=0.1),
}
# Their weights are functions of the log-probabilities that no gradient flows through.
DETACHED = {"cispo": grpo(surrogate="cispo"), "vespo": grpo(surrogate="vespo", importance="token")}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    new, old, engine, reference, values = (
        torch.randn(12, generator=generator, dtype=torch.float64) * 0.4 - (1 if i < 4 else 0) for i in range(5)
    )
    new.requires_grad_()

    def total(logprobs):
        return token_losses(
            OBJECTIVES[name],
            logprobs,
            advantages=values,
            engine_logprobs=engine,
            old=old,
            reference=reference,
            lengths=[5, 7],
        )[0]

    assert torch.autograd.gradcheck(total, (new,), eps=1e-6, atol=1e-6)


def pulls(rewards, arms, logits, config):
    """The rows' loss of a group that pulled these arms of a softmax, and its gradient by the arms' logits."""
    parameter = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    policy = torch.log_softmax(parameter, 0)
    group = [
        made_rollout([r], member=i, logprob=float(policy[arm].detach()), token=arm)
        for i, (r, arm) in enumerate(zip(rewards, arms, strict=True))
    ]
    rows = rows_of(group, advantages(group, std=config.std), config)
    flat = flatten(rows)
    ids = torch.tensor([row.sequence.ids[-1] for row in rows])
    values, _ = token_losses(
        Objective.of(config),
        policy[ids],
        advantages=torch.tensor(flat.advantages),
        engine_logprobs=torch.tensor(flat.engine_logprobs),
        reference=torch.zeros(len(ids)),
        lengths=flat.lengths,
    )
    (gradient,) = torch.autograd.grad((torch.tensor(flat.weights) * values).sum(), parameter)
    return gradient.tolist()


def test_the_gradient_is_the_analytic_one_on_a_two_armed_softmax():
    """Trap 1: minus the mean of A (1[arm] - p), here of four pulls of rewards 1, 0, 0, 1 with a mean of 0.5."""
    p = 1 / (1 + math.exp(-0.7))
    first = -(0.5 * (1 - p) + -0.5 * (0 - p) + -0.5 * (1 - p) + 0.5 * (1 - p)) / 4
    gradient = pulls([1, 0, 0, 1], [0, 1, 0, 0], [0.7, 0.0], replace(CONFIG, normaliser="token"))
    assert gradient == pytest.approx([first, -first], rel=1e-6)
    constant = pulls([1, 0, 0, 1], [0, 1, 0, 0], [0.7, 0.0], replace(CONFIG, max_new_tokens=50))
    assert constant == pytest.approx([first / 50, -first / 50], rel=1e-6)


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("normaliser", ["constant", "token", "sequence"])
def test_equal_rewards_give_exactly_no_gradient(std, normaliser):
    """Trap 1."""
    config = replace(CONFIG, std=std, normaliser=normaliser)
    assert pulls([0.1, 0.1, 0.1], [0, 1, 0], [0.7, 0.0], config) == [0.0, 0.0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", [*OBJECTIVES, *DETACHED])
def test_the_step_is_the_same_however_its_rows_are_split(name, ranks):
    """Trap 11, at the level of the loss: sums of losses, gradients and statistics over micro-batches and ranks."""
    rng = np.random.default_rng(0)
    group = [
        made_rollout(rng.random(n), answers=rng.integers(1, 5, n), member=i) for i, n in enumerate((3, 1, 2, 4, 2))
    ]
    rows = [
        replace(row, old=noise(rng, row), reference=noise(rng, row))
        for row in rows_of(group, advantages(group), replace(CONFIG, normaliser="sequence"))
    ]
    moved = {row.sequence: noise(rng, row) for row in rows}

    def step(micros):
        loss, totals, gradients = 0.0, dict[str, float](), {}
        for micro in micros:
            flat = flatten(micro)
            parts = [moved[row.sequence][chosen] for row, chosen in zip(micro, flat.chosen, strict=True)]
            new = torch.tensor(np.concatenate(parts), dtype=torch.float64, requires_grad=True)
            values, sums = token_losses(
                {**OBJECTIVES, **DETACHED}[name],
                new,
                advantages=torch.tensor(flat.advantages),
                engine_logprobs=torch.tensor(flat.engine_logprobs),
                old=torch.tensor(flat.old),
                reference=torch.tensor(flat.reference),
                lengths=flat.lengths,
            )
            weighed = (torch.tensor(flat.weights) * values).sum()
            weighed.backward()
            loss += weighed.item()
            for key, value in sums.items():
                totals[key] = totals.get(key, 0.0) + float(value)
            for row, part in zip(micro, new.grad.split(list(flat.lengths)), strict=True):
                gradients.setdefault(row.sequence, part.tolist()) if len(part) else None
        return loss, summary(totals), gradients

    whole = step([rows])
    split = step([micro for micros in plan(rows, ranks, 2, 30) for micro in micros])
    assert split[0] == pytest.approx(whole[0], rel=1e-5)
    assert split[1] == pytest.approx(whole[1], rel=1e-5)
    assert split[2].keys() == whole[2].keys()
    for sequence, gradient in whole[2].items():
        assert split[2][sequence] == pytest.approx(gradient, rel=1e-5, abs=1e-8)


def noise(rng, row):
    return (-1 + 0.3 * rng.standard_normal(len(row.weights))).astype(np.float32)


@pytest.mark.parametrize("name", [*OBJECTIVES, *DETACHED])
def test_a_micro_batch_of_fillers_alone_has_a_gradient_of_zero(name):
    """So that every rank's backward pass runs and meets the others'."""
    rows = rows_of([made_rollout([1.0], answers=[3])], [np.ones(1)], CONFIG)
    flat = flatten([filler(rows[0])])
    padded = torch.randn(1, 5, requires_grad=True)
    none = torch.zeros(0)
    values, sums = token_losses(
        {**OBJECTIVES, **DETACHED}[name],
        padded[torch.tensor(flat.chosen[0])[None]],
        advantages=none,
        engine_logprobs=none,
        old=none,
        reference=none,
        lengths=flat.lengths,
    )
    (torch.tensor(flat.weights) * values).sum().backward()
    assert padded.grad.tolist() == [[0.0] * 5]
    assert summary({k: float(v) for k, v in sums.items()}) == {"tokens": 0.0}


def test_log_ratios_beyond_twenty_give_finite_numbers():
    for objective in (*OBJECTIVES.values(), *DETACHED.values()):
        values, gradient, stats = losses(
            objective,
            [0.0, -500.0],
            advantages=[-1.0, 1.0],
            engine_logprobs=[-500.0, 0.0],
            old=[-400.0, 0.0],
            reference=[-500.0, 0.0],
            lengths=[1, 1],
        )
        assert np.isfinite(values).all() and np.isfinite(gradient).all() and np.isfinite(list(stats.values())).all()


def test_an_objective_is_what_the_settings_say():
    config = replace(CONFIG, clip_high=0.2, dual_clip=3.0, importance="sequence", temperature=0.7, ratio="sequence")
    assert Objective.of(config) == Objective(
        "grpo", temperature=0.7, clip_high=0.2, dual_clip=3.0, importance="sequence", ratio="sequence"
    )
    assert Objective.of(SFTConfig(model="tiny", out="out", data="data.h5")) == Objective("sft")
    with pytest.raises(MedSegError, match="no objective for a Common"):
        Objective.of(Common(model="tiny", out="out"))


@pytest.mark.parametrize(
    ("setting", "value"), [("importance", "tokens"), ("ratio", "chat"), ("surrogate", "ppo"), ("kind", "dpo")]
)
def test_unknown_names_are_refused(setting, value):
    with pytest.raises(UnknownNameError, match=value):
        Objective(**{"kind": "grpo", setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", 0.0),
        ("clip_low", 1.5),
        ("clip_high", -0.1),
        ("dual_clip", 0.5),
        ("kl", -1.0),
        ("importance_cap", 0.5),
    ],
)
def test_numbers_that_make_no_objective_are_refused(setting, value):
    with pytest.raises(MedSegError, match=f"{setting}={value}; wanted"):
        Objective("grpo", **{setting: value})


@pytest.mark.parametrize("setting", ["top_p", "top_k"])
def test_ratios_come_with_the_whole_distribution(setting):
    """Trap 2: there is no way to ask for top_p or top_k where ratios are used."""
    with pytest.raises(UnknownNameError, match=setting):
        read(GRPOConfig, model="tiny", out="out", env="MedSeg-Phantom-Stub-v0", **{setting: 1})


def test_what_an_objective_needs_must_be_there():
    new = torch.zeros(3)
    with pytest.raises(MedSegError, match="advantages"):
        token_losses(grpo(), new, engine_logprobs=new)
    with pytest.raises(MedSegError, match="reference"):
        token_losses(grpo(kl=0.1), new, advantages=new, engine_logprobs=new)
    for lengths in (None, [1, 1]):
        with pytest.raises(MedSegError, match="adding up to 3"):
            token_losses(grpo(ratio="sequence"), new, advantages=new, engine_logprobs=new, lengths=lengths)
