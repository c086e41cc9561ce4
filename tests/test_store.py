"""The HDF5 store: what goes in comes out, nothing is ever half there, and bad files get a clear error."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_gym import datasets
from medseg_gym.datasets import store_writer
from medseg_gym.datasets.base import Dataset, check_sample
from medseg_gym.datasets.schema import slug
from medseg_gym.datasets.store import SplitCount, Store
from medseg_gym.datasets.store_writer import StoreWriter, remove_stale
from medseg_gym.errors import BadDataError, DataMissingError, MedSegError, UnknownNameError


def grey(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.repeat(np.random.default_rng(seed).integers(0, 256, (height, width, 1), np.uint8), 3, axis=2)


def colour(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def rectangle(height: int, width: int, y: int, x: int) -> np.ndarray:
    """False but for the rectangle from the corner to (y, x), inclusive."""
    mask = np.zeros((height, width), np.bool_)
    mask[: y + 1, : x + 1] = True
    return mask


def write(path: Path, name: str = "Toy") -> Path:
    """Three patients: "b" trains with two images (grey and colour), "a" is val, "c" is test; sizes differ."""
    with StoreWriter(path, name, structures=("liver", "left kidney"), layout="hand") as writer:
        for patient, image_name, split, image, structures in (
            ("b", "slice-002", "train", colour(9, 13, 1), ("left kidney",)),
            ("b", "slice-001", "train", grey(9, 13, 2), ("left kidney", "liver", "aorta")),
            ("c", "one", "test", grey(1, 1, 3), ("liver",)),
            ("a", "one", "val", colour(16, 8, 4), ("aorta",)),
        ):
            height, width = image.shape[:2]
            masks = {s: rectangle(height, width, len(s) % height, len(s) % width) for s in structures}
            phrases = {s: f"{s} in abdomen CT" for s in structures}
            spacing = (0.75, 0.5) if patient == "c" else None
            writer.add(
                image, masks, patient=patient, name=image_name, split=split, instructions=phrases, spacing_mm=spacing
            )
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "Toy.h5")


@pytest.fixture
def store(path: Path) -> Store:
    return Store(path, "Toy")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# What goes in comes out


def test_cases_come_back_as_they_were_written(store: Store) -> None:
    sample = check_sample(store["Toy/b/slice-001/liver"])
    assert np.array_equal(sample.image, grey(9, 13, 2))
    assert np.array_equal(sample.target, rectangle(9, 13, 5, 5))  # "liver" has five letters
    assert (sample.structure, sample.instruction, sample.patient) == ("liver", "liver in abdomen CT", "b")
    assert sample.spacing_mm is None
    one = store["Toy/c/one/liver"]
    assert one.image.shape == (1, 1, 3) and one.target.tolist() == [[True]] and one.spacing_mm == (0.75, 0.5)
    assert np.array_equal(store["Toy/a/one/aorta"].image, colour(16, 8, 4))


def test_keys_are_sorted_by_patient_and_kept_apart_by_split(store: Store) -> None:
    assert store.keys("train") == (
        "Toy/b/slice-001/aorta",
        "Toy/b/slice-001/left-kidney",
        "Toy/b/slice-001/liver",
        "Toy/b/slice-002/left-kidney",
    )
    assert store.keys("val") == ("Toy/a/one/aorta",)
    assert store.keys("test") == ("Toy/c/one/liver",)
    assert store.keys("train", ("left kidney", "liver")) == store.keys("train")[1:]
    assert store.keys("test", ["aorta"]) == ()
    assert len(store) == 6


def test_structures_keep_the_given_order_and_others_follow(store: Store) -> None:
    assert store.structures == ("liver", "left kidney", "aorta")
    assert isinstance(store, Dataset) and store.name == "Toy"


def test_counts_per_split_and_structure(store: Store) -> None:
    assert store.splits() == {"train": SplitCount(1, 2, 4), "val": SplitCount(1, 1, 1), "test": SplitCount(1, 1, 1)}
    assert store.structure_counts()["aorta"] == {"train": 1, "val": 1, "test": 0}


def test_arrays_are_read_only_and_one_image_is_one_array(store: Store) -> None:
    first, second = store["Toy/b/slice-001/liver"], store["Toy/b/slice-001/aorta"]
    assert first.image is second.image
    assert not first.image.flags.writeable and not first.target.flags.writeable


def test_the_image_cache_keeps_to_its_bytes(path: Path) -> None:
    store = Store(path, cache_bytes=9 * 13 * 3)  # one of b's images
    first = store["Toy/b/slice-001/liver"].image
    assert store["Toy/b/slice-001/aorta"].image is first
    store["Toy/b/slice-002/left-kidney"]
    assert store["Toy/b/slice-001/liver"].image is not first


def test_grey_images_take_one_channel_and_an_image_is_a_chunk(path: Path) -> None:
    with h5py.File(path) as file:
        assert set(file["images"]) == {"9x13x3", "9x13x1", "1x1x1", "16x8x3"}
        assert file["images/9x13x1"].chunks == (1, 9, 13, 1)
        assert file["masks/9x13"].shape == (4, 9, 2) and file["masks/9x13"].chunks == (1, 9, 2)
        assert file["images/9x13x1"].compression == "gzip"


def test_unknown_keys_splits_and_structures_are_named(store: Store) -> None:
    with pytest.raises(KeyError, match="no case 'Toy/b/slice-001/spleen' in Toy"):
        store["Toy/b/slice-001/spleen"]
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        store.keys("trian")
    with pytest.raises(UnknownNameError, match="did you mean 'liver'"):
        store.keys("train", ("lever",))


def test_an_absent_structure_keeps_its_empty_mask(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "T.h5", "T") as writer:
        empty = np.zeros((4, 5), np.bool_)
        writer.add(grey(4, 5), {"cyst": empty}, patient="1", name="1", split="test", instructions={"cyst": "cyst"})
    store = Store(tmp_path / "T.h5")
    assert not store["T/1/1/cyst"].target.any() and store.verify() == ()


def test_a_radiograph_of_4096_by_3000_comes_back(tmp_path: Path) -> None:
    image = np.repeat(np.arange(4096, dtype=np.uint16)[:, None].astype(np.uint8), 3000, axis=1)
    mask = rectangle(4096, 3000, 4000, 2999)
    with StoreWriter(tmp_path / "T.h5", "T") as writer:
        writer.add(image, {"lung": mask}, patient="1", name="1", split="test", instructions={"lung": "lung"})
    sample = Store(tmp_path / "T.h5")["T/1/1/lung"]
    assert np.array_equal(sample.image[..., 2], image) and np.array_equal(sample.target, mask)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(height=st.integers(1, 20), width=st.integers(1, 20), grey_image=st.booleans(), seed=st.integers(0, 99))
def test_any_size_survives(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, grey_image: bool, seed: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "T.h5"
    image = (grey if grey_image else colour)(height, width, seed)
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    with StoreWriter(path, "T") as writer:
        writer.add(image, {"x": mask}, patient="1", name="1", split="val", instructions={"x": "x"})
    sample = Store(path)["T/1/1/x"]
    assert np.array_equal(sample.image, image) and np.array_equal(sample.target, mask)


def test_slugs() -> None:
    assert slug("Right kidney") == "right-kidney" and slug("prostate/uterus") == "prostate-uterus"
    assert slug(" COVID-19 infection ") == "covid-19-infection"


# Processes


def test_a_pickled_store_opens_its_own_file(store: Store) -> None:
    before = store["Toy/b/slice-001/liver"]
    copy = pickle.loads(pickle.dumps(store))
    assert copy._opened is None
    assert np.array_equal(copy["Toy/b/slice-001/liver"].image, before.image)


def _read(store: Store, queue: multiprocessing.Queue[int]) -> None:  # type: ignore[type-arg]
    inherited = store._opened
    total = sum(int(store[key].image.sum()) for key in store.keys("train"))
    queue.put(total if store._opened is not inherited else -1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_readers_do_not_share_the_open_file(store: Store) -> None:
    expected = sum(int(store[key].image.sum()) for key in store.keys("train"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    readers = [context.Process(target=_read, args=(store, queue)) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert [queue.get(timeout=20) for _ in readers] == [expected, expected]
    for reader in readers:
        reader.join()
    assert store["Toy/b/slice-002/left-kidney"].image.shape == (9, 13, 3)


# Never half there


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StoreWriter(tmp_path / "T.h5", "T") as writer:
        mask = rectangle(4, 4, 1, 1)
        writer.add(grey(4, 4), {"x": mask}, patient="1", name="1", split="val", instructions={"x": "x"})
        assert names(tmp_path) != []  # the temporary file
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_nothing_to_write_is_an_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="no case to write"), StoreWriter(tmp_path / "T.h5", "T"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["flush", "replace"])
def test_a_full_disk_leaves_the_old_file_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(store_writer.os, "fsync" if moment == "flush" else "replace", full)
    with pytest.raises(MedSegError, match=r"cannot write .*Toy\.h5: No space left on device"):
        write(path, "Other")
    assert names(path.parent) == ["Toy.h5"] and path.read_bytes() == before


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from medseg_gym.datasets.store_writer import StoreWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
rng = np.random.default_rng(0)
with StoreWriter(sys.argv[1], "T") as writer:
    for i in range(20):
        image, mask = rng.integers(0, 256, (128, 128, 3), np.uint8), np.ones((128, 128), np.bool_)
        writer.add(image, {"x": mask}, patient=str(i), name="1", split="val", instructions={"x": "x"})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_write_that_really_fails_leaves_nothing(tmp_path: Path) -> None:
    """The operating system refuses to let the file grow past 200 kB, as a full disk would."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "T.h5")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "MedSegError: cannot write" in done.stderr and "File too large" in done.stderr
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
import numpy as np
from medseg_gym.datasets.store_writer import StoreWriter
with StoreWriter(sys.argv[1], "T") as writer:
    writer.add(np.zeros((4, 4), np.uint8), {"x": np.ones((4, 4), np.bool_)},
               patient="1", name="1", split="val", instructions={"x": "x"})
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_what_a_killed_writer_left_is_recognised_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "T.h5"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    (left,) = names(tmp_path)
    assert left.endswith(".part")
    running = StoreWriter(path, "T").__enter__()
    other = tmp_path / ".Tother.h5.00000000.1.aaaa.part"
    other.touch()
    assert remove_stale(path) == [tmp_path / left]
    assert running._temp.exists() and other.exists()
    running.discard()
    assert names(tmp_path) == [other.name]


def test_temporary_files_of_other_machines_go_after_a_day(tmp_path: Path) -> None:
    young, old = tmp_path / ".T.h5.00000000.1.aaaa.part", tmp_path / ".T.h5.00000000.1.bbbb.part"
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    assert remove_stale(tmp_path / "T.h5") == [old]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.h5"), write(tmp_path / "two.h5")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": {"x": np.ones((4, 5), np.bool_)}}, r"mask of 'x' is \(4, 5\) bool; wanted \(4, 4\) bool"),
        ({"masks": {"x": np.ones((4, 4), np.uint8)}}, r"uint8; wanted \(4, 4\) bool"),
        ({"masks": {}}, "no masks"),
        ({"masks": {"a b": np.ones((4, 4), np.bool_), "a-b": np.ones((4, 4), np.bool_)}}, "same key twice"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, r"image is \(4, 4, 3\) float32"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, r"image is \(0, 4, 3\) uint8"),
        ({"patient": "a/b"}, "'a/b' cannot be in a key"),
        ({"name": ""}, "'' cannot be in a key"),
        ({"patient": "1", "split": "test"}, "patient '1' is already in 'train', now 'test'"),
        ({"patient": "1", "name": "1"}, "already in the file"),
        ({"instructions": {"x": "bad\ud800"}}, "is no name or phrase"),
        ({"split": "training"}, "unknown split 'training'; did you mean 'train'"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_rest_is_kept(tmp_path: Path, change: dict, message: str) -> None:
    good = {
        "image": grey(4, 4),
        "masks": {"x": rectangle(4, 4, 1, 1)},
        "patient": "1",
        "name": "1",
        "split": "train",
        "instructions": {"x": "x", "a b": "a", "a-b": "b"},
    }
    with StoreWriter(tmp_path / "T.h5", "T") as writer:
        writer.add(**good)
        with pytest.raises(MedSegError, match=message):
            writer.add(**{**good, "name": "2", **change})
    store = Store(tmp_path / "T.h5")
    assert store.keys("train") == ("T/1/1/x",) and store.verify() == ()


# Bad files


def test_a_missing_store_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="medseg-gym data prepare BTCV --from FOLDER"):
        Store(tmp_path / "BTCV.h5", "BTCV")


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _edit(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return apply


def _foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)


def _replace(name: str, value: object) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return apply


def _point_nowhere(file: h5py.File) -> None:
    cases = file["index/cases"][()]
    cases["image"][0] = 4
    file["index/cases"][...] = cases


def _objects(file: h5py.File) -> None:
    del file["index/structures"]
    file.create_dataset("index/structures", data=["a", "b", "c"], dtype=h5py.string_dtype())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "not readable HDF5"),
        (lambda path: path.write_bytes(b"PK\x03\x04 not hdf5" * 99), "not readable HDF5"),
        (_truncate, "not readable HDF5.*truncated"),
        (_foreign, "HDF5 file of another program"),
        (_edit(lambda f: f.attrs.modify("schema", 2)), "in schema 2; this version reads up to 1. Upgrade with"),
        (_edit(lambda f: f.attrs.__setitem__("schema", "x")), "its schema is 'x'"),
        (_edit(lambda f: f.attrs.modify("name", "Other")), "holds the dataset 'Other', not 'Toy'"),
        (_edit(lambda f: f.__delitem__("index/cases")), "no index/cases of its own"),
        (_edit(lambda f: f.__delitem__("index")), "no index/structures of its own"),
        (_edit(_point_nowhere), "index of cases points at nothing"),
        (_edit(_replace("index/cases", np.zeros(3))), "index/cases is float64"),
        (_edit(_objects), "index/structures is object"),
        (_edit(_replace("index/cases", h5py.ExternalLink("other.h5", "/x"))), "no index/cases of its own"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong_and_the_next_move(
    path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(path)
    with pytest.raises(BadDataError, match=message) as caught:
        Store(path, "Toy").keys("train")
    assert str(path) in str(caught.value)
    assert "prepare Toy --from FOLDER --force" in str(caught.value) or "Upgrade" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_replace("images/1x1x1", h5py.SoftLink("/masks/1x1")), "no images/1x1x1 of its own"),
        (_replace("images/1x1x1", np.zeros((1, 1, 1, 1))), r"images/1x1x1 is \(1, 1, 1, 1\) float64"),
        (lambda f: f.__delitem__("masks/1x1"), "no masks/1x1 of its own"),
        (lambda f: f["masks/1x1"].resize(0, axis=0), "row 0 of masks/1x1 is not there"),
    ],
)
def test_a_damaged_record_is_found_when_it_is_read_and_by_verify(
    path: Path, damage: Callable[[h5py.File], None], message: str
) -> None:
    _edit(damage)(path)
    store = Store(path, "Toy")
    assert store["Toy/b/slice-001/liver"].structure == "liver"
    with pytest.raises(BadDataError, match=message):
        store["Toy/c/one/liver"]
    (problem,) = store.verify()
    assert message.split()[0].replace("\\", "") in problem


def test_flipped_bits_are_found(path: Path) -> None:
    with h5py.File(path) as file:
        place = file["images/9x13x3"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 20] ^= 0xFF
    path.write_bytes(content)
    store = Store(path, "Toy")
    with pytest.raises(BadDataError, match="row 0 of images/9x13x3 cannot be read"):
        store["Toy/b/slice-002/left-kidney"]
    assert len(store.verify()) == 1


def _swap_masks(file: h5py.File) -> None:
    cases = file["index/cases"][()]
    cases["row"][[1, 2]] = cases["row"][[2, 1]]  # b/slice-001: aorta and left kidney
    file["index/cases"][...] = cases


def _wrong_area(file: h5py.File) -> None:
    cases = file["index/cases"][()]
    cases["area"][0] += 1
    file["index/cases"][...] = cases


def _repaint(file: h5py.File) -> None:
    file["images/16x8x3"][0, 0, 0, 0] ^= 1


def _move_patient(file: h5py.File) -> None:
    patients = file["index/patients"][()]
    patients["split"] = 0
    file["index/patients"][...] = patients


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_masks, "Toy/b/slice-001: the image or its masks differ"),
        (_wrong_area, "Toy/a/one/aorta: the mask has 36 pixels; 37 were written"),
        (_repaint, "Toy/a/one: the image or its masks differ"),
        (_move_patient, "does not match the file's checksum"),
    ],
)
def test_verify_finds_changed_content(path: Path, change: Callable[[h5py.File], None], message: str) -> None:
    assert Store(path).verify() == ()
    _edit(change)(path)
    problems = Store(path).verify()
    assert problems and any(re.search(message, problem) for problem in problems)


# By name


def test_load_gives_one_object_a_name_until_it_is_prepared_again(home: Path) -> None:
    folder = home / "datasets"
    folder.mkdir(parents=True)
    assert not datasets.available("Toy")
    with pytest.raises(UnknownNameError, match="unknown dataset 'Toy'"):
        datasets.load("Toy")
    path = write(folder / "Toy.h5")
    first = datasets.load("Toy")
    assert datasets.available("Toy") and datasets.load("Toy") is first and first.name == "Toy"
    assert datasets.load(first) is first
    with pytest.raises(BadDataError, match="dataset=3; wanted a name"):
        datasets.load(3)  # type: ignore[arg-type]
    assert datasets.load(str(path)).name == "Toy"
    shutil.copy(path, folder / "copy")
    os.replace(folder / "copy", path)
    assert datasets.load("Toy") is not first
    with pytest.raises(UnknownNameError, match="keyword 'size'"):
        datasets.load("Toy", size=3)


def test_load_of_a_catalogue_name_without_data_names_the_command(home: Path) -> None:
    assert not datasets.available("BTCV")
    with pytest.raises(DataMissingError, match="medseg-gym data prepare BTCV --from FOLDER"):
        datasets.load("BTCV")


@pytest.mark.parametrize("name", ["../Toy", "/etc/passwd", "BTVC", ""])
def test_other_names_are_unknown(home: Path, name: str) -> None:
    assert not datasets.available(name)
    with pytest.raises(UnknownNameError, match="unknown dataset"):
        datasets.load(name)
