"""DICOM series with SEG and RTSTRUCT: masks lie where position and orientation say, under their segments' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_import_nifti import cases

from medseg_gym.datasets.importers.dicom_labels import polygon
from medseg_gym.datasets.importers.dicom_series import read_series
from medseg_gym.datasets.prepare import prepare
from medseg_gym.errors import BadDataError, MedSegError

pydicom = pytest.importorskip("pydicom")

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
CT = "1.2.840.10008.5.1.4.1.1.2"
AXIAL = (1, 0, 0, 0, 1, 0)


def dataset(sop: str, **tags: Any) -> Any:
    out = pydicom.Dataset()
    out.file_meta = pydicom.dataset.FileMetaDataset()
    out.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    out.file_meta.MediaStorageSOPClassUID = out.SOPClassUID = sop
    out.file_meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID = "1.2.3.4"
    out.PatientID, out.StudyInstanceUID = "P7", "1.2.3"
    for name, value in tags.items():
        setattr(out, name, value)
    return out


def items(*records: dict[str, Any]) -> Any:
    out = []
    for record in records:
        item = pydicom.Dataset()
        for name, value in record.items():
            setattr(item, name, value)
        out.append(item)
    return pydicom.Sequence(out)


def save(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record.save_as(path, enforce_file_format=True)


def volume() -> np.ndarray:
    """(slices, rows, columns) stored values; Hounsfield units are 1024 below."""
    return np.random.default_rng(0).integers(800, 1400, (4, 6, 5)).astype(np.uint16)


def series(root: Path, orientation: tuple[float, ...] = AXIAL, uid: str = "1.2.3.9", **changes: Any) -> np.ndarray:
    """Four slices of 6 x 5 pixels, 2 x 3 mm, 4 mm apart upwards from z = -10, in shuffled files; the stored values."""
    pixels = volume()
    right, down = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(right, down)
    for number, name in zip(range(4), "cadb", strict=True):
        position = np.array([-20.0, -30.0, -10.0]) + 4 * number * normal
        record = dataset(
            CT, Modality="CT", SeriesInstanceUID=uid, FrameOfReferenceUID="1.2.5", Rows=6, Columns=5, BitsAllocated=16,
            BitsStored=16, HighBit=15, PixelRepresentation=0, SamplesPerPixel=1,
            PhotometricInterpretation="MONOCHROME2",
            PixelSpacing=[2, 3], ImageOrientationPatient=list(orientation), ImagePositionPatient=position.tolist(),
            RescaleSlope=1, RescaleIntercept=-1024, PixelData=pixels[number].tobytes(), **changes,
        )  # fmt: skip
        save(root / f"ct/{name}.dcm", record)
    return pixels


def seg(
    path: Path,
    masks: list[tuple[int, float, np.ndarray]],
    labels: dict[int, str],
    refers: str = "1.2.3.9",
    **changes: Any,
) -> None:
    """Frames (segment number, z of the slice, mask) in the orientation and grid of the series."""
    bits = np.concatenate([mask.ravel() for _, _, mask in masks]).astype(np.uint8)
    packed = np.packbits(bits, bitorder="little").tobytes()
    frames = [
        {
            "SegmentIdentificationSequence": items({"ReferencedSegmentNumber": number}),
            "PlanePositionSequence": items({"ImagePositionPatient": [-20.0, -30.0, z]}),
        }
        for number, z, _ in masks
    ]
    shared = {
        "PlaneOrientationSequence": items({"ImageOrientationPatient": list(AXIAL)}),
        "PixelMeasuresSequence": items({"PixelSpacing": [2, 3]}),
    }
    record = dataset(
        SEG, Modality="SEG", SeriesInstanceUID="1.2.3.10", FrameOfReferenceUID="1.2.5", NumberOfFrames=len(masks),
        Rows=masks[0][2].shape[0], Columns=masks[0][2].shape[1], BitsAllocated=1, BitsStored=1, HighBit=0,
        PixelRepresentation=0, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", SegmentationType="BINARY",
        SegmentSequence=items(*({"SegmentNumber": n, "SegmentLabel": label} for n, label in labels.items())),
        ReferencedSeriesSequence=items({"SeriesInstanceUID": refers}),
        SharedFunctionalGroupsSequence=items(shared), PerFrameFunctionalGroupsSequence=items(*frames),
        PixelData=packed + b"\0" * (len(packed) % 2),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(record, name, value)
    save(path, record)


def rtstruct(path: Path, regions: dict[str, list[tuple[str, list[float]]]], refers: str = "1.2.3.9") -> None:
    """Regions by name, each a list of (geometric type, x y z x y z ...)."""
    study = {"RTReferencedSeriesSequence": items({"SeriesInstanceUID": refers})}
    frame = {"FrameOfReferenceUID": "1.2.5", "RTReferencedStudySequence": items(study)}
    contours = [
        {
            "ReferencedROINumber": number,
            "ContourSequence": items(*({"ContourGeometricType": kind, "ContourData": data} for kind, data in drawn)),
        }
        for number, drawn in enumerate(regions.values(), 1)
    ]
    record = dataset(
        RTSTRUCT, Modality="RTSTRUCT", SeriesInstanceUID="1.2.3.11",
        ReferencedFrameOfReferenceSequence=items(frame),
        StructureSetROISequence=items(*({"ROINumber": n, "ROIName": name} for n, name in enumerate(regions, 1))),
        ROIContourSequence=items(*contours),
    )  # fmt: skip
    save(path, record)


def block(y: int, x: int) -> np.ndarray:
    mask = np.zeros((6, 5), np.bool_)
    mask[y : y + 2, x : x + 2] = True
    return mask


def ring(x1: float, y1: float, x2: float, y2: float, z: float) -> list[float]:
    """A rectangle's corners; the pixel of row r, column c lies at x = -20 + 3 c, y = -30 + 2 r."""
    return [x1, y1, z, x2, y1, z, x2, y2, z, x1, y2, z]


def test_segments_lie_on_their_slices_under_their_names(tmp_path: Path) -> None:
    pixels = series(tmp_path)
    masks = [(1, -6.0, block(1, 1)), (2, -6.0, block(2, 2)), (1, 2.0, block(3, 0))]  # 1 and 2 overlap
    seg(tmp_path / "seg.dcm", masks, {1: "Liver", 2: "Kidney_left"})
    found, left = cases("dicom", tmp_path)
    assert left == {} and [(case.patient, case.name) for case in found] == [("P7", "slice-001"), ("P7", "slice-003")]
    assert sorted(found[0].masks) == ["Liver", "left Kidney"] and sorted(found[1].masks) == ["Liver"]
    np.testing.assert_array_equal(found[0].masks["Liver"], block(1, 1))
    np.testing.assert_array_equal(found[0].masks["left Kidney"], block(2, 2))
    np.testing.assert_array_equal(found[1].masks["Liver"], block(3, 0))
    expected = np.floor(np.clip((pixels[1] - 1024.0 + 160) / 400, 0, 1) * 255 + 0.5)  # the abdomen's window
    np.testing.assert_array_equal(found[0].image, expected)
    assert found[0].spacing_mm == (2.0, 3.0)


def test_segments_are_chosen_and_renamed(tmp_path: Path) -> None:
    series(tmp_path)
    masks = [(1, -6.0, block(1, 1)), (2, -6.0, block(2, 2))]
    seg(tmp_path / "seg.dcm", masks, {1: "Liver", 2: "Neoplasm"})
    found, _ = cases("dicom", tmp_path, structure="Neoplasm=liver tumor")
    assert [sorted(case.masks) for case in found] == [["liver tumor"]]
    joined, _ = cases("dicom", tmp_path, structure="Neoplasm=liver,Liver=liver")
    np.testing.assert_array_equal(joined[0].masks["liver"], block(1, 1) | block(2, 2))


def test_a_segment_on_a_shifted_grid_is_moved_to_the_series(tmp_path: Path) -> None:
    series(tmp_path)
    mask = np.ones((2, 2), np.bool_)
    place = {"ImagePositionPatient": [-20.0 + 2 * 3, -30.0 + 3 * 2, -6.0]}  # column 2, row 3
    frame = {
        "SegmentIdentificationSequence": items({"ReferencedSegmentNumber": 1}),
        "PlanePositionSequence": items(place),
    }
    seg(tmp_path / "s.dcm", [(1, -6.0, mask)], {1: "Liver"}, PerFrameFunctionalGroupsSequence=items(frame))
    (case,), left = cases("dicom", tmp_path)
    assert left == {}
    np.testing.assert_array_equal(case.masks["Liver"], block(3, 2))


def test_contours_are_filled_by_pixel_centres_and_holes_stay_open(tmp_path: Path) -> None:
    series(tmp_path)
    outer = ring(-21, -31, -20 + 4 * 3 + 1, -30 + 5 * 2 + 1, -6.2)  # all 6 x 5 centres, 0.2 mm off the slice
    hole = ring(-20 + 2, -30 + 1, -20 + 7, -30 + 5, -6.2)  # rows 1 to 2, columns 1 to 2
    far = ring(-21, -31, 0, 0, 50)
    point = [-20.0, -30.0, -6.0]
    regions = {
        "Liver": [("CLOSED_PLANAR", outer), ("CLOSED_PLANAR", hole)],
        "Marks": [("POINT", point), ("CLOSED_PLANAR", far)],
    }
    rtstruct(tmp_path / "rs.dcm", regions)
    (case,), left = cases("dicom", tmp_path)
    assert case.name == "slice-001" and sorted(case.masks) == ["Liver"]
    np.testing.assert_array_equal(case.masks["Liver"], ~block(1, 1))
    assert left == {"rs.dcm": "1 contours are points or open lines"}  # the last of two


def test_a_polygon_holds_the_pixels_whose_centres_it_holds() -> None:
    triangle = polygon(np.array([0, 4, 0]), np.array([0, 0, 4]), 5, 5)
    assert triangle.sum(axis=1).tolist() == [4, 3, 2, 1, 0]
    bow = polygon(np.array([0, 3, 3, 0.0]), np.array([0, 3, 0, 3.0]), 4, 4)  # crosses itself
    assert bow.sum() > 0 and not bow[0, 1]
    assert not polygon(np.array([9, 12, 9]), np.array([1, 1, 4]), 5, 5).any()  # right of the image
    assert polygon(np.array([-9, 99, 99, -9]), np.array([-9, -9, 99, 99]), 5, 5).all()


@pytest.mark.parametrize(
    ("orientation", "name"),
    [((1, 0, 0, 0, 0, -1), "coronal"), ((0, 1, 0, 0, 0, -1), "sagittal"), ((-1, 0, 0, 0, 1, 0), "axial")],
)
def test_a_series_of_another_orientation_is_shown_by_the_same_convention(
    tmp_path: Path, orientation: tuple[float, ...], name: str
) -> None:
    pixels = series(tmp_path, orientation)
    data, grid = read_series(sorted((tmp_path / "ct").glob("*")))
    assert data.shape == (5, 6, 4) and grid.gap == 4.0
    np.testing.assert_array_equal(data[..., 0].T, pixels[0] - 1024.0)
    right, down = np.array(orientation[:3]), np.array(orientation[3:])
    start = grid.origins[1]
    corners = [start + right * 3 * c + down * 2 * r for r, c in ((-0.5, -0.5), (-0.5, 1.5), (1.5, 1.5), (1.5, -0.5))]
    rtstruct(tmp_path / "rs.dcm", {"Liver": [("CLOSED_PLANAR", np.concatenate(corners).tolist())]})
    (case,), left = cases("dicom", tmp_path, window="-1024:1000")
    assert left == {}
    shown = np.floor((pixels[1] / 2024.0) * 255 + 0.5)
    if name == "axial":  # its rows run to the patient's right; shown, the right is on the image's left
        np.testing.assert_allclose(case.image, shown[:, ::-1], atol=1)
        assert case.masks["Liver"][:2, 3:].all() and case.masks["Liver"].sum() == 4
    else:
        np.testing.assert_allclose(case.image, shown, atol=1)
        assert case.masks["Liver"][:2, :2].all() and case.masks["Liver"].sum() == 4


def test_two_series_of_a_patient_stay_apart(tmp_path: Path) -> None:
    for uid in ("1.2.3.9", "1.2.3.12"):
        series(tmp_path / uid, uid=uid)
        seg(tmp_path / uid / "seg.dcm", [(1, -6.0, block(1, 1))], {1: "Liver"}, refers=uid)
    found, left = cases("dicom", tmp_path)
    assert left == {} and len(found) == 2 and len({case.name for case in found}) == 2
    assert {case.patient for case in found} == {"P7"}


def damaged(root: Path) -> dict[str, str]:
    """A sound series and segment among things that are not; file -> the reason expected."""
    series(root)
    seg(root / "a.dcm", [(1, -6.0, block(1, 1))], {1: "Liver"})
    (root / "cut.dcm").write_bytes((root / "a.dcm").read_bytes()[:700])
    (root / "text.dcm").write_bytes(b"not DICOM at all" * 20)
    seg(root / "elsewhere.dcm", [(1, -6.0, block(1, 1))], {1: "Liver"}, refers="9.9")
    tilted = {"PlaneOrientationSequence": items({"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}),
              "PixelMeasuresSequence": items({"PixelSpacing": [2, 3]})}  # fmt: skip
    seg(root / "tilted.dcm", [(1, -6.0, block(1, 1))], {1: "A"}, SharedFunctionalGroupsSequence=items(tilted))
    seg(root / "between.dcm", [(1, -8.0, block(1, 1))], {1: "B"})
    seg(root / "nameless.dcm", [(3, -6.0, block(1, 1))], {1: "C"})
    seg(root / "huge.dcm", [(1, -6.0, block(1, 1))], {1: "D"}, Rows=60000, Columns=60000)
    rtstruct(root / "open.dcm", {"E": [("CLOSED_PLANAR", [1.0, 2.0, 3.0])]})
    return {
        "cut.dcm": "",
        "text.dcm": "not a readable DICOM file",
        "elsewhere.dcm": "the image series it refers to is not here",
        "tilted.dcm": "not parallel",
        "between.dcm": "1 frames lie on no slice of the series",
        "nameless.dcm": "segment 3, which is not described",
        "huge.dcm": "more than is read",
        "open.dcm": "a contour has 3 numbers",
    }


def test_broken_files_cost_themselves_and_are_told_of(tmp_path: Path, home: Path) -> None:
    expected = damaged(tmp_path)
    report = prepare("Mine", tmp_path, layout="dicom")
    reasons = {entry.file: entry.reason for entry in report.skipped}
    assert reasons.keys() == expected.keys()
    for file, text in expected.items():
        assert text in reasons[file], (file, reasons[file])
        assert str(tmp_path) not in reasons[file]
    assert (report.images, report.cases) == (1, 1) and report.structures.keys() == {"Liver"}


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("a", {"Rows": 5}, "differs from the series' first slice|cannot be decoded"),
        ("a", {"ImagePositionPatient": [-20.0, -30.0, -10.0]}, "at the same place"),
        ("a", {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "two unit vectors"),
        ("a", {"PixelSpacing": [0, 3]}, "lengths above 0"),
        ("a", {"PixelData": b"\0\0"}, "cannot be decoded"),
    ],
)
def test_a_series_with_a_bad_slice_is_left_out(
    tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    series(tmp_path)
    record = pydicom.dcmread(tmp_path / f"ct/{file}.dcm")
    for name, value in changes.items():
        setattr(record, name, value)
    record.save_as(tmp_path / f"ct/{file}.dcm")
    with pytest.raises(BadDataError, match=message):
        read_series(sorted((tmp_path / "ct").glob("*.dcm")))


def test_unevenly_spaced_slices_are_cut_only_as_acquired(tmp_path: Path) -> None:
    series(tmp_path)
    record = pydicom.dcmread(tmp_path / "ct/b.dcm")  # the topmost
    record.ImagePositionPatient = [-20.0, -30.0, 12.0]
    record.save_as(tmp_path / "ct/b.dcm")
    seg(tmp_path / "seg.dcm", [(1, -6.0, block(1, 1))], {1: "Liver"})
    assert len(cases("dicom", tmp_path)[0]) == 1
    none, left = cases("dicom", tmp_path, axis="coronal")
    assert none == [] and "unevenly spaced" in left["ct/a.dcm"]


def test_packed_files_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    series(tmp_path)
    record = pydicom.dcmread(tmp_path / "ct/a.dcm")
    record.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    record.save_as(tmp_path / "ct/a.dcm", enforce_file_format=True)
    _, left = cases("dicom", tmp_path)
    assert "deflated as a whole" in left["ct/a.dcm"]


def test_options_and_folders_that_do_not_fit_say_so(tmp_path: Path) -> None:
    series(tmp_path)
    found, left = cases("dicom", tmp_path)
    assert found == [] and left == {"ct/a.dcm": "no SEG or RTSTRUCT refers to its series"}
    with pytest.raises(MedSegError, match="wanted LABEL=NAME"):
        cases("dicom", tmp_path, structure="=liver")


def test_the_real_series_gives_every_segment(samples: Path, home: Path) -> None:
    """Three CT slices, a SEG of the liver and one of five overlapping segments; pixels counted from the files."""
    folder = samples / "dicom"
    report = prepare("Mine", folder, layout="dicom")
    assert (report.images, report.cases, report.skipped) == (3, 10, ())
    counts = {structure: sum(row.values()) for structure, row in report.structures.items()}
    assert counts == {"Liver": 3, "GREEN": 1, "ORANGE": 1, "PURPLE": 3, "LIGHT BLUE": 1, "DARK BLUE": 1}
    found, _ = cases("dicom", folder)
    assert [int(case.masks["Liver"].sum()) for case in found] == [36233, 35645, 35220]  # z = -128.69 first
    assert [int(case.masks["PURPLE"].sum()) for case in found] == [117, 117, 10509]
    assert all(case.masks["Liver"][:, :256].sum() > case.masks["Liver"][:, 256:].sum() for case in found)
