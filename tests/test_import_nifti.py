"""NIfTI volumes: any stored orientation gives the same upright slices, windows are exact, misfits are refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym.datasets.cards import DATASETS, DatasetCard
from medseg_gym.datasets.importers import RawCase, Skipped, importer
from medseg_gym.datasets.importers.intensities import bounds, parse_window, to_bytes, window_for
from medseg_gym.datasets.importers.volumes import in_ras
from medseg_gym.datasets.prepare import prepare
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError

nib = pytest.importorskip("nibabel")

MINE = DatasetCard("Mine", "Mine", "", "")


def volume(path: Path, data: np.ndarray, order: str = "RAS", spacing: tuple[float, ...] = (2, 3, 4)) -> None:
    """Writes an array given in RAS order as a file whose voxels are stored in another order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-7, 11, 5)
    image = nib.Nifti1Image(data, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(order))
    nib.save(image.as_reoriented(turn), path)


def scan(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A 5 x 6 x 7 image of whole numbers, and labels: 1 in a block of 2 x 3 x 3 voxels, 2 in one voxel beside it."""
    image = np.random.default_rng(seed).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1:3, 2:5, 2:5] = 1
    labels[4, 5, 4] = 2
    return image, labels


def msd(root: Path, count: int = 2, **changes: Any) -> dict[str, Any]:
    """A folder of the Decathlon with a liver and a tumour in each volume; returns dataset.json's content."""
    for number in range(count):
        image, labels = scan(number)
        volume(root / f"imagesTr/case_{number}.nii.gz", image)
        volume(root / f"labelsTr/case_{number}.nii.gz", labels)
    record = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": [
            {"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"} for n in range(count)
        ],
        **changes,
    }
    (root / "dataset.json").write_text(json.dumps(record))
    return record


def pairs(
    root: Path, order: str = "RAS", label_order: str | None = None, spacing: tuple[float, ...] = (2, 3, 4)
) -> None:
    image, labels = scan()
    volume(root / "p1.nii.gz", image, order, spacing)
    volume(root / "p1_seg.nii.gz", labels, label_order or order, spacing)


def cases(layout: str, source: Path, card: DatasetCard = MINE, **options: str) -> tuple[list[RawCase], dict[str, str]]:
    """What an importer finds, and file -> reason of what it leaves out."""
    module = importer(layout)
    items, skipped = module.plan(source, card, {name.replace("_", "-"): value for name, value in options.items()})
    found = [result for item in items for result in module.read(item)]
    left = [*skipped, *(result for result in found if isinstance(result, Skipped))]
    return [result for result in found if isinstance(result, RawCase)], {entry.file: entry.reason for entry in left}


LABELS = "1=liver,2=tumor"


@pytest.mark.parametrize("label_order", ["same", "RAS"])
@pytest.mark.parametrize("order", ["LPS", "LAS", "RSP", "ASL", "IPR"])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal", "acquired"])
def test_every_stored_orientation_gives_the_same_slices(
    tmp_path: Path, order: str, label_order: str, axis: str
) -> None:
    pairs(tmp_path / "a")
    pairs(tmp_path / "b", order, order if label_order == "same" else label_order)
    one, none = cases("nifti-pairs", tmp_path / "a", structure=LABELS, axis=axis)
    other, _ = cases("nifti-pairs", tmp_path / "b", structure=LABELS, axis=axis)
    assert none == {} and len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert (a.name, a.patient, a.spacing_mm) == (b.name, b.patient, b.spacing_mm)
        np.testing.assert_array_equal(a.image, b.image)
        assert a.masks.keys() == b.masks.keys()
        for structure, mask in a.masks.items():
            np.testing.assert_array_equal(mask, b.masks[structure])


def test_two_stores_of_one_volume_in_ras_and_lps_hold_the_same(tmp_path: Path, home: Path) -> None:
    pairs(tmp_path / "a")
    pairs(tmp_path / "b", "LPS")
    options = {"structure": LABELS}
    first = prepare("Mine", tmp_path / "a", layout="nifti-pairs", options=options)
    again = prepare("Mine", tmp_path / "b", layout="nifti-pairs", options=options)
    assert first.cases == 4 and again.unchanged and again.checksum == first.checksum


@pytest.mark.parametrize(
    ("axis", "name", "shape", "spacing"),
    [
        ("axial", "slice-006", (6, 5), (3.0, 2.0)),
        ("coronal", "slice-005", (7, 5), (4.0, 2.0)),
        ("sagittal", "slice-004", (7, 6), (4.0, 3.0)),
    ],
)
def test_slices_are_shown_as_radiologists_hang_them(
    tmp_path: Path, axis: str, name: str, shape: tuple[int, int], spacing: tuple[float, float]
) -> None:
    """The voxel at the right, front and top end comes to lie in the upper left corner of each view."""
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[4, 5, 6] = 1
    volume(tmp_path / "p1.nii.gz", labels.astype(np.int16), "LPS")
    volume(tmp_path / "p1_seg.nii.gz", labels, "LPS")
    (case,), left = cases("nifti-pairs", tmp_path, structure="liver", axis=axis, window="full")
    assert left == {} and case.name == name and case.patient == "p1"
    assert case.image.shape == shape and case.spacing_mm == spacing
    assert np.argwhere(case.masks["liver"]).tolist() == [[0, 0]] == np.argwhere(case.image == 255).tolist()


def test_acquired_is_across_the_coarsest_spacing(tmp_path: Path) -> None:
    pairs(tmp_path, "PIR", spacing=(1, 6, 1))
    found, _ = cases("nifti-pairs", tmp_path, structure=LABELS, axis="acquired")
    assert [case.name for case in found] == ["slice-002", "slice-003", "slice-004", "slice-005"]  # coronal
    assert found[0].image.shape == (7, 5) and found[0].spacing_mm == (1.0, 1.0)


def test_an_oblique_grid_is_turned_to_its_nearest_axes_and_not_resampled() -> None:
    angle = np.deg2rad(30)
    affine = np.eye(4)
    affine[:3, :3] = [[0, -np.cos(angle), np.sin(angle)], [0, -np.sin(angle), -np.cos(angle)], [2, 0, 0]]
    data = np.arange(24).reshape(2, 3, 4)
    out = in_ras(data, affine)  # first axis up, second to the left, third to the back
    assert out.data.shape == (3, 4, 2) and out.spacing_mm == (1.0, 1.0, 2.0)
    np.testing.assert_array_equal(out.data, data.transpose(1, 2, 0)[::-1, ::-1])
    np.testing.assert_allclose(out.affine @ [2, 3, 0, 1], affine[:, 3])  # the first voxel stays where it was


# Which slices


def test_a_slice_is_a_case_for_each_structure_in_it(tmp_path: Path) -> None:
    pairs(tmp_path)
    found, left = cases("nifti-pairs", tmp_path, structure=LABELS)
    assert left == {}
    assert [(case.name, sorted(case.masks)) for case in found] == [
        ("slice-002", ["liver"]),
        ("slice-003", ["liver"]),
        ("slice-004", ["liver", "tumor"]),
    ]
    assert found[0].masks["liver"].sum() == 6  # 2 x 3 voxels


def test_small_masks_are_left_out_and_counted_once(tmp_path: Path) -> None:
    pairs(tmp_path)
    found, left = cases("nifti-pairs", tmp_path, structure=LABELS, min_area="2")
    assert [sorted(case.masks) for case in found] == [["liver"]] * 3
    assert left == {"p1.nii.gz": "'tumor' is smaller than 2 pixels in 1 of its slices"}


def test_empty_slices_are_kept_as_absent_when_asked_for(tmp_path: Path, home: Path) -> None:
    pairs(tmp_path)
    found, left = cases("nifti-pairs", tmp_path, structure=LABELS, empty="keep", min_area="2")
    assert len(found) == 7 and len(left) == 1
    assert found[0].absent == {"liver", "tumor"} and found[3].absent == {"tumor"}
    assert "tumor" not in found[4].masks  # too small to be a case, and not absent either
    report = prepare("Mine", tmp_path, layout="nifti-pairs", options={"structure": LABELS, "empty": "keep"})
    assert (report.images, report.cases) == (7, 14)


def test_every_nth_slice_is_counted_from_the_first(tmp_path: Path) -> None:
    pairs(tmp_path)
    found, _ = cases("nifti-pairs", tmp_path, structure=LABELS, every="2")
    assert [case.name for case in found] == ["slice-002", "slice-004"]


# Windows


def test_windows_put_their_bounds_at_0_and_255() -> None:
    low, high = bounds(np.zeros(3), parse_window("abdomen"))
    assert (low, high) == (-160, 240)  # level 40, width 400
    values = np.array([-1000, -160, 40, 240, 3000], np.int16)
    assert to_bytes(values, low, high).tolist() == [0, 0, 128, 255, 255]
    assert bounds(values, parse_window("-10:20.5")) == (-10, 20.5)
    assert bounds(values, "full") == (-1000, 3000)
    assert to_bytes(np.array([np.nan, np.inf, -np.inf], np.float32), 0, 1).tolist() == [0, 255, 0]


def test_percentiles_look_at_what_is_not_air() -> None:
    values = np.concatenate([np.zeros(5000), np.arange(1, 1002)])  # of 1..1001 the 0.5 and 99.5 percentiles are 6, 996
    assert bounds(values, "percentile") == (6, 996)
    assert bounds(np.zeros(9), "percentile") == (0, 0)
    assert to_bytes(np.zeros((2, 2)), 0, 0).tolist() == [[0, 0], [0, 0]]
    assert bounds(np.array([np.nan, 5.0], np.float32), "full") == (5, 5)


def test_the_window_follows_modality_region_and_structures() -> None:
    assert window_for("MRI", "abdomen", ["liver"]) == "percentile"
    assert window_for("CT", "abdomen", ["liver"]) == (-160, 240)
    assert window_for("CT", "chest", ["heart"]) == (-125, 225)
    assert window_for("CT", "chest", ["lung tumor"]) == (-1350, 150)
    assert window_for("CT", "brain", ["bleeding"]) == (0, 80)


@pytest.mark.parametrize(
    ("text", "message"),
    [("abdomenn", "did you mean 'abdomen'"), ("5:5", "LOW below HIGH"), ("a:b", "two numbers"), ("0:inf", "LOW below")],
)
def test_windows_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(MedSegError, match=message):
        parse_window(text)


def test_the_listing_says_that_it_is_ct(tmp_path: Path) -> None:
    msd(tmp_path, 1)
    found, _ = cases("nifti-msd", tmp_path)
    image, _ = scan(0)
    np.testing.assert_array_equal(found[0].image, to_bytes(image[::-1, ::-1, 2].T, -160, 240))
    asked, _ = cases("nifti-msd", tmp_path, window="0:100")
    np.testing.assert_array_equal(asked[0].image, to_bytes(image[::-1, ::-1, 2].T, 0, 100))


# Labels


def test_decathlon_labels_take_the_cards_words(tmp_path: Path) -> None:
    msd(tmp_path)
    found, left = cases("nifti-msd", tmp_path, DATASETS["MSDLiver"])
    assert {s for case in found for s in case.masks} == {"liver", "liver tumor"} and left == {}
    plain, _ = cases("nifti-msd", tmp_path)
    assert {s for case in plain for s in case.masks} == {"liver", "cancer"}
    joined, _ = cases("nifti-msd", tmp_path, structure="1+2=whole liver,2=tumor")
    assert [case.masks["whole liver"].sum() for case in joined[:3]] == [6, 6, 7]
    assert [case.patient for case in found] == ["case_0"] * 3 + ["case_1"] * 3 and found[0].split is None


def test_nnunet_folders_need_no_list(tmp_path: Path) -> None:
    msd(
        tmp_path,
        labels={"background": 0, "organ": [1, 2], "tumor": 2, "ignore": 3},
        channel_names={"0": "T1", "1": "T2"},
    )
    record = json.loads((tmp_path / "dataset.json").read_text())
    del record["training"], record["modality"]
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    for number in range(2):
        image, _ = scan(number)
        path = tmp_path / f"imagesTr/case_{number}.nii.gz"
        path.rename(tmp_path / f"imagesTr/case_{number}_0000.nii.gz")
        volume(tmp_path / f"imagesTr/case_{number}_0001.nii.gz", image * 0 + 7)
    volume(tmp_path / "imagesTs/case_9_0000.nii.gz", scan()[0])
    volume(tmp_path / "labelsTs/case_9.nii.gz", scan()[1])
    found, left = cases("nifti-msd", tmp_path)
    assert left == {}
    assert [(case.patient, case.split) for case in found[::3]] == [
        ("case_0", "train"),
        ("case_1", "train"),
        ("case_9", "test"),
    ]
    assert sorted(found[2].masks) == ["organ", "tumor"] and found[2].masks["organ"].sum() == 7
    second, _ = cases("nifti-msd", tmp_path, channel="T2", window="full")
    assert not second[0].image.any() and second[0].file == "imagesTr/case_0_0001.nii.gz"


def test_a_file_a_structure_is_read_by_its_name(tmp_path: Path) -> None:
    image, labels = scan()
    volume(tmp_path / "s1/ct.nii.gz", image)
    volume(tmp_path / "s1/segmentations/kidney_left.nii.gz", (labels == 2).astype(np.uint8), "LPS")
    volume(tmp_path / "s1/segmentations/liver.nii.gz", labels.clip(0, 1).astype(np.float32))
    found, left = cases("nifti-pairs", tmp_path)
    assert [(case.patient, case.name, sorted(case.masks)) for case in found] == [
        ("s1", "ct-slice-002", ["liver"]),
        ("s1", "ct-slice-003", ["liver"]),
        ("s1", "ct-slice-004", ["kidney left", "liver"]),
    ]
    assert left == {}


def test_several_volumes_of_a_patient_stay_apart(tmp_path: Path) -> None:
    for frame in ("01", "12"):
        image, labels = scan(int(frame))
        volume(tmp_path / f"patient001/patient001_frame{frame}.nii.gz", image)
        volume(tmp_path / f"patient001/patient001_frame{frame}_gt.nii.gz", labels)
    card = DATASETS["ACDC"]
    card = DatasetCard(
        "ACDC", "ACDC", "MRI", "heart", structures=card.structures, patient=r"(?P<patient>patient\d+)_.*"
    )
    found, left = cases("nifti-pairs", tmp_path, card)
    assert {case.patient for case in found} == {"patient001"} and left == {}
    assert len({case.name for case in found}) == 6 and found[0].name == "patient001_frame01-slice-002"


def test_values_without_a_name_are_told_of(tmp_path: Path) -> None:
    msd(tmp_path, 1, labels={"0": "background", "1": "liver"})
    found, left = cases("nifti-msd", tmp_path)
    assert len(found) == 3
    assert left == {"labelsTr/case_0.nii.gz": "label values 2 have no name and are left out"}
    assert cases("nifti-msd", tmp_path, structure="2=tumor")[1] == {}  # chosen by hand


# What does not fit, and what is broken


def test_a_label_of_another_shape_is_refused(tmp_path: Path) -> None:
    msd(tmp_path)
    volume(tmp_path / "labelsTr/case_0.nii.gz", np.ones((5, 6, 8), np.uint8))
    found, left = cases("nifti-msd", tmp_path)
    assert {case.patient for case in found} == {"case_1"}
    assert left == {"labelsTr/case_0.nii.gz": "label is 5x6x8, the image 5x6x7 (left-right, back-front, feet-head)"}


def test_a_label_that_lies_elsewhere_is_refused_unless_its_affine_is_not_to_be_believed(tmp_path: Path) -> None:
    image, labels = scan()
    volume(tmp_path / "p1.nii.gz", image, "LPS")
    stored = nib.load(tmp_path / "p1.nii.gz")
    turned = labels[::-1, ::-1]  # the same order as the image is stored in
    nib.save(nib.Nifti1Image(turned, np.diag([2, 3, 4, 1])), tmp_path / "p1_seg.nii.gz")
    assert stored.shape == turned.shape
    none, left = cases("nifti-pairs", tmp_path, structure=LABELS)
    assert (
        none == [] and "mm off its image; if only its affine is wrong: --option affine=image" in left["p1_seg.nii.gz"]
    )
    found, left = cases("nifti-pairs", tmp_path, structure=LABELS, affine="image")
    assert left == {}
    pairs(tmp_path / "sound")
    for a, b in zip(found, cases("nifti-pairs", tmp_path / "sound", structure=LABELS)[0], strict=True):
        np.testing.assert_array_equal(a.masks["liver"], b.masks["liver"])


def test_4d_images_are_refused_unless_one_volume_is_chosen(tmp_path: Path) -> None:
    image, labels = scan()
    volume(tmp_path / "p1.nii.gz", np.stack([image * 0, image], axis=3))
    volume(tmp_path / "p1_seg.nii.gz", labels)
    none, left = cases("nifti-pairs", tmp_path, structure=LABELS)
    assert none == [] and left["p1.nii.gz"].startswith(
        "4D, (5, 6, 7, 2); say which of its volumes with --option channel="
    )
    found, _ = cases("nifti-pairs", tmp_path, structure=LABELS, channel="1", window="full")
    np.testing.assert_array_equal(found[0].image, to_bytes(image[::-1, ::-1, 2].T, *bounds(image, "full")))
    assert "there is no channel 2" in cases("nifti-pairs", tmp_path, structure=LABELS, channel="2")[1]["p1.nii.gz"]


def test_a_4d_label_is_read_at_its_images_channel(tmp_path: Path) -> None:
    image, labels = scan()
    volume(tmp_path / "p1.nii.gz", np.stack([image * 0, image], axis=3))
    volume(tmp_path / "p1_gt.nii.gz", np.stack([labels * 0, labels], axis=3))
    found, left = cases("nifti-pairs", tmp_path, structure=LABELS, channel="1")
    assert left == {} and [case.name for case in found] == ["slice-002", "slice-003", "slice-004"]


def test_a_picture_without_orientation_is_shown_as_stored(tmp_path: Path) -> None:
    picture = np.arange(20, dtype=np.int16).reshape(4, 5)  # 4 columns, 5 rows
    for name, data in (("p1", picture), ("p1_gt", (picture == 1).astype(np.uint8))):
        image = nib.Nifti1Image(data, None)
        image.header.set_zooms((2, 3))
        nib.save(image, tmp_path / f"{name}.nii.gz")
    (case,), left = cases("nifti-pairs", tmp_path, structure="ventricle", window="0:255")
    assert left == {} and case.spacing_mm == (3.0, 2.0)
    np.testing.assert_array_equal(case.image, picture.T)
    assert np.argwhere(case.masks["ventricle"]).tolist() == [[1, 0]]


def test_scaled_voxels_are_scaled(tmp_path: Path) -> None:
    pairs(tmp_path)
    image = nib.load(tmp_path / "p1.nii.gz")
    scaled = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    scaled.header.set_slope_inter(2, -1000)
    nib.save(scaled, tmp_path / "p1.nii.gz")
    raw = nib.load(tmp_path / "p1.nii.gz")
    found, _ = cases("nifti-pairs", tmp_path, structure=LABELS, window="-100:100")
    np.testing.assert_array_equal(found[0].image, to_bytes(raw.get_fdata()[::-1, ::-1, 2].T, -100, 100))


def damaged(source: Path) -> dict[str, str]:
    """Breaks volumes 0 to 6 of a Decathlon folder in their own ways; file -> the reason expected."""
    packed = (source / "imagesTr/case_0.nii.gz").read_bytes()
    (source / "imagesTr/case_0.nii.gz").write_bytes(packed[: len(packed) // 2])
    (source / "imagesTr/case_1.nii.gz").write_bytes(b"not packed at all")
    (source / "labelsTr/case_2.nii.gz").unlink()
    raw = bytearray(gzip.decompress((source / "imagesTr/case_3.nii.gz").read_bytes()))
    raw[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()  # the shape: 65 terabytes
    (source / "imagesTr/case_3.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    _, labels = scan()
    volume(source / "labelsTr/case_4.nii.gz", labels + np.float32(0.5))
    raw = bytearray(gzip.decompress((source / "imagesTr/case_5.nii.gz").read_bytes()))
    raw[280:296] = bytes(16)  # the affine's first row
    (source / "imagesTr/case_5.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    colours = np.zeros((5, 6, 7), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(colours, np.eye(4)), source / "imagesTr/case_6.nii.gz")
    return {
        "imagesTr/case_0.nii.gz": "not a readable NIfTI volume",
        "imagesTr/case_1.nii.gz": "not a readable NIfTI volume",
        "labelsTr/case_2.nii.gz": "no such file",
        "imagesTr/case_3.nii.gz": "more voxels than the limit",
        "labelsTr/case_4.nii.gz": "label values are not whole numbers",
        "imagesTr/case_5.nii.gz": "its affine gives the voxels no volume",
        "imagesTr/case_6.nii.gz": "wanted plain numbers",
        "dataset.json, training 8": "leads outside the folder; refused",
        "dataset.json, training 9": "a str; wanted an object",
    }


def test_broken_volumes_cost_themselves_and_are_told_of(tmp_path: Path, home: Path) -> None:
    record = msd(tmp_path, 8)
    record["training"] += [{"image": "../../x.nii.gz", "label": "labelsTr/case_0.nii.gz"}, "case_7"]
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    expected = damaged(tmp_path)
    report = prepare("Mine", tmp_path, layout="nifti-msd")
    reasons = {entry.file: entry.reason for entry in report.skipped}
    assert reasons.keys() == expected.keys()
    for file, text in expected.items():
        assert text in reasons[file], file
        assert str(tmp_path) not in reasons[file]
    assert report.images == 3 and report.damaged == len(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {}}, "no labels; wanted"),
        ({"labels": {"0": "background"}}, "only the background"),
        ({"labels": {"liver": 1.5}}, "label 'liver' is 1.5"),
        ({"labels": {"1": "liver", "2": "liver"}}, "two labels are called 'liver'"),
        ({"training": {}}, "'training' is a dict"),
    ],
)
def test_a_listing_of_another_kind_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    msd(tmp_path, 1, **changes)
    with pytest.raises(BadDataError, match=message):
        cases("nifti-msd", tmp_path)


def test_wrong_options_say_what_was_meant(tmp_path: Path) -> None:
    pairs(tmp_path)
    for options, message in (
        ({"windw": "lung"}, "did you mean 'window'"),
        ({"axis": "axail"}, "did you mean 'axial'"),
        ({"empty": "kept"}, "did you mean 'keep'"),
        ({"affine": "imge"}, "did you mean 'image'"),
    ):
        with pytest.raises(UnknownNameError, match=message):
            cases("nifti-pairs", tmp_path, structure=LABELS, **options)
    for options, message in (
        ({"every": "0"}, "a whole number from 1 up"),
        ({"min_area": "ten"}, "a whole number from 1 up"),
        ({"image": "{id}.nii.gz"}, "--mask is missing"),
        ({"image": "../{id}.nii.gz", "mask": "{id}_seg.nii.gz"}, "leads outside the folder"),
    ):
        with pytest.raises(MedSegError, match=message):
            cases("nifti-pairs", tmp_path, structure=LABELS, **options)
    with pytest.raises(MedSegError, match="nothing says what is outlined; add --structure"):
        cases("nifti-pairs", tmp_path)


# Real files


def test_hippocampus_gives_every_labelled_slice(samples: Path, home: Path) -> None:
    """16 volumes; as many slices and masks as their label volumes hold, counted without the importer."""
    folder = samples / "nifti" / "Task04_Hippocampus"
    expected = {1: 0, 2: 0}
    images = 0
    for path in sorted((folder / "labelsTr").glob("*.nii.gz")):
        labels = np.asarray(nib.load(path).dataobj)  # all are stored in RAS
        images += int((labels > 0).any(axis=(0, 1)).sum())
        for value in expected:
            expected[value] += int((labels == value).any(axis=(0, 1)).sum())
    report = prepare("MSDHippocampus", folder, layout="nifti-msd")
    assert report.skipped == () and report.images == images == 418
    counts = {structure: sum(row.values()) for structure, row in report.structures.items()}
    assert counts == {"anterior hippocampus": expected[1], "posterior hippocampus": expected[2]}
    assert sum(split.patients for split in report.splits.values()) == 16
