"""What every policy engine keeps to, whatever is behind it: one suite, each engine a factory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError  # noqa: E402
from medseg_gym.rl.engines.base import GenRequest, GenResult, PolicyEngine, WeightRef  # noqa: E402
from medseg_gym.rl.engines.fake import FakeEngine  # noqa: E402
from medseg_gym.rl.engines.hf import HFEngine  # noqa: E402
from medseg_gym.rl.tiny_model import save_tiny_model  # noqa: E402
from medseg_gym.rl.tokens import ChatTokens  # noqa: E402
from medseg_gym.rl.types import ImageRef  # noqa: E402

LONG = 200  # tokens of an answer that a pause finds in mid-course
RNG = np.random.default_rng(0)
PICTURES = [ImageRef.of(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]


@dataclass(frozen=True)
class Case:
    """What a test needs of an engine: how to make one, the chats' tokens, its weights' shapes."""

    make: Callable[[], PolicyEngine]
    tokens: ChatTokens
    weights: Mapping[str, Any]  # name: tensor
    exact: bool = True  # whether the same requests give the same bits, and not only the same to 1e-4

    def alike(self, one: Sequence[float], other: Sequence[float]) -> bool:
        return tuple(one) == tuple(other) if self.exact else np.allclose(one, other, rtol=0, atol=1e-4)

    def request(self, seed: int = 0, *, images: int = 1, words: str = "spleen", **changes: Any) -> GenRequest:
        parts = [{"type": "image", "image": picture.pixels} for picture in PICTURES[:images]]
        prompt = self.tokens.prompt([{"role": "user", "content": [*parts, {"type": "text", "text": words}]}])
        request = GenRequest(
            id=f"{words}-{seed}",
            ids=prompt.ids,
            images=tuple(PICTURES[:images]),
            temperature=1.0,
            max_tokens=12,
            seed=seed,
            stop_ids=(self.tokens.end,),
            banned_ids=self.tokens.banned_ids,
        )
        return replace(request, **changes)

    def update(self, version: int, **changes: Any) -> WeightRef:
        """All weights as they are, under a version; what is changed by name, or left out where it is None."""
        weights = {name: changes.get(name, tensor) for name, tensor in self.weights.items()}
        extra = {name: tensor for name, tensor in changes.items() if name not in weights}
        return WeightRef(version, True, {n: t for n, t in {**weights, **extra}.items() if t is not None})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", spread=0.2)


def _fake(checkpoint: Path) -> Case:
    tokens = ChatTokens.from_pretrained(checkpoint)
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(4)}

    def script(request: GenRequest) -> list[int]:
        """Any ids that may be, as likely as not an end of turn: a function of what an answer is a function of."""
        said = (request.ids, [image.sha for image in request.images], request.seed if request.temperature else 0)
        rng = np.random.default_rng(int(hashlib.sha256(repr(said).encode()).hexdigest()[:8], 16))
        free = [i for i in range(len(tokens.tokenizer)) if i not in request.banned_ids]
        return [int(token) for token in rng.choice(free, request.max_tokens)]

    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return Case(lambda: FakeEngine(script, tokens, seconds_per_token=0.001, shapes=shapes), tokens, weights)


def _hf(checkpoint: Path) -> Case:
    from safetensors.torch import load_file

    return Case(
        lambda: HFEngine(checkpoint, device="cpu"),
        ChatTokens.from_pretrained(checkpoint),
        load_file(checkpoint / "model.safetensors"),
    )


@pytest.fixture(scope="module", params=[_fake, _hf], ids=["fake", "hf"])
def case(request: pytest.FixtureRequest, checkpoint: Path) -> Case:
    made: Case = request.param(checkpoint)
    return made


@pytest.fixture(scope="module")
def engine(case: Case) -> Iterator[PolicyEngine]:
    """One for all tests that leave it as it was."""
    made = case.make()
    yield made
    asyncio.run(made.close())


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 250))


def with_own(case: Case, work: Callable[[PolicyEngine], Coroutine[Any, Any, Any]]) -> Any:
    """Runs `work` on an engine of its own, which is closed after it."""

    async def whole() -> Any:
        engine = case.make()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return run(whole())


async def under_way(engine: PolicyEngine, request: GenRequest) -> asyncio.Task[GenResult]:
    """A request of which some tokens are sampled."""
    before = (await engine.status()).counters["completion_tokens"]
    task = asyncio.create_task(engine.generate(request))
    while (await engine.status()).counters["completion_tokens"] < before + 3:
        await asyncio.sleep(0.001)
    return task


def assert_whole(result: GenResult, request: GenRequest) -> None:
    assert len(result.ids) == len(result.logprobs)
    assert all(np.isfinite(value) and value <= 0 for value in result.logprobs)
    assert not set(result.ids) & request.banned_ids
    edges = [0, *(end for _, _, end in result.versions)]
    assert [start for _, start, _ in result.versions] == edges[:-1]
    assert edges[-1] == len(result.ids)
    stops = [token in request.stop_ids for token in result.ids]
    if result.finish == "stop":
        assert stops[-1] and not any(stops[:-1])
    else:
        assert not any(stops)
    if result.finish == "length":
        assert len(result.ids) == request.max_tokens


def test_an_answer_hangs_on_its_seed_chat_and_pictures(case: Case, engine: PolicyEngine) -> None:
    async def work() -> None:
        same = [await engine.generate(case.request(3)) for _ in range(2)]
        assert same[0].ids == same[1].ids
        assert case.alike(same[0].logprobs, same[1].logprobs)
        others = [case.request(4), case.request(3, words="liver"), case.request(3, images=2)]
        assert all([(await engine.generate(other)).ids != same[0].ids for other in others])

    run(work())


def test_without_temperature_the_seed_does_not_matter(case: Case, engine: PolicyEngine) -> None:
    async def work() -> None:
        answers = [await engine.generate(case.request(seed, temperature=0.0)) for seed in (1, 2)]
        assert answers[0].ids == answers[1].ids

    run(work())


def test_answers_are_whole_and_in_order_together_and_at_the_same_time(case: Case, engine: PolicyEngine) -> None:
    """Lengths tell which is whose; banned ids never come; versions cover the answer."""
    requests = [case.request(i, images=i % 3, max_tokens=5 + i, words="w" * (i + 1)) for i in range(6)]

    async def work() -> tuple[list[GenResult], list[GenResult]]:
        together = await engine.generate_together(requests)
        at_once = await asyncio.gather(*map(engine.generate, requests))
        return together, list(at_once)

    for results in run(work()):
        assert len(results) == len(requests)
        for request, result in zip(requests, results, strict=True):
            assert_whole(result, request)
            assert result.finish in ("stop", "length")
            assert [version for version, _, _ in result.versions] == [0]


def test_requests_that_are_asked_for_together_get_the_ids_they_get_alone(case: Case, engine: PolicyEngine) -> None:
    requests = [case.request(i, images=i % 3, words="w" * (i + 1)) for i in range(5)] + [case.request(9)] * 2

    async def work() -> None:
        together = await engine.generate_together(requests)
        alone = [await engine.generate(request) for request in requests]
        assert [result.ids for result in together] == [result.ids for result in alone]
        # the last bits hang on who is in the batch, and on nothing else
        again = await engine.generate_together(requests)
        assert all(case.alike(one.logprobs, other.logprobs) for one, other in zip(again, together, strict=True))
        assert await engine.generate_together([]) == []

    run(work())


def test_an_answer_ends_with_the_first_stop_id_or_at_max_tokens(case: Case, engine: PolicyEngine) -> None:
    async def work() -> None:
        whole = await engine.generate(case.request(5, stop_ids=(), max_tokens=8))
        assert (len(whole.ids), whole.finish) == (8, "length")
        stop = whole.ids[3]
        first = whole.ids.index(stop)
        cut = await engine.generate(case.request(5, stop_ids=(stop,), max_tokens=8))
        assert (cut.ids, cut.finish) == (whole.ids[: first + 1], "stop")
        assert case.alike(cut.logprobs, whole.logprobs[: first + 1])
        short = await engine.generate(case.request(5, stop_ids=(), max_tokens=2))
        assert (short.ids, short.finish) == (whole.ids[:2], "length")

    run(work())


def test_a_banned_id_never_comes(case: Case, engine: PolicyEngine) -> None:
    async def work() -> None:
        liked = (await engine.generate(case.request(0, temperature=0.0, stop_ids=()))).ids
        banned = case.tokens.banned_ids | set(liked)
        for temperature in (0.0, 2.0):
            request = case.request(1, temperature=temperature, stop_ids=(), banned_ids=banned, max_tokens=60)
            assert_whole(await engine.generate(request), request)

    run(work())


def test_a_request_that_cannot_be_meant_is_refused_by_its_name(case: Case, engine: PolicyEngine) -> None:
    """Trap 5: a model would look at the wrong picture without saying so."""
    with pytest.raises(BadDataError, match=r"spleen-0: image tokens come in runs of \[4\]; the images need \[\]"):
        run(engine.generate(replace(case.request(0), images=())))
    for wrong in ({"max_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(BadDataError, match="spleen-0: max_tokens"):
            run(engine.generate(case.request(0, **wrong)))


def test_nothing_begins_while_paused(case: Case) -> None:
    async def work(engine: PolicyEngine) -> None:
        await engine.pause()
        assert (await engine.status()).paused
        task = asyncio.create_task(engine.generate(case.request(0)))
        await asyncio.sleep(0.1)
        assert not task.done()
        await engine.resume()
        assert not (await engine.status()).paused
        assert_whole(await task, case.request(0))

    with_own(case, work)


def test_a_pause_that_waits_ends_with_the_answers_under_way(case: Case) -> None:
    async def work(engine: PolicyEngine) -> None:
        request = case.request(0, stop_ids=(), max_tokens=40)
        task = await under_way(engine, request)
        await engine.pause("wait")
        assert (await engine.status()).running == 0
        await asyncio.sleep(0)
        result = await asyncio.wait_for(task, 1)  # resume is not needed for it
        assert_whole(result, request)
        assert result.finish == "length"

    with_own(case, work)


def test_an_aborted_answer_says_so_and_keeps_what_was_sampled(case: Case) -> None:
    """Trap 13."""

    async def work(engine: PolicyEngine) -> None:
        request = case.request(0, stop_ids=(), max_tokens=LONG)
        whole = await engine.generate(request)
        task = await under_way(engine, request)
        await engine.pause("abort")
        cut = await asyncio.wait_for(task, 1)
        assert cut.finish == "abort"
        assert len(cut.ids) < LONG
        assert cut.ids == whole.ids[: len(cut.ids)]
        assert_whole(cut, request)
        await engine.resume()
        assert (await engine.generate(request)).ids == whole.ids

    with_own(case, work)


def test_a_kept_answer_goes_on_and_tells_which_weights_gave_what(case: Case) -> None:
    """Trap 13: two version spans. The weights are equal, so the answer is what it would have been."""

    async def work(engine: PolicyEngine) -> None:
        request = case.request(0, stop_ids=(), max_tokens=LONG)
        whole = await engine.generate(request)
        task = await under_way(engine, request)
        await engine.pause("keep")
        await engine.update_weights(case.update(7))
        await asyncio.sleep(0.1)
        assert not task.done()
        await engine.resume()
        kept = await task
        assert kept.ids == whole.ids
        assert_whole(kept, request)
        assert [version for version, _, _ in kept.versions] == [0, 7]
        assert all(0 < edge < LONG for edge in (kept.versions[0][2], kept.versions[1][1]))

    with_own(case, work)


def test_weights_are_taken_when_paused_and_give_the_version_of_what_follows(case: Case) -> None:
    async def work(engine: PolicyEngine) -> None:
        with pytest.raises(MedSegError, match="paused"):
            await engine.update_weights(case.update(1))
        await engine.pause()
        await engine.update_weights(case.update(1))
        assert (await engine.status()).version == 1
        await engine.resume()
        result = await engine.generate(case.request(0))
        assert [version for version, _, _ in result.versions] == [1]

    with_own(case, work)


def test_weights_that_are_not_the_models_change_nothing(case: Case) -> None:
    """Trap 16: every name must arrive, and no other."""
    first = next(iter(case.weights))

    async def work(engine: PolicyEngine) -> None:
        before = await engine.generate(case.request(0))
        await engine.pause()
        changed = {name: tensor + 1 for name, tensor in case.weights.items()}
        for bad, error in (
            (case.update(2, **{**changed, "nonsense.weight": torch.ones(2)}), UnknownNameError),
            (case.update(2, **{**changed, first: None}), BadDataError),
            (case.update(2, **{**changed, first: torch.ones(7, 7, 7)}), BadDataError),
            (WeightRef(2, False, {}), BadDataError),
        ):
            with pytest.raises(error):
                await engine.update_weights(bad)
        assert (await engine.status()).version == 0
        await engine.resume()
        assert case.alike((await engine.generate(case.request(0))).logprobs, before.logprobs)
        await engine.pause()
        await engine.update_weights(WeightRef(3, False, {first: case.weights[first]}))  # a partial one names a few
        assert (await engine.status()).version == 3

    with_own(case, work)


def test_counters_add_up(case: Case) -> None:
    async def work(engine: PolicyEngine) -> None:
        requests = [case.request(i) for i in range(3)]
        results = await engine.generate_together(requests)
        counters = (await engine.status()).counters
        assert counters["requests"] == 3
        assert counters["prompt_tokens"] == sum(len(request.ids) for request in requests)
        assert counters["completion_tokens"] == sum(len(result.ids) for result in results)
        assert counters["busy_s"] > 0
        assert set(results[0].timing) >= {"queue_s", "prefill_s", "decode_s"}

    with_own(case, work)


def test_a_closed_engine_ends_what_is_under_way_and_refuses_the_rest(case: Case) -> None:
    async def work(engine: PolicyEngine) -> None:
        task = await under_way(engine, case.request(0, stop_ids=(), max_tokens=LONG))
        await engine.close()
        assert (await task).finish == "abort"
        with pytest.raises(MedSegError, match="closed"):
            await engine.generate(case.request(1))
        await engine.close()

    with_own(case, work)
