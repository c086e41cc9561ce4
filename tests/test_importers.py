"""Importers and prepare: real folders become stores with the right counts, and bad files cost only themselves."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from medseg_gym.datasets.cards import DATASETS, DatasetCard, instruction
from medseg_gym.datasets.importers import LAYOUTS, identify, importer, inside
from medseg_gym.datasets.importers.imis_bench import plain_name, read_label
from medseg_gym.datasets.prepare import prepare, split_of
from medseg_gym.datasets.store import SplitCount, Store
from medseg_gym.errors import BadDataError, DataMissingError, MedSegError, UnknownNameError

# DATA.md of the samples
BTCV_MASKS = {
    "spleen": 65,
    "right kidney": 66,
    "left kidney": 63,
    "gallbladder": 28,
    "esophagus": 52,
    "liver": 111,
    "stomach": 80,
    "aorta": 151,
    "inferior vena cava": 138,
    "portal vein and splenic vein": 39,
    "pancreas": 57,
    "right adrenal gland": 24,
    "left adrenal gland": 30,
}


def square(height: int, width: int, y: int = 1, x: int = 2, side: int = 3) -> np.ndarray:
    mask = np.zeros((height, width), np.bool_)
    mask[y : y + side, x : x + side] = True
    return mask


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def rgb(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def biomedparse(root: Path, split: str = "train") -> list[dict[str, Any]]:
    """Two 8 x 10 images with two masks each; returns the annotations, to be changed and listed with `listing`."""
    annotations = []
    for number in ("01", "02"):
        image = f"{number}_CT_abdomen.png"
        save(root / split / image, rgb(8, 10, int(number)))
        for i, target in enumerate(("liver", "left+kidney")):
            mask = f"{number}_CT_abdomen_{target}.png"
            save(root / f"{split}_mask" / mask, square(8, 10, i).astype(np.uint8) * 255)
            sentence = f"{target.replace('+', ' ')} in abdomen CT"
            annotations.append({"file_name": image, "mask_file": mask, "sentences": [{"sent": sentence}]})
    listing(root, annotations, split)
    return annotations


def listing(root: Path, annotations: list[Any], split: str = "train") -> None:
    (root / f"{split}.json").write_text(json.dumps({"annotations": annotations}))


def imis(root: Path, stems: tuple[str, ...] = ("CT_001_5", "CT_001_12", "CT_002_7")) -> dict[str, Any]:
    """8 x 10 images with the rows kidney_right, liver and an empty spleen; returns dataset.json's content."""
    entries = []
    for seed, stem in enumerate(stems):
        save(root / f"image/{stem}.png", rgb(8, 10, seed))
        rows = np.stack([square(8, 10), square(8, 10, 4, 5), np.zeros((8, 10), np.bool_)]).reshape(3, -1)
        label = f"label/{stem}.(3, 8, 10, 1).npz"
        (root / "label").mkdir(exist_ok=True)
        sparse.save_npz(root / label, sparse.csr_matrix(rows.astype(np.int32)))
        entries.append({"image": f"image/{stem}.png", "label": label})
    record = {
        "labels": {"0": "background", "1": "kidney_right", "2": "liver", "3": "spleen"},
        "training": entries,
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(record))
    return record


def skipped(report: Any) -> dict[str, str]:
    return {entry.file: entry.reason for entry in report.skipped}


# Real files


def test_btcv_gives_every_mask_there_is(samples: Path, home: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = prepare("BTCV", samples / "imis-bench" / "BTCV", progress=lambda done, total: seen.append((done, total)))
    assert (report.images, report.cases, report.skipped) == (158, 904, ())
    assert {s: sum(counts.values()) for s, counts in report.structures.items()} == BTCV_MASKS
    assert report.splits["train"] == SplitCount(13, 103, 594)
    assert report.splits["val"] == SplitCount(3, 18, 92)
    assert report.splits["test"] == SplitCount(5, 37, 218)
    assert seen[0] == (1, 158) and seen[-1] == (158, 158) and len(seen) == 158

    store = Store(report.path, "BTCV")
    assert store.structures == tuple(BTCV_MASKS)  # in label order
    assert {key.split("/")[1] for key in store.keys("test")} == {"028", "029", "030", "031", "032"}
    sample = store["BTCV/001/slice-094/right-kidney"]
    assert sample.image.shape == (512, 512, 3) and sample.instruction == "right kidney in abdomen CT"
    # The back is on top (kidneys above the aorta, stomach below), the patient's right on the image's left.
    middle = {
        s: np.argwhere(store[f"BTCV/001/slice-094/{s}"].target).mean(axis=0).tolist()
        for s in ("right-kidney", "left-kidney", "liver", "aorta", "stomach")
    }
    assert middle["right-kidney"][0] < middle["aorta"][0] < middle["stomach"][0]
    assert middle["right-kidney"][1] < middle["aorta"][1] < middle["left-kidney"][1]
    assert middle["liver"][1] < 256


def test_biomedparse_demo_gives_every_mask_there_is(samples: Path, home: Path) -> None:
    report = prepare("Demo", samples / "biomedparse" / "demo", layout="biomedparse")
    assert (report.images, report.cases, report.skipped) == (5, 26, ())
    assert report.splits["test"] == SplitCount(5, 5, 26)
    store = Store(report.path)
    sample = store["Demo/15/15_X-Ray_chest/covid-19-infection"]
    assert sample.image.shape == (1024, 1024, 3) and sample.patient == "15"
    assert sample.instruction == "COVID-19 infection in chest X-Ray"
    lungs = store["Demo/15/15_X-Ray_chest/left-lung"].target | store["Demo/15/15_X-Ray_chest/right-lung"].target
    assert (store["Demo/15/15_X-Ray_chest/lung"].target & lungs).sum() > 0.95 * lungs.sum()


# BiomedParse


def test_biomedparse_names_and_sentences(tmp_path: Path, home: Path) -> None:
    source = tmp_path / "source"
    annotations = biomedparse(source)
    del annotations[1]["sentences"]
    listing(source, annotations)
    report = prepare("KiTS", source)
    store = Store(report.path)
    assert store.keys("train") == tuple(
        f"KiTS/{n}/{n}_CT_abdomen/{s}" for n in ("01", "02") for s in ("left-kidney", "liver")
    )
    sample = store["KiTS/01/01_CT_abdomen/left-kidney"]
    assert sample.structure == "left kidney" and sample.instruction == "left kidney in abdomen CT"  # the card's wording
    assert np.array_equal(sample.image, rgb(8, 10, 1)) and np.array_equal(sample.target, square(8, 10, 1))


def test_any_colour_is_foreground_and_transparency_is_not(tmp_path: Path, home: Path) -> None:
    biomedparse(tmp_path)
    mask = np.zeros((8, 10, 4), np.uint8)
    mask[..., 3] = 255
    mask[2, 3, 2] = 1  # a blue too dark for the luminance to see
    save(tmp_path / "train_mask/01_CT_abdomen_liver.png", mask)
    report = prepare("KiTS", tmp_path)
    assert np.argwhere(Store(report.path)["KiTS/01/01_CT_abdomen/liver"].target).tolist() == [[2, 3]]


def test_bad_biomedparse_files_are_skipped_with_their_reason(tmp_path: Path, home: Path) -> None:
    annotations = biomedparse(tmp_path)
    save(tmp_path / "train/03_CT_abdomen.png", rgb(8, 10))
    save(tmp_path / "train_mask/03_CT_abdomen_small.png", square(4, 5, 0, 0).astype(np.uint8))
    save(tmp_path / "train_mask/03_CT_abdomen_empty.png", np.zeros((8, 10), np.uint8))
    (tmp_path / "train_mask/03_CT_abdomen_broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    save(tmp_path / "train_mask/04_CT_abdomen_liver.png", square(8, 10).astype(np.uint8))
    more = [("03", t) for t in ("small", "empty", "broken", "gone")] + [("04", "liver")]
    annotations += [{"file_name": f"{n}_CT_abdomen.png", "mask_file": f"{n}_CT_abdomen_{t}.png"} for n, t in more]
    annotations += [
        {"file_name": "../../etc/passwd", "mask_file": "x.png"},
        {"file_name": "01_CT_abdomen.png", "mask_file": "/etc/passwd"},
        {"file_name": "01_CT_abdomen.png", "mask_file": "other.png"},
        {"file_name": 7},
        "nonsense",
        annotations[0],
    ]
    listing(tmp_path, annotations)
    report = prepare("KiTS", tmp_path)
    assert (report.images, report.cases) == (2, 4)
    reasons = skipped(report)
    assert reasons["train.json, annotation 9"].endswith("leads outside the folder; refused")
    assert reasons["train.json, annotation 10"].endswith("leads outside the folder; refused")
    assert "does not name its target" in reasons["train.json, annotation 11"]
    assert reasons["train.json, annotation 12"] == "file name is 7; wanted a text"
    assert reasons["train.json, annotation 13"].startswith("a str; wanted an object")
    assert "not a readable image" in reasons["train_mask/03_CT_abdomen_broken.png"]
    assert reasons["train_mask/03_CT_abdomen_gone.png"] == "no such file"
    assert reasons["train/04_CT_abdomen.png"] == "no such file; its 1 masks are left out with it"
    assert reasons["train_mask/01_CT_abdomen_liver.png"] == "a second mask of 'liver' for this image"
    texts = {entry.reason for entry in report.skipped if entry.file == "train/03_CT_abdomen.png"}
    assert texts == {
        "mask of 'small' is 4x5, the image 8x10 (height x width)",
        "mask of 'empty' has no foreground",
    }
    assert len(report.skipped) == 11


def test_a_patient_stays_on_one_side(tmp_path: Path, home: Path) -> None:
    biomedparse(tmp_path, "train")
    biomedparse(tmp_path, "test")
    test = tmp_path / "test.json"
    test.write_text(test.read_text().replace("02_CT", "05_CT"))
    for folder in ("test", "test_mask"):
        for path in (tmp_path / folder).glob("02_*"):
            path.rename(path.with_name(path.name.replace("02_", "05_")))
    report = prepare("KiTS", tmp_path)
    assert report.splits == {"train": SplitCount(2, 2, 4), "val": SplitCount(0, 0, 0), "test": SplitCount(1, 1, 2)}
    assert skipped(report) == {
        "test/01_CT_abdomen.png": "patient '01' is in 'train' already and here in 'test'; a patient stays on one side"
    }


# IMIS-Bench


def test_imis_rows_are_label_values_and_empty_rows_are_absent(tmp_path: Path, home: Path) -> None:
    imis(tmp_path)
    report = prepare("Mine", tmp_path, layout="imis-bench", patient=r"CT_(?P<patient>\d+)_(?P<slice>\d+)")
    assert (report.images, report.cases, report.skipped) == (3, 6, ())
    store = Store(report.path)
    keys = [key for split in ("train", "val", "test") for key in store.keys(split)]
    assert sorted(keys) == [
        f"Mine/{image}/{s}"
        for image in ("001/slice-005", "001/slice-012", "002/slice-007")
        for s in ("liver", "right-kidney")
    ]
    assert np.array_equal(store["Mine/002/slice-007/right-kidney"].target, square(8, 10))
    assert np.array_equal(store["Mine/002/slice-007/liver"].target, square(8, 10, 4, 5))
    assert np.array_equal(store["Mine/001/slice-012/liver"].image, rgb(8, 10, 1))


def test_bad_imis_files_are_skipped_with_their_reason(tmp_path: Path, home: Path) -> None:
    record = imis(tmp_path, ("a", "b", "c", "d", "e", "f"))
    (tmp_path / "image/a.png").write_bytes(b"not an image")
    (tmp_path / "label/b.(3, 8, 10, 1).npz").write_bytes(b"PK\x03\x04 cut short")
    save(tmp_path / "image/c.png", rgb(8, 9))
    sparse.save_npz(tmp_path / "label/d.(3, 8, 10, 1).npz", sparse.csr_matrix((3, 80)))
    record["training"].append({"image": "../a.png", "label": "label/a.npz"})
    record["training"].append({"image": "image/e.png", "label": "label/e.npz"})
    record["training"].append(["image/e.png"])
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    report = prepare("Mine", tmp_path, layout="imis-bench")
    assert report.images == 2
    reasons = skipped(report)
    assert reasons["image/a.png"].startswith("not a readable image")
    assert reasons["label/b.(3, 8, 10, 1).npz"].startswith("not a readable .npz")
    assert reasons["label/c.(3, 8, 10, 1).npz"] == "masks are 8x10 and the image 8x9 (height x width)"
    assert reasons["label/d.(3, 8, 10, 1).npz"] == "no structure has foreground"
    assert reasons["dataset.json, training 6"].endswith("leads outside the folder; refused")
    assert reasons["label/e.npz"].startswith("the file name gives no shape")
    assert reasons["dataset.json, training 8"].startswith("a list; wanted an object")
    assert len(reasons) == 7


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def label_file(folder: Path, changes: Mapping[str, bytes | None]) -> Path:
    """A sound label of one 2 x 3 mask with pixels 1 and 4, with some members replaced (None: left out)."""
    members: dict[str, bytes | None] = {
        "format": npy(np.array(b"csr")),
        "shape": npy(np.array([1, 6])),
        "indptr": npy(np.array([0, 3], np.int32)),
        "indices": npy(np.array([1, 4, 5], np.int32)),
        "data": npy(np.array([1, 1, 0], np.int32)),  # a stored zero is background
    }
    path = folder / "x.(1, 2, 3, 1).npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **changes}.items():
            if content is not None:
                archive.writestr(f"{name}.npy", content)
    return path


def test_a_sound_label_is_read(tmp_path: Path) -> None:
    assert read_label(label_file(tmp_path, {}), 1).tolist() == [[[False, True, False], [False, True, False]]]


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was run')",)


def lying_header() -> bytes:
    """An array that claims ten billion numbers and holds three."""
    good = npy(np.array([1, 4, 5], np.int32))
    return good.replace(b"(3,), }        ", b"(9999999999,), }")[: len(good) + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "no data in it"),
        ({"data": npy(np.array([Evil()], object), allow_pickle=True)}, "an array of object"),
        ({"indices": npy(np.array([1, 4, 6], np.int32))}, "do not fit together"),
        ({"indices": npy(np.array([1, 4, -1], np.int32))}, "do not fit together"),
        ({"indices": npy(np.array([1.0, 4.0, 5.0]))}, "do not fit together"),
        ({"indptr": npy(np.array([0, 2], np.int32))}, "do not fit together"),
        ({"indptr": npy(np.array([0, 2, 3], np.int32))}, "do not fit together"),
        ({"data": npy(np.array([1], np.int32))}, "do not fit together"),
        ({"shape": npy(np.array([1, 7]))}, "wanted csr of"),
        ({"format": npy(np.array(b"coo"))}, "wanted csr of"),
        ({"data": npy(np.zeros(9_000_000, np.int32))}, "unpacks to .* bytes; the limit"),
        ({"data": lying_header()}, "not fit its bytes|not a readable array"),
        ({"data": b"\x93NUMPY"}, "not a readable array"),
        ({"data": b""}, "not a readable array"),
        ({"format": npy(np.array("c\xe9r"))}, "not a readable label"),
        ({"shape": npy(np.array([float("nan"), 6.0]))}, "not a readable label"),
        ({"shape": npy(np.array([b"x", b"y"]))}, "not a readable label"),
    ],
)
def test_a_bad_label_is_refused_before_anything_is_unpacked_or_run(
    tmp_path: Path, changes: Mapping[str, bytes | None], message: str
) -> None:
    with pytest.raises(BadDataError, match=message):
        read_label(label_file(tmp_path, changes), 1)


def test_pixels_of_more_than_eight_bits_are_refused_not_clipped(tmp_path: Path) -> None:
    from medseg_gym.images import read_image

    save(tmp_path / "deep.png", np.arange(0, 2000, 100, dtype=np.uint16).reshape(4, 5))
    with pytest.raises(BadDataError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png")


def test_a_label_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = label_file(tmp_path, {})
    with pytest.raises(BadDataError, match="1 rows, depth 1; wanted 2 rows"):
        read_label(path, 2)
    huge = path.rename(tmp_path / "x.(1, 999999, 999999, 1).npz")
    with pytest.raises(BadDataError, match="more than is read"):
        read_label(huge, 1)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("kidney_right", "right kidney"),
        ("adrenal_gland_left", "left adrenal gland"),
        ("portal_vein_and_splenic_vein", "portal vein and splenic vein"),
        ("liver", "liver"),
        ("left", "left"),
    ],
)
def test_label_names_are_worded_as_people_say_them(label: str, name: str) -> None:
    assert plain_name(label) == name


# The folder as a whole


@pytest.mark.parametrize(
    ("layout", "file", "content", "message"),
    [
        ("biomedparse", None, "", "no train.json, val.json or test.json"),
        ("biomedparse", "train.json", "{", "not readable JSON"),
        ("biomedparse", "train.json", "[]", "holds a list; wanted"),
        ("biomedparse", "train.json", "[" * 100_000, "not readable JSON"),
        ("biomedparse", "train.json", '{"images": []}', "no list of annotations"),
        ("biomedparse", "train.json", '{"annotations": []}', "no usable case in it, nothing was written"),
        ("imis-bench", None, "", "dataset.json: no such file"),
        ("imis-bench", "dataset.json", '{"training": []}', "no labels"),
        ("imis-bench", "dataset.json", '{"labels": {"1": "a", "3": "b"}}', "without gaps"),
        ("imis-bench", "dataset.json", '{"labels": {"one": "a"}}', "wanted integers"),
        ("imis-bench", "dataset.json", '{"labels": {"1": "a"}, "training": 3}', "'training' is a int"),
        ("imis-bench", "dataset.json", '{"labels": {"1": "a"}, "training": []}', "no usable case in it"),
    ],
)
def test_a_folder_of_another_kind_is_an_error_and_nothing_is_written(
    tmp_path: Path, home: Path, layout: str, file: str | None, content: str, message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if file:
        (source / file).write_text(content)
    with pytest.raises(BadDataError, match=message):
        prepare("Mine", source, layout=layout)
    assert list(home.rglob("*.*")) == []


def test_an_existing_store_of_other_content_stays_unless_forced(tmp_path: Path, home: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    record = imis(source)
    first = prepare("Mine", source, layout="imis-bench")
    before = first.path.read_bytes()
    again = prepare("Mine", source, layout="imis-bench")
    assert again.unchanged and not first.unchanged and again.checksum == first.checksum
    (source / "dataset.json").write_text(json.dumps({**record, "training": record["training"][:1]}))
    with pytest.raises(MedSegError, match=r"other content.*--force"):
        prepare("Mine", source, layout="imis-bench")
    assert first.path.read_bytes() == before and len(list(first.path.parent.iterdir())) == 1
    assert prepare("Mine", source, layout="imis-bench", force=True).cases == 2
    first.path.write_bytes(b"damaged")
    with pytest.raises(MedSegError, match=r"not a sound store of Mine.*--force"):
        prepare("Mine", source, layout="imis-bench")
    assert prepare("Mine", source, layout="imis-bench", force=True).cases == 2


def test_left_overs_of_a_killed_run_are_removed(tmp_path: Path, home: Path) -> None:
    (tmp_path / "source").mkdir()
    imis(tmp_path / "source")
    left = home / "datasets" / ".Mine.h5.00000000.1.aaaa.part"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (0, 0))
    prepare("Mine", tmp_path / "source", layout="imis-bench")
    assert [path.name for path in left.parent.iterdir()] == ["Mine.h5"]


@pytest.mark.parametrize("name", ["../Mine", "a/b", "a\\b", "", ".hid", "My-Data", "My_Data", "C++", "x.h5", "a" * 65])
def test_names_that_cannot_be_files_and_ids_are_refused(tmp_path: Path, home: Path, name: str) -> None:
    with pytest.raises(UnknownNameError, match="wanted 1 to 64 letters, digits and dots"):
        prepare(name, tmp_path, layout="biomedparse")


def test_wrong_arguments_say_what_was_meant(tmp_path: Path, home: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'BTCV'.*name its layout"):
        prepare("BTVC", tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'biomedparse'"):
        prepare("Mine", tmp_path, layout="biomedparse2")
    with pytest.raises(DataMissingError, match="no such folder"):
        prepare("BTCV", tmp_path / "nowhere")
    with pytest.raises(MedSegError, match="no group"):
        prepare("BTCV", tmp_path, patient=r"\d+")
    with pytest.raises(MedSegError, match="not a regular expression"):
        prepare("BTCV", tmp_path, patient="(")
    with pytest.raises(MedSegError, match="needs no preparing"):
        prepare("Phantom", tmp_path)


# Small rules


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "C:\\x", "a\\..\\x", "", None, "a\0b", ".."])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(BadDataError, match="file name"):
        inside(tmp_path, name)


def test_names_within_are_taken(tmp_path: Path) -> None:
    assert inside(tmp_path, "image/a..b (1).png") == tmp_path / "image" / "a..b (1).png"


def test_patients_and_slices_are_read_from_file_stems() -> None:
    pattern = DATASETS["BTCV"].patient
    assert identify("ABD_007_80", pattern, "ABD_007_80") == ("007", "slice-080")
    assert identify("ABD 007/80", pattern, "ABD 007/80") == ("ABD-007-80", "ABD-007-80")  # does not fit
    assert identify("p7_x", r"(?P<patient>p\d)_x", "p7_x") == ("p7", "p7_x")


def test_the_hash_splits_patients_about_seventy_to_ten_to_twenty() -> None:
    card = DatasetCard("Mine", "Mine", "CT", "")
    sides = [split_of(card, str(i), None, seed=0) for i in range(2000)]
    assert abs(sides.count("train") - 1400) < 80 and abs(sides.count("val") - 200) < 50
    assert sides == [split_of(card, str(i), None, seed=0) for i in range(2000)]
    assert sides != [split_of(card, str(i), None, seed=1) for i in range(2000)]
    assert split_of(card, "1", "val", seed=0) == "val"
    assert split_of(DATASETS["BTCV"], "030", "train", seed=0) == "test"


def test_cards_have_ids_that_gymnasium_takes_and_structures_without_doubles() -> None:
    for name, card in DATASETS.items():
        assert name == card.id and name.replace(".", "").isalnum() and name.isascii()
        assert len({s.name for s in card.structures}) == len(card.structures)
        assert card.layout in LAYOUTS or name == "Phantom"
        sides = [patient for patients in card.splits.values() for patient in patients]
        assert len(set(sides)) == len(sides)
    assert instruction(DATASETS["BTCV"], "right kidney") == "right kidney in abdomen CT"
    assert instruction(DATASETS["PanNuke"], "nuclei") == "nuclei in pathology"
    assert instruction(DATASETS["Phantom"], "disc") == "disc"


def test_every_layout_has_an_importer() -> None:
    for layout in LAYOUTS:
        module = importer(layout)
        assert callable(module.plan) and callable(module.read)
