"""Exact match: what counts as the same answer, and what does not."""

from __future__ import annotations

import pytest

from medseg_gym.answers import choice_of, exact_match, lettered, normalised
from medseg_gym.datasets.vqa import Question

ORGANS = ("liver", "spleen", "left kidney")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Yes", "yes"),
        (" YES. ", "yes"),
        ("y", "Yes"),
        ("True", "yes"),
        ("n.", "no"),
        ("X-ray", "x_ray."),
        ("the left lung", "Left lung"),
        ("A Pneumothorax", "pneumothorax"),
        ("an", "an"),
        ("1.5 cm", "1.5cm".replace("cm", " cm")),
        ("5%", "5 %".replace(" ", "")),
        ("ﬁbrosis", "fibrosis"),
        ("Crohn's disease", "crohns disease"),
        ("CT,  axial", "ct axial"),
    ],
)
def test_answers_are_the_same_but_for_case_articles_punctuation_and_blanks(said: str, answer: str) -> None:
    assert exact_match(said, answer)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("yes, there is", "yes"),
        ("no", "yes"),
        ("", "yes"),
        ("...", "yes"),
        ("15 cm", "1.5 cm"),
        ("-3", "3"),
        ("left", "right"),
        ("left lung", "lung"),
        ("y", "yttrium"),
        ("yes " * 200, "yes"),
    ],
)
def test_nothing_else_is_forgiven(said: str, answer: str) -> None:
    assert not exact_match(said, answer)


@pytest.mark.parametrize("said", ["B", "b", "(b)", "B.", "B)", "b:", "spleen", "Spleen.", "the spleen", "B. spleen"])
def test_a_choice_is_named_by_its_letter_its_text_or_both(said: str) -> None:
    assert exact_match(said, "spleen", ORGANS)
    assert exact_match(said, "B", ORGANS)


@pytest.mark.parametrize("said", ["A", "liver", "B. liver", "D", "spleen liver", "AB", "left", "yes"])
def test_another_choice_none_and_a_letter_that_disagrees_with_its_text_are_wrong(said: str) -> None:
    assert not exact_match(said, "spleen", ORGANS)


def test_a_text_that_is_a_choice_comes_before_a_letter() -> None:
    """Blood groups: "A" is the second choice's text and the first choice's letter."""
    assert choice_of("A", ("B", "A", "0")) == 1
    assert exact_match("A", "A", ("B", "A", "0"))


def test_yes_and_no_have_no_letters() -> None:
    assert not lettered(("yes", "no"))
    assert not exact_match("A", "yes", ("yes", "no"))


def test_an_article_alone_is_not_normalised_away() -> None:
    assert normalised("The") == "the"
    assert normalised("the a") == "the a"
    assert normalised("the heart") == "heart"


def test_a_question_is_shown_with_its_choices_and_demonstrated_by_a_letter() -> None:
    organ = Question("Which organ is it?", "spleen", True, ORGANS)
    assert organ.asked == "Which organ is it?\nA. liver\nB. spleen\nC. left kidney"
    assert organ.demonstrated == "B"
    assert organ.right(organ.demonstrated)
    closed = Question("Is it a liver?", "No", True, ("yes", "no"))
    assert closed.asked == "Is it a liver?\nAnswer yes or no."
    assert (closed.demonstrated, closed.right("no"), closed.right("yes")) == ("No", True, False)
    free = Question("What is it?", "a spleen", False)
    assert (free.asked, free.demonstrated) == ("What is it?", "a spleen")
