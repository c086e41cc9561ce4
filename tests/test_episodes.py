"""Stored episodes: masks, actions and records come back as they went, and what is no episode is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from medseg_gym import episodes
from medseg_gym.errors import BadDataError
from medseg_gym.types import Action, Box, Click, Episode, Mask, Stop, Turn, Undo, Unreadable

properties = settings(deadline=None, derandomize=True, max_examples=200)


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """From empty through speckled to full, of any small shape."""
    shape = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    share = draw(st.sampled_from((0.0, 0.02, 0.5, 0.98, 1.0)))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(shape) < share


def test_run_lengths_by_hand() -> None:
    """Column by column: 1 off, 2 on, 1 off. Each run is one character, its value plus 48."""
    assert episodes.encode_mask(np.array([[False, True], [True, False]])) == {"size": [2, 2], "counts": "121"}
    assert np.array_equal(episodes.decode_mask({"size": [2, 2], "counts": "121"}), [[False, True], [True, False]])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on NumPy 2
@properties
@given(masks())
def test_masks_come_back(mask: Mask) -> None:
    rle = episodes.encode_mask(mask)
    back = episodes.decode_mask(json.loads(json.dumps(rle)))
    assert back.dtype == np.bool_
    assert back.flags.c_contiguous
    assert np.array_equal(back, mask)
    theirs = coco.decode({"size": rle["size"], "counts": rle["counts"].encode()})
    assert np.array_equal(back, theirs.astype(np.bool_))


def test_large_masks_come_back() -> None:
    """Runs beyond 2 ** 20 pixels, coded in five characters, and differences below zero."""
    mask = np.zeros((2048, 2048), np.bool_)
    mask[:, 1024:1800] = True
    mask[100:200, :1000] = True
    rle = episodes.encode_mask(mask)
    assert np.array_equal(episodes.decode_mask(rle), mask)


def test_a_transposed_mask_is_encoded_as_it_looks() -> None:
    mask = np.random.default_rng(0).random((5, 9)) < 0.5
    assert np.array_equal(episodes.decode_mask(episodes.encode_mask(mask.T)), mask.T)


@properties
@given(masks(), st.data())
def test_cut_run_lengths_are_refused(mask: Mask, data: st.DataObject) -> None:
    """A prefix of the text covers fewer pixels: runs end early, or a character is left without its next."""
    rle = episodes.encode_mask(mask)
    cut = rle["counts"][: data.draw(st.integers(0, len(rle["counts"]) - 1))]
    with pytest.raises(BadDataError):
        episodes.decode_mask({"size": rle["size"], "counts": cut})


@properties
@given(
    st.text(st.characters(min_codepoint=0, max_codepoint=300), max_size=40), st.integers(-1, 40), st.integers(-1, 40)
)
@example("0" * 10_000 + "4", 2, 2)
@example("P" * 30 + "1", 2, 2)
@example("o" * 12 + "1", 2, 2)
def test_hostile_run_lengths_decode_to_their_size_or_are_refused(counts: str, height: int, width: int) -> None:
    try:
        mask = episodes.decode_mask({"size": [height, width], "counts": counts})
    except BadDataError:
        return
    assert mask.shape == (height, width)
    assert np.array_equal(episodes.decode_mask(episodes.encode_mask(mask)), mask)


@pytest.mark.parametrize(
    "rle",
    [
        {},
        [],
        "121",
        None,
        {"size": [2, 2]},
        {"counts": "121"},
        {"size": [2], "counts": "121"},
        {"size": 4, "counts": "121"},
        {"size": [2, 2, 1], "counts": "121"},
        {"size": ["two", 2], "counts": "121"},
        {"size": [float("inf"), 2], "counts": "121"},
        {"size": [float("nan"), 2], "counts": "121"},
        {"size": [2, 2], "counts": [1, 2, 1]},
        {"size": [2, 2], "counts": None},
        {"size": [2, 2], "counts": "12é"},
        {"size": [2, 2], "counts": ""},
        {"size": [0, 2], "counts": ""},
        {"size": [-2, -2], "counts": "121"},
        {"size": [2, 2], "counts": "122"},
        {"size": [2, 2], "counts": "6N"},  # 6, then -2: adds up, and is no run
        {"size": [10**6, 10**6], "counts": "121"},
    ],
)
def test_what_is_no_mask_is_refused(rle: Any) -> None:
    with pytest.raises(BadDataError):
        episodes.decode_mask(rle)


def test_a_mask_beyond_the_limit_is_refused_before_it_is_built() -> None:
    """10^6 x 10^6 pixels in one run of nine characters would take a terabyte."""
    counts, value = "", 10**12
    while value:
        value, low = value >> 5, value & 31
        counts += chr(48 + (low | (32 if value or low & 16 else 0)))
    with pytest.raises(BadDataError):
        episodes.decode_mask({"size": [10**6, 10**6], "counts": counts})


pixels = st.integers(0, 5000)
actions = st.one_of(
    st.builds(Click, pixels, pixels, st.booleans()),
    st.builds(Box, pixels, pixels, pixels, pixels),
    st.just(Stop()),
    st.just(Undo()),
    st.builds(Unreadable, st.text()),
)


@properties
@given(actions)
def test_actions_come_back(action: Action | Unreadable) -> None:
    assert episodes.decode_action(json.loads(json.dumps(episodes.encode_action(action)))) == action


def test_an_action_by_hand() -> None:
    assert episodes.encode_action(Click(3, 4, False)) == {"do": "click", "x": 3, "y": 4, "positive": False}
    assert episodes.encode_action(Stop()) == {"do": "stop"}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"do": "dance"},
        {"do": ["click"]},
        {"do": "click", "x": 1},
        {"do": "click", "x": 1, "y": 2, "z": 3},
        {"do": "click", "x": "1", "y": 2, "positive": True},
        {"do": "click", "x": 1.5, "y": 2, "positive": True},
        {"do": "click", "x": True, "y": 2, "positive": True},
        {"do": "click", "x": 1, "y": 2, "positive": 1},
        {"do": "unreadable", "reason": None},
        {"do": "stop", "x": 1},
        [],
        None,
        5,
    ],
)
def test_what_is_no_action_is_refused(record: Any) -> None:
    with pytest.raises(BadDataError, match="not an action"):
        episodes.decode_action(record)


def an_episode() -> Episode:
    mask = episodes.encode_mask(np.eye(3, dtype=np.bool_))
    return Episode(
        env="MedSeg-Blobs-Stub-v0",
        tool="Stub:0123456789abcdef",
        policy="OracleClicks:jitter=5",
        case=3,
        key="Blobs/1/disc",
        structure="disc",
        instruction="disc in drawing",
        patient="1",
        seed=7,
        horizon=5,
        reward="shaped",
        turns=(
            Turn(Click(1, 2, False), 0.1, {"quality": 0.30000000000000004, "tool_cost": -0.2}, True, mask),
            Turn(Unreadable('no "JSON"\n'), 0.0, {}, False, mask, text="Ich weiß nicht \u2028 \U0001f600"),
            Turn(Stop(), 1e-300, {"quality": 1e-300}, False, mask),
        ),
        iou=(0.0, 1 / 3, 1 / 3, 1 / 3),
        dice=(0.0, 0.5, 0.5, 0.5),
        ended="stopped",
        start=mask,
        spacing_mm=(0.5, 0.75),
        extra={"note": [1, 2, {"deep": None}]},
    )


@pytest.mark.parametrize(
    "change", [{}, {"start": None, "spacing_mm": None}, {"turns": (), "iou": (0.0,), "dice": (0.0,)}]
)
def test_an_episode_comes_back(change: dict[str, Any]) -> None:
    episode = replace(an_episode(), **change)
    line = episodes.to_json(episode)
    assert "\n" not in line
    assert episodes.from_json(line) == episode
    assert episodes.to_json(episodes.from_json(line)) == line


@properties
@given(st.lists(actions, max_size=4), st.text(st.characters()), st.text())
@example([], "half a pair: \ud83d", "")
@example([Unreadable("\udc80")], "", "")
def test_any_completion_can_be_written_and_read(done: list[Action | Unreadable], text: str, note: str) -> None:
    turns = tuple(Turn(action, 0.5, {"quality": 0.5}, False, {}, text=text) for action in done)
    episode = replace(an_episode(), turns=turns, error=text, extra={"note": note})
    line = episodes.to_json(episode)
    assert episodes.from_json(line.encode("utf-8").decode("utf-8")) == episode


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_refused_on_the_way_out_and_in(bad: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        episodes.to_json(replace(an_episode(), iou=(bad,)))
    line = json.dumps({"schema": 1, "iou": [bad]})
    with pytest.raises(BadDataError, match="is no number"):
        episodes.from_json(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "3",
        "null",
        "[]",
        '"schema"',
        "{}",
        '{"schema": 1}',
        '{"schema": 1, "turns": 3}',
        '{"schema": 1, "turns": [{"action": 5}]}',
        '{"schema": 1, "turns": [3]}',
        "[" * 200_000,
        '{"schema": ' + "1" * 5000 + "}",
    ],
)
def test_what_is_no_episode_is_refused(line: str) -> None:
    with pytest.raises(BadDataError, match=r"not an|episode schema"):
        episodes.from_json(line)


def test_another_schema_is_named() -> None:
    line = episodes.to_json(an_episode()).replace('"schema":1', '"schema":99')
    with pytest.raises(BadDataError, match="episode schema 99; this version reads 1"):
        episodes.from_json(line)


def test_a_field_too_many_is_refused() -> None:
    line = episodes.to_json(an_episode()).replace('"case":3', '"case":3,"colour":"red"')
    with pytest.raises(BadDataError, match="colour"):
        episodes.from_json(line)


@properties
@given(st.data())
def test_a_cut_line_is_refused(data: st.DataObject) -> None:
    """A run killed while it wrote leaves half a line."""
    line = episodes.to_json(an_episode())
    with pytest.raises(BadDataError):
        episodes.from_json(line[: data.draw(st.integers(0, len(line) - 1))])
