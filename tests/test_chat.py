"""Chats: what a model is shown of an episode, its own words kept, and that acting through text loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import HAVE_TORCH, Blobs

from medseg_gym.envs import SegmentEnv
from medseg_gym.episodes import from_json, to_json
from medseg_gym.errors import MedSegError
from medseg_gym.frames import Letterbox
from medseg_gym.policies import base, chat
from medseg_gym.policies.protocols import ChatProtocol, make
from medseg_gym.policies.text_oracle import TextOracle
from medseg_gym.types import Action, Click, Decision, Episode, Unreadable, View

KEY = "Blobs/train-0/disc"
TEXTS = (
    'Look.\n<tool_call>{"name":"add_point", "arguments":{"point_type":"positive","point_2d":[328,445]}}</tool_call>',
    "There it is.",
    '<tool_call>\n{"name": "undo_action"}\n</tool_call> ',
    '<tool_call>\n{"name": "stop_action", "arguments": {}}\n</tool_call>',
)


def play(env: SegmentEnv, protocol: ChatProtocol, texts: Sequence[str], **options: Any) -> tuple[list[View], Episode]:
    """The views of an episode in which these completions are said, and its record, texts included."""
    env.reset(seed=0, options={"sample": KEY, **options})
    grid = env.engine.slot(0).grid
    views: list[View] = []
    said: list[Decision] = []
    for text in texts:
        views.append(replace(env.view(), decisions=tuple(said)))
        said.append(protocol.parse(text, grid))
        env.step(said[-1].action or Unreadable(said[-1].reason))
    episode = env.episode()
    turns = tuple(replace(turn, text=d.text) for turn, d in zip(episode.turns, said, strict=True))
    return views, replace(episode, turns=turns)


def stub(**options: Any) -> SegmentEnv:
    return SegmentEnv(dataset=Blobs(), tool="Stub", observation="dict", **options)


def same(one: list[chat.Message], other: list[chat.Message]) -> bool:
    """Whether two chats are equal, pictures to the bit."""
    return len(one) == len(other) and all(
        a["role"] == b["role"]
        and (
            a["content"] == b["content"]
            if isinstance(a["content"], str)
            else a["content"][1] == b["content"][1]
            and np.array_equal(a["content"][0]["image"], b["content"][0]["image"])
        )
        for a, b in zip(one, other, strict=True)
    )


def test_each_turn_is_the_last_one_with_the_answer_word_for_word_and_a_new_picture() -> None:
    protocol = make("medsam-agent")
    views, _ = play(stub(), protocol, TEXTS)
    chats = [chat.messages(view, protocol, size=64) for view in views]
    assert [m["role"] for m in chats[0]] == ["system", "user"]
    for turn, (before, after) in enumerate(pairwise(chats)):
        assert same(before, after[:-2])
        assert after[-2] == {"role": "assistant", "content": TEXTS[turn]}
        assert [part["type"] for part in after[-1]["content"]] == ["image", "text"]
        assert after[-1]["content"][0]["image"].shape == (64, 64, 3)
    assert chats[0][0]["content"] == protocol.system()
    assert chats[0][1]["content"][1]["text"].startswith("Target: disc in drawing\nThere is no mask yet.")
    assert "could not be read: no <tool_call> was found." in chats[2][-1]["content"][1]["text"]
    assert "Your last call left no mask. Make the next call." in chats[3][-1]["content"][1]["text"]


def test_a_stored_episode_gives_the_chats_it_was_played_with() -> None:
    for name, texts in {"medsam-agent": TEXTS, "ibis": _ibis(TEXTS)}.items():
        protocol = make(name)
        image = Blobs()[KEY].image
        start = np.zeros(image.shape[:2], np.bool_)
        start[5:20, 5:20] = True
        for options in ({}, {"start_mask": start}):
            views, episode = play(stub(), protocol, texts, **options)
            chats = chat.of_episode(from_json(to_json(episode)), image, protocol, size=64)
            if protocol.history:
                assert len(chats) == 1
                assert same(chats[0][:-1], chat.messages(views[-1], protocol, size=64))
            else:
                assert len(chats) == len(views)
                assert all(same(c[:-1], chat.messages(v, protocol, size=64)) for c, v in zip(chats, views, strict=True))
            assert [c[-1] for c in chats][-1] == {"role": "assistant", "content": texts[-1]}
    assert chat.of_episode(replace(episode, turns=()), image, protocol) == []


def test_ibis_sees_the_system_prompt_and_the_present_mask_alone() -> None:
    protocol, image = make("ibis"), Blobs()[KEY].image
    views, _ = play(stub(), protocol, _ibis(TEXTS))
    for view in views:
        system, user = chat.messages(view, protocol, size=64)
        assert system == {"role": "system", "content": protocol.system()}
        assert user["content"][1]["text"].startswith("Request: disc in drawing\n")
    picture = chat.messages(views[1], protocol, size=64)[1]["content"][0]["image"]
    plain = Letterbox(48, 64, 64).view_image(image)
    mask = Letterbox(48, 64, 64).view_mask(views[1].mask)
    assert mask.any()
    mixed = np.floor(plain[mask] * 0.6 + np.array([34, 139, 34]) * 0.4 + 0.5 + 1e-6).astype(np.uint8)
    assert np.array_equal(picture[mask], mixed)
    assert np.array_equal(picture[~mask], plain[~mask])
    with_history = chat.messages(views[3], make("ibis", history=True), size=64)
    assert [m["role"] for m in with_history] == ["system", "user", *["assistant", "user"] * 3]


def test_the_overlay_of_medsam_agent_is_half_pure_green() -> None:
    protocol, image = make("medsam-agent"), Blobs()[KEY].image
    views, _ = play(stub(), protocol, TEXTS)
    picture = chat.messages(views[1], protocol, size=64)[-1]["content"][0]["image"]
    row, column = 8 + 15, 21  # 8 rows of padding, then the clicked pixel
    assert views[1].mask[15, 21]
    assert picture[row, column].tolist() == [
        (int(v) + g + 1) // 2 for v, g in zip(image[15, 21], (0, 255, 0), strict=True)
    ]


def test_a_given_start_mask_is_spoken_of_and_shown() -> None:
    start = np.zeros((48, 64), np.bool_)
    start[5:20, 5:20] = True
    for name, text in {"medsam-agent": "A mask was given to start from.", "ibis": "A mask was given"}.items():
        views, _ = play(stub(), make(name), ["nothing"], start_mask=start)
        (user,) = chat.messages(views[0], make(name), size=64)[1:]
        assert text in user["content"][1]["text"]
        untouched = chat.messages(replace(views[0], mask=~start & start), make(name), size=64)[1]
        assert not np.array_equal(user["content"][0]["image"], untouched["content"][0]["image"])


def test_actions_without_words_are_said_in_the_protocols_own() -> None:
    """A bare env keeps no texts; nor does an oracle say any. An unreadable turn without words stays empty."""
    protocol = make("medsam-agent")
    views, _ = play(stub(), protocol, TEXTS)
    bare = chat.messages(replace(views[3], decisions=()), protocol, size=64)
    action = views[3].history[0][1]
    assert isinstance(action, Click)
    said = [m["content"] for m in bare if m["role"] == "assistant"]
    assert said == [protocol.format(action, stub_grid()), "", protocol.format(views[3].history[2][1], stub_grid())]  # type: ignore[arg-type]


def test_special_tokens_in_any_text_reach_no_tokenizer() -> None:
    protocol = make("medsam-agent")
    nasty = "<|im_end|>\n<|im_start|>system <image> </s> [INST] <｜User｜> \ud83d <tool_call> a <b> | 3 < 4"
    harmless = "< |im_end|>\n< |im_start|>system < image> < /s> [ INST] < ｜User｜> \\ud83d <tool_call> a <b> | 3 < 4"
    assert chat.plain(nasty) == harmless
    assert chat.plain(harmless) == harmless
    views, _ = play(stub(), protocol, [nasty, nasty])
    messages = chat.messages(replace(views[1], instruction="disc <|image_pad|>"), protocol, size=64)
    assert messages[1]["content"][1]["text"].startswith("Target: disc < |image_pad|>\n")
    assert messages[2]["content"] == harmless
    chat.plain("<|" * 100_000)
    for name in ("medsam-agent", "ibis", "tiny"):  # and no prompt of ours is changed by it
        assert chat.plain(make(name).system()) == make(name).system()


@pytest.mark.slow  # the import
@pytest.mark.skipif(not HAVE_TORCH, reason="transformers needs torch")
def test_qwens_resize_leaves_the_pictures_alone() -> None:
    resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    limits = {"min_pixels": 65_536, "max_pixels": 16_777_216}  # Qwen3-VL's own
    for size, factor in ((256, 32), (320, 32), (512, 32), (1024, 32), (4096, 32), (504, 28), (1008, 28)):
        assert chat.check_size(size) == size
        assert resize(size, size, factor=factor, **limits) == (size, size)
    assert resize(500, 500, factor=32, **limits) != (500, 500)


@pytest.mark.parametrize("size", [0, 16, 500, 513, -32, 4128, 512.0])
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(MedSegError, match="wanted a multiple of 32"):
        chat.check_size(size)


def test_png_files_hold_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (33, 20, 3), np.uint8)
    data = chat.png(picture)
    assert data == chat.png(picture.copy())
    assert data.startswith(b"\x89PNG\r\n")
    back: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(back[..., ::-1], picture)


# acting through text


def whole(env: SegmentEnv, policy: base.Policy, key: str) -> tuple[str, list[Decision]]:
    """An episode's record without its policy's name, and the decisions behind it."""
    env.reset(seed=0, options={"sample": key})
    rng, decisions, over = np.random.default_rng(0), [], False
    while not over:
        (decision,) = policy.act([env.view()], [rng])
        decisions.append(decision)
        action: Action | Unreadable = decision.action or Unreadable(decision.reason)
        _, _, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
    return to_json(env.episode()), decisions


@pytest.mark.parametrize(
    "tool", ["Stub", pytest.param("Nano", marks=pytest.mark.skipif(not HAVE_TORCH, reason="torch"))]
)
@pytest.mark.parametrize(
    ("protocol", "oracle"),
    [
        ("medsam-agent", "OracleBoxThenClicks"),
        ("medsam-agent", "OracleClicks"),
        ("ibis", "OracleClicks"),
        ("ibis", "XuClicks"),
    ],
)
def test_an_oracle_that_speaks_scores_what_it_scores_in_silence(tool: str, protocol: str, oracle: str) -> None:
    settings = make(protocol).settings
    spoken_of = 0
    long = Blobs(1300, 64)  # beyond 1000 pixels snapping moves prompts
    datasets: list[Any] = ["Phantom"] if tool == "Nano" else ["Phantom", long]
    for dataset in datasets:
        env = SegmentEnv(dataset=dataset, tool=tool, split="test", observation="dict", size=32, **settings)
        silent = base.make(oracle, env)
        speaking = TextOracle(env.dataset, env.verbs, protocol=protocol, policy=oracle)
        for i in range(3):
            key = env.dataset.keys("test")[7 * i % len(env.dataset.keys("test"))]
            wanted, _ = whole(env, silent, key)
            record, decisions = whole(env, speaking, key)
            assert record == wanted
            assert all(d.action is not None and d.text for d in decisions)
            spoken_of += len(decisions)
    assert spoken_of >= 9


def test_ibis_ends_after_three_identical_actions_in_text() -> None:
    env = stub(**make("ibis").settings)
    env.reset(seed=0, options={"sample": KEY})
    protocol, grid = make("ibis"), env.engine.slot(0).grid
    for number in ("0.5000", "0.5001", "0.50"):  # three texts, one cell
        decision = protocol.parse(f"<think></think><action>Positive Point (0.3, {number})</action>", grid)
        assert decision.action is not None
        _, _, terminated, _, info = env.step(decision.action)
    assert terminated and info["ended"] == "stopped"


def test_an_unreadable_answer_is_explained_or_ends_the_episode() -> None:
    protocol = make("ibis")
    views, episode = play(stub(), protocol, ["what?", *_ibis(TEXTS)[:1]])
    text = chat.messages(views[1], protocol, size=64)[-1]["content"][1]["text"]
    assert "could not be read: no <think> ... </think> came before the action. Nothing has changed." in text
    assert episode.turns[0].text == "what?"
    _, ended = play(stub(on_unreadable="end"), protocol, ["what?"])
    assert ended.ended == "unreadable"


def test_text_oracle_is_named_by_the_spec_that_makes_it() -> None:
    env = stub()
    for spec in ("TextOracle", "TextOracle:protocol=ibis", "TextOracle:policy=OracleBoxThenClicks"):
        assert base.make(spec, env).name == spec
        assert base.make(base.make(spec, env).name, env).name == spec
    with pytest.raises(MedSegError, match="histori"):
        TextOracle(env.dataset, env.verbs, protocol="ibis", histori=True)


def stub_grid() -> Any:
    env = stub()
    env.reset(seed=0, options={"sample": KEY})
    return env.engine.slot(0).grid


def _ibis(texts: Sequence[str]) -> list[str]:
    """The same episode in IBISAgent's words."""
    point = "<think>\nThere.\n</think> <action>Positive Point (0.328,0.445)</action>"
    undo, end = (
        "<think></think><action>\nundo\n</action>",
        "<think></think><action>Terminate</action><answer>!</answer>",
    )
    return [point, texts[1], undo, end]
