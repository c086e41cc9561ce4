"""The gallery: which groups it shows, and that a page stands by itself whatever a model has said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from grpo_parts import rollout

from medseg_gym.datasets.phantom import Phantom, cue_boxes
from medseg_gym.episodes import encode_mask
from medseg_gym.rl.gallery import Shown, pick, render, write_gallery
from medseg_gym.rl.types import Rollout
from medseg_gym.types import Turn


def groups(*rewards: tuple[float, ...]) -> list[list[Rollout]]:
    return [[rollout(g, m, value) for m, value in enumerate(values)] for g, values in enumerate(rewards)]


def test_the_widest_the_best_and_the_worst_trained_group_come_first() -> None:
    """Means .5, .45, .9, .1 and 1 (filtered); spreads 1, .1, .2, .2 and 0."""
    made = groups((0.0, 1.0), (0.4, 0.5), (0.8, 1.0), (0.0, 0.2), (1.0, 1.0))
    marked = [(g != 4, group) for g, group in enumerate(made)]
    assert pick(marked, 9) == [0, 2, 3, 1, 4]
    assert pick(marked, 2) == [0, 2]
    assert pick([(True, made[0])], 3) == pick([(False, made[4])], 3) == [0] and pick([], 3) == []


def shown(text: str, with_sample: bool = True) -> Shown:
    data = Phantom(task="cue")
    key = data.keys("train")[0]
    sample = data[key]
    box = cue_boxes(64)[data.cue_answer(key)]
    turn = Turn(box, 1.0, {"quality": 0.8, "overshoot": 0.0}, True, encode_mask(sample.target), text)
    made = rollout(0, 0, 1.0, key=key)
    whole = replace(made.episode, turns=(turn,), iou=(0.0, 1.0), dice=(0.0, 1.0), instruction="target in cue image")
    other = rollout(0, 1, 0.25, key=key, dropped="the answer was aborted")
    return Shown([replace(made, episode=whole), other], [[0.5], []], "trained", sample if with_sample else None)


def test_a_page_shows_texts_rewards_and_advantages_and_needs_nothing_beside_it(tmp_path: Path) -> None:
    page = write_gallery(tmp_path / "gallery" / "1.html", "Iteration 1", [shown("Bkkzz")]).read_text()
    for words in ("Iteration 1", "target in cue image", "Bkkzz", "+0.50</span> advantage", "quality +0.80", "IoU 1.00"):
        assert words in page, words
    assert "dropped: the answer was aborted" in page and "overshoot" not in page
    assert page.count("data:image/webp;base64,") == 3  # the case, and a turn of each member
    assert "http" not in page.replace("http-equiv", "")


def test_what_a_model_says_is_not_read_as_html() -> None:
    page = render("<b>", [shown("<script>alert(1)</script>")])
    assert "<script" not in page and "&lt;script&gt;" in page and "<title>&lt;b&gt;" in page


def test_without_the_dataset_there_are_words_and_no_pictures() -> None:
    page = render("t", [shown("Bkkzz", with_sample=False)])
    assert "Bkkzz" in page and "data:image" not in page


def test_a_long_answer_is_cut_and_an_endless_reward_is_no_number() -> None:
    made = shown("x" * 2000)
    strange = replace(made, members=[rollout(0, 0, float("nan"))], advantages=[[float("nan")]])
    page = render("t", [made, strange])
    assert "x" * 599 + "…" in page and "x" * 601 not in page
