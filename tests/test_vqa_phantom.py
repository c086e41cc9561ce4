"""The drawn questions: functions of their keys, true of what is drawn, and not to be guessed without a look."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from medseg_gym.datasets.phantom import Phantom
from medseg_gym.datasets.vqa import Questions, open_questions
from medseg_gym.datasets.vqa_phantom import PLACES, PhantomQuestions
from medseg_gym.errors import BadDataError, UnknownNameError


def test_a_question_is_a_function_of_its_key_also_after_a_pickle() -> None:
    first, second = PhantomQuestions(size=64, cases=12), pickle.loads(pickle.dumps(PhantomQuestions(size=64, cases=12)))
    assert isinstance(first, Questions)
    assert first.content == second.content
    for key in first.keys("val")[::7]:
        one, other = first[key], second[key]
        assert one.asked == other.asked
        assert (one.image == other.image).all()
        assert first.question(key) == one.asked


def test_every_picture_is_asked_about_once_in_each_kind() -> None:
    questions = PhantomQuestions(size=64, cases=12)
    keys = questions.keys("train")
    assert (len(keys), len(set(keys))) == (72, 72)
    assert keys[3:9] == list(keys)[3:9]
    assert keys[-1] in questions
    assert "PhantomQuestions/train/000012/side" not in questions
    assert sorted(keys) == list(keys) or [k.split("/")[2] for k in keys] == sorted(k.split("/")[2] for k in keys)
    assert not set(keys) & set(questions.keys("test"))


def test_the_cue_tasks_answers_are_those_of_its_stripes() -> None:
    questions, phantom = open_questions("Phantom:task=cue,cases=20"), Phantom(task="cue")
    for key in questions.keys("test"):
        sample = questions[key]
        index = int(key.split("/")[2])
        place = PLACES[phantom.cue_answer(phantom.keys("test")[index])]
        assert (sample.image == phantom[phantom.keys("test")[index]].image).all()
        if sample.kind == "side":
            assert sample.answer in place
        elif sample.kind == "height":
            assert sample.answer == {"top": "upper", "bottom": "lower"}[place.split()[0]]
        else:
            assert (sample.answer == "yes") == (place in sample.question)


def test_presence_size_and_modality_are_true_of_the_drawing() -> None:
    questions = PhantomQuestions(size=64, cases=36)
    whole, sparse = Phantom(size=64, cases=36), Phantom(size=64, cases=36, absent=0.5)
    seen: Counter[str] = Counter()
    for key in questions.keys("test"):
        sample = questions[key]
        index, seen = int(key.split("/")[2]), seen + Counter([sample.kind])
        phantom = sparse if sample.kind == "present" else whole
        there = {phantom[k].structure: phantom[k].target for k in phantom.keys("test") if f"/{index:06d}-" in k}
        if sample.kind == "present":
            (name,) = [name for name in there if f"a {name} in" in sample.question]
            assert (sample.answer == "yes") == bool(there[name].any())
        elif sample.kind == "larger" and sample.answer not in ("yes", "no"):
            assert there[sample.answer].sum() == max(there[name].sum() for name in sample.choices)
        elif sample.kind == "modality":
            assert len(set(sample.choices)) == 4
            assert sample.answer in sample.choices
    assert set(seen.values()) == {36}


def test_no_answer_is_right_much_more_often_than_the_others() -> None:
    """An always-yes and an always-first agent stay near chance, over 200 pictures of the cue task."""
    questions = open_questions("Phantom:task=cue,cases=200")
    asked = [questions.question(key) for key in questions.keys("train")]
    for kind in ("side", "height", "place"):
        counts = Counter(one.answer for one in asked if one.kind == kind)
        assert len(counts) == 2
        assert max(counts.values()) < 0.6 * 200
    assert np.mean([one.answer == one.choices[0] for one in asked]) < 0.57


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("Phantom:task=heart", "unknown task"),
        ("Phantom:tsk=cue", "did you mean 'task'"),
        ("Phantom:task", "no new key=value"),
        ("Phantom:kinds=sides", "did you mean 'side'"),
        ("Phantom:task=cue,kinds=modality", "unknown kind"),
        ("Phantom:kinds=side+side", "wanted each once"),
        ("Phantom:cases=0", "cases=0"),
    ],
)
def test_a_spec_that_says_nothing_is_refused(spec: str, said: str) -> None:
    with pytest.raises((UnknownNameError, BadDataError), match=said):
        open_questions(spec)


def test_kinds_can_be_chosen() -> None:
    questions = open_questions("Phantom:size=64,cases=5,kinds=side+modality")
    assert {key.split("/")[-1] for key in questions.keys("train")} == {"side", "modality"}
