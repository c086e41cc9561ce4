"""The transformers engine says what the learner computes: the same tokens, positions, pictures and weights."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from medseg_gym.policies.inprocess import TransformersModel  # noqa: E402
from medseg_gym.rl import sync  # noqa: E402
from medseg_gym.rl.engines.base import GenRequest, GenResult  # noqa: E402
from medseg_gym.rl.engines.hf import HFEngine  # noqa: E402
from medseg_gym.rl.forward import token_logprobs, unpad  # noqa: E402
from medseg_gym.rl.tiny_model import save_tiny_model, tiny_config, tiny_model  # noqa: E402
from medseg_gym.rl.tokens import ChatTokens  # noqa: E402
from medseg_gym.rl.types import ImageRef, Segment, TokenSequence  # noqa: E402

RNG = np.random.default_rng(0)
SHAPES = ((64, 64), (96, 64), (32, 96), (64, 64))
PICTURES = [ImageRef.of(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES]
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", spread=0.2)


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> ChatTokens:
    return ChatTokens.from_pretrained(checkpoint)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[HFEngine]:
    made = HFEngine(checkpoint, device="cpu", max_batch=16)
    yield made
    asyncio.run(made.close())


def user(picture: ImageRef | None, words: str) -> dict[str, Any]:
    parts = [] if picture is None else [{"type": "image", "image": picture.pixels}]
    return {"role": "user", "content": [*parts, {"type": "text", "text": words}]}


def request(tokens: ChatTokens, segments: Sequence[Segment], seed: int = 0, **changes: Any) -> GenRequest:
    chat = TokenSequence(tuple(segments))
    asked = GenRequest(f"r{seed}", chat.ids, chat.images, 1.0, 12, seed, (tokens.end,), tokens.banned_ids)
    return replace(asked, **changes)


def opening(tokens: ChatTokens, picture: ImageRef | None = PICTURES[0], words: str = "spleen") -> Segment:
    prompt = tokens.prompt([{"role": "system", "content": "Outline it."}, user(picture, words)])
    return Segment("prompt", prompt.ids, 0, () if picture is None else (picture,))


def answered(tokens: ChatTokens, segments: Sequence[Segment], said: GenResult, then: ImageRef | None) -> list[Segment]:
    """The chat with an answer and the picture that follows it, without decoding anything; with None it ends there."""
    turn = segments[-1].turn
    action = Segment("action", said.ids, turn, (), said.logprobs, said.versions)
    if then is None:
        return [*segments, action]
    suffix = tokens.suffix(said.ids, [user(then, "and now?")])
    cut = 0 if said.ids[-1] == tokens.end else 1
    injected = [Segment("injected", suffix.ids[:cut], turn)] if cut else []
    return [*segments, action, *injected, Segment("observation", suffix.ids[cut:], turn + 1, (then,))]


async def chats(engine: HFEngine, turns: Sequence[int], **changes: Any) -> list[TokenSequence]:
    """A chat of as many turns as each number says, the chats asking together, with other pictures in each."""
    tokens = engine.tokens
    grown: list[list[Segment]] = [[opening(tokens, PICTURES[i % 4])] for i in range(len(turns))]
    for turn in range(max(turns)):
        playing = [i for i in range(len(turns)) if turn < turns[i]]
        asked = [request(tokens, grown[i], 10 * turn + i, **changes) for i in playing]
        for i, said in zip(playing, await engine.generate_together(asked), strict=True):
            then = PICTURES[(i + turn + 1) % 4] if turn + 1 < turns[i] else None
            grown[i] = answered(tokens, grown[i], said, then)
    return [TokenSequence(tuple(segments)) for segments in grown]


def learned(model: Any, tokens: ChatTokens, sequences: Sequence[TokenSequence], **settings: Any) -> list[np.ndarray]:
    with torch.no_grad():
        return unpad(token_logprobs(model, tokens, sequences, **settings), sequences)


def worst(model: Any, tokens: ChatTokens, sequences: Sequence[TokenSequence], **settings: Any) -> float:
    """The largest difference between what the engine said and what a learner's forward pass says."""
    theirs = learned(model, tokens, sequences, **settings)
    return max(float(np.abs(mine.logprobs - their).max()) for mine, their in zip(sequences, theirs, strict=True))


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 250))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_lone_answer_is_the_one_that_the_in_process_policy_gives(
    checkpoint: Path, engine: HFEngine, temperature: float
) -> None:
    policy = TransformersModel(checkpoint, temperature=temperature, max_tokens=12, device="cpu")
    try:
        for pictures in (0, 1, 3):
            said = {"role": "assistant", "content": "click"}
            shown = [message for picture in PICTURES[:pictures] for message in (user(picture, "x"), said)]
            prompt = policy.tokens.conversation([*shown, user(None, "liver")])
            theirs = policy.generate(prompt, seed=5)
            asked = Segment("prompt", prompt.ids, 0, tuple(PICTURES[:pictures]))
            mine = run(engine.generate(request(policy.tokens, [asked], 5, temperature=temperature)))
            assert mine.ids == theirs.token_ids
            assert np.allclose(mine.logprobs, theirs.logprobs, **CLOSE)
    finally:
        policy.close()


def test_engine_and_learner_agree_on_every_sampled_token(engine: HFEngine) -> None:
    """Traps 2 and 7: chats of one to four pictures in one batch, each turn asked incrementally, learned at one go."""
    sequences = run(chats(engine, [1, 4, 2, 3, 1], temperature=0.7))
    assert sum(int(sequence.loss_mask.sum()) for sequence in sequences) > 60
    assert worst(engine.model, engine.tokens, sequences, temperature=0.7) < 1e-5
    assert worst(engine.model, engine.tokens, sequences[1:2], temperature=0.7) < 1e-5
    # the test would see a temperature that is left out, and pictures that are swapped (trap 8)
    assert worst(engine.model, engine.tokens, sequences, temperature=1.0) > 0.1
    first = sequences[0].segments
    swapped = TokenSequence((replace(first[0], images=(PICTURES[3],)), *first[1:]))
    assert worst(engine.model, engine.tokens, [swapped], temperature=0.7) > 1e-2


def test_positions_grown_token_by_token_are_those_of_the_whole_chat(engine: HFEngine) -> None:
    """Trap 7: each row's rope goes on from its own pictures, whatever the other rows hold and how they are padded."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        seen.append((given["position_ids"].clone(), given["attention_mask"].clone()))

    sequences = run(chats(engine, [3, 1, 2]))
    prompts = [sequence.segments[:-1] for sequence in sequences]
    hook = engine.model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    results = run(engine.generate_together([request(engine.tokens, p, stop_ids=(), max_tokens=9) for p in prompts]))
    hook.remove()
    grown = torch.cat([positions for positions, _ in seen], -1)
    mask = seen[-1][1].bool()
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        ids = torch.tensor([[*TokenSequence(tuple(prompt)).ids, *result.ids[:-1]]])
        pixels = [image.pixels for image in TokenSequence(tuple(prompt)).images]
        grids = engine.tokens.processor(images=pixels, return_tensors="pt")["image_grid_thw"]
        kinds = (ids == engine.tokens.image_pad).long()
        whole, _ = engine.model.model.get_rope_index(ids, kinds, image_grid_thw=grids)
        assert torch.equal(grown[:, row][:, mask[row]], whole[:, 0])


def test_padding_company_and_order_change_no_token(engine: HFEngine) -> None:
    """Trap 7: alone, in sixteen, and in another order."""
    sequences = run(chats(engine, [1, 2, 3, 1]))
    asked = [request(engine.tokens, sequences[i % 4].segments[:-1], seed=i) for i in range(16)]
    together = run(engine.generate_together(asked))
    order = np.random.default_rng(1).permutation(16)
    moved = run(engine.generate_together([asked[i] for i in order]))
    for i, place in enumerate(np.argsort(order)):
        assert moved[place].ids == together[i].ids
        assert np.allclose(moved[place].logprobs, together[i].logprobs, **CLOSE)
    alone = [run(engine.generate(one)) for one in asked[:4]]
    for one, other in zip(alone, together, strict=False):
        assert one.ids == other.ids
        assert np.allclose(one.logprobs, other.logprobs, **CLOSE)


def test_a_row_that_ends_early_leaves_the_bits_of_the_others_alone(engine: HFEngine) -> None:
    rows = [[opening(engine.tokens, picture)] for picture in PICTURES]
    long = [request(engine.tokens, row, i, stop_ids=(), max_tokens=20) for i, row in enumerate(rows)]
    short = [long[0], replace(long[1], max_tokens=1), replace(long[2], max_tokens=7), long[3]]
    whole, cut = run(engine.generate_together(long)), run(engine.generate_together(short))
    for result, other, asked in zip(whole, cut, short, strict=True):
        assert other.logprobs == result.logprobs[: asked.max_tokens]
        assert other.ids == result.ids[: asked.max_tokens]


def test_ids_that_do_not_survive_their_text_are_trained_as_sampled(engine: HFEngine) -> None:
    """Trap 4: answers of lone continuation bytes, whose text reads as other bytes."""
    tokens = engine.tokens
    halves = {tokens.text(c)[1] for c in "éàüß"}
    banned = frozenset(range(len(tokens.tokenizer))) - halves
    prompt = [opening(tokens)]
    said = run(engine.generate(request(tokens, prompt, 1, banned_ids=banned, max_tokens=8)))
    assert set(said.ids) <= halves
    assert tokens.text(tokens.decode(said.ids)) != said.ids
    grown = answered(tokens, prompt, said, PICTURES[1])
    follow_up = request(tokens, grown, 2)
    at = len(prompt[0].ids)
    assert follow_up.ids[at : at + 8] == said.ids
    sequence = TokenSequence(tuple(answered(tokens, grown, run(engine.generate(follow_up)), None)))
    trained = [token for token, kept in zip(sequence.ids, sequence.loss_mask, strict=True) if kept]
    assert tuple(trained[:8]) == said.ids
    marked = [replace(s, marked=s.ids == said.ids) for s in sequence.segments]  # it was sampled with other bans
    kept = TokenSequence(tuple(marked))
    theirs = learned(engine.model, tokens, [kept])[0]
    assert np.allclose(theirs[kept.loss_mask], sequence.logprobs[kept.loss_mask], **CLOSE)


def test_ids_that_are_banned_have_no_part_in_anyones_probabilities(engine: HFEngine) -> None:
    """Trap 6: a model that would say little else than vision tokens."""
    tokens = engine.tokens
    greedy = request(tokens, [opening(tokens)], temperature=0.0)
    liked = run(engine.generate(greedy)).ids[0]
    with torch.no_grad():  # twice what the most likely token has
        for token in (tokens.image_pad, tokens.vision_start):
            engine.model.lm_head.weight[token] = 2 * engine.model.lm_head.weight[liked]
    assert run(engine.generate(replace(greedy, banned_ids=frozenset()))).ids[0] in tokens.banned_ids
    sequences = run(chats(engine, [2, 1, 2]))
    assert not any(set(np.array(s.ids)[s.loss_mask]) & tokens.banned_ids for s in sequences)
    assert worst(engine.model, tokens, sequences) < 1e-5
    assert worst(engine.model, tokens, sequences, banned=False) > 0.1


@pytest.mark.parametrize("part", ["all", "vision tower", "language model"])
def test_after_an_update_the_log_probabilities_are_the_new_weights(
    checkpoint: Path, engine: HFEngine, part: str, tmp_path: Path
) -> None:
    """Traps 12 and 16: every name arrives, by file too; and what is not published stays."""
    other = tiny_model(tiny_config(engine.tokens.tokenizer, spread=0.2), seed=1)
    names = [n for n in other.state_dict() if part == "all" or ("visual" in n) == (part == "vision tower")]
    weights = {name: other.state_dict()[name] for name in names}
    before = run(chats(engine, [1, 2]))
    assert worst(other, engine.tokens, before) > 0.1

    async def update() -> list[TokenSequence]:
        await engine.pause()
        await engine.update_weights(sync.publish(weights, 1, part == "all", tmp_path))
        await engine.resume()
        return await chats(engine, [1, 2])

    old = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    after = run(update())
    expected = tiny_model(tiny_config(engine.tokens.tokenizer, spread=0.2), seed=2)
    expected.load_state_dict({**old, **weights})
    assert worst(expected, engine.tokens, after) < 1e-5
    assert all(torch.equal(t, {**old, **weights}[n]) for n, t in engine.model.state_dict().items())
    # the prompts' answers changed too, so nothing that was remembered of the old weights was used
    assert [s.logprobs.tolist() for s in after] != [s.logprobs.tolist() for s in before]
    assert {v for s in after for segment in s.segments for v, _, _ in segment.versions} == {1}


def test_a_head_that_is_tied_need_not_be_sent(engine: HFEngine) -> None:
    config = tiny_config(engine.tokens.tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    tied = HFEngine(tiny_model(config, 0), engine.tokens, device="cpu")
    weights = {n: t + 0.1 for n, t in tied.model.state_dict().items() if n != "lm_head.weight"}

    async def update() -> None:
        await tied.pause()
        await tied.update_weights(sync.publish(weights, 1, True))
        await tied.close()

    run(update())
    embedding = weights["model.language_model.embed_tokens.weight"]
    assert torch.equal(tied.model.lm_head.weight, embedding)


def test_a_groups_equal_pictures_and_prompts_are_read_once(engine: HFEngine) -> None:
    asked = [request(engine.tokens, [opening(engine.tokens)], seed) for seed in range(8)]
    with_bits = run(engine.generate_together(asked))
    assert run(engine.status()).counters["image_encodes"] == 1
    assert len({result.ids for result in with_bits}) == 8
    run(chats(engine, [1, 1, 1, 1, 1]))  # four pictures, the first of which comes twice
    assert run(engine.status()).counters["image_encodes"] == 1 + 4


def test_pictures_that_are_too_many_for_one_pass_of_the_tower_keep_their_order(
    engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 8: the pictures have 16, 24, 12 and 16 patches, so two passes of at most 40 for three of them."""
    monkeypatch.setattr("medseg_gym.rl.engines.decode.PATCHES", 40)
    sequences = run(chats(engine, [3, 1]))
    assert worst(engine.model, engine.tokens, sequences) < 1e-5


def test_batches_above_the_limit_are_split_in_order(checkpoint: Path, engine: HFEngine) -> None:
    small = HFEngine(checkpoint, device="cpu", max_batch=3)
    asked = [request(engine.tokens, [opening(engine.tokens, PICTURES[i % 4])], i) for i in range(7)]
    rows: list[int] = []
    hook = small.model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    split = run(small.generate_together(asked))
    hook.remove()
    assert max(rows) == 3
    assert [result.ids for result in split] == [result.ids for result in run(engine.generate_together(asked))]
    run(small.close())


def test_an_error_in_the_model_is_the_askers_and_the_next_answer_comes(
    engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(engine.tokens, [opening(engine.tokens)])
    before = run(engine.generate(asked))

    def out_of_memory(*given: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.model, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            run(engine.generate(asked))
    assert run(engine.generate(asked)).logprobs == before.logprobs
    assert run(engine.status()).running == 0


def test_an_asker_that_gave_up_costs_nothing(engine: HFEngine) -> None:
    async def work() -> float:
        await engine.pause()
        task = asyncio.create_task(engine.generate(request(engine.tokens, [opening(engine.tokens)])))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        await engine.resume()
        await engine.generate(request(engine.tokens, [opening(engine.tokens)], 1))
        return (await engine.status()).counters["requests"]

    assert run(work()) == 1


def test_nothing_is_left_of_answers_and_updates(engine: HFEngine, tmp_path: Path) -> None:
    """Trap 18."""
    weights = dict(engine.model.state_dict())

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    async def round_(version: int) -> None:
        await engine.pause()
        await engine.update_weights(sync.publish(weights, version, True, tmp_path if version % 2 else None))
        await engine.resume()
        await chats(engine, [2, 1], max_tokens=4)

    run(round_(0))
    run(round_(1))
    before = tensors()
    for version in range(2, 12):
        run(round_(version))
    assert tensors() <= before
    assert len(list(tmp_path.iterdir())) == 1
