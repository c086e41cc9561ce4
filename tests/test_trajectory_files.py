"""Trajectories on disk: what is written comes back, nothing half-written is believed, and rubbish is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT
from trajectory_cases import several, trajectory

from medseg_gym.errors import BadDataError, DataMissingError, MedSegError
from medseg_gym.trajectories import store
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.store import Trajectories, TrajectoryWriter
from medseg_gym.types import Click

SETTINGS = {"env": "MedSeg-Blobs-Stub-v0", "seed": 0}


def written(folder: Path, shard: int = 2) -> list[tuple[Trajectory, np.ndarray]]:
    pairs = several()
    with TrajectoryWriter(folder, SETTINGS, shard=shard) as writer:
        for one, image in pairs:
            writer.add(one, image)
    return pairs


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    pairs = several()
    rich = replace(pairs[4][0], thoughts=("a", "é <", "", "d"), answer="x", extra={"n": [1, 2.5]}, dropped="iou")
    grey = np.repeat(pairs[4][1][..., :1], 3, axis=2)
    with TrajectoryWriter(tmp_path, SETTINGS, shard=3) as writer:
        for one, image in pairs[:4]:
            writer.add(one, image)
        writer.add(rich, grey)
    stored = Trajectories(tmp_path)
    assert len(stored) == 5 and len(stored.files) == 2
    assert [one for one, _ in stored] == [one for one, _ in pairs[:4]] + [rich]
    assert all(np.array_equal(got, image) for (_, got), (_, image) in zip(stored, pairs[:4], strict=False))
    assert np.array_equal(stored[4][1], grey) and not stored[4][1].flags.writeable
    assert stored.settings == SETTINGS
    assert stored.keys == tuple(one.episode.key for one, _ in pairs)
    assert [head.turns for head in stored.heads] == [3, 3, 3, 5, 4]
    assert list(stored.records()) == [one for one, _ in stored]
    assert stored[-1][0] == rich


def test_an_image_is_stored_once_and_grey_as_one_channel(tmp_path: Path) -> None:
    """Trap 18: an image is stored once."""
    one, image = trajectory()
    grey = np.repeat(image[..., :1], 3, axis=2)
    store.write(tmp_path / "x.h5", [(one, image), (one, grey), (one, image), (one, grey)], {})
    with h5py.File(tmp_path / "x.h5") as file:
        assert {name: file["images"][name].shape for name in file["images"]} == {
            "48x64x3": (1, 48, 64, 3),
            "48x64x1": (1, 48, 64, 1),
        }
    with Trajectories(tmp_path / "x.h5") as stored:
        assert stored[0][1] is stored[2][1]  # read once, too
        assert stored.sha(1) == stored.sha(3) != stored.sha(0)


def test_a_folder_is_gone_on_with(tmp_path: Path) -> None:
    pairs = written(tmp_path)
    with TrajectoryWriter(tmp_path, SETTINGS) as writer:
        assert writer.stored.keys == tuple(one.episode.key for one, _ in pairs)
        writer.add(*pairs[0])
    assert [one for one, _ in Trajectories(tmp_path)] == [*(one for one, _ in pairs), pairs[0][0]]


def test_a_kill_loses_only_what_was_not_yet_a_file(tmp_path: Path) -> None:
    """The process ends with two trajectories written, one waiting, and half a file under its temporary name."""
    code = (
        "import os, pathlib, sys; from trajectory_cases import several\n"
        "from medseg_gym.trajectories.store import TrajectoryWriter\n"
        f"with TrajectoryWriter(sys.argv[1], {SETTINGS!r}, shard=2) as writer:\n"
        "    [writer.add(*pair) for pair in several()[:3]]\n"
        "    pathlib.Path(sys.argv[1], '.trajectories-000001.h5.part').write_bytes(b'half a file')\n"
        "    os._exit(9)\n"
    )
    path = [str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n" + code, str(tmp_path)], timeout=120
    )
    assert done.returncode == 9
    pairs = several()
    assert [one for one, _ in Trajectories(tmp_path)] == [one for one, _ in pairs[:2]]
    with TrajectoryWriter(tmp_path, SETTINGS) as writer:
        for pair in pairs[len(writer.stored) :]:
            writer.add(*pair)
    assert [one for one, _ in Trajectories(tmp_path)] == [one for one, _ in pairs]
    assert not list(tmp_path.glob("*.part"))


def test_what_belongs_together_is_in_one_file(tmp_path: Path) -> None:
    one, image = trajectory()
    with TrajectoryWriter(tmp_path, {}, shard=2) as writer:
        writer.add(one, image)
        writer.add_all([one, one, one], image)
        writer.add(one, image)
    assert [len(Trajectories(file)) for file in Trajectories(tmp_path).files] == [4, 1]


def test_an_exception_keeps_what_was_added(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TrajectoryWriter(tmp_path, {}) as writer:
        writer.add(*trajectory())
        raise KeyboardInterrupt
    assert len(Trajectories(tmp_path)) == 1


def test_other_settings_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(MedSegError, match="seed is 0, now 1"), TrajectoryWriter(tmp_path, {**SETTINGS, "seed": 1}):
        pass
    with (
        TrajectoryWriter(tmp_path, SETTINGS),
        pytest.raises(MedSegError, match="another run is writing"),
        TrajectoryWriter(tmp_path, SETTINGS),
    ):
        pass
    with TrajectoryWriter(tmp_path, SETTINGS):
        pass  # both locks are let go of


def test_files_and_folders_read_as_one_and_can_be_chosen_from(tmp_path: Path) -> None:
    first, (one, image) = written(tmp_path / "a"), trajectory(2)
    with TrajectoryWriter(tmp_path / "b", {**SETTINGS, "seed": 5}) as writer:
        writer.add(replace(one, dropped="length"), image)
    both = Trajectories(tmp_path / "a", tmp_path / "b" / "trajectories-000000.h5")
    assert len(both) == 6 and both[5][0].dropped == "length"
    assert both.settings == {"env": "MedSeg-Blobs-Stub-v0"}  # those they share
    assert len(both.kept()) == 5
    wrong = both.select(lambda head: head.kind == "wrong-start")
    assert [trajectory for trajectory, _ in wrong] == [first[4][0]]
    again = pickle.loads(pickle.dumps(both))
    assert [one for one, _ in again] == [one for one, _ in both]
    assert len(Trajectories()) == 0
    with pytest.raises(DataMissingError, match="no trajectories at"):
        Trajectories(tmp_path / "c")


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    one, image = trajectory()
    turns = one.episode.turns
    numpy = replace(one, episode=replace(one.episode, turns=(replace(turns[0], action=Click(np.int64(1), 2)),)))
    for bad, words in (
        (replace(one, marked=(True,)), "1 values in marked; wanted one a turn, 3"),
        (replace(one, extra={"x": float("nan")}), "wanted what JSON can hold"),
        (numpy, "wanted what JSON can hold"),
    ):
        with pytest.raises(MedSegError, match=words), TrajectoryWriter(tmp_path, {}) as writer:
            writer.add(bad, image)
    with pytest.raises(MedSegError, match="run lengths of 24x64"), TrajectoryWriter(tmp_path, {}) as writer:
        writer.add(one, image[:24])
    with pytest.raises(MedSegError, match="settings"):
        TrajectoryWriter(tmp_path, {"x": object()})
    with TrajectoryWriter(tmp_path, {}) as writer:
        writer.add(one, image)
    with pytest.raises(MedSegError, match="not open"):
        writer.add(one, image)
    assert len(Trajectories(tmp_path)) == 1


def test_an_empty_episode_is_kept_too(tmp_path: Path) -> None:
    one, image = trajectory()
    unread = replace(one.episode, turns=(), iou=(0.0,), dice=(0.0,), ended="failed", error="case: gone")
    store.write(tmp_path / "x.h5", [(replace(one, episode=unread, dropped="failed"), image)], {})
    assert Trajectories(tmp_path / "x.h5")[0][0].episode == unread


def damaged(path: Path, name: str, change: object) -> Path:
    """The file with an array replaced, or an attribute where the name begins with @."""
    with h5py.File(path, "a") as file:
        if name.startswith("@"):
            file.attrs[name[1:]] = change
        else:
            kept = file[name][()] if name in file else None
            if name in file:
                del file[name]
            new = change(kept) if callable(change) else change
            if name == "records/data":
                file.create_dataset(name, data=new, chunks=(2**16,), maxshape=(None,))
            else:
                file[name] = new
    return path


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("@format", "medseg-gym dataset", "another program"),
        ("@schema", np.int64(99), "schema"),
        ("@settings", "[1]", "settings"),
        ("records/ends", lambda ends: ends[::-1], "records/ends"),
        ("records/ends", lambda ends: ends + 1, "another length"),
        ("records/data", lambda data: data[:-1], "another length"),
        ("index/images", lambda rows: rows[:0], "points at no image"),
        ("index/trajectories", np.zeros((3, 2)), "index/trajectories"),
        ("index/images", h5py.SoftLink("/records/ends"), "of its own"),
        ("records/ends", h5py.ExternalLink("other.h5", "/x"), "of its own"),
    ],
)
def test_a_file_of_another_form_is_refused_when_opened(tmp_path: Path, name: str, change: object, words: str) -> None:
    written(tmp_path, shard=9)
    path = damaged(tmp_path / "trajectories-000000.h5", name, change)
    with pytest.raises(BadDataError, match=words) as caught:
        Trajectories(tmp_path)
    assert str(path) in str(caught.value)


def test_no_hdf5_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    written(tmp_path, shard=9)
    path = tmp_path / "trajectories-000000.h5"
    whole = path.read_bytes()
    for data in (b"", b"rubbish", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(BadDataError, match="not readable HDF5"):
            Trajectories(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"strategy":"box-to-point"', b'"strategy":"box-to-Point"', "another than the index says"),
        (b'"do":"box"', b'"do":"bin"', "not an action"),
        (b'"tries":4', b'"tries":"', "not a trajectory"),
        (b'"size":[48,64]', b'"size":[64,48]', "wanted run lengths of 48x64"),
        (b'"reward":', b'"rewarX":', "not an episode"),
    ],
)
def test_a_damaged_record_is_refused_when_read(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    written(tmp_path, shard=9)

    def change(data: np.ndarray) -> np.ndarray:
        raw = bytes(data)
        assert old in raw
        return np.frombuffer(raw.replace(old, new[: len(old)].ljust(len(old)), 1), np.uint8)

    damaged(tmp_path / "trajectories-000000.h5", "records/data", change)
    stored = Trajectories(tmp_path)
    with pytest.raises(BadDataError, match=words):
        stored[0]


def test_a_changed_picture_is_noticed(tmp_path: Path) -> None:
    one, image = trajectory()
    store.write(tmp_path / "x.h5", [(one, image)], {})
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file["images/48x64x3"][0, 5, 5, 0] ^= 1
    with pytest.raises(BadDataError, match="differs from what was written"):
        Trajectories(tmp_path / "x.h5")[0]
