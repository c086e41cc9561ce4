"""Corrupted: the same picture for everyone, worse with every severity, and keys, targets and start masks that fit."""

from __future__ import annotations

import numpy as np
import pytest

import medseg_gym
from medseg_gym import datasets
from medseg_gym.bench.cases import choose_cases
from medseg_gym.datasets.corruptions import KINDS, Corrupted, corrupt, parse, specs
from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.types import Image

SIZE = 96


@pytest.fixture(scope="module")
def picture() -> Image:
    """An image with edges, texture and colour."""
    data = datasets.load("Phantom", size=SIZE, cases=40)
    return next(data[key].image for key in data.keys("test") if "polyp" in key)


def error(image: Image, other: Image) -> float:
    return float(np.abs(image.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_severity_is_farther_from_the_clean_image_than_the_one_before(kind: str, picture: Image) -> None:
    far = [error(picture, corrupt(picture, f"{kind}-{severity}")) for severity in range(1, 6)]
    assert far == sorted(far) and far[0] > 0.1 and len(set(far)) == 5


@pytest.mark.parametrize("spec", specs((1, 3, 5)))
def test_a_corrupted_image_is_an_image_of_the_same_size_and_drawn_from_seed_and_image_alone(
    spec: str, picture: Image
) -> None:
    out = corrupt(picture, spec)
    assert out.shape == picture.shape and out.dtype == np.uint8 and not out.flags.writeable
    assert np.array_equal(out, corrupt(picture.copy(), spec))
    grey = np.repeat(picture[..., :1], 3, axis=2)
    worse = corrupt(grey, spec)
    assert (worse[..., :1] == worse).all()


@pytest.mark.parametrize("spec", specs((1, 5)))
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 3), (30, 41)])
def test_thin_and_tiny_images_are_corrupted_too(spec: str, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert corrupt(image, spec).shape == image.shape


def test_noise_is_drawn_anew_for_another_seed_and_another_image(picture: Image) -> None:
    first = corrupt(picture, "noise-3")
    assert not np.array_equal(first, corrupt(picture, "noise-3", seed=1))
    moved = picture.copy()
    moved[0, 0, 0] ^= 1
    assert error(first, corrupt(moved, "noise-3")) > 1


def test_the_share_of_black_lines_is_one_two_three_five_and_eight_of_24_stripes() -> None:
    white = np.full((48, 48, 3), 255, np.uint8)
    black = [float((corrupt(white, f"occlusion-{s}") == 0).mean()) for s in range(1, 6)]
    assert black == pytest.approx([n / 24 for n in (1, 2, 3, 5, 8)])


def test_contrast_shrinks_about_the_mean_by_the_stated_factor() -> None:
    """Half 50, half 150: mean 100; at severity 2 the distance of 50 becomes .55 * 50 = 27.5."""
    image = np.full((4, 4, 3), 50, np.uint8)
    image[:2] = 150
    out = corrupt(image, "contrast-2")
    assert set(np.unique(out)) <= {72, 73, 127, 128}


def test_keys_are_marked_and_cases_keep_target_and_words(picture: Image) -> None:
    clean = datasets.load("Phantom", size=SIZE, cases=40)
    noisy = datasets.load("Phantom", size=SIZE, cases=40, corruption="noise-3")
    assert list(noisy.keys("test")) == [f"{key}@noise-3" for key in clean.keys("test")]
    key = clean.keys("test")[0]
    one, other = clean[key], noisy[f"{key}@noise-3"]
    assert np.array_equal(one.target, other.target) and not np.array_equal(one.image, other.image)
    assert (other.key, other.instruction, other.patient) == (f"{key}@noise-3", one.instruction, one.patient)
    for wrong in (key, f"{key}@noise-2", f"{key}@noise-3@noise-3"):
        with pytest.raises(KeyError):
            noisy[wrong]
    assert (noisy.name, noisy.structures) == (clean.name, clean.structures)


def test_an_evaluation_chooses_the_same_cases_whatever_the_corruption() -> None:
    clean, blurred = (datasets.load("Phantom", size=SIZE, **more) for more in ({}, {"corruption": "blur-5"}))
    keys, _ = choose_cases(clean, "test", (), 9, 4)
    assert choose_cases(blurred, "test", (), 9, 4)[0] == [f"{key}@blur-5" for key in keys]


def test_structures_of_one_image_share_one_corrupted_picture(blobs: object) -> None:
    noisy = Corrupted(blobs, "noise-2")  # type: ignore[arg-type]
    bar, disc = noisy.keys("test")[:2]
    assert noisy[bar].image is noisy[disc].image
    with pytest.raises(MedSegError, match="siblings"):
        noisy.siblings(bar)


def test_start_masks_are_those_of_the_clean_case() -> None:
    options = {"size": SIZE, "cases": 20, "kinds": ["refine"]}
    clean, dark = datasets.load("Phantom", **options), datasets.load("Phantom", **options, corruption="brightness-4")
    key = clean.keys("test")[0]
    assert key.endswith("@refine")
    start, same = clean.start_mask(key), dark.start_mask(f"{key}@brightness-4")  # type: ignore[attr-defined]
    assert start is not None and np.array_equal(start, same)


def test_an_env_takes_a_corruption_by_its_dataset_options() -> None:
    env = medseg_gym.envs.SegmentEnv("Phantom", "Stub", dataset_options={"corruption": "jpeg-5"}, observation="dict")
    env.reset(seed=0)
    assert env.view().key.endswith("@jpeg-5")


@pytest.mark.parametrize("spec", ["noise", "noise-0", "noise-6", "noise-3.0", "-3", "", 3, "haze-3", "noise-3 "])
def test_other_words_are_refused(spec: object) -> None:
    with pytest.raises(UnknownNameError):
        parse(spec)  # type: ignore[arg-type]


def test_a_kind_nearly_right_is_pointed_out() -> None:
    with pytest.raises(UnknownNameError, match="'noise'"):
        datasets.load("Phantom", corruption="nois-3")
