"""The TRL adapter against trl itself: tools, pictures in their answers, rewards, and GRPOTrainer's loop on a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Blobs

from medseg_gym.adapters import trl as adapter
from medseg_gym.envs.segment import SegmentEnv
from medseg_gym.errors import MedSegError, ToolUnavailableError
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Stop, Undo, Unreadable

KEY = "Blobs/train-1/disc"
BOXES = {"good": [180, 130, 480, 500], "poor": [600, 600, 900, 900]}


def environment(**options: Any) -> type[adapter.Environment]:
    return adapter.environment("MedSeg-v0", dataset=Blobs(), tool=Stub(), size=64, **options)


def local(**options: Any) -> SegmentEnv:
    return SegmentEnv(Blobs(), Stub(), size=64, observation="dict", **options)


def test_the_tools_are_those_of_the_env_as_trl_finds_them() -> None:
    """TRL takes every public function of the class for a tool and makes its schema by transformers."""
    import inspect

    from transformers.utils import get_json_schema

    def tools(kind: type) -> list[str]:
        return [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]

    assert tools(environment()) == [
        *("add_bbox", "add_point", "get_reward", "reset", "stop_action", "undo_action"),
    ]
    assert tools(environment(verbs=["box", "stop"])) == ["add_bbox", "get_reward", "reset", "stop_action"]
    one = environment(verbs=["positive", "stop"])()
    (told,) = [get_json_schema(one.add_point)["function"]["parameters"]]  # type: ignore[attr-defined]
    assert told["properties"]["point_type"]["enum"] == ["positive"]
    assert told["properties"]["point_2d"]["items"] == {"type": "integer"}
    assert told["required"] == ["point_2d", "point_type"]


def test_an_episode_by_tools_is_the_envs_own_episode() -> None:
    one, env = environment(horizon=6)(), local(horizon=6)
    parts = one.reset(sample=KEY, prompt=[{"role": "user", "content": ""}], other=3)
    obs, _ = env.reset(options={"sample": KEY})
    shown: list[Any] = [parts]
    wanted: list[Any] = [obs["overlay"]]
    total = 0.0
    for name, arguments, action in (
        ("add_bbox", {"bbox_2d": BOXES["good"]}, [2, *BOXES["good"]]),
        ("add_point", {"point_2d": [600, 400], "point_type": "negative"}, [1, 600, 400, 0, 0]),
        ("add_bbox", {"box": [1, 2, 3, 4]}, Unreadable("add_bbox takes bbox_2d, nothing else")),
        ("add_bbox", {"bbox_2d": "left"}, Unreadable("add_bbox: bbox_2d wants 4 whole numbers in a list")),
        ("undo_action", {}, Undo()),
        ("stop_action", {}, Stop()),
    ):
        shown.append(getattr(one, name)(**arguments))
        obs, reward, *_ = env.step(action)
        wanted.append(obs["overlay"])
        total += reward
    assert shown.pop() == adapter.OVER
    wanted.pop()
    for (picture, text), overlay in zip(shown, wanted, strict=True):
        assert (picture["type"], text["type"]) == ("image", "text")
        assert np.array(picture["image"]).tobytes() == overlay.tobytes()
    assert shown[0][1]["text"].startswith("Target: disc in drawing")
    assert "add_bbox takes bbox_2d, nothing else. Nothing has changed." in shown[3][1]["text"]
    assert env.episode().turns == one._env.episode().turns
    assert one.add_bbox(bbox_2d=[0, 0, 9, 9]) == adapter.OVER  # type: ignore[attr-defined]
    assert one.get_reward() == one.get_reward() == pytest.approx(total, abs=1e-15)
    assert adapter.final_dice([one]) == [env.engine.slot(0).dice[-1]]
    assert adapter.final_iou([one]) == [env.engine.slot(0).iou[-1]]


@pytest.mark.parametrize("timing", ["dense", "terminal"])
def test_a_rollout_that_trl_ends_is_paid_for_the_turns_it_has(timing: str) -> None:
    """`shaped` pays the same at either timing; what says nothing gets 0, less than stopping at once (0.2)."""
    one, env = environment(timing=timing)(), local(timing=timing, horizon=1)
    one.reset(sample=KEY)
    one.add_bbox(bbox_2d=BOXES["good"])  # type: ignore[attr-defined]
    env.reset(options={"sample": KEY})
    assert one.get_reward() == env.step([2, *BOXES["good"]])[1] > 0.3
    one.reset(sample=KEY)
    assert one.get_reward() == 0.0
    one.reset(sample=KEY)
    one.stop_action()  # type: ignore[attr-defined]
    assert one.get_reward() == pytest.approx(0.2)


def test_a_group_shares_its_case_and_a_row_without_one_is_refused() -> None:
    kind = environment(structures=["disc"])
    rows = adapter.cases(kind, 7, seed=3)
    assert sorted(rows["sample"][:3]) == [f"Blobs/train-{i}/disc" for i in range(3)]  # all before any comes again
    assert rows["sample"] == adapter.cases(kind, 7, seed=3)["sample"] != adapter.cases(kind, 7, seed=4)["sample"]
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]
    first, second = kind(), kind()
    for row in rows:
        pictures = [np.array(one.reset(**row)[0]["image"]).tobytes() for one in (first, second)]
        assert pictures[0] == pictures[1]
    assert first._env.tool is second._env.tool  # so that an image is encoded once for the group
    with pytest.raises(MedSegError, match="every rollout of a group would get a case of its own"):
        first.reset(prompt=[])
    with pytest.raises(MedSegError, match="observation= is the adapter's own"):
        environment(observation="image")


def test_a_tool_that_is_gone_stops_the_training_though_trl_swallows_errors() -> None:
    class Gone(Stub):
        def predict(self, queries: Any) -> Any:
            raise ToolUnavailableError("no tool server answers")

    one = adapter.environment("MedSeg-v0", dataset=Blobs(), tool=Gone(), size=64)()
    one.reset(sample=KEY)
    with pytest.raises(ToolUnavailableError):
        one.add_bbox(bbox_2d=[0, 0, 9, 9])  # type: ignore[attr-defined]
    with pytest.raises(ToolUnavailableError):
        one.get_reward()


def said(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.slow
def test_grpo_trainer_plays_and_learns_with_pictures_in_tool_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the real trainer: two rollouts of a box each, one on the target, then a stop.

    transformers' generate runs with the pictures every time; its words are then replaced, as random weights say no
    call. All that TRL does with them is its own: parsing, tools, masks, log-probabilities, loss, optimiser.
    """
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    from test_trajectory_exports import _processor
    from trl.chat_template_utils import qwen3_vl_chat_template

    from medseg_gym.rl.tiny_model import tiny_config, tiny_model

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    processor = _processor(qwen3_vl_chat_template)
    tokenizer, kind = processor.tokenizer, environment(verbs=["box", "stop"], structures=["disc"], horizon=3)
    model = tiny_model(tiny_config(tokenizer), seed=0)
    turns = [[said("add_bbox", bbox_2d=box) for box in BOXES.values()], [said("stop_action")] * 2, ["Done."] * 2]
    generate, pictures = model.generate, []

    def scripted(input_ids: Any, **keywords: Any) -> Any:
        keywords["generation_config"].max_new_tokens = 1
        generate(input_ids=input_ids, **keywords)
        pictures.append(len(keywords["image_grid_thw"]))
        words = [tokenizer(text + "<|im_end|>")["input_ids"] for text in turns[len(pictures) - 1]]
        longest = max(map(len, words))
        ids = [word + [tokenizer.pad_token_id] * (longest - len(word)) for word in words]
        return torch.cat([input_ids, torch.tensor(ids)], dim=1)

    monkeypatch.setattr(model, "generate", scripted)
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_steps=1,
        max_completion_length=1000,
        max_tool_calling_iterations=3,
        reward_weights=[0.0],
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[adapter.final_dice],
        train_dataset=adapter.cases(kind, 1, system="Outline it."),
        processing_class=processor,
        environment_factory=kind,
    )
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    log = trainer.state.log_history[0]
    assert pictures == [2, 4, 4]  # one each, one more each with the box's mask, none with the stop
    assert (log["tools/call_frequency"], log["tools/failure_frequency"]) == (2, 0)
    rewards, dices = [], []
    (key,) = adapter.cases(kind, 1)["sample"]
    for box in BOXES.values():
        env = local(verbs=["box", "stop"])
        env.reset(options={"sample": key})
        paid = env.step([0, *box])[1], env.step(Stop())[1]
        rewards.append(sum(paid))
        dices.append(env.engine.slot(0).dice[-1])
    assert rewards[0] != rewards[1]
    assert log["rewards/MedSeg-v0/mean"] == pytest.approx(np.mean(rewards), abs=1e-6)
    assert log["rewards/final_dice/mean"] == pytest.approx(np.mean(dices), abs=1e-6)
    assert log["reward"] == pytest.approx(np.mean(rewards), abs=1e-6)
    words = [sum(len(tokenizer(turn[i] + "<|im_end|>")["input_ids"]) for turn in turns) for i in range(2)]
    assert log["completions/mean_length"] == pytest.approx(np.mean(words))  # the pictures' tokens are not trained
    assert log["grad_norm"] > 0
    assert (model.lm_head.weight - before).abs().max() > 0


@pytest.mark.slow
def test_the_script_in_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there but for its model, which is tiny, random and in a folder, and its counts.

    Random weights call no function, so this goes as far as the first answer and a step of no advantage; and
    Qwen3VLProcessor wants torchvision, so a processor with its image part alone stands in.
    """
    pytest.importorskip("trl")
    import transformers
    from test_trajectory_exports import _processor
    from trl.chat_template_utils import qwen3_vl_chat_template

    from medseg_gym.rl.tiny_model import save_tiny_model

    readme = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
    scripts = [text for text in re.findall(r"^```py\n(.*?)^```", readme, re.M | re.S) if "GRPOTrainer" in text]
    if not scripts:
        pytest.skip("no README.md with a TRL script beside the tests")
    (script,) = scripts
    assert len(script.splitlines()) <= 20
    model = save_tiny_model(tmp_path / "tiny")
    smaller = {
        "Qwen/Qwen3-VL-4B-Instruct": str(model),
        "Phantom-Nano": "Phantom-Stub",
        "size=256": "size=64",
        "max_steps=500": "max_steps=1, use_cpu=True, bf16=False",
        "num_generations=8": "num_generations=2",
        "per_device_train_batch_size=8": "per_device_train_batch_size=2",
        "max_completion_length=4096": "max_completion_length=8",
    }
    for text, other in smaller.items():
        assert text in script, f"the README's script says nothing of {text}: change this test with it"
        script = script.replace(text, other)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    processor = _processor(qwen3_vl_chat_template)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    namespace: dict[str, Any] = {}
    exec(compile(script, "README.md", "exec"), namespace)
    assert namespace["trainer"].state.global_step == 1
    assert namespace["trainer"].state.log_history
