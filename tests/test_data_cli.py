"""`medseg-gym data`: what people see, and that mistakes end in one clean message and exit code 1."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from medseg_gym import registration
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
    assert result.exit_code == 3, result.output  # an image is not there
    assert "KiTS is prepared: 3 images, 3 cases" in result.stdout
    assert [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["train"]] == [
        ["train", "3", "3", "3"]
    ]
    assert ["liver", "3", "0", "0", "3", "8", "px"] in [line.split() for line in result.stdout.splitlines()]
    assert "2 skipped, 1 of them damaged or unusable:" in result.stdout
    assert "1 x mask of 'liver' has no foreground: train/3_CT_abdomen.png" in result.stdout
    assert "1 x no such file; its 1 masks are left out with it: train/4_CT_abdomen.png" in result.stdout
    assert "5/5" in result.output  # the progress bar counts images
    again = run("prepare", "KiTS", "--from", source)
    assert again.exit_code == 3 and "was prepared already, with the same content" in again.stdout
    (source / "train" / "4_CT_abdomen.png").write_bytes((source / "train" / "0_CT_abdomen.png").read_bytes())
    mended = run("prepare", "KiTS", "--from", source, "--force")
    assert mended.exit_code == 0 and "1 skipped:" in mended.stdout  # the empty mask is no damage


def test_info_list_and_verify_tell_of_a_prepared_dataset(home: Path, source: Path) -> None:
    run("prepare", "MyData", "--from", source, "--layout", "biomedparse")
    info = run("info", "MyData")
    assert info.exit_code == 0 and "MyData: 3 cases, 1 structures" in info.stdout and "checksum " in info.stdout
    assert ["liver", "3", "0", "0", "3", "8", "px"] in [line.split() for line in info.stdout.splitlines()]
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
    assert run("prepare", "KiTS", "--from", source, "--force").exit_code == 3  # even with an unchanged checksum
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
        (("prepare", "Mine", "--from", ".", "--layout", "cocos"), "unknown layout 'cocos'; did you mean 'coco'"),
        (
            ("prepare", "Mine", "--from", ".", "--layout", "biomedparse", "--option", "x"),
            "--option 'x'; wanted key=value",
        ),
        (("prepare", "Mine", "--from", ".", "--layout", "biomedparse", "--mask", "m"), "unknown option 'mask'"),
        (("prepare", "BTCV", "--from", ".", "--jobs", "0"), "jobs=0; wanted"),
        (("card", "BTVC"), "did you mean 'BTCV'"),
        (("preview", "Phantom", "--out", "x.png", "--count", "0"), "count=0; wanted 1 to 400"),
        (("preview", "Phantom", "--out", "/dev/null/x.png", "--count", "1"), "cannot write /dev/null/x.png"),
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


def test_verify_compares_with_what_was_published_and_is_strict_on_request(home: Path, source: Path) -> None:
    run("prepare", "KiTS", "--from", source)
    result = run("verify", "KiTS")
    assert result.exit_code == 0 and "KiTS is sound: 3 cases" in result.stdout
    assert "44,557 cases expected (MedSAM-Agent, Table 4), 3 here: differs" in result.stdout
    assert "at least 1,427 cases expected (IBISAgent, Table 11: kits23), 3 here: differs" in result.stdout
    assert "no near-duplicate images across splits" in result.stdout
    assert run("verify", "KiTS", "--strict").exit_code == 3
    run("prepare", "Mine", "--from", source, "--layout", "biomedparse")
    assert run("verify", "Mine", "--strict").exit_code == 0  # nothing is published of it


def test_verify_names_near_duplicates_across_splits(home: Path, source: Path) -> None:
    rng = np.random.default_rng(0)
    for number in (0, 1):  # the same picture, once brighter
        picture = np.random.default_rng(7).integers(0, 200, (64, 64, 3), np.uint8) + np.uint8(20 * number)
        Image.fromarray(picture).save(source / "train" / f"{number}_CT_abdomen.png")
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(source / "train" / "2_CT_abdomen.png")
    for number in range(3):
        mask = np.full((64, 64), 255, np.uint8)
        Image.fromarray(mask).save(source / "train_mask" / f"{number}_CT_abdomen_liver.png")
    splits = source / "splits.json"
    splits.write_text('{"test": ["1"], "val": ["2"]}')
    run("prepare", "Mine", "--from", source, "--layout", "biomedparse", "--splits", splits)
    result = run("verify", "Mine")
    assert result.exit_code == 0 and "1 near-duplicate images across splits:" in result.stdout
    assert "Mine/0/0_CT_abdomen (train) and Mine/1/1_CT_abdomen (test): 1.0000" in result.stdout
    assert run("verify", "Mine", "--strict").exit_code == 3


def test_card_prints_what_is_known_and_says_what_is_not(home: Path) -> None:
    shown = run("card", "ACDC").stdout
    for text in ("heart MRI", "3 left heart ventricle", "CC BY-NC-SA 4.0", "Bernard et al.", "creatis.insa-lyon.fr"):
        assert text in shown
    assert "7,666 cases (MedSAM-Agent, Table 4)" in shown
    assert "1,746 cases drawn from it (IBISAgent, Table 11)" in shown
    assert "medseg-gym data prepare ACDC --from FOLDER" in shown
    assert "not known for sure" in run("card", "OCTCME").stdout
    assert "PREPARE" not in run("card", "Phantom").stdout.upper()


def test_preview_writes_a_contact_sheet(home: Path, source: Path, tmp_path: Path) -> None:
    run("prepare", "Mine", "--from", source, "--layout", "biomedparse")
    out = tmp_path / "sheets" / "mine.png"
    result = run("preview", "Mine", "--out", out, "--count", "3", "--columns", "2", "--size", "64")
    assert result.exit_code == 0, result.output
    with Image.open(out) as sheet:
        assert sheet.width == 12 + 2 * (64 + 12)  # two columns and the gaps
        green = np.asarray(sheet).astype(int)
    assert ((green[..., 1] - green[..., 0]) > 40).any()  # masks are drawn in green


def test_layouts_lists_every_layout() -> None:
    from medseg_gym.datasets.importers import LAYOUTS

    shown = run("layouts").stdout
    assert all(f"{layout}: " in shown for layout in LAYOUTS)


def test_your_own_data_is_an_env_here_and_in_another_process(home: Path, source: Path) -> None:
    run("prepare", "MyData", "--from", source, "--layout", "biomedparse", "--modality", "CT", "--region", "abdomen")
    env = gym.make("MedSeg-MyData-GrabCut-v0", size=32)
    assert env.reset(seed=0)[1]["instruction"] == "liver in abdomen CT"
    code = (
        "import sys, medseg_gym, gymnasium as gym\n"
        "assert 'h5py' not in sys.modules\n"
        "env = gym.make('MedSeg-MyData-GrabCut-v0', size=32)\n"
        "print(env.reset(seed=0)[1]['key'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MyData/")


def test_a_prepared_name_of_the_catalogue_adds_no_ids(home: Path, source: Path) -> None:
    before = set(gym.registry)
    run("prepare", "KiTS", "--from", source)
    (home / "datasets" / "My-Data.h5").write_bytes(b"")  # put there by hand; no id can hold the name
    registration.register()
    assert set(gym.registry) == before
