"""Kinds of cases: refinement, inconsistent start masks and absent structures, and how an env begins with them."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import Blobs
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_gym import datasets
from medseg_gym.datasets import kinds as kinds_module
from medseg_gym.datasets.base import Dataset
from medseg_gym.datasets.instructions import Worded
from medseg_gym.datasets.kinds import REFINE_IOU, Joined, Kinds, degrade
from medseg_gym.datasets.store import Store
from medseg_gym.datasets.store_writer import StoreWriter
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError
from medseg_gym.metrics import iou
from medseg_gym.types import Box, Stop, Undo


def square(y: int, x: int) -> np.ndarray:
    mask = np.zeros((32, 32), np.bool_)
    mask[y : y + 10, x : x + 10] = True
    return mask


@pytest.fixture
def store(home: Path) -> Store:
    """Training: image "a" has liver and spleen, "b" liver alone, "c" all three structures."""
    path = home / "datasets" / "Trio.h5"
    masks = {"liver": square(2, 2), "spleen": square(2, 20), "cyst": square(20, 20)}
    with StoreWriter(path, "Trio", structures=("liver", "spleen", "cyst")) as writer:
        for name, there in (("a", ("liver", "spleen")), ("b", ("liver",)), ("c", tuple(masks))):
            image = np.full((32, 32), 40 * ord(name) % 200, np.uint8)
            kept = {structure: masks[structure] for structure in there}
            phrases = {structure: f"{structure} in abdomen CT" for structure in there}
            writer.add(image, kept, patient="1", name=name, split="train", instructions=phrases)
    return Store(path, "Trio")


def test_siblings_are_the_cases_of_one_image(store: Store) -> None:
    assert store.siblings("Trio/1/a/spleen") == {"liver": "Trio/1/a/liver", "spleen": "Trio/1/a/spleen"}
    assert store.siblings("Trio/1/b/liver") == {"liver": "Trio/1/b/liver"}
    with pytest.raises(KeyError):
        store.siblings("Trio/1/b/spleen")


def test_scratch_is_the_dataset_itself(store: Store) -> None:
    kinds = Kinds(store, ("scratch",))
    assert isinstance(kinds, Dataset) and kinds.name == "Trio" and kinds.structures == store.structures
    assert tuple(kinds.keys("train")) == store.keys("train")
    assert kinds["Trio/1/a/liver"].key == "Trio/1/a/liver" and kinds.start_mask("Trio/1/a/liver") is None


def test_refinement_begins_with_a_worse_target(store: Store) -> None:
    kinds = Kinds(store, ("refine",))
    assert list(kinds.keys("train", ("spleen",))) == ["Trio/1/a/spleen@refine", "Trio/1/c/spleen@refine"]
    sample, start = kinds["Trio/1/a/liver@refine"], kinds.start_mask("Trio/1/a/liver@refine")
    assert sample.key == "Trio/1/a/liver@refine" and sample.instruction == "liver in abdomen CT"
    assert start is not None and REFINE_IOU[0] <= iou(start, sample.target) <= REFINE_IOU[1]
    again = kinds.start_mask("Trio/1/a/liver@refine")
    assert np.array_equal(start, again)  # a group shares its start
    other = Kinds(store, ("refine",), seed=1).start_mask("Trio/1/a/liver@refine")
    assert not np.array_equal(start, other)


def test_inconsistency_begins_with_another_structure(store: Store) -> None:
    kinds = Kinds(store, ("inconsistent",))
    assert list(kinds.keys("train")) == [
        f"Trio/1/{case}@inconsistent" for case in ("a/liver", "a/spleen", "c/cyst", "c/liver", "c/spleen")
    ]  # b has nothing else to be mistaken for
    assert np.array_equal(kinds.start_mask("Trio/1/a/liver@inconsistent"), square(2, 20))
    assert np.array_equal(kinds["Trio/1/a/liver@inconsistent"].target, square(2, 2))
    start = kinds.start_mask("Trio/1/c/cyst@inconsistent")
    assert any(np.array_equal(start, mask) for mask in (square(2, 2), square(2, 20)))


def test_an_absent_structure_is_asked_for_once_an_image(store: Store) -> None:
    kinds = Kinds(store, ("absent",))
    keys = list(kinds.keys("train"))
    assert keys == ["Trio/1/a/liver@absent", "Trio/1/b/liver@absent"]  # c has all three
    a, b = (kinds[key] for key in keys)
    assert (a.structure, a.instruction) == ("cyst", "cyst in abdomen CT")
    assert b.structure in ("spleen", "cyst") and b.instruction == f"{b.structure} in abdomen CT"
    assert not a.target.any() and a.target.shape == (32, 32) and kinds.start_mask(keys[0]) is None
    assert list(kinds.keys("train", ("liver",))) == []
    assert keys[0] in list(kinds.keys("train", ("cyst",)))


def test_kinds_come_one_after_the_other(store: Store) -> None:
    kinds = Kinds(store)
    keys = kinds.keys("train")
    assert len(keys) == 6 + 6 + 5 + 2 and list(keys) == [keys[i] for i in range(len(keys))]
    assert keys[-1] == "Trio/1/b/liver@absent" and keys[5:7] == ["Trio/1/c/spleen", "Trio/1/a/liver@refine"]
    assert {kinds[key].key for key in keys} == set(keys)


def test_wrong_kinds_and_keys_are_refused(store: Store, blobs: Blobs) -> None:
    for wrong, message in (("refine", "wanted a list"), ((), "wanted a list"), (("refined",), "mean 'refine'")):
        with pytest.raises(UnknownNameError, match=message):
            Kinds(store, wrong)
    with pytest.raises(KeyError, match="its kind is absent, those here are refine"):
        Kinds(store, ("refine",))["Trio/1/a/liver@absent"]
    with pytest.raises(KeyError):
        Kinds(store, ("absent",))["Trio/1/c/cyst@absent"]  # nothing is absent there
    with pytest.raises(MedSegError, match="Blobs has no siblings"):
        Kinds(blobs, ("absent",))
    Kinds(blobs, ("scratch", "refine"))


def test_joined_keys() -> None:
    keys = Joined([(("a", "b"), ""), ((), "@x"), (("a",), "@y")])
    assert list(keys) == ["a", "b", "a@y"] == [keys[0], keys[1], keys[2]] and keys[-1] == "a@y"
    with pytest.raises(IndexError):
        keys[3]


# In an env


def test_an_env_begins_with_the_start_mask_and_undo_discards_it(store: Store) -> None:
    env = gym.make("MedSeg-v0", dataset=Kinds(store, ("inconsistent",)), tool="Stub", size=32, observation="dict")
    _, info = env.reset(seed=0, options={"sample": "Trio/1/a/liver@inconsistent"})
    assert np.array_equal(env.unwrapped.view().mask, square(2, 20)) and info["iou"] == 0
    assert env.unwrapped.episode().key == "Trio/1/a/liver@inconsistent"
    env.step(Undo())
    assert not env.unwrapped.view().mask.any()
    _, _, _, _, info = env.step(Box(2, 2, 11, 11))
    assert info["iou"] == 1.0  # Stub fills the box


def test_a_given_start_mask_comes_before_the_datasets(store: Store) -> None:
    env = gym.make("MedSeg-v0", dataset=Kinds(store, ("refine",)), tool="Stub", size=32, observation="dict")
    env.reset(seed=0, options={"sample": "Trio/1/a/liver@refine", "start_mask": square(5, 5)})
    assert np.array_equal(env.unwrapped.view().mask, square(5, 5))


def test_stopping_at_once_is_right_where_the_structure_is_absent(store: Store) -> None:
    env = gym.make("MedSeg-v0", dataset=Kinds(store, ("absent",)), tool="Stub", size=32, observation="dict")
    _, info = env.reset(seed=0)
    assert info["iou"] == 1.0
    assert env.step(Stop())[1] == pytest.approx(1.0)


def test_an_env_is_given_kinds_and_words_by_name(store: Store) -> None:
    env = gym.make(
        "MedSeg-v0",
        dataset="Trio",
        tool="Stub",
        size=32,
        observation="dict",
        dataset_options={"kinds": ["refine"], "wording": ["direct"], "case_seed": 3},
    )
    _, info = env.reset(seed=0)
    assert info["key"].endswith("@refine") and 0.3 <= info["iou"] <= 0.85
    assert info["instruction"] == Worded(Kinds(store, ["refine"], seed=3), ["direct"], seed=3)[info["key"]].instruction
    with pytest.raises(UnknownNameError, match="did you mean 'kinds'"):
        datasets.load("Trio", kind=["refine"])
    phantom = datasets.load("Phantom", size=64, kinds=["refine"])
    key = phantom.keys("train")[0]
    assert key.endswith("@refine") and phantom[key].image.shape == (64, 64, 3)


def test_slots_of_a_vector_env_begin_like_single_envs(store: Store) -> None:
    options = {"dataset": Kinds(store), "tool": "Stub", "size": 32, "observation": "dict"}
    vector = gym.make_vec("MedSeg-v0", num_envs=3, vectorization_mode="vector_entry_point", **options)
    obs, _ = vector.reset(seed=5)
    for i in range(3):
        alone, _ = gym.make("MedSeg-v0", **options).reset(seed=5 + i)
        np.testing.assert_array_equal(obs["mask"][i], alone["mask"])


def test_no_case_of_a_kind_says_so(store: Store) -> None:
    with pytest.raises(BadDataError, match="no case in its test split"):
        gym.make("MedSeg-v0", dataset=Kinds(store, ("absent",)), tool="Stub", split="test", size=32)


# Degrading


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    height=st.integers(24, 60),
    width=st.integers(24, 60),
    y=st.integers(0, 12),
    x=st.integers(0, 12),
    side=st.integers(4, 24),
    seed=st.integers(0, 2**32),
)
def test_a_degraded_mask_lies_in_the_range(height: int, width: int, y: int, x: int, side: int, seed: int) -> None:
    target = np.zeros((height, width), np.bool_)
    target[y : y + side, x : x + side] = True
    before = target.copy()
    mask = degrade(target, np.random.default_rng(seed))
    assert REFINE_IOU[0] <= iou(mask, target) <= REFINE_IOU[1]
    assert mask.shape == target.shape and mask.dtype == np.bool_ and np.array_equal(target, before)
    assert np.array_equal(mask, degrade(target, np.random.default_rng(seed)))


def test_masks_are_degraded_in_many_ways() -> None:
    target = square(10, 10)
    masks = [degrade(target, np.random.default_rng(seed)) for seed in range(60)]
    assert any((mask & ~target).any() and not (target & ~mask).any() for mask in masks)  # spilled only
    assert any((target & ~mask).any() and not (mask & ~target).any() for mask in masks)  # missed only
    assert any((target & ~mask).any() and (mask & ~target).any() for mask in masks)  # moved
    assert len({mask.tobytes() for mask in masks}) > 40


def test_a_degraded_mask_is_never_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_module, "TRIES", 1)
    dot = np.zeros((5, 5), np.bool_)
    dot[2, 2] = True
    assert all(degrade(dot, np.random.default_rng(seed)).any() for seed in range(30))


def test_targets_that_are_too_small_or_empty() -> None:
    dot = np.zeros((5, 5), np.bool_)
    assert not degrade(dot, np.random.default_rng(0)).any()
    dot[2, 2] = True
    for seed in range(10):
        mask = degrade(dot, np.random.default_rng(seed))
        assert mask.any() and not np.array_equal(mask, dot)
    only = np.ones((1, 1), np.bool_)
    assert np.array_equal(degrade(only, np.random.default_rng(0)), only)
