"""MedSAM2's volumes: slices upright by their direction, nothing unpickled, nothing unpacked beyond the limits."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_import_nifti import MINE, cases, scan
from test_importers import Evil, lying_header

from medseg_gym.datasets.importers.npz import read_volume
from medseg_gym.datasets.prepare import prepare
from medseg_gym.errors import BadDataError, MedSegError


def npz(path: Path, **changes: Any) -> Path:
    """7 slices of 6 x 5 pixels with labels 1 and 2, some arrays replaced (None: left out)."""
    image, labels = scan()
    arrays: dict[str, Any] = {
        "imgs": (image.transpose(2, 1, 0) % 256).astype(np.uint8),
        "gts": labels.transpose(2, 1, 0),
        "spacing": np.array([2.0, 3.0, 4.0]),
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_without_a_direction_slices_are_shown_as_stored(tmp_path: Path) -> None:
    npz(tmp_path / "CT_01.npz")
    found, left = cases("npz", tmp_path, structure="1=liver,2=tumor")
    image, labels = scan()
    assert left == {} and [case.name for case in found] == ["slice-002", "slice-003", "slice-004"]
    for case, index in zip(found, (2, 3, 4), strict=True):
        np.testing.assert_array_equal(case.image, (image[:, :, index].T % 256).astype(np.uint8))
        np.testing.assert_array_equal(case.masks["liver"], labels[:, :, index].T == 1)
        assert case.spacing_mm == (3.0, 2.0) and case.patient == "CT_01"


def test_a_direction_is_respected(tmp_path: Path) -> None:
    """x runs to the back, y to the left and the slices downwards, as in MedSAM2's DeepLesion files."""
    volume, labels = read_volume(npz(tmp_path / "a.npz", direction=np.array([0, 1, 0, 1, 0, 0, 0, 0, -1.0])))
    image, _ = scan()
    assert volume.data.shape == labels.shape == (6, 5, 7) and volume.spacing_mm == (3.0, 2.0, 4.0)
    np.testing.assert_array_equal(volume.data, (image.transpose(1, 0, 2)[::-1, ::-1, ::-1] % 256).astype(np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gts": None}, "no gts in it; wanted the arrays imgs, gts"),
        ({"gts": np.zeros((7, 6, 4), np.uint8)}, "gts is 7x6x4, imgs 7x6x5 .slices x height x width."),
        ({"gts": np.full((7, 6, 5), 0.5)}, "not whole numbers"),
        ({"imgs": np.zeros((6, 5), np.uint8)}, r"imgs is \(6, 5\) uint8"),
        ({"imgs": np.zeros((7, 6, 5, 3), np.uint8)}, "with 4 axes"),
        ({"spacing": np.array([1.0, 2.0])}, "spacing is"),
        ({"spacing": np.array([1.0, 2.0, 0.0])}, "spacing is"),
        ({"spacing": np.array([1.0, 2.0, np.nan])}, "spacing is"),
        ({"direction": np.zeros(9)}, "direction is"),
        ({"direction": np.eye(2)}, "direction is"),
        ({"imgs": np.array([Evil()], object)}, "an array of object"),
    ],
)
def test_a_volume_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        read_volume(npz(tmp_path / "a.npz", **changes))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(tmp_path / "a.npz", gts=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("gts.npy", lying_header())
    with pytest.raises(BadDataError, match="not fit its bytes|not a readable array"):
        read_volume(path)
    monkeypatch.setattr("medseg_gym.datasets.importers.npz.MAX_VOXELS", 2**18)
    bomb = npz(tmp_path / "b.npz", imgs=np.zeros((64, 128, 129), np.uint8))
    assert bomb.stat().st_size < 10_000
    with pytest.raises(BadDataError, match="unpacks to 1057.* bytes; the limit is 1048576"):
        read_volume(bomb)


def test_broken_files_cost_themselves(tmp_path: Path, home: Path) -> None:
    for name in "abc":
        npz(tmp_path / f"{name}.npz")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    npz(tmp_path / "b.npz", gts=np.zeros((7, 6, 5), np.uint8))
    report = prepare("Mine", tmp_path, layout="npz", options={"structure": "lesion"})
    reasons = {entry.file: (entry.reason, entry.damaged) for entry in report.skipped}
    assert reasons.keys() == {"a.npz", "b.npz"} and report.images == 3
    assert reasons["a.npz"][0].startswith("not a readable .npz") and reasons["a.npz"][1]
    assert reasons["b.npz"] == ("no structure has foreground in any slice", False)


def test_a_folder_without_volumes_or_names_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="no .npz file in it"):
        cases("npz", tmp_path, structure="lesion")
    npz(tmp_path / "a.npz")
    with pytest.raises(MedSegError, match="add --structure"):
        cases("npz", tmp_path, MINE)


def test_deep_lesion_gives_its_labelled_slices(samples: Path, home: Path) -> None:
    """Two volumes, 7 and 13 slices with a lesion; the patient's chest bone lies on top."""
    report = prepare(
        "Mine", samples / "npz" / "DeepLesion", layout="npz", options={"structure": "lesion"},
        patient=r"CT_Lesion_(?P<patient>\d+)_.*",
    )  # fmt: skip
    assert (report.images, report.cases, report.skipped) == (20, 20, ())
    assert sum(split.patients for split in report.splits.values()) == 2
    found, _ = cases("npz", samples / "npz" / "DeepLesion", structure="lesion")
    table = found[7].image  # the second volume: the patient lies on a table, at the bottom
    assert table[:100].mean() < 1 < table[400:480].mean()
    assert found[7].spacing_mm == (0.9375, 0.9375)
