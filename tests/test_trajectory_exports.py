"""Exports for other trainers. TRL and Minari load theirs; LLaMA-Factory's and verl's meet the published schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Blobs
from trajectory_cases import env, several, trajectory

from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.images import read_image
from medseg_gym.policies import protocols
from medseg_gym.trajectories import store
from medseg_gym.trajectories.chats import chats
from medseg_gym.trajectories.export import whole_folder
from medseg_gym.trajectories.export_minari import export_minari
from medseg_gym.trajectories.export_sharegpt import export_sharegpt
from medseg_gym.trajectories.export_trl import export_trl, load
from medseg_gym.trajectories.export_verl import export_verl
from medseg_gym.trajectories.store import Pair, Trajectories

AGENT = protocols.make("medsam-agent")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


def stored(tmp_path: Path, pairs: Sequence[Pair]) -> Trajectories:
    store.write(tmp_path / "in.h5", pairs, {})
    return Trajectories(tmp_path / "in.h5")


def loaded(kind: str, path: Path, tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"))


def test_sharegpt_is_what_llama_factory_asks_for(tmp_path: Path) -> None:
    """Its README: dataset_info.json beside the file, roles taking turns after the system, an <image> a picture."""
    done = export_sharegpt(stored(tmp_path, several()), tmp_path / "out", AGENT, 64, per="turn")
    entry = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["medseg_gym"]
    rows = loaded("json", tmp_path / "out" / entry["file_name"], tmp_path)
    # turns: 3 + 3 + 3, 5 with one marked, 4; so many rows
    assert len(rows) == done.rows == 3 + 3 + 3 + 4 + 4 and done.trajectories == 5
    assert entry["formatting"] == "sharegpt" and entry["columns"] == {"messages": "messages", "images": "images"}
    tags = entry["tags"]
    for row in rows:
        system, *turns = row[entry["columns"]["messages"]]
        assert system[tags["role_tag"]] == tags["system_tag"]
        assert [m[tags["role_tag"]] for m in turns] == [tags["user_tag"], tags["assistant_tag"]] * (len(turns) // 2)
        placeholders = [m[tags["content_tag"]].count("<image>") for m in turns]
        assert placeholders == [1, 0] * (len(turns) // 2)
        images = row[entry["columns"]["images"]]
        assert len(images) == sum(placeholders)
        assert all(read_image(tmp_path / "out" / name).shape == (64, 64, 3) for name in images)
    note = json.loads((tmp_path / "out" / "export.json").read_text())
    assert note["llama_factory"]["mask_history"] is True


def test_a_picture_is_written_once(tmp_path: Path) -> None:
    """Trap 18. The disc shows the bare image and the box's mask, which the click leaves as it is: 2 in 6 rows."""
    done = export_sharegpt(stored(tmp_path, [trajectory(), trajectory()]), tmp_path / "out", AGENT, 64, per="turn")
    files = list((tmp_path / "out" / "images").rglob("*.png"))
    assert done.rows == 6 and done.pictures == len(files) == 2


def test_marked_turns_choose_a_row_a_turn(tmp_path: Path) -> None:
    plain = stored(tmp_path, several()[:3])
    assert export_sharegpt(plain, tmp_path / "a", AGENT, 64).rows == 3
    marked = stored(tmp_path, several())
    assert export_sharegpt(marked, tmp_path / "b", AGENT, 64).rows == 17
    assert json.loads((tmp_path / "a" / "export.json").read_text())["llama_factory"]["mask_history"] is False
    forced = export_sharegpt(marked, tmp_path / "c", AGENT, 64, per="chat")
    assert (forced.rows, dict(forced.left_out)) == (4, {"marked": 1})


def test_dropped_and_unspeakable_trajectories_are_left_out(tmp_path: Path) -> None:
    pairs = [trajectory(), trajectory(1, boxes=False), trajectory(2, dropped="iou")]
    done = export_sharegpt(stored(tmp_path, pairs), tmp_path / "x", protocols.make("ibis", thinking=False), 64)
    assert (done.rows, done.trajectories, dict(done.left_out)) == (3, 1, {"words": 1})


def test_a_marked_turn_of_a_chat_without_history_is_no_row(tmp_path: Path) -> None:
    one = stored(tmp_path, [trajectory(0, "self-correction", boxes=False)])
    done = export_sharegpt(one, tmp_path / "x", protocols.make("ibis", thinking=False), 64)
    assert done.rows == 4 and not done.left_out
    rows = [json.loads(line) for line in (tmp_path / "x" / "train.jsonl").read_text().splitlines()]
    assert not any("Positive Point (0.0" in row["messages"][2]["content"] for row in rows)  # the wrong click, at (2, 2)


def test_token_ids_of_an_exported_chat_are_ours(tmp_path: Path) -> None:
    """Trap 19: rendered by the checkpoint's own template, from the files alone."""
    pytest.importorskip("transformers")
    from medseg_gym.rl.tiny_model import image_processor, tiny_tokenizer
    from medseg_gym.rl.tokens import ChatTokens

    tokens = ChatTokens(tiny_tokenizer(), image_processor())
    pairs = several()
    export_sharegpt(stored(tmp_path, pairs[:3]), tmp_path / "out", AGENT, 64, per="chat")
    for (one, image), line in zip(pairs, (tmp_path / "out" / "train.jsonl").read_text().splitlines(), strict=False):
        row = json.loads(line)
        (ours,) = chats(one, image, AGENT, 64)
        wanted = tokens.conversation(ours.messages)
        words = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n".replace(
                "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
            )
            for m in row["messages"]
        )
        ids = tokens.tokenizer.encode(words + "<|im_start|>assistant\n", add_special_tokens=False)
        assert ids == tokens.collapse(wanted.ids)
        pictures = [read_image(tmp_path / "out" / name) for name in row["images"]]
        assert len(pictures) == len(wanted.images)
        assert all(np.array_equal(a, b) for a, b in zip(pictures, wanted.images, strict=True))


def test_verl_has_the_published_columns(tmp_path: Path) -> None:
    """Its MultiTurnSFTDataset reads messages and images ([{bytes}]); its RLHFDataset prompt, images, reward_model."""
    pytest.importorskip("pyarrow")
    done = export_verl(
        stored(tmp_path, several()), tmp_path / "out", AGENT, 64, targets=lambda key: Blobs()[key].target
    )
    assert (done.rows, dict(done.left_out)) == (4, {"marked": 1})  # verl cannot leave an answer out of the loss
    for row in loaded("parquet", tmp_path / "out" / "train.parquet", tmp_path):
        assert [m["role"] for m in row["messages"]][:3] == ["system", "user", "assistant"]
        told = "".join(m["content"] for m in row["messages"])
        assert told.count("<image>") == len(row["images"]) and set(row["images"][0]) == {"bytes"}
    rl = loaded("parquet", tmp_path / "out" / "rl.parquet", tmp_path)
    assert [row["extra_info"]["id"] for row in rl] == [f"Blobs/train-{n}/disc" for n in range(3)]
    row = rl[0]
    assert [m["role"] for m in row["prompt"]] == ["system", "user"] and row["prompt"][1]["content"].startswith(
        "<image>"
    )
    assert row["data_source"] == "Blobs" and row["extra_info"]["target_description"] == "disc in drawing"
    (tmp_path / "t.png").write_bytes(row["reward_model"]["ground_truth"]["bytes"])
    assert np.array_equal(read_image(tmp_path / "t.png")[..., 0] > 0, Blobs()["Blobs/train-0/disc"].target)


def test_an_export_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "x") as part:
        (part / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    one = stored(tmp_path, [trajectory()])
    export_sharegpt(one, tmp_path / "x", AGENT, 64)
    with pytest.raises(MedSegError, match="is there already"):
        export_sharegpt(one, tmp_path / "x", AGENT, 64)
    with pytest.raises(UnknownNameError, match="unknown per 'turns'; did you mean 'turn'"):
        export_sharegpt(one, tmp_path / "y", AGENT, 64, per="turns")


def test_minari_loads_what_the_env_showed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    pairs = several()
    done = export_minari(stored(tmp_path, pairs), tmp_path / "minari", env(), "blobs-v0")
    assert (done.trajectories, done.rows, done.differing) == (5, 3 + 3 + 3 + 5 + 4, 0)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    data = minari.load_dataset("blobs-v0")
    assert len(data) == 5
    game = env()
    for (one, _), episode in zip(pairs, data.iterate_episodes(), strict=True):
        start = np.ones((48, 64), np.bool_) if one.kind == "wrong-start" else None
        shown = [game.reset(seed=0, options={"sample": one.episode.key, "start_mask": start})[0]]
        shown += [game.step(turn.action)[0] for turn in one.episode.turns]
        assert np.array_equal(episode.observations, np.stack(shown))  # to the pixel: no JPEG
        assert all(game.action_space.contains(action) for action in episode.actions)
        decoded = [game.engine.codec.decode(action, game.engine.slot(0).grid) for action in episode.actions]
        assert decoded == [turn.action for turn in one.episode.turns]
        assert episode.rewards.tolist() == [turn.reward for turn in one.episode.turns]
        assert episode.terminations.tolist() == [False] * (len(decoded) - 1) + [True]
        assert not episode.truncations.any()
        assert episode.infos["iou"].tolist() == list(one.episode.iou)
        assert episode.infos["marked"].tolist() == [False, *(one.marked or [False] * len(decoded))]
        assert set(episode.infos["key"].tolist()) == {one.episode.key.encode()}


def test_minari_wants_the_env_of_the_trajectories(tmp_path: Path) -> None:
    pytest.importorskip("minari")
    one = stored(tmp_path, [trajectory()])
    with pytest.raises(MedSegError, match="horizon"):
        export_minari(one, tmp_path, env(horizon=2))
    with pytest.raises(MedSegError, match="wanted Minari's form"):
        export_minari(one, tmp_path, env(), "blobs")
    with pytest.raises(MedSegError, match="no kept trajectory is of"):
        export_minari(stored(tmp_path, [trajectory(dropped="iou")]), tmp_path, env())
    assert not list(tmp_path.glob("medseg*"))


def _processor(template: str) -> Any:
    """Qwen3-VL's processor without its video part, which needs torchvision."""
    from transformers import ProcessorMixin

    from medseg_gym.rl.tiny_model import image_processor, tiny_tokenizer

    class Processor(ProcessorMixin):
        return_mm_token_type_ids = True
        image_token = "<|image_pad|>"

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

        def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
            return self.image_token * int(image_inputs["image_grid_thw"][image_idx].prod() // 4)

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Processor(image_processor(), tokenizer, chat_template=template)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["chat", "turn"])
def test_trl_trains_on_the_ids_that_we_train_on(tmp_path: Path, per: str) -> None:
    """SFTTrainer makes its batches of the exported folder, and takes a step. Traps 3, 9, 19.

    The template is Qwen3-VL's own, in which TRL marks by itself what is trained: answers, their end of turn and, other
    than here, the newline after it. Qwen3VLProcessor cannot be made without torchvision; the one here has its image
    part and transformers' own call.
    """
    trl = pytest.importorskip("trl")
    from trl.chat_template_utils import qwen3_vl_chat_template

    from medseg_gym.rl.tiny_model import tiny_config, tiny_model
    from medseg_gym.rl.tokens import ChatTokens

    pairs = several()[: 3 if per == "chat" else 5]
    export_trl(stored(tmp_path, pairs), tmp_path / "out", AGENT, 64, per=per)
    processor = _processor(qwen3_vl_chat_template)
    model = tiny_model(tiny_config(processor.tokenizer, hidden=64), seed=0)
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=1,
        max_steps=1,
        max_length=None,
        assistant_only_loss=per == "chat",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    data = load(tmp_path / "out")
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    tokens = ChatTokens(processor.tokenizer, processor.image_processor)
    batches = [trainer.data_collator([data[number]]) for number in range(len(data))]
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for batch in batches:
        labels = [token for token in batch["labels"][0].tolist() if token != -100]
        seen.append((tuple(batch["input_ids"][0].tolist()), tuple(labels)))
    newline, wanted = tokens.text("\n"), []
    for one, image in pairs:
        (told,) = chats(one, image, AGENT, 64)
        places = [place for place, m in enumerate(told.messages) if m["role"] == "assistant"]
        said = [(*tokens.text(told.messages[place]["content"]), tokens.end, *newline) for place in places]
        for turn, place in enumerate(places):
            if told.trained[turn] and (per == "turn" or turn == len(places) - 1):
                learned = said[turn] if per == "turn" else sum(said, ())
                wanted.append((tokens.conversation(told.messages[:place]).ids + said[turn], learned))
    assert seen == wanted
    assert np.isfinite(trainer.train().training_loss)
