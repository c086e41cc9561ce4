"""The loss, its gradient and the advantages are TRL's, for every loss variant that TRL has.

TRL's own methods run: `GRPOTrainer._generate_and_score_completions` from given tokens and rewards to advantages,
importance weights and masks, and `_compute_loss` on what it returns; only the model, the sampler and the reward
function are replaced. A chat's observations are what they mask as tool output.

| TRL                                                    | here                                                      |
|--------------------------------------------------------|-----------------------------------------------------------|
| loss_type grpo                                         | surrogate clip, normaliser sequence                       |
| bnpo, dapo                                             | clip, token (they differ in accumulation and ranks alone) |
| dr_grpo                                                | clip, constant (max_completion_length = max_new_tokens)   |
| luspo                                                  | clip, constant with max_new_tokens=1, ratio sequence      |
| cispo (epsilon_high: the bound itself)                 | cispo (clip_high: what is above 1), token                 |
| sapo, vespo                                            | sapo, sequence; vespo, token                              |
| importance_sampling_level                              | ratio                                                     |
| vllm_importance_sampling_mode, _clip_max; _correction  | importance, importance_cap; without it "ignore"           |
| beta, use_bias_correction_kl                           | kl, kl_ratio                                              |
| delta, above 1 + epsilon_high                          | dual_clip: the same bound, as good tokens never reach it  |
| scale_rewards none, group (over std + 1e-4)            | std False, True (over std + 1e-6)                         |

TRL alone has: a lower bound of importance weights, entropy bonus and entropy mask, off-policy sequence mask, std over
the batch. Here alone: a dual clip within 1 + clip_high, credit by turn, chats
without history; see test_surrogates, test_advantages and test_batch.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_rollouts import made_episode

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trl import GRPOConfig as TrlConfig  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from medseg_gym.rl.advantages import advantages  # noqa: E402
from medseg_gym.rl.batch import flatten, rows_of  # noqa: E402
from medseg_gym.rl.config import GRPOConfig  # noqa: E402
from medseg_gym.rl.loss import Objective, summary, token_losses  # noqa: E402
from medseg_gym.rl.types import Rollout, Segment, TokenSequence  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
CONFIG = GRPOConfig(model="tiny", out="out", env="MedSeg-Phantom-Stub-v0", max_new_tokens=24)
MEMBERS, PROMPT = 4, 3
SETTINGS = (
    *("beta", "loss_type", "importance_sampling_level", "scale_rewards", "use_vllm", "num_generations"),
    *("max_completion_length", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "off_policy_mask_threshold"),
    *("top_entropy_quantile", "mask_truncated_completions", "multi_objective_aggregation", "pad_to_multiple_of"),
)


@dataclass(frozen=True)
class Batch:
    """Two groups of four chats, and (8, C) log-probabilities of their completions, padded at the right."""

    masks: list[list[int]]  # of each completion: 1 at sampled tokens
    rewards: list[float]
    new: Any
    old: Any
    engine: Any
    reference: Any


@pytest.fixture(params=range(2))
def batch(request: pytest.FixtureRequest) -> Batch:
    rng = np.random.default_rng(request.param)
    masks = []
    for _ in range(2 * MEMBERS):
        turns = [[1] * int(rng.integers(1, 5)) for _ in range(rng.integers(1, 4))]
        masks.append([token for i, turn in enumerate(turns) for token in ([0, 0] if i else []) + turn])
    shape = (len(masks), max(map(len, masks)))
    base = -rng.exponential(1.0, shape) - 0.05

    def near(scale: float) -> Any:
        return torch.tensor(base + scale * rng.standard_normal(shape), dtype=torch.float32)

    rewards = np.round(rng.random(len(masks)), 3).tolist()
    return Batch(masks, rewards, near(0.3).requires_grad_(), near(0.3), near(0.3), near(0.5))


@cache
def defaults() -> TrlConfig:
    """TRL's settings, of which one is made, as that takes longer than a test."""
    return TrlConfig(
        output_dir="unused",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2 * MEMBERS,
        num_generations=MEMBERS,
        max_completion_length=CONFIG.max_new_tokens,
    )


class Trl(GRPOTrainer):
    """TRL's trainer without a model: what it samples, how likely and how good, is the batch's."""

    def __init__(self, batch: Batch, **settings: Any) -> None:
        self.args = copy.copy(defaults())
        for name, value in {"scale_rewards": "none", "loss_type": "grpo", "epsilon_high": 0.28, **settings}.items():
            assert hasattr(self.args, name)
            setattr(self.args, name, value)
        self.batch = batch
        for name in SETTINGS:
            setattr(self, name, getattr(self.args, name))
        self.epsilon_low, self.epsilon_high = self.args.epsilon, self.args.epsilon_high
        self.num_iterations = 2  # updates on a batch, so that old log-probabilities are not the new ones
        self.current_gradient_accumulation_steps = 1
        self.aux_loss_enabled = self._entropy_bonus_enabled = self.log_multimodal = False
        self.environments = self.environment_factories = self.tools = None
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.ref_model = "reference"
        self._tokenizer = SimpleNamespace(pad_token_id=0)
        self.reward_weights, self.reward_funcs, self.reward_func_names = torch.ones(1), [None], ["reward"]
        self._metrics = {"train": defaultdict(list)}
        self._logs: Any = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
        self._pending_extra_logs, self._pending_metrics = {}, {}
        self.accelerator: Any = SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            process_index=0,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            unwrap_model=lambda model: model,
        )

    def _generate(self, prompts: Any) -> Any:
        sizes = [len(mask) for mask in self.batch.masks]
        sampled = [row[:size] for row, size in zip(self.batch.engine.tolist(), sizes, strict=True)]
        ids = [[7] * size for size in sizes]
        return [[1] * PROMPT] * len(sizes), ids, self.batch.masks, [""] * len(sizes), sampled, {}, None, None

    def _calculate_rewards(self, *given: Any) -> Any:
        return torch.tensor(self.batch.rewards)[:, None]

    def _get_per_token_logps_and_entropies(self, model: Any, *given: Any, **more: Any) -> Any:
        known = {"reference": self.batch.reference, "policy": self.batch.new}
        values = known[model] if isinstance(model, str) else self.batch.old
        return values, torch.zeros_like(values), None

    def loss(self) -> tuple[Any, Any, Any]:
        """The loss, its gradient by the batch's `new`, and the inputs that TRL made for it."""
        inputs = self._generate_and_score_completions([{"prompt": "."}] * len(self.batch.masks))
        loss = self._compute_loss("policy", inputs)
        (gradient,) = torch.autograd.grad(loss, self.batch.new)
        return loss.item(), gradient, inputs


def ours(batch: Batch, objective: Objective, config: GRPOConfig, old: bool = True) -> tuple[float, Any, Any]:
    """The same of this package: groups of rollouts, their advantages, rows and token losses."""
    rollouts = []
    for i, (mask, reward) in enumerate(zip(batch.masks, batch.rewards, strict=True)):
        segments, turn = [Segment("prompt", (1,) * PROMPT, 0)], 0
        for at, sampled in enumerate(mask):
            if not sampled:
                turn += mask[at - 1]
                segments.append(Segment("observation", (1,), turn))
            else:
                segments.append(Segment("action", (7,), turn, logprobs=(float(batch.engine[i, at]),)))
        rollouts.append(
            Rollout(i // MEMBERS, i % MEMBERS, made_episode([0.0] * turn + [reward]), (TokenSequence(tuple(segments)),))
        )
    groups = [rollouts[:MEMBERS], rollouts[MEMBERS:]]
    given = [values for group in groups for values in advantages(group, std=config.std)]
    rows = [
        replace(row, old=padded(batch.old, i, mask) if old else None, reference=padded(batch.reference, i, mask))
        for i, (row, mask) in enumerate(zip(rows_of(rollouts, given, config), batch.masks, strict=True))
    ]
    flat = flatten(rows)
    chosen = torch.zeros_like(batch.new, dtype=torch.bool)
    for i, mask in enumerate(batch.masks):
        chosen[i, : len(mask)] = torch.tensor(mask, dtype=torch.bool)
    values, sums = token_losses(
        objective,
        batch.new[chosen],
        advantages=torch.tensor(flat.advantages),
        engine_logprobs=torch.tensor(flat.engine_logprobs),
        old=torch.tensor(flat.old) if old else None,
        reference=torch.tensor(flat.reference),
        lengths=flat.lengths,
    )
    loss = (torch.tensor(flat.weights) * values).sum()
    (gradient,) = torch.autograd.grad(loss, batch.new)
    return loss.item(), gradient, (given, summary({k: float(v) for k, v in sums.items()}))


def padded(values: Any, i: int, mask: list[int]) -> Any:
    return np.concatenate([np.zeros(PROMPT), values[i, : len(mask)].numpy()]).astype(np.float32)


VARIANTS = {
    "grpo": ({}, "sequence"),
    "bnpo": ({}, "token"),
    "dapo": ({}, "token"),
    "dr_grpo": ({}, "constant"),
    "luspo": ({}, "constant"),
    "cispo": ({"surrogate": "cispo"}, "token"),
    "sapo": ({"surrogate": "sapo"}, "sequence"),
    "vespo": ({"surrogate": "vespo"}, "token"),
}
MODES = {
    "token": "token_truncate",
    "sequence": "sequence_truncate",
    "token_mask": "token_mask",
    "sequence_mask": "sequence_mask",
}


def test_the_variants_are_all_that_trl_has():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    named = re.findall(r'self\.loss_type (?:==|in) (\[[^\]]*\]|"\w+")', source)
    assert {name for group in named for name in re.findall(r'"(\w+)"', group)} == set(VARIANTS)


def agree(batch: Batch, variant: str, *, theirs: dict[str, Any], here: dict[str, Any]) -> None:
    surrogate, normaliser = VARIANTS[variant]
    if variant == "cispo":
        theirs = {**theirs, "epsilon_high": 1.28}
    trl = Trl(batch, loss_type=variant, **theirs)
    assert trl.args.epsilon == 0.2
    length = 1 if variant == "luspo" else CONFIG.max_new_tokens
    config = replace(CONFIG, normaliser=normaliser, max_new_tokens=length, **surrogate, **here)
    known = trl.loss()
    found = ours(with_engine(batch, here), Objective.of(config), config)
    assert found[0] == pytest.approx(known[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(found[1], known[1], rtol=1e-4, atol=1e-7)
    assert known[1].abs().sum() > 1e-3


def with_engine(batch: Batch, here: dict[str, Any]) -> Batch:
    """TRL without vLLM has ratios to the old log-probabilities: with "none" they are the engine's."""
    return replace(batch, engine=batch.old) if here["importance"] == "none" else batch


COMBINED = [
    (variant, ratio, importance)
    for variant in VARIANTS
    for ratio in ("token", "sequence")
    for importance in ("none", "ignore", *MODES)
    # Refused here and by TRL: it sums over a chat itself.
    if variant != "vespo" or "sequence" not in (ratio, importance.removesuffix("_mask"))
]


@pytest.mark.parametrize(("variant", "ratio", "importance"), COMBINED)
def test_losses_and_gradients_are_trls(batch, variant, ratio, importance):
    theirs = {"importance_sampling_level": ratio}
    if importance == "ignore":
        theirs |= {"use_vllm": True, "vllm_importance_sampling_correction": False}
    elif importance != "none":
        theirs |= {
            "use_vllm": True,
            "vllm_importance_sampling_mode": MODES[importance],
            "vllm_importance_sampling_clip_max": 1.4,
        }
    here = {"ratio": ratio, "importance": importance, "importance_cap": 1.4}
    agree(batch, variant, theirs=theirs, here=here)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kl_term_is_trls(batch, variant, weighed):
    theirs = {"beta": 0.3, "use_bias_correction_kl": weighed, "use_vllm": True}
    theirs |= {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 2.0}
    agree(batch, variant, theirs=theirs, here={"kl": 0.3, "kl_ratio": weighed, "importance": "token"})


@pytest.mark.parametrize("bound", [1.3, 1.6])
@pytest.mark.parametrize("variant", ["grpo", "bnpo", "dapo", "dr_grpo", "luspo"])
def test_the_dual_clip_is_trls_delta(batch, variant, bound):
    agree(batch, variant, theirs={"delta": bound}, here={"dual_clip": bound, "importance": "none"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_step_on_a_batch_is_trls(batch, variant):
    """Without old log-probabilities the new ones stand for them, here and there."""
    surrogate, normaliser = VARIANTS[variant]
    trl = Trl(batch, loss_type=variant, **({"epsilon_high": 1.28} if variant == "cispo" else {}))
    trl.num_iterations = 1
    length = 1 if variant == "luspo" else CONFIG.max_new_tokens
    config = replace(CONFIG, normaliser=normaliser, max_new_tokens=length, **surrogate)
    loss, gradient, inputs = trl.loss()
    assert "old_per_token_logps" not in inputs
    on_policy = replace(batch, engine=batch.new.detach())
    found = ours(on_policy, Objective.of(config), config, old=False)
    assert found[0] == pytest.approx(loss, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(found[1], gradient, rtol=1e-4, atol=1e-7)


def test_advantages_are_trls(batch):
    plain = ours(batch, Objective.of(CONFIG), CONFIG)[2][0]
    _, _, inputs = Trl(batch).loss()
    assert [values[0] for values in plain] == pytest.approx(inputs["advantages"].tolist(), abs=1e-6)
    _, _, inputs = Trl(batch, scale_rewards="group").loss()
    divided = ours(batch, Objective.of(CONFIG), replace(CONFIG, std=True))[2][0]
    for values, theirs, centred in zip(divided, inputs["advantages"].tolist(), plain, strict=True):
        deviation = centred[0] / values[0] - 1e-6  # undone, and with their 1e-4
        assert centred[0] / (deviation + 1e-4) == pytest.approx(theirs, rel=1e-5)


def test_the_statistics_are_trls(batch):
    config = replace(CONFIG, kl=0.3, importance="token", importance_cap=1.4)
    trl = Trl(
        batch,
        beta=0.3,
        use_bias_correction_kl=False,
        use_vllm=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=1.4,
    )
    trl.loss()
    theirs = {name: values[0] for name, values in trl._metrics["train"].items()}
    stats = ours(batch, Objective.of(config), config)[2][1]
    assert stats["clip_share"] == pytest.approx(theirs["clip_ratio/region_mean"], rel=1e-5)
    assert stats["kl"] == pytest.approx(theirs["kl"], rel=1e-5)
    assert stats["weight"] == pytest.approx(theirs["sampling/importance_sampling_ratio/mean"], rel=1e-5)
