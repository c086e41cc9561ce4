"""Log-probabilities of chats: against the model called plainly, whatever the batch, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import made_chats
import numpy as np
import pytest
import torch

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl import forward
from medseg_gym.rl.checkpoint_folder import load_model
from medseg_gym.rl.forward import micros, model_inputs, token_logprobs, unpad
from medseg_gym.rl.tiny_model import save_tiny_model
from medseg_gym.rl.tokens import ChatTokens, TokenPrompt
from medseg_gym.rl.types import ImageRef, Segment, TokenSequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), spread=0.2)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder).eval()


@pytest.fixture(scope="module")
def tokens(folder):
    return ChatTokens.from_pretrained(folder)


@pytest.fixture(scope="module")
def chats(tokens):
    return [made_chats.chat(tokens, 1 + n % 4, seed=n, side=64 if n % 3 else 96) for n in range(16)]


@torch.no_grad()
def scores(model, tokens, chats, **options):
    return unpad(token_logprobs(model, tokens, chats, **options), chats)


@torch.no_grad()
def plainly(model, tokens, chat, temperature, banned):
    """One chat without padding, all logits, the model's own positions."""
    inputs = tokens.inputs([TokenPrompt(chat.ids, tuple(i.pixels for i in chat.images))])
    logits = model(**inputs, use_cache=False).logits[0]
    if banned:
        logits[:, sorted(tokens.banned_ids)] = -torch.inf
    logprobs = torch.log_softmax(logits / temperature, -1)
    found = np.zeros(len(chat.ids), np.float32)
    for t in np.flatnonzero(chat.loss_mask):
        found[t] = logprobs[t - 1, chat.ids[t]]
    return found


@pytest.mark.parametrize(("temperature", "banned"), [(1.0, True), (0.5, True), (1.0, False)])
def test_log_probabilities_are_those_of_the_plain_model(model, tokens, chats, temperature, banned):
    found = scores(model, tokens, chats[:4], temperature=temperature, banned=banned)
    for chat, values in zip(chats, found, strict=False):
        np.testing.assert_allclose(values, plainly(model, tokens, chat, temperature, banned), atol=1e-5)


def test_temperature_and_banned_ids_change_them(model, tokens, chats):
    usual = scores(model, tokens, chats[:1])[0]
    assert np.abs(scores(model, tokens, chats[:1], temperature=0.5)[0] - usual).max() > 1e-2
    assert (scores(model, tokens, chats[:1], banned=False)[0][chats[0].loss_mask] < usual[chats[0].loss_mask]).all()


def test_padding_batch_size_and_order_leave_them_alone(model, tokens, chats):
    """Trap 7: batches of 1 and of 16, permuted: the same log-probabilities."""
    alone = [scores(model, tokens, [chat])[0] for chat in chats]
    order = np.random.default_rng(3).permutation(len(chats))
    together = scores(model, tokens, [chats[i] for i in order])
    for i, values in zip(order, together, strict=True):
        np.testing.assert_allclose(values, alone[i], atol=1e-5)


def test_padding_on_the_right_gives_the_same(model, tokens, chats):
    """Trap 7: the sum of both sides, as the model itself sees no padding."""
    inputs = model_inputs(model, tokens, chats[:2])
    pad = (inputs["attention_mask"][0] == 0).sum().item() or (inputs["attention_mask"][1] == 0).sum().item()
    assert pad
    short = int(inputs["attention_mask"].sum(1).argmin())
    text = ("input_ids", "attention_mask", "mm_token_type_ids")
    rolled = {k: v.clone() for k, v in inputs.items()}
    for key in text:
        rolled[key][short] = inputs[key][short].roll(-pad)
    rolled["position_ids"][:, short] = inputs["position_ids"][:, short].roll(-pad, -1)
    with torch.no_grad():
        left = model.model(**inputs, use_cache=False)[0][short]
        right = model.model(**rolled, use_cache=False)[0][short]
    torch.testing.assert_close(left[pad:], right[:-pad], atol=1e-4, rtol=1e-4)


def test_positions_after_several_images(model, tokens):
    """Trap 7: worked out by hand for 64x64 pictures, 2x2 tokens each; a chat's beginning has the positions of the
    whole chat's beginning."""
    chat = made_chats.chat(tokens, 3, seed=0)
    positions = model_inputs(model, tokens, [chat])["position_ids"][:, 0]
    at, next_position, wanted = 0, 0, []
    while at < len(chat.ids):
        if chat.ids[at] == tokens.image_pad:
            p = next_position
            wanted += [(p, p, p), (p, p, p + 1), (p, p + 1, p), (p, p + 1, p + 1)]
            at, next_position = at + 4, p + 2
        else:
            wanted.append((next_position,) * 3)
            at, next_position = at + 1, next_position + 1
    assert [tuple(column) for column in positions.T.tolist()] == wanted
    first = TokenSequence(chat.segments[:5])
    begun = model_inputs(model, tokens, [first])["position_ids"][:, 0]
    assert torch.equal(begun, positions[:, : begun.shape[1]])


def test_swapped_images_change_them(model, tokens):
    """Trap 8: a policy that does not see trains without any error."""
    chat = made_chats.chat(tokens, 2, seed=1)
    first, second = (s for s in chat.segments if s.images)
    swap = {id(first): second.images, id(second): first.images}
    swapped = TokenSequence(tuple(replace(s, images=swap.get(id(s), ())) for s in chat.segments))
    before, after = scores(model, tokens, [chat])[0], scores(model, tokens, [swapped])[0]
    for turn in (0, 1):
        assert np.abs(before - after)[chat.turns == turn].max() > 1e-4


def test_only_sampled_tokens_have_one(model, tokens, chats):
    """Trap 3: as many as were sampled; neither pictures, injected ends of turn nor marked answers."""
    chat = chats[3]
    sampled = sum(len(s.ids) for s in chat.segments if s.kind == "action")
    found = scores(model, tokens, [chat])[0]
    assert np.count_nonzero(found) == sampled == chat.loss_mask.sum()
    marked = TokenSequence(tuple(replace(s, marked=s.turn == 1) for s in chat.segments))
    fewer = scores(model, tokens, [marked])[0]
    dropped = sum(len(s.ids) for s in chat.segments if s.kind == "action" and s.turn == 1)
    assert np.count_nonzero(fewer) == sampled - dropped
    np.testing.assert_allclose(fewer[fewer != 0], found[fewer != 0], atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_chunks_give_the_same_values_and_gradients(model, tokens, chats, monkeypatch, checkpointed):
    def gradient():
        model.zero_grad()
        token_logprobs(model, tokens, chats[:4]).sum().backward()
        return model.lm_head.weight.grad.clone(), model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone()

    model.train(checkpointed)
    whole, usual = scores(model, tokens, chats[:4]), gradient()
    monkeypatch.setattr(forward, "LOGITS", 7 * 263)  # seven positions at once
    for values, wanted in zip(scores(model, tokens, chats[:4]), whole, strict=True):
        np.testing.assert_allclose(values, wanted, atol=1e-6)
    for found, wanted in zip(gradient(), usual, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    model.eval().zero_grad()


def test_a_missing_picture_is_refused_and_its_turn_named(model, tokens):
    """Trap 5: one picture fewer than placeholders, a picture of another size, and sampled image tokens."""
    chat = made_chats.chat(tokens, 3, seed=2)
    prompt = next(s for s in chat.segments if s.turn == 2 and s.images)
    big = ImageRef.of(np.zeros((96, 96, 3), np.uint8))
    for change in ({"images": ()}, {"images": (big,)}, {"ids": (*prompt.ids, tokens.image_pad)}):
        broken = TokenSequence(tuple(replace(s, **change) if s is prompt else s for s in chat.segments))
        with pytest.raises(BadDataError, match="turn 2, observation: image tokens come in runs"):
            token_logprobs(model, tokens, [chat, broken])


def test_a_banned_token_is_not_trained(model, tokens):
    """Trap 6: sampler and learner ban the same ids."""
    start = Segment("prompt", tokens.prompt([{"role": "user", "content": "x"}]).ids, 0)
    chat = TokenSequence((start, Segment("action", (tokens.start, tokens.end), 0)))
    with pytest.raises(BadDataError, match="no sampler may produce it"):
        token_logprobs(model, tokens, [chat])
    assert np.isfinite(scores(model, tokens, [chat], banned=False)[0]).all()


def test_greedy_and_unpredicted_tokens_are_refused(model, tokens, chats):
    with pytest.raises(MedSegError, match="greedy"):
        token_logprobs(model, tokens, chats[:1], temperature=0.0)
    with pytest.raises(BadDataError, match="first token"):
        token_logprobs(model, tokens, [TokenSequence((Segment("action", tokens.text("ab"), 0),))])


def test_a_chat_without_pictures_and_one_without_trained_tokens(model, tokens, chats):
    words = tokens.prompt([{"role": "user", "content": "x"}]).ids
    silent = TokenSequence((Segment("prompt", words, 0),))
    spoken = TokenSequence((Segment("prompt", words, 0), Segment("action", tokens.text("a"), 0)))
    assert not scores(model, tokens, [silent])[0].any()
    alone = scores(model, tokens, [spoken])[0]
    np.testing.assert_allclose(scores(model, tokens, [chats[1], spoken, silent])[1], alone, atol=1e-5)


def test_micro_batches_keep_order_and_bounds():
    made = [TokenSequence((Segment("prompt", (0,) * n, 0),)) for n in (3, 3, 5, 2, 2, 2, 40, 1)]
    cut = micros(made, rows=3, tokens=12)
    assert [[len(s.ids) for s in part] for part in cut] == [[3, 3], [5, 2], [2, 2], [40], [1]]
