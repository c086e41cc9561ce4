"""Every dataset layout on Stub: the checkers of Gymnasium and Stable-Baselines3, twin seeds, slots equal singles."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import test_import_dicom as series
import test_import_nifti as volumes
import test_import_pictures as pictures
import test_importers as folders
from gymnasium.utils.env_checker import check_env
from test_import_npz import npz

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import LAYOUTS, importer
from medseg_gym.datasets.prepare import prepare
from medseg_gym.errors import MedSegError, UnknownNameError


def biomedparse(root: Path) -> None:
    for split in ("train", "test"):
        folders.listing(root, folders.biomedparse(root, split), split)


def png_pairs(root: Path) -> None:
    pictures.folder(root, image="images/{}.png", mask="masks/{}__polyp.png")


def dicom(root: Path) -> None:
    series.series(root)
    series.seg(
        root / "seg.dcm", [(1, -6.0, series.block(1, 1)), (2, 2.0, series.block(3, 2))], {1: "Liver", 2: "Spleen"}
    )


LABELS = {"structure": "1=liver,2=tumor"}
MAKERS: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "biomedparse": (biomedparse, {}),
    "imis-bench": (folders.imis, {}),
    "nifti-msd": (volumes.msd, {}),
    "nifti-pairs": (volumes.pairs, LABELS),
    "dicom": (dicom, {}),
    "npz": (lambda root: npz(root / "a.npz"), LABELS),
    "png-pairs": (png_pairs, {}),
    "pool": (pictures.pool, {}),
    "coco": (lambda root: pictures.coco(root, where="all.json"), {}),
    "colour-masks": (pictures.folder, {"structure": "white=polyp"}),
}


def test_every_layout_is_here() -> None:
    assert MAKERS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", sorted(MAKERS))
def test_items_travel_to_worker_processes_and_options_are_told(layout: str, tmp_path: Path) -> None:
    make, options = MAKERS[layout]
    make(tmp_path)
    module = importer(layout)
    items, _ = module.plan(tmp_path, DatasetCard("Mine", "Mine", "", ""), options)
    assert len(items) > 0 and pickle.loads(pickle.dumps(items)) == items
    assert all(len(pickle.dumps(item)) < 2000 for item in items)
    assert (
        all(isinstance(told, str) and told for told in module.OPTIONS.values())
        and options.keys() <= module.OPTIONS.keys()
    )
    with pytest.raises(UnknownNameError, match="unknown option"):
        module.plan(tmp_path, DatasetCard("Mine", "Mine", "", ""), {**options, "nonsense": "1"})


@pytest.mark.parametrize(
    ("layout", "package"), [("nifti-msd", "nibabel"), ("nifti-pairs", "nibabel"), ("dicom", "pydicom")]
)
def test_a_missing_package_is_named_with_its_extra(
    layout: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MedSegError, match=rf"needs {package}: pip install 'medseg-gym\[medical\]'"):
        importer(layout).plan(tmp_path, DatasetCard("Mine", "Mine", "", ""), {})


@pytest.fixture(params=sorted(MAKERS))
def store(request: pytest.FixtureRequest, tmp_path: Path, home: Path) -> str:
    """A store prepared from a small folder in the layout."""
    make, options = MAKERS[request.param]
    make(tmp_path / "source")
    # One patient may be all there is: the hash must not send it to the test split
    splits = None if request.param == "biomedparse" else {"test": ["nobody"]}
    report = prepare("Mine", tmp_path / "source", layout=request.param, options=options, splits=splits)
    assert request.param == "biomedparse" or report.skipped == ()  # there the test images are the train patients'
    return str(report.path)


def make(store: str, **options: Any) -> gym.Env[Any, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an image observation does not say")
        return gym.make("MedSeg-v0", dataset=store, tool="Stub", size=84, render_mode="rgb_array", **options)


@pytest.mark.parametrize("observation", ["image", "dict"])
def test_gymnasiums_checker_passes(store: str, observation: str) -> None:
    check_env(make(store, observation=observation).unwrapped)


def test_stable_baselines_checker_passes(store: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(make(store).unwrapped)


def test_twin_seeds_give_twin_episodes(store: str) -> None:
    def play() -> list[Any]:
        env = make(store)
        env.action_space.seed(1)
        out: list[Any] = [env.reset(seed=5)[0]]
        for _ in range(20):
            obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
            out.append((obs, reward, terminated, truncated, info["key"], info["iou"]))
            if terminated or truncated:
                out.append(env.reset()[0])
        return out

    for a, b in zip(play(), play(), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_slots_equal_single_envs(store: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = gym.make_vec("MedSeg-v0", num_envs=3, dataset=store, tool="Stub", size=84)
    singles = [make(store) for _ in range(3)]
    obs, _ = vector.reset(seed=2)
    vector.action_space.seed(0)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(obs[i], env.reset(seed=2 + i)[0])
    ended = [False] * 3
    for _ in range(15):
        actions = vector.action_space.sample()
        obs, rewards, terminated, truncated, _ = vector.step(actions)
        for i, env in enumerate(singles):
            alone = (env.reset()[0], 0.0, False, False) if ended[i] else env.step(actions[i])[:4]
            np.testing.assert_array_equal(obs[i], alone[0])
            assert (rewards[i], terminated[i], truncated[i]) == alone[1:]
            ended[i] = bool(terminated[i] or truncated[i])


@pytest.mark.slow
def test_the_main_job_on_real_slices(samples: Path, tmp_path: Path, home: Path) -> None:
    """BTCV's real slices end to end: the oracle beats the box, which beats random; the test patients are 028-032."""
    from medseg_gym.bench.evaluate import evaluate

    prepare("BTCV", samples / "imis-bench" / "BTCV")
    result = evaluate(
        "MedSeg-BTCV-GrabCut-v0", ["OracleBoxThenClicks", "BoxOnce", "Random"], cases=30, out=tmp_path / "run"
    )
    oracle, box, random = (row["dice"] for row in result.summary["rows"])
    assert oracle > box > random
    assert {episode.patient for episode in result.episodes} <= {"028", "029", "030", "031", "032"}
    assert result.report is not None and result.report.stat().st_size > 100_000
    timings = result.directory / "times.json"
    assert '"encodes": 0' in timings.read_text()  # the second and third policy find every embedding in the cache
