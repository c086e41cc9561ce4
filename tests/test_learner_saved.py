"""What a learner hands out: weights for engines, checkpoints to go on from, folders to load elsewhere, a reference."""

from __future__ import annotations

import json

import made_chats
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl import batch
from medseg_gym.rl.checkpoint_folder import load_model
from medseg_gym.rl.forward import token_logprobs, unpad
from medseg_gym.rl.learner_state import RECORD, TENSORS
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.tiny_model import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer

SFT = Objective("sft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A checkpoint whose head is its embedding."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tied"))
    config = tiny_config(tiny_tokenizer())
    config.tie_word_embeddings = True
    tiny_model(config, 0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(folder):
    tokens = made_chats.learner(folder).tokens
    return [made_chats.chat(tokens, 1 + n % 3, seed=n) for n in range(6)]


@pytest.fixture(scope="module")
def rows(chats):
    return batch.supervised_rows(chats)


def parameters(learner):
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def trained(folder, rows, **settings):
    learner = made_chats.learner(folder, **settings)
    for _ in range(2):
        learner.step([rows], SFT)
    return learner


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_weights_have_every_name_and_shape_of_the_saved_checkpoint(folder, rows, lora_rank):
    """Trap 16: counts, names and shapes are those of the file that `save_pretrained` wrote."""
    weights = trained(folder, rows, lora_rank=lora_rank).weights(full=True)
    file = load_file(folder / "model.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {name: v.shape for name, v in file.items()}
    assert all(value.device.type == "cpu" and value.dtype == torch.float32 for value in weights.values())
    for name in file:
        assert torch.equal(weights[name], file[name]) == ("visual" in name or not _changes(name, lora_rank)), name


def _changes(name, lora_rank):
    adapted = "_proj" in name and "language_model" in name
    return adapted if lora_rank else True


def test_tied_weights_are_published_once(tied, rows, tmp_path):
    learner = trained(tied, rows)
    weights = learner.weights(full=True)
    assert "lm_head.weight" not in weights
    assert set(weights) == set(load_file(tied / "model.safetensors"))
    learner.export(tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights["model.language_model.embed_tokens.weight"])


def test_weights_are_copies(folder, rows):
    learner = trained(folder, rows)
    before = learner.weights(full=False)["lm_head.weight"]
    kept = before.clone()
    learner.step([rows], SFT)
    assert torch.equal(before, kept)
    before.zero_()
    assert learner.model.lm_head.weight.abs().sum() > 0


def test_partial_weights_are_all_that_training_changes(folder, rows):
    """Trap 15 and 16: with LoRA they are the merged layers, and those alone."""
    learner = made_chats.learner(folder, lora_rank=2, lora_targets=("q_proj", "down_proj"))
    before = learner.weights(full=True)
    learner.step([rows], SFT)
    learner.step([rows], SFT)
    after, part = learner.weights(full=True), learner.weights(full=False)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(part)
    assert len(part) == 4  # two targets in two layers
    assert all(torch.equal(value, after[name]) for name, value in part.items())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_an_exported_folder_gives_the_same_log_probabilities(folder, rows, chats, tmp_path, lora_rank):
    """Merged LoRA equals unmerged; tokenizer, template and picture settings come along."""
    learner = trained(folder, rows, lora_rank=lora_rank)
    before = parameters(learner)
    learner.export(tmp_path / "a" / "b")
    assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())
    again = made_chats.learner(tmp_path / "a" / "b")
    for found, wanted in zip(
        again.logprobs(chats, temperature=1.0), learner.logprobs(chats, temperature=1.0), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert {f.name for f in folder.iterdir()} == {f.name for f in (tmp_path / "a" / "b").iterdir()}


def test_an_export_is_in_the_dtype_of_training(folder, tmp_path):
    made_chats.learner(folder, dtype="bfloat16").export(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_learner_goes_on_bit_for_bit(folder, rows, tmp_path, lora_rank):
    """Trap 10, the learner's part: two steps, saved, loaded by another, two more; against four in one go."""
    settings = {"lora_rank": lora_rank, "schedule": "cosine", "warmup": 0.2, "weight_decay": 0.1}
    whole = trained(folder, rows, **settings)
    whole.save(tmp_path)
    numbers = [whole.step([rows[:3], rows[3:]], SFT) for _ in range(2)]
    again = made_chats.learner(folder, seed=5 if not lora_rank else 0, **settings)
    again.load(tmp_path)
    assert [again.step([rows[:3], rows[3:]], SFT) for _ in range(2)] == numbers
    wanted = parameters(whole)
    assert all(torch.equal(value, wanted[name]) for name, value in parameters(again).items())


def test_the_counters_are_saved(folder, rows, tmp_path):
    learner = made_chats.learner(folder)
    head = learner.model.lm_head.weight
    hook = head.register_hook(lambda grad: torch.full_like(grad, torch.nan))
    learner.step([rows], SFT)
    hook.remove()
    learner.step([rows], SFT)
    learner.save(tmp_path)
    again = made_chats.learner(folder)
    again.load(tmp_path)
    assert (again.optimiser.steps, again.optimiser.skipped) == (2, 1)


def test_a_save_of_other_parameters_is_refused(folder, rows, tmp_path):
    trained(folder, rows, lora_rank=2).save(tmp_path / "lora")
    learner = made_chats.learner(folder)
    before = parameters(learner)
    with pytest.raises(BadDataError, match="other parameters"):
        learner.load(tmp_path / "lora")
    with pytest.raises(BadDataError, match="no learner's state"):
        learner.load(tmp_path)
    learner.save(tmp_path / "cut")
    file = tmp_path / "cut" / TENSORS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadDataError, match="no learner's state"):
        learner.load(tmp_path / "cut")
    learner.save(tmp_path / "cut")
    (tmp_path / "cut" / RECORD).write_text("[]")
    with pytest.raises(BadDataError, match="no learner's state"):
        learner.load(tmp_path / "cut")
    learner.save(tmp_path / "part")
    tensors = load_file(tmp_path / "part" / TENSORS)
    save_file({k: v for k, v in tensors.items() if not k.startswith("rng")}, tmp_path / "part" / TENSORS)
    with pytest.raises(BadDataError, match="no learner's state"):
        learner.load(tmp_path / "part")
    assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())


@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"kl": 0.1}])
def test_the_reference_is_the_policy_before_training(folder, rows, chats, settings):
    learner = made_chats.learner(folder, **settings)
    start = learner.logprobs(chats, temperature=0.7)
    for found, wanted in zip(learner.reference_logprobs(chats, temperature=0.7), start, strict=True):
        np.testing.assert_array_equal(found, wanted)
    learner.step([rows], SFT)
    learner.step([rows], SFT)
    after = learner.reference_logprobs(chats, temperature=0.7)
    assert all(np.array_equal(found, wanted) for found, wanted in zip(after, start, strict=True))
    assert np.abs(learner.logprobs(chats, temperature=0.7)[0] - start[0]).max() > 1e-3
    assert learner.step([rows], SFT)["grad_norm"] > 0  # the adapters are on again


def test_a_reference_may_be_another_checkpoint(folder, chats, tmp_path):
    other = save_tiny_model(tmp_path, seed=7)
    learner = made_chats.learner(folder, kl=0.1, reference=str(other))
    with torch.no_grad():
        wanted = unpad(token_logprobs(load_model(other).eval(), learner.tokens, chats), chats)
    for found, values in zip(learner.reference_logprobs(chats, temperature=1.0), wanted, strict=True):
        np.testing.assert_allclose(found, values, atol=1e-5)


def test_without_a_reference_there_is_none(folder, chats):
    with pytest.raises(MedSegError, match="no reference policy"):
        made_chats.learner(folder).reference_logprobs(chats, temperature=1.0)
