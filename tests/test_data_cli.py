"""`medseg-gym data`: what people see, and that mistakes end in one clean message and exit code 1."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from medseg_gym.cli_data import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A BiomedParse folder: three images with a liver each, of which one mask is empty and one file is not there."""
    folder = tmp_path / "source"
    annotations = []
    for part in ("train", "train_mask"):
        (folder / part).mkdir(parents=True)
    for number in range(5):
        stem = f"{number}_CT_abdomen"
        if number != 4:
            Image.fromarray(np.full((6, 7, 3), 40 * number, np.uint8)).save(folder / "train" / f"{stem}.png")
        mask = np.zeros((6, 7), np.uint8)
        mask[2:4, 1:5] = 255 * (number != 3)
        Image.fromarray(mask).save(folder / "train_mask" / f"{stem}_liver.png")
        annotations.append({"file_name": f"{stem}.png", "mask_file": f"{stem}_liver.png"})
    (folder / "train.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def test_prepare_prints_totals_splits_and_what_was_skipped(home: Path, source: Path) -> None:
    result = run("prepare", "KiTS", "--from", source)
    assert result.exit_code == 0, result.output
    assert "KiTS is prepared: 3 images, 3 cases" in result.stdout
    assert [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["train"]] == [
        ["train", "3", "3", "3"]
    ]
    assert "2 skipped:" in result.stdout
    assert "1 x mask of 'liver' has no foreground: train/3_CT_abdomen.png" in result.stdout
    assert "1 x no such file; its 1 masks are left out with it: train/4_CT_abdomen.png" in result.stdout
    assert "5/5" in result.output  # the progress bar counts images
    again = run("prepare", "KiTS", "--from", source)
    assert again.exit_code == 0 and "was prepared already, with the same content" in again.stdout


def test_info_list_and_verify_tell_of_a_prepared_dataset(home: Path, source: Path) -> None:
    run("prepare", "MyData", "--from", source, "--layout", "biomedparse")
    info = run("info", "MyData")
    assert info.exit_code == 0 and "MyData: 3 cases, 1 structures" in info.stdout and "checksum " in info.stdout
    assert ["liver", "3", "0", "0", "3"] in [line.split() for line in info.stdout.splitlines()]
    assert run("info", home / "datasets" / "MyData.h5").stdout == info.stdout
    listed = [line.split() for line in run("list").stdout.splitlines()]
    assert ["MyData", "(your", "own)", "yes", "3"] in listed and ["BTCV", "BTCV", "CT"] in listed
    assert ["Phantom", "Phantom", "built", "in", "endless"] in listed
    verified = run("verify", "MyData")
    assert verified.exit_code == 0 and "MyData is sound: 3 cases" in verified.stdout


def test_verify_of_a_damaged_file_fails_and_says_how_to_mend_it(home: Path, source: Path) -> None:
    import h5py

    run("prepare", "KiTS", "--from", source)
    with h5py.File(home / "datasets" / "KiTS.h5", "r+") as file:
        file["images/6x7x1"][1] = 0
    result = run("verify", "KiTS")
    assert result.exit_code == 1
    assert "KiTS/1/1_CT_abdomen: the image or its masks differ from what was written" in result.output
    assert "medseg-gym data prepare KiTS --from FOLDER --force" in result.output
    assert run("prepare", "KiTS", "--from", source, "--force").exit_code == 0  # even with an unchanged checksum
    assert run("verify", "KiTS").exit_code == 0
    (home / "datasets" / "KiTS.h5").unlink()
    (home / "datasets" / "KiTS.h5").write_bytes(b"")
    listed = [line.split() for line in run("list").stdout.splitlines()]
    assert ["KiTS", "KiTS", "CT", "damaged"] in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "BTVC", "--from", "."), "unknown dataset 'BTVC'; did you mean 'BTCV'?"),
        (("prepare", "BTCV", "--from", "nowhere"), "nowhere: no such folder"),
        (("prepare", "../x", "--from", ".", "--layout", "biomedparse"), "dataset name '../x'; wanted"),
        (("prepare", "Mine", "--from", ".", "--layout", "coco"), "unknown layout 'coco'"),
        (("info", "BTCV"), "medseg-gym data prepare BTCV --from FOLDER"),
        (("info", "nothing.h5"), "nothing.h5 is not there"),
        (("info", "Phantom"), "made as it is asked for"),
        (("verify", "[red]"), "unknown dataset '[red]'"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_1(home: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
