"""verl's real agent loop worker over our envs, with a stand-in for its servers; and the cases it reads from parquet.

Where verl is not installed only the file of cases is tested. What stands in beside the servers is Qwen's processor
without its half for videos, which needs torchvision.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from grpo_parts import CUE, chat_tokens

from medseg_gym.adapters.verl_cases import write_cases
from medseg_gym.datasets.phantom import cue_boxes
from medseg_gym.errors import MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies.protocols import Tiny
from medseg_gym.rl.engines.fake import FakeEngine
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.rl.rollout import Job, Settings, play
from medseg_gym.rl.tiny_model import save_tiny_model
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Rollout

ENV = "MedSeg-Phantom-Stub-v0"
KEYS = ("Phantom/train/000000-cue/target", "Phantom/train/000001-cue/target")
OPTIONS: dict[str, Any] = {"protocol": "tiny", "size": 64, "env_options": {**CUE, "verbs": ["box", "stop"]}}


def box(number: int) -> str:
    return Tiny().format(cue_boxes(64)[number], Grid(64, 64))


def test_a_case_is_a_row_with_what_the_env_shows_first_and_where_the_agent_loop_finds_it(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "deep" / "cases.parquet"
    assert write_cases(ENV, file, cases=3, seed=1, **OPTIONS) == 3
    rows = parquet.read_table(file).to_pylist()
    assert [path.name for path in file.parent.iterdir()] == ["cases.parquet"]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert (row["agent_name"], row["data_source"], row["extra_info"]["env"]) == ("medseg_gym", "Phantom", ENV)
        assert row["extra_info"]["id"].startswith("Phantom/train/") and row["extra_info"]["structure"] == "target"
        assert "".join(message["content"] for message in row["prompt"]).count("<image>") == len(row["images"]) == 1
    with pytest.raises(MedSegError, match="protocol"):
        write_cases(ENV, file, protocol="tinny")


# with verl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("verl") / "tiny")


@pytest.fixture(scope="module")
def config(model: Path) -> Any:
    pytest.importorskip("verl", reason="verl is not installed: see CONTRIBUTING.md for how it is")
    pytest.importorskip("verl.experimental.agent_loop.agent_loop")
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    loops = model.parent / "loops.yaml"
    target = "medseg_gym.adapters.verl.MedSegAgentLoop"
    loops.write_text(OmegaConf.to_yaml([{"name": "medseg_gym", "_target_": target, "max_new_tokens": 8, **OPTIONS}]))
    rollout = "actor_rollout_ref.rollout"
    with initialize_config_module(config_module="verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                f"actor_rollout_ref.model.path={model}",
                f"{rollout}.name=vllm",
                f"{rollout}.calculate_log_probs=true",
                f"{rollout}.agent.agent_loop_config_path={loops}",
                "data.max_prompt_length=128",
                "data.max_response_length=128",
                "data.filter_overlong_prompts=false",
            ],
        )


class Processor:
    """Qwen3-VL's processor as verl's `hf_processor` gives it, for pictures only."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        from transformers import AutoConfig
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        from transformers.models.qwen3_vl import Qwen3VLModel

        self.tokenizer, self.image_processor = tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        self.config = AutoConfig.from_pretrained(folder)
        for name in ("get_rope_index", "get_vision_position_ids"):
            if hasattr(Qwen3VLModel, name):
                setattr(self, name, types.MethodType(getattr(Qwen3VLModel, name), self))

    def __call__(self, text: Any = None, images: Any = None, **other: Any) -> Any:
        from transformers.feature_extraction_utils import BatchFeature

        pixels = dict(self.image_processor(images=images, return_tensors="pt"))
        return BatchFeature({**pixels, **self.tokenizer(text), "mm_token_type_ids": [[0]]})


class Servers:
    """verl's server manager: a script's answers, and all that was asked."""

    def __init__(self, script: Callable[[int, int], str | Sequence[int]], tokens: ChatTokens, stop: str = "completed"):
        self.script, self.tokens, self.stop = script, tokens, stop
        self.asked: list[dict[str, Any]] = []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: Any, **given: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        episodes = list(dict.fromkeys([*(asked["id"] for asked in self.asked), request_id]))
        said = self.script(episodes.index(request_id), len(given["image_data"]) - 1)
        ids = [*self.tokens.text(said), self.tokens.end] if isinstance(said, str) else list(said)
        self.asked.append({"id": request_id, "ids": prompt_ids, "sampling": sampling_params, "said": ids, **given})
        await asyncio.sleep(0)
        steps = {"global_steps": 3, "min_global_steps": 3, "max_global_steps": 3}
        return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids), stop_reason=self.stop, extra_fields=steps)


@pytest.fixture
def tokens() -> ChatTokens:
    return chat_tokens()


def run(config: Any, model: Path, servers: Servers, **given: Any) -> Any:
    """What the agent loop gives for one row."""
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from medseg_gym.adapters.verl import MedSegAgentLoop

    row = {"extra_info": given.pop("extra_info", {"env": ENV, "id": KEYS[0]})}

    async def whole() -> Any:
        loop = MedSegAgentLoop(
            trainer_config=DictConfigWrap(config),
            server_manager=servers,
            tokenizer=servers.tokens.tokenizer,
            processor=Processor(model, servers.tokens.tokenizer),
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(config.data),
            hf_model_type="qwen3_vl",
            **{"max_new_tokens": 8, **OPTIONS, **given},
        )
        return await loop.run({"temperature": 1.0, "logprobs": True}, **row)

    return asyncio.run(whole())


def own(script: Callable[[int, int], str], tokens: ChatTokens) -> list[Rollout]:
    """The same cases and answers in our own rollout."""

    async def whole() -> list[Rollout]:
        worker = LocalWorker(ENV, 1, "tiny", size=64, options=CUE)
        engine = FakeEngine(lambda r: script(int(r.id.split("/")[2]), len(r.images) - 1), tokens)
        jobs = [Job(at, key) for at, key in enumerate(KEYS)]
        played = [g[0] async for g in play(jobs, [worker], engine, tokens, Settings(seed=0, max_new_tokens=8))]
        await worker.close()
        return sorted(played, key=lambda rollout: rollout.group)

    return asyncio.run(whole())


def test_verls_worker_plays_rows_as_our_own_rollout_does(
    config: Any, model: Path, tokens: ChatTokens, tmp_path: Path
) -> None:
    """Trap 1: every turn is asked for by the ids before it as they stand, and only what was sampled is trained."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
    from verl.protocol import DataProto
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
    from verl.utils.tokenizer import hf_tokenizer

    def script(episode: int, turn: int) -> str:
        return "S" if turn else box(episode)

    write_cases(ENV, tmp_path / "cases.parquet", cases=2, **OPTIONS)
    tokenizer = hf_tokenizer(str(model))
    dataset = RLHFDataset(str(tmp_path / "cases.parquet"), tokenizer, config.data, Processor(model, tokenizer))
    rows = [dataset[at] for at in range(2)]
    for row, key in zip(rows, KEYS, strict=True):
        row["extra_info"]["id"] = key
    batch = DataProto.from_single_dict(collate_fn(rows))
    batch.meta_info = {}
    servers = Servers(script, tokens)
    worker = AgentLoopWorker(config, servers)
    worker.processor = Processor(model, worker.tokenizer)
    out = asyncio.run(worker.generate_sequences(batch))

    wanted = own(script, tokens)
    assert len(servers.asked) == 4
    for at, rollout in enumerate(wanted):
        (chat,) = rollout.sequences
        mine = [asked for asked in servers.asked if asked["id"] == servers.asked[at]["id"]]
        assert mine[1]["ids"][: len(mine[0]["ids"]) + 6] == [*mine[0]["ids"], *mine[0]["said"]]
        assert [len(asked["image_data"]) for asked in mine] == [1, 2]
        prompt, response = len(chat.segments[0].ids), len(chat.ids) - len(chat.segments[0].ids)
        assert out.batch["prompts"][at, -prompt:].tolist() == list(chat.segments[0].ids)
        assert out.batch["responses"][at, :response].tolist() == list(chat.ids[prompt:])
        assert out.batch["response_mask"][at, :response].tolist() == chat.loss_mask[prompt:].tolist()
        assert out.batch["response_mask"][at, response:].sum() == 0
        assert np.array_equal(out.batch["rollout_log_probs"][at, :response].numpy(), chat.logprobs[prompt:])
        assert out.batch["rm_scores"][at].sum().item() == pytest.approx(rollout.reward, abs=1e-6)
        assert out.batch["rm_scores"][at, response - 1].item() != 0
        assert out.non_tensor_batch["iou"][at] == rollout.episode.iou[-1]
        assert out.non_tensor_batch["multi_modal_inputs"][at]["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert out.non_tensor_batch["__num_turns__"].tolist() == [4, 4]
    assert servers.asked[0]["sampling"]["stop_token_ids"] == [tokens.end]
    assert set(servers.asked[0]["sampling"]["logit_bias"]) == tokens.banned_ids


def test_an_answer_is_cut_before_a_token_that_no_chat_may_hold_and_its_end_is_not_trained(
    config: Any, model: Path, tokens: ChatTokens
) -> None:
    said = [*tokens.text("BAA"), tokens.image_pad, *tokens.text("zz")]
    out = run(config, model, Servers(lambda episode, turn: "S" if turn else said, tokens))
    assert out.response_ids[:4] == [*tokens.text("BAA"), tokens.end] and out.response_mask[:4] == [1, 1, 1, 0]
    assert tokens.image_pad not in out.response_ids[:4]
    assert out.extra_fields["reward_extra_info"]["unreadable"] == 1.0
    assert sum(out.response_mask) == 3 + 2  # and "S" with its end of turn


def test_an_episode_whose_answers_are_aborted_trains_nothing(config: Any, model: Path, tokens: ChatTokens) -> None:
    servers = Servers(lambda episode, turn: box(0), tokens, stop="aborted")
    out = run(config, model, servers)
    assert len(servers.asked) == 3 and len({asked["id"] for asked in servers.asked}) == 1
    assert (out.response_ids, out.response_mask) == ([tokens.end], [0])
    assert out.extra_fields["reward_extra_info"]["dropped"] == 1.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"protocol": "ibis", "env_options": {}}, "begins a chat a turn"),
        ({"extra_info": {"id": KEYS[0]}}, "write rows with"),
        ({"size": 512}, "rollout.prompt_length=128"),
        ({"protocol": "tinny"}, "unknown protocol"),
    ],
)
def test_what_verl_could_not_train_on_is_refused(
    given: dict[str, Any], said: str, config: Any, model: Path, tokens: ChatTokens
) -> None:
    with pytest.raises(MedSegError, match=said):
        run(config, model, Servers(lambda episode, turn: "S", tokens), **given)
