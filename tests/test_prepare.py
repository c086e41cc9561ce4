"""Preparing: the same bytes for any number of processes and after a kill, memory flat, and a report that tells all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medseg_gym.datasets import blocks, spool
from medseg_gym.datasets import prepare as prepare_module
from medseg_gym.datasets.blocks import WorkerDiedError, block_size
from medseg_gym.datasets.importers import RawCase, Skipped
from medseg_gym.datasets.prepare import prepare
from medseg_gym.datasets.spool import Ready, Spool, check, is_sound, read_block, write_block
from medseg_gym.datasets.store import Store
from medseg_gym.errors import MedSegError, UnknownNameError

IMAGES = 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A BiomedParse folder: twelve images, liver and kidney in each; mask 3 is cut short, image 7 is not there."""
    return biomedparse(tmp_path / "source")


def biomedparse(folder: Path, images: int = IMAGES, side: int = 24) -> Path:
    annotations = []
    for part in ("train", "train_mask"):
        (folder / part).mkdir(parents=True)
    for number in range(images):
        stem = f"p{number:03}_CT_abdomen"
        image = np.random.default_rng(number).integers(0, 256, (side, side + number % 3, 3), np.uint8)
        if number != 7:
            Image.fromarray(image).save(folder / "train" / f"{stem}.png")
        for i, structure in enumerate(("liver", "right+kidney")):
            mask = np.zeros(image.shape[:2], np.uint8)
            mask[2 : 6 + number % 5, 3 : 9 + i] = 255
            file = folder / "train_mask" / f"{stem}_{structure}.png"
            Image.fromarray(mask).save(file)
            annotations.append({"file_name": f"{stem}.png", "mask_file": file.name})
    cut = folder / "train_mask" / "p003_CT_abdomen_liver.png"
    cut.write_bytes(cut.read_bytes()[:40])
    (folder / "train.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def run(source: Path, home: Path, **options: Any) -> Any:
    return prepare("Mine", source, layout="biomedparse", home=home, **options)


def test_the_bytes_do_not_depend_on_the_number_of_processes(source: Path, tmp_path: Path) -> None:
    one, three = run(source, tmp_path / "one"), run(source, tmp_path / "three", jobs=3)
    assert one.path.read_bytes() == three.path.read_bytes()
    assert one.skipped == three.skipped
    assert [path.name for path in three.path.parent.iterdir()] == ["Mine.h5"]


def test_the_report_tells_counts_areas_and_what_is_damaged(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "home")
    assert (report.images, report.cases) == (11, 21)
    assert {s: sum(counts.values()) for s, counts in report.structures.items()} == {"liver": 10, "right kidney": 11}
    # rows are 4 + number % 5: livers (without 3 and 7) 4 5 6 8 4 5 7 8 4 5, median 5, in 6 columns; kidneys in 7
    assert report.areas == {"liver": 30.0, "right kidney": 35.0}
    assert report.damaged == len(report.skipped) == 2 and report.resumed == 0
    (cut, gone) = report.skipped
    assert cut.file == "train_mask/p003_CT_abdomen_liver.png"
    assert gone.file == "train/p007_CT_abdomen.png" and gone.reason.startswith("no such file")


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole = run(source, tmp_path / "whole").path.read_bytes()
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "home", progress=interrupt)
    folder = tmp_path / "home" / "datasets"
    (left,) = folder.iterdir()  # the blocks; the half-written store is gone
    assert left.name.startswith(".Mine.h5.") and left.name.endswith(".blocks") and len(list(left.iterdir())) == 5
    report = run(source, tmp_path / "home", jobs=2)
    assert report.resumed == 5 and report.path.read_bytes() == whole
    assert [path.name for path in folder.iterdir()] == ["Mine.h5"]


KILLED = """
import sys
from medseg_gym.datasets import prepare
if __name__ == "__main__":
    from medseg_gym.datasets.prepare import prepare
    prepare("Mine", sys.argv[1], layout="biomedparse", home=sys.argv[2], jobs=int(sys.argv[3]),
            progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, jobs: int) -> None:
    source = biomedparse(tmp_path / "large", images=60, side=200)
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(source), str(tmp_path / "home"), str(jobs)]
    path = f"{Path(prepare_module.__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "20":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "home" / "datasets" / "Mine.h5").exists()
    if jobs > 1:
        time.sleep(0.5)  # until its processes have noticed
    report = run(source, tmp_path / "home")
    assert report.resumed >= 20
    assert [p.name for p in report.path.parent.iterdir()] == ["Mine.h5"]
    assert report.path.read_bytes() == run(source, tmp_path / "whole").path.read_bytes()


@pytest.mark.parametrize("change", ["image", "listing", "patient", "structures"])
def test_blocks_of_another_state_are_not_used(source: Path, tmp_path: Path, change: str) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "home", progress=interrupt)
    options: dict[str, Any] = {}
    if change == "image":
        Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(source / "train" / "p000_CT_abdomen.png")
    elif change == "listing":
        (source / "train.json").write_text((source / "train.json").read_text() + "\n")
    elif change == "patient":
        options["patient"] = r"(?P<patient>p\d)\d\d_CT_abdomen"
    else:
        options["region"] = "belly"
    report = run(source, tmp_path / "home", **options)
    assert report.resumed == 0
    assert [path.name for path in report.path.parent.iterdir()] == ["Mine.h5"]
    assert report.path.read_bytes() == run(source, tmp_path / "other", **options).path.read_bytes()


def test_a_damaged_block_is_made_again(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "home", progress=interrupt)
    (folder,) = (tmp_path / "home" / "datasets").iterdir()
    first, second, third, *_ = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[:-3])
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    third.write_bytes(b"")
    report = run(source, tmp_path / "home")
    assert report.resumed == 2
    assert report.path.read_bytes() == run(source, tmp_path / "whole").path.read_bytes()


def test_a_process_that_is_ended_from_outside_is_told_and_its_work_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    submit = ProcessPoolExecutor.submit

    def die_at_the_fourth(self: Any, call: Any, *arguments: Any) -> Future[Any]:
        if arguments[-1].name == "000003.block":
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool("gone"))
            return future
        return submit(self, call, *arguments)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", die_at_the_fourth)
    with pytest.raises(WorkerDiedError, match="run the command again, with fewer --jobs"):
        run(source, tmp_path / "home", jobs=2)
    monkeypatch.undo()
    assert run(source, tmp_path / "home").resumed >= 3


def test_blocks_are_the_same_for_any_number_of_processes() -> None:
    assert [block_size(n) for n in (0, 1, 63, 64, 128, 158, 2048, 100_000)] == [1, 1, 1, 1, 2, 2, 32, 32]


def test_a_decoder_that_fails_costs_its_file_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg_gym.datasets.importers import biomedparse

    read = biomedparse.read

    def broken(item: Any) -> Any:
        if item.image == "p001_CT_abdomen.png":
            raise ZeroDivisionError("of a library")
        return read(item)

    monkeypatch.setattr(biomedparse, "read", broken)
    report = run(source, tmp_path / "home")
    assert Skipped("p001_CT_abdomen.png", "reading it failed (ZeroDivisionError: of a library)") in report.skipped
    assert report.images == 10

    def gone(item: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(biomedparse, "read", gone)
    with pytest.raises(MemoryError):
        run(source, tmp_path / "other")


def test_given_splits_place_patients_and_refuse_two_sides(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "home", splits={"test": ["p000", "p001"], "val": ["p002"]})
    assert {split: count.patients for split, count in report.splits.items()} == {"train": 8, "val": 1, "test": 2}
    assert {key.split("/")[1] for key in Store(report.path).keys("test")} == {"p000", "p001"}
    for splits, message in (
        ({"test": ["p0"], "train": ["p0"]}, "patient 'p0' is in test and in train"),
        ({"tset": ["p0"]}, "did you mean 'test'"),
        ({"test": "p0"}, "wanted a list of patients"),
        ({"test": [0]}, "wanted a list of patients"),
    ):
        with pytest.raises(MedSegError, match=message):
            run(source, tmp_path / "home", splits=splits)


def test_a_patient_whose_files_are_on_two_sides_stays_on_the_first(source: Path, tmp_path: Path) -> None:
    for part in ("", "_mask"):
        (source / f"test{part}").mkdir()
    for file in ("test/p000_CT_abdomen.png", "test_mask/p000_CT_abdomen_liver.png"):
        (source / file).write_bytes((source / file.replace("test", "train")).read_bytes())
    record = {"file_name": "p000_CT_abdomen.png", "mask_file": "p000_CT_abdomen_liver.png"}
    (source / "test.json").write_text(json.dumps({"annotations": [record]}))
    report = run(source, tmp_path / "home")
    reasons = {entry.file: entry.reason for entry in report.skipped}
    assert reasons["test/p000_CT_abdomen.png"] == (
        "patient 'p000' is in 'train' already and here in 'test'; a patient stays on one side"
    )
    assert report.splits["test"].cases == 0 and report.damaged == 3


def test_modality_and_region_word_the_instructions(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "home", modality="CT", region="abdomen")
    assert Store(report.path)["Mine/p000/p000_CT_abdomen/liver"].instruction == "liver in abdomen CT"


def test_wrong_options_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown option 'mask'"):
        run(source, tmp_path / "home", options={"mask": "x"})
    for jobs in (0, True, "2"):
        with pytest.raises(MedSegError, match=r"jobs=.*; wanted a whole number"):
            run(source, tmp_path / "home", jobs=jobs)


# Blocks


def test_a_block_gives_back_what_went_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 256, (5, 9, 1), np.uint8), 3, axis=2)
    masks = {"a": rng.random((5, 9)) < 0.5, "b": np.zeros((5, 9), np.bool_), "c": np.ones((4, 9), np.bool_)}
    raw = RawCase(
        "x.png", grey, {**masks, "d": masks["b"]}, "p", "n", {"a": "an a"}, "val", (0.5, 0.75), frozenset({"b"})
    )
    found = list(check(raw))
    assert [type(result) for result in found] == [Skipped, Skipped, Ready]
    assert found[0].reason == "mask of 'c' is 4x9, the image 5x9 (height x width)" and found[0].damaged
    assert found[1].reason == "mask of 'd' has no foreground" and not found[1].damaged
    path = tmp_path / "folder" / "000000.block"
    write_block(path, [*found, None])
    assert is_sound(path) and [p.name for p in path.parent.iterdir()] == ["000000.block"]
    *skipped, ready, end = read_block(path)
    assert skipped == found[:2] and end is None and isinstance(ready, Ready)
    assert np.array_equal(ready.image, grey[..., :1]) and set(ready.masks) == {"a", "b"}
    assert all(np.array_equal(ready.masks[s], masks[s]) and ready.masks[s].dtype == np.bool_ for s in "ab")
    assert (ready.patient, ready.name, ready.split, ready.spacing_mm) == ("p", "n", "val", (0.5, 0.75))
    assert ready.instructions == {"a": "an a"}


def test_images_of_the_wrong_kind_are_skipped() -> None:
    (entry,) = check(RawCase("x.png", np.zeros((4, 4), np.float32), {}, "p", "n"))
    assert isinstance(entry, Skipped) and entry.reason.startswith("image is (4, 4, 1) float32; wanted")


@pytest.mark.parametrize("length", [0, 1, 15, 16, 40, -1])
def test_a_block_that_is_cut_anywhere_is_not_sound(tmp_path: Path, length: int) -> None:
    path = tmp_path / "b.block"
    write_block(path, [Skipped("a", "b"), None])
    path.write_bytes(path.read_bytes()[:length])
    assert not is_sound(path)


def test_an_unfinished_block_is_not_there(tmp_path: Path) -> None:
    def results() -> Any:
        yield None
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_block(tmp_path / "b.block", results())
    assert not (tmp_path / "b.block").exists() and not is_sound(tmp_path / "b.block")


def test_memory_holds_one_image_whatever_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume of 200 slices goes through without two of them being kept at once."""
    import gc
    import weakref

    from medseg_gym.datasets.importers import biomedparse

    made: list[weakref.ref[Any]] = []
    most = 0

    class Slice(np.ndarray):
        pass

    def volume(item: Any) -> Any:
        nonlocal most
        for z in range(200):
            image = np.full((16, 16), z, np.uint8).view(Slice)
            made.append(weakref.ref(image))
            gc.collect(0)
            most = max(most, sum(ref() is not None for ref in made))
            yield RawCase("v", image, {"x": np.ones((16, 16), np.bool_)}, "p", f"slice-{z:03}")

    monkeypatch.setattr(biomedparse, "read", volume)
    spooled = Spool(tmp_path / "Mine.h5", "0" * 64)
    seen = sum(isinstance(r, Ready) for r in blocks.results("biomedparse", ["v"], spooled, 1))
    assert seen == 200 and most <= 3


def test_the_identity_tells_every_change(source: Path) -> None:
    first = spool.identity(source, ["item"], "settings")
    assert spool.identity(source, ["item"], "settings") == first
    assert spool.identity(source, ["item 2"], "settings") != first
    assert spool.identity(source, ["item"], "other") != first
    os.utime(source / "train.json", (1, 1))
    assert spool.identity(source, ["item"], "settings") != first
