"""An optimiser step: its gradient, what it leaves alone, and what it does not hang on."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import made_chats
import numpy as np
import pytest
import torch

from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.rl import batch
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.optimiser import learning_rate
from medseg_gym.rl.tiny_model import save_tiny_model
from medseg_gym.rl.types import Row, Segment, TokenSequence

PLAIN = Objective("grpo", importance="token", importance_cap=1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chats(folder):
    tokens = made_chats.learner(folder).tokens
    return [made_chats.chat(tokens, 1 + n % 3, seed=n) for n in range(16)]


def parameters(learner):
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def one_armed(learner, arm, advantage, weight):
    """A prompt and the one sampled token "a" or "b", as an engine at the present weights samples it."""
    prompt = Segment("prompt", learner.tokens.prompt([{"role": "user", "content": "?"}]).ids, 0)
    chat = TokenSequence((prompt, Segment("action", learner.tokens.text(arm), 0)))
    logprobs = tuple(float(v) for v in learner.logprobs([chat], temperature=1.0)[0][-1:])
    chat = TokenSequence((prompt, replace(chat.segments[1], logprobs=logprobs)))
    mask = chat.loss_mask.astype(np.float32)
    return Row(chat, mask * np.float32(weight), mask * np.float32(advantage))


@pytest.mark.parametrize("importance", ["token", "none"])
def test_the_gradient_is_the_policy_gradient(folder, importance):
    """Trap 1: a softmax of two arms. With samples a, a, b of advantages 1/3, 1/3, -2/3 and weights 1/3 the loss's
    gradient in arm a's logit is -sum w A (1[a] - p) = -2/9, and 2/9 in b's; the head's is that times its input."""
    learner = made_chats.learner(folder, freeze=("*visual*", "*language_model*"))
    arms = learner.tokens.text("a") + learner.tokens.text("b")
    learner.tokens.banned_ids = frozenset(range(263)) - set(arms)
    states = []
    hook = learner.model.lm_head.register_forward_hook(lambda _, given, __: states.append(given[0].detach()))
    rows = [
        one_armed(learner, arm, advantage, 1 / 3) for arm, advantage in zip("aab", (1 / 3, 1 / 3, -2 / 3), strict=True)
    ]
    hook.remove()
    before = learner.model.lm_head.weight.detach().clone()
    # so small a step is the gradient's sign in Adam, so the norm is looked at, and the direction
    found = learner.step([rows[:2], rows[2:]], Objective("grpo", importance=importance))
    assert found["grad_norm"] == pytest.approx(math.sqrt(2) * 2 / 9 * states[0].norm().item(), rel=1e-4)
    moved = learner.model.lm_head.weight.detach() - before
    assert set(moved.abs().sum(1).nonzero()[:, 0].tolist()) == set(arms)
    torch.testing.assert_close(moved[arms[0]].sign(), states[0][0].sign())
    torch.testing.assert_close(moved[arms[1]].sign(), -states[0][0].sign())


def test_equal_rewards_give_exactly_no_gradient(folder, chats):
    """Trap 1: advantages of 0, whatever was sampled."""
    learner = made_chats.learner(folder)
    rows = [replace(row, advantages=np.zeros_like(row.weights)) for row in made_chats.grpo_rows(chats[:4])]
    before = parameters(learner)
    found = learner.step([rows], PLAIN)
    assert found["grad_norm"] == 0.0 and found["skipped"] == 0.0
    assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())


def test_only_what_has_a_weight_is_counted(folder, chats):
    """Trap 3: the step's token count is the number of sampled tokens, a filler row's are none."""
    learner = made_chats.learner(folder)
    rows = made_chats.grpo_rows(chats[:3])
    sampled = sum(len(s.ids) for c in chats[:3] for s in c.segments if s.kind == "action")
    assert learner.step([rows, [batch.filler(rows[0])]], PLAIN)["tokens"] == sampled


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_micro_batches_do_not_change_the_update(folder, chats, kind):
    """Trap 11: 1x16, 4x4 and 16x1; Adam's first step hides a gradient's size, so the norm is compared too."""
    rows = made_chats.grpo_rows(chats) if kind == "grpo" else batch.supervised_rows(chats)
    objective = PLAIN if kind == "grpo" else Objective("sft")
    found = []
    for size in (16, 4, 1):
        learner = made_chats.learner(folder, lr=1e-3)
        for _ in range(2):
            numbers = learner.step([rows[at : at + size] for at in range(0, 16, size)], objective)
        found.append((numbers, parameters(learner)))
    for numbers, values in found[1:]:
        assert numbers["loss"] == pytest.approx(found[0][0]["loss"], abs=1e-5)
        assert numbers["grad_norm"] == pytest.approx(found[0][0]["grad_norm"], rel=1e-4)
        for name, value in values.items():
            torch.testing.assert_close(value, found[0][1][name], atol=1e-5, rtol=0)


def test_the_same_calls_give_the_same_bits(folder, chats):
    rows = batch.supervised_rows(chats[:4])
    states = []
    for _ in range(2):
        learner = made_chats.learner(folder, lora_rank=2, gradient_checkpointing=True)
        for _ in range(2):
            learner.step([rows[:2], rows[2:]], Objective("sft"))
        states.append(parameters(learner))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_gradient_checkpointing_changes_nothing(folder, chats):
    rows, found = batch.supervised_rows(chats[:4]), []
    for checkpointing in (True, False):
        learner = made_chats.learner(folder, gradient_checkpointing=checkpointing)
        layers = learner.model.model.language_model.layers
        assert all(layer.gradient_checkpointing == checkpointing for layer in layers)
        found.append((learner.step([rows], Objective("sft")), parameters(learner)))
    assert found[0][0]["grad_norm"] == pytest.approx(found[1][0]["grad_norm"], rel=1e-6)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], atol=1e-6, rtol=0)


def test_a_checkpoints_dropout_is_not_used(folder, chats, tmp_path):
    """It would be another policy's log-probabilities than the one that sampled."""
    shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["attention_dropout"] = 0.5
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    rows = batch.supervised_rows(chats[:2])
    losses = [made_chats.learner(f).step([rows], Objective("sft"))["loss"] for f in (folder, tmp_path / "model")]
    assert losses[0] == losses[1]


def test_bfloat16_trains_float32_weights(folder, chats):
    learner = made_chats.learner(folder, dtype="bfloat16", gradient_checkpointing=True, lr=1e-3)
    rows = batch.supervised_rows(chats[:4])
    losses = [learner.step([rows], Objective("sft"))["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.05
    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_frozen_tower_stays_as_it_was(folder, chats, lora_rank):
    """Trap 15: no gradient, absent from the optimiser, unchanged bit for bit, and published once."""
    learner = made_chats.learner(folder, lora_rank=lora_rank)
    before = parameters(learner)
    learner.step([batch.supervised_rows(chats[:2])], Objective("sft"))
    tower = {name for name in before if "visual" in name}
    assert len(tower) > 20
    assert not tower & set(learner.optimiser.named)
    assert all(p.grad is None for name, p in learner.model.named_parameters() if name in tower)
    assert len(learner.optimiser.adamw.state) == len(learner.optimiser.named)
    after = parameters(learner)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed <= set(learner.optimiser.named) and len(changed) > 10
    published = learner.weights(full=False)
    assert published and not any("visual" in name for name in published)
    assert tower <= set(learner.weights(full=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(folder, chats, poison):
    learner = made_chats.learner(folder)
    rows = made_chats.grpo_rows(chats[:2])
    learner.step([rows], PLAIN)
    before, state = parameters(learner), learner.optimiser.moments()
    bad = replace(rows[0], advantages=np.full_like(rows[0].weights, poison))
    found = learner.step([[bad], rows[1:]], PLAIN)
    assert found["skipped"] == 1.0 and found["skipped_steps"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())
    for name, values in learner.optimiser.moments().items():
        assert all(torch.equal(value, state[name][what]) for what, value in values.items())
    assert learner.step([rows], PLAIN)["skipped"] == 0.0


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped(folder, chats):
    learner = made_chats.learner(folder)
    head = learner.model.lm_head.weight
    head.register_hook(lambda grad: torch.full_like(grad, math.inf))
    before = parameters(learner)
    found = learner.step([batch.supervised_rows(chats[:1])], Objective("sft"))
    assert math.isfinite(found["loss"]) and found["skipped"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient(folder):
    learner = made_chats.learner(folder)
    before = parameters(learner)
    for parameter in learner.optimiser.named.values():
        parameter.grad = torch.ones_like(parameter)
    assert learner.optimiser.step(math.nan)["skipped"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())
    assert all(parameter.grad is None for parameter in learner.optimiser.named.values())


def test_a_gradient_above_the_clip_is_scaled_to_it(folder, chats):
    """Two learners whose clips differ by 2 and are both reached have first moments that differ by 2."""
    rows, moments = batch.supervised_rows(chats[:2]), []
    for clip in (0.1, 0.2):
        learner = made_chats.learner(folder, grad_clip=clip)
        assert learner.step([rows], Objective("sft"))["grad_norm"] > 1
        moments.append(torch.cat([v["exp_avg"].flatten() for v in learner.optimiser.moments().values()]))
    torch.testing.assert_close(moments[0] * 2, moments[1])
    assert moments[0].norm().item() == pytest.approx(0.1 * (1 - 0.9), rel=1e-4)


def test_a_step_without_rows_changes_nothing(folder):
    learner = made_chats.learner(folder, weight_decay=0.1)
    before = parameters(learner)
    found = learner.step([], Objective("sft"))
    assert (found["loss"], found["tokens"], found["grad_norm"]) == (0.0, 0.0, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())


def test_norms_do_not_decay(folder):
    learner = made_chats.learner(folder, weight_decay=0.1)
    decays = {id(p): g["weight_decay"] for g in learner.optimiser.adamw.param_groups for p in g["params"]}
    for name, parameter in learner.optimiser.named.items():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.1)


def test_learning_rates(folder):
    def rates(**given):
        settings = made_chats.config(folder, **given)
        return [learning_rate(settings, step, 10) for step in range(11)]

    assert rates(lr=1.0) == [1.0] * 11
    assert rates(lr=1.0, warmup=0.2, schedule="linear") == pytest.approx(
        [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]
    )
    cosine = rates(lr=2.0, schedule="cosine")
    assert (cosine[0], cosine[5], cosine[10]) == pytest.approx((2, 1, 0))
    with pytest.raises(UnknownNameError, match="linear"):
        rates(schedule="lineal")


def test_settings_that_fit_nothing_are_refused(folder, tmp_path):
    for given, said in (
        ({"freeze": ("*vision*",)}, "fits no parameter"),
        ({"freeze": ("*",)}, "nothing to train"),
        ({"lora_rank": 2, "lora_targets": ("q_prog",)}, "q_proj"),
        ({"dtype": "float16"}, "bfloat16"),
        ({"device": "gpu"}, "device='gpu'; wanted cpu"),
        ({"device": "cuda:99"}, "device='cuda:99', but this torch has"),
    ):
        with pytest.raises(MedSegError, match=said):
            made_chats.learner(folder, **given)
    with pytest.raises(MedSegError, match="no checkpoint folder"):
        made_chats.learner(tmp_path / "none")
