"""Published question sets, made up small: what each layout gives, how they are split, and what damage is reported."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from medseg_gym.datasets.vqa import Questions, open_questions
from medseg_gym.datasets.vqa_file import QuestionFile
from medseg_gym.datasets.vqa_prepare import VqaReport, prepare_vqa
from medseg_gym.errors import BadDataError, DataMissingError, MedSegError, UnknownNameError


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8))
    return path


def write(path: Path, records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(r) for r in records) if path.suffix == ".jsonl" else json.dumps(records)
    path.write_text(lines, encoding="utf-8")


def rad(number: int, image: int, answer: str, phrase: str = "freeform", kind: str = "CLOSED") -> dict[str, Any]:
    return {
        "qid": str(number),
        "phrase_type": phrase,
        "image_name": f"synpic{image}.jpg",
        "question": f"Is thing {number} there?",
        "question_type": "PRES",
        "answer": answer,
        "answer_type": kind,
    }


@pytest.fixture
def vqa_rad(tmp_path: Path) -> Path:
    """Picture 1 is in train and in test as published, picture 2 in train, 3 in test; one picture is missing."""
    folder = tmp_path / "rad"
    for number in (1, 2, 3):
        picture(folder / "VQA_RAD Image Folder" / f"synpic{number}.jpg", number)
    records = [
        rad(1, 1, "Yes"),
        rad(2, 1, "no", "test_freeform"),
        rad(3, 2, "left lung", "para", "OPEN"),
        rad(4, 3, "No", "test_para", "CLOSED "),
        rad(5, 9, "yes"),
        rad(6, 2, ""),
        rad(3, 2, "left lung", "para", "OPEN"),
    ]
    write(folder / "VQA_RAD Dataset Public.json", records)
    return folder


def opened(report: VqaReport) -> dict[str, Any]:
    found = QuestionFile(report.path)
    return {found.question(key).text: found.row(key) for split in report.splits for key in found.keys(split)}


def test_vqa_rad_is_read_and_what_is_wrong_with_it_is_told(vqa_rad: Path, tmp_path: Path) -> None:
    report = prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", out=tmp_path / "out")
    rows = opened(report)
    assert (report.questions, report.pictures, report.closed) == (4, 3, 3)
    assert rows["Is thing 4 there?"].asked.closed  # "CLOSED " with a blank
    assert not rows["Is thing 3 there?"].asked.closed
    assert rows["Is thing 1 there?"].asked.choices == ("yes", "no")
    assert rows["Is thing 1 there?"].asked.kind == "PRES"
    told = {entry.file.split("record ")[-1]: (entry.reason, entry.damaged) for entry in report.skipped}
    assert "synpic9.jpg' is not there" in told["5"][0]
    assert "answer is ''" in told["6"][0]
    assert told["7"] == ("the same question came before", False)
    assert report.damaged == 2


def test_a_picture_on_two_published_sides_is_put_on_one_unless_the_published_split_is_asked_for(
    vqa_rad: Path, tmp_path: Path
) -> None:
    clean = prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", out=tmp_path / "clean")
    assert clean.two_sided == 1
    rows = opened(clean)
    assert rows["Is thing 1 there?"].split == rows["Is thing 2 there?"].split
    assert (rows["Is thing 3 there?"].split, rows["Is thing 4 there?"].split) == ("train", "test")
    kept = prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", out=tmp_path / "kept", split="published")
    assert kept.splits == {"train": 2, "val": 0, "test": 2}
    assert kept.two_sided == 1


def test_slake_has_its_three_files_its_languages_and_its_pictures_in_folders(tmp_path: Path) -> None:
    folder = tmp_path / "slake"
    sides = {"train": (1, 2), "validate": (3,), "test": (4,)}
    for split, images in sides.items():
        records = []
        for image in images:
            picture(folder / "imgs" / f"xmlab{image}" / "source.jpg", image)
            base = {"img_id": image, "img_name": f"xmlab{image}/source.jpg", "content_type": "Modality", "q_lang": "en"}
            records.append({**base, "question": "Which modality?", "answer": "MRI", "answer_type": "OPEN"})
            records.append({**base, "question": "MRI?", "answer": "Yes", "answer_type": "CLOSED"})
            records.append({**base, "question": "是MRI吗?", "answer": "是", "q_lang": "zh", "answer_type": "CLOSED"})
        write(folder / f"{split}.json", records)
    write(folder / "imgs" / "xmlab1" / "question.json", [{"question": "not to be read"}])
    report = prepare_vqa("SLAKE", folder, layout="slake", out=tmp_path / "out")
    assert report.splits == {"train": 4, "val": 2, "test": 2}
    assert (report.damaged, len(report.skipped)) == (0, 4)
    assert {row.patient for row in opened(report).values()} <= {f"xmlab{n}" for n in range(1, 5)}
    both = prepare_vqa("SLAKE", folder, layout="slake", out=tmp_path / "zh", language="zh")
    assert both.questions == 4


def test_pathvqa_names_pictures_without_their_suffix_and_its_pickles_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "path"
    for split in ("train", "val", "test"):
        picture(folder / "images" / split / f"{split}_0001.jpg", len(split))
        records = [
            {"image": f"{split}_0001", "question": "what is shown?", "answer": f"a {split} cell"},
            {"image": f"{split}_0001", "question": "is it a cell?", "answer": "yes"},
        ]
        write(folder / "qas" / split / f"{split}_qa.jsonl", records)
    report = prepare_vqa("PathVQA", folder, layout="pathvqa", out=tmp_path / "out")
    assert report.splits == {"train": 2, "val": 2, "test": 2}
    assert report.closed == 3
    pickled = tmp_path / "pickled"
    picture(pickled / "images" / "train_0001.jpg", 1)
    (pickled / "train_qa.pkl").write_bytes(pickle.dumps([{"image": "train_0001"}]))
    with pytest.raises(MedSegError, match="a pickle runs code"):
        prepare_vqa("PathVQA", pickled, layout="pathvqa", out=tmp_path / "no")


def test_omnimedvqa_has_lettered_options_and_no_split(tmp_path: Path) -> None:
    folder = tmp_path / "omni"
    records = []
    for number in range(40):
        picture(folder / "Images" / "ACRIMA" / f"Im{number}.png", number)
        records.append(
            {
                "dataset": "ACRIMA",
                "question_id": f"ACRIMA_{number:04d}",
                "question_type": "Modality Recognition",
                "question": "What is the imaging modality?",
                "gt_answer": "Fundus imaging.",
                "image_path": f"Images/ACRIMA/Im{number}.png",
                "option_A": "CT",
                "option_B": "Fundus imaging",
                "option_C": "X-ray",
                "option_D": "",
            }
        )
    records[1] = {**records[1], "gt_answer": "MRI"}
    records[2] = {k: v for k, v in records[2].items() if not k.startswith("option_") or k == "option_A"}
    write(folder / "QA_information" / "Open-access" / "ACRIMA.json", records)
    report = prepare_vqa("OmniMedVQA", folder, layout="omnimedvqa", out=tmp_path / "out")
    assert (report.questions, report.closed, report.damaged) == (38, 38, 2)
    assert min(report.splits.values()) > 0
    question = next(iter(opened(report).values())).asked
    assert question.asked.endswith("A. CT\nB. Fundus imaging\nC. X-ray")
    assert question.demonstrated == "B"


def test_equal_pictures_under_two_names_are_one_and_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    picture(folder / "a.png", 1)
    picture(folder / "b.png", 1)
    records = [
        {"image": name, "question": f"{name}?", "answer": "yes", "split": split}
        for name, split in (("a.png", "train"), ("b.png", "test"))
    ]
    write(folder / "all.json", records)
    report = prepare_vqa("Own", folder, layout="json", out=tmp_path / "out")
    assert (report.pictures, report.two_sided) == (1, 1)
    assert len({row.split for row in opened(report).values()}) == 1
    assert len({row.image for row in opened(report).values()}) == 1


def test_patients_named_by_a_pattern_stay_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    records = []
    for number in range(60):
        picture(folder / f"p{number % 20:02d}_{number}.png", number)
        records.append({"image": f"p{number % 20:02d}_{number}.png", "question": "q?", "answer": "yes"})
    write(folder / "all.jsonl", records)
    report = prepare_vqa("Own", folder, layout="json", patient=r"(?P<patient>p\d+)_", out=tmp_path / "out")
    found = QuestionFile(report.path)
    sides = Counter((found.row(key).patient, split) for split in report.splits for key in found.keys(split))
    assert len(sides) == 20
    assert set(sides.values()) == {3}
    with pytest.raises(MedSegError, match="no group"):
        prepare_vqa("Own", folder, layout="json", patient="p", out=tmp_path / "no")


def test_the_same_again_is_left_alone_and_something_else_needs_force(vqa_rad: Path, tmp_path: Path) -> None:
    first = prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", out=tmp_path / "out")
    again = prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", out=tmp_path / "out")
    assert (first.unchanged, again.unchanged) == (False, True)
    assert first.checksum == again.checksum
    with pytest.raises(MedSegError, match="--force"):
        prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", split="published", out=tmp_path / "out")
    other = prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", split="published", out=tmp_path / "out", force=True)
    assert other.checksum != first.checksum
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rad"]


def test_damaged_pictures_and_files_are_reported_and_the_rest_is_taken(vqa_rad: Path, tmp_path: Path) -> None:
    (vqa_rad / "VQA_RAD Image Folder" / "synpic2.jpg").write_bytes(b"\xff\xd8 cut short")
    (vqa_rad / "VQA_RAD more.json").write_text('{"not": "a list"}')
    report = prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", out=tmp_path / "out")
    assert report.questions == 3
    reasons = " ".join(entry.reason for entry in report.skipped)
    assert "2 questions are about it" in reasons
    assert "wanted a list of records" in reasons


def test_nothing_usable_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    write(folder / "all.json", [{"image": "gone.png", "question": "q?", "answer": "yes"}])
    with pytest.raises(BadDataError, match="no usable question"):
        prepare_vqa("Own", folder, layout="json", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MedSegError, match="holds no file of the layout slake"):
        prepare_vqa("Own", folder, layout="slake", out=tmp_path / "out")
    with pytest.raises(UnknownNameError, match="vqa-rad"):
        prepare_vqa("Own", folder, layout="vqarad", out=tmp_path / "out")


def test_a_picture_that_changed_after_preparing_is_noticed(vqa_rad: Path, tmp_path: Path) -> None:
    report = prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad", out=tmp_path / "out")
    found = QuestionFile(report.path)
    assert found.verify() == []
    key = found.keys("test")[0]
    picture(report.path / found.row(key).image, 99)
    with pytest.raises(BadDataError, match="not the picture"):
        QuestionFile(report.path)[key]
    assert len(QuestionFile(report.path).verify()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "q", "answer": "a", "image": "../../etc/passwd"}', "leads out"),
        ('{"question": "q", "answer": "a", "image": "/etc/passwd"}', "leads out"),
        ('{"question": "q", "answer": "", "image": "a.png"}', "answer is ''"),
        ('{"question": "q", "answer": "a", "image": "a.png", "choices": "ab"}', "choices are"),
        ('{"question": "q", "answer": "a", "image": "a.png", "split": "dev"}', "split 'dev'"),
        ('{"question": "q", "answer": "a", "image": "a.png", "foo": 1}', "it has 'foo'"),
        ("[1]", "a list; wanted an object"),
        ("{", "line 1"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "questions.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(BadDataError, match="questions.jsonl, line 1") as error:
        QuestionFile(tmp_path)
    assert said in str(error.value)


def test_a_file_of_ones_own_needs_three_fields(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    write(tmp_path / "mine.jsonl", [{"image": "a.png", "question": "q?", "answer": "No"}])
    found = open_questions(str(tmp_path / "mine.jsonl"))
    assert isinstance(found, Questions)
    (key,) = found.keys("test")
    sample = found[key]
    assert (sample.key, sample.dataset, sample.closed, sample.patient) == ("mine/a.png/1", "mine", True, "a.png")
    assert sample.image.shape == (20, 30, 3)
    assert not sample.image.flags.writeable


def test_a_prepared_set_is_found_by_its_name(vqa_rad: Path, home: Path) -> None:
    prepare_vqa("VQA-RAD", vqa_rad, layout="vqa-rad")
    assert open_questions("VQA-RAD").name == "VQA-RAD"
    with pytest.raises(DataMissingError, match="prepare-vqa"):
        open_questions("SLAKE")
