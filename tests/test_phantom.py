"""The Phantom dataset: lazy keys, repeatable drawings, truthful targets, and a cue that only the texture gives."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections import defaultdict

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_gym.datasets.base import SPLITS, Dataset, check_sample
from medseg_gym.datasets.phantom import Phantom, cue_boxes
from medseg_gym.datasets.phantoms import TASKS
from medseg_gym.errors import UnknownNameError
from medseg_gym.types import Sample

MODALITIES = ("ct", "mr", "ultrasound", "fundus", "xray", "polyp")


def digest(sample: Sample) -> str:
    return hashlib.sha256(sample.image.tobytes() + sample.target.tobytes()).hexdigest()


def by_structure(**options: object) -> dict[tuple[str, str], list[Sample]]:
    """Test samples by (modality, structure)."""
    phantom = Phantom(**options)  # type: ignore[arg-type]
    found = defaultdict(list)
    for key in phantom.keys("test"):
        sample = phantom[key]
        found[key.split("/")[2].split("-")[1], sample.structure].append(sample)
    return found


@pytest.fixture(scope="module")
def easy() -> dict[tuple[str, str], list[Sample]]:
    return by_structure(cases=48, difficulty=0.15, size=128)


# ---------------------------------------------------------------- the protocol


def test_it_is_a_dataset_of_every_modality() -> None:
    phantom = Phantom(cases=12)
    assert isinstance(phantom, Dataset)
    seen = {phantom[key].structure for key in phantom.keys("val")}
    assert seen == set(phantom.structures)
    assert {key.split("/")[2].split("-")[1] for key in phantom.keys("val")} == set(MODALITIES)


@pytest.mark.parametrize("task", TASKS)
def test_every_sample_fits_its_records(task: str) -> None:
    phantom = Phantom(task=task, cases=len(TASKS[task]))
    for key in phantom.keys("train"):
        sample = check_sample(phantom[key])
        assert sample.key == key
        assert sample.instruction.startswith(sample.structure + " in ")
        assert key.startswith(sample.patient + "/")
        assert sample.target.any()
        assert not sample.image.flags.writeable
        assert not sample.target.flags.writeable


def test_a_default_sample_is_what_the_readme_shows() -> None:
    sample = Phantom()["Phantom/test/000000-ct/right-kidney"]
    assert sample.instruction == "right kidney in abdomen CT"
    assert sample.image.shape == (256, 256, 3)
    assert sample.patient == "Phantom/test/000000-ct"
    assert sample.spacing_mm is not None
    assert 1.3 < sample.spacing_mm[0] < 1.7  # a field of 340 to 420 mm over 256 pixels


def test_photographs_have_no_spacing() -> None:
    phantom = Phantom()
    assert phantom["Phantom/test/000001-fundus/optic-cup"].spacing_mm is None
    assert phantom["Phantom/test/000003-polyp/polyp"].spacing_mm is None


def test_the_structures_of_an_image_share_one_array() -> None:
    phantom = Phantom(task="ct")
    keys = phantom.keys("val")[:6]
    assert len({id(phantom[key].image) for key in keys}) == 1
    assert len({phantom[key].target.tobytes() for key in keys}) == 6


def test_opening_loads_no_opencv() -> None:
    code = "import sys, medseg_gym.datasets.phantom as p; p.Phantom().keys('train')[5]; sys.exit('cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- the same key, the same bytes


def test_a_key_gives_the_same_bytes_in_any_order_and_any_object() -> None:
    keys = list(Phantom(size=64).keys("train")[:24])
    forwards = Phantom(size=64)
    backwards = Phantom(size=64)
    first = [digest(forwards[key]) for key in keys]
    assert [digest(backwards[key]) for key in reversed(keys)] == first[::-1]
    assert [digest(forwards[key]) for key in keys] == first  # 12 images: the first are no longer kept


def test_a_key_gives_the_same_bytes_in_another_process() -> None:
    key = "Phantom/val/000010-ultrasound/left-ventricle"
    code = (
        "import hashlib; from medseg_gym.datasets.phantom import Phantom;"
        f"s = Phantom(size=64)[{key!r}]; print(hashlib.sha256(s.image.tobytes() + s.target.tobytes()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
    assert out.strip() == digest(Phantom(size=64)[key])


def test_seed_and_difficulty_change_the_picture() -> None:
    key = "Phantom/test/000000-ct/liver"
    pictures = {digest(Phantom(size=64, **o)[key]) for o in ({}, {"seed": 1}, {"difficulty": 0.9})}  # type: ignore[arg-type]
    assert len(pictures) == 3


def test_a_pickled_dataset_draws_the_same_read_only_samples() -> None:
    phantom = Phantom(size=48, task="mr", seed=3, cases={"test": 7})
    key = phantom.keys("test")[4]
    before = digest(phantom[key])
    again = pickle.loads(pickle.dumps(phantom))
    assert len(again.keys("test")) == 21
    assert digest(again[key]) == before
    assert not again[key].image.flags.writeable


def test_splits_share_neither_seed_nor_key() -> None:
    phantom = Phantom()
    states = {
        tuple(phantom._rng(split, index, stream).bit_generator.state["state"].values())
        for split in SPLITS
        for index in range(300)
        for stream in (0, 1)
    }
    assert len(states) == 3 * 300 * 2
    lists = [set(Phantom(cases=30).keys(split)) for split in SPLITS]
    assert len(set.union(*lists)) == sum(map(len, lists))
    images = {phantom[f"Phantom/{split}/000003-polyp/polyp"].image.tobytes() for split in SPLITS}
    assert len(images) == 3


def test_the_same_key_shows_the_same_scene_at_every_size() -> None:
    small, large = Phantom(size=128), Phantom(size=256)
    for key in small.keys("test")[:32]:
        target = cv2.resize(large[key].target.astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA) > 0.5
        both = (target & small[key].target).sum()
        assert 2 * both / (target.sum() + small[key].target.sum()) > 0.8, key
        if (mm := small[key].spacing_mm) is not None:
            assert mm[0] == pytest.approx(2 * large[key].spacing_mm[0])  # type: ignore[index]


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("cases", [0, 1, 4, 11, 12, 25])
@pytest.mark.parametrize("task", ["mixed", "ultrasound", "ct"])
def test_keys_are_sorted_unique_and_of_every_image(task: str, cases: int) -> None:
    phantom = Phantom(task=task, cases=cases)
    keys = phantom.keys("test")
    listed = list(keys)
    assert listed == sorted(set(listed))
    assert len(keys) == len(listed) == sum(len(TASKS[task][i % len(TASKS[task])].structures) for i in range(cases))
    assert len({phantom._parse(key)[:2] for key in listed}) == cases


def test_a_structure_filter_keeps_just_these() -> None:
    phantom = Phantom(cases=29)
    every = phantom.keys("val")
    for wanted in (["left ventricle"], ["liver", "optic cup"], "polyp"):
        kept = phantom.keys("val", wanted)
        names = [wanted] if isinstance(wanted, str) else wanted
        assert list(kept) == [key for key in every if key.split("/")[3].replace("-", " ") in names]
        assert every[0] not in kept  # the aorta


def test_keys_of_a_trillion_images_cost_nothing() -> None:
    phantom = Phantom(cases=10**12)
    tracemalloc.start()
    keys = phantom.keys("train", ["liver", "right ventricle"])
    assert len(keys) == 4 * (10**12 // 12) + 2  # two CT and two MR images a round; the rest of 4 has one of each
    assert keys[-1] == "Phantom/train/999999999998-mr/right-ventricle"
    assert keys[-1] in keys
    assert keys.index(keys[10**11]) == 10**11
    assert len(keys[:: 10**9]) == 334
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    assert phantom[keys[-1]].target.any()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.slices(60),
    st.integers(-60, 59),
    st.sampled_from([(), ("spleen",), ("heart", "lesion")]),
)
def test_keys_behave_as_a_list_would(part: slice, at: int, structures: tuple[str, ...]) -> None:
    keys = Phantom(cases=23).keys("train", structures)
    plain = list(keys)
    assert list(keys[part]) == plain[part]
    assert list(keys[part][::-1]) == plain[part][::-1]
    assert list(reversed(keys[part])) == plain[part][::-1]
    assert [key in keys[part] for key in plain] == [key in plain[part] for key in plain]
    if -len(plain) <= at < len(plain):
        assert keys[at] == plain[at]
        assert keys.index(plain[at]) == at % len(plain)
        assert keys.count(plain[at]) == 1
    else:
        with pytest.raises(IndexError):
            keys[at]


def test_keys_cannot_be_changed() -> None:
    keys = Phantom().keys("test")
    with pytest.raises(TypeError):
        keys[0] = "x"  # type: ignore[index]
    assert keys == Phantom().keys("test")
    assert hash(keys) == hash(Phantom().keys("test"))


@pytest.mark.parametrize(
    "key",
    [
        "",
        "Phantom",
        "Phantom/test/000000-ct",
        "Phantom/test/000000-ct/tail",
        "Phantom/test/000000-ct/right kidney",
        "Phantom/test/000000-mr/liver",  # image 0 is a CT
        "Phantom/test/0-ct/liver",
        "Phantom/test/0000000-ct/liver",
        "Phantom/test/012000-ct/liver",  # the split has 10 000 images
        "Phantom/holdout/000000-ct/liver",
        "BTCV/0001/slice-080/spleen",
        "Phantom/test/" + "9" * 5000 + "-ct/liver",
        7,
        None,
    ],
)
def test_an_unknown_key_is_named_together_with_the_form(key: object) -> None:
    phantom = Phantom()
    with pytest.raises(KeyError) as error:
        phantom[key]  # type: ignore[index]
    assert repr(key) in error.value.args[0]
    assert "Phantom/train/000000-ct/aorta" in error.value.args[0]
    assert key not in phantom.keys("test")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 31}, "32 to 1024"),
        ({"size": 1025}, "32 to 1024"),
        ({"size": 99.5}, "32 to 1024"),
        ({"absent": 1.5}, "from 0 to 1"),
        ({"difficulty": float("nan")}, "from 0 to 1"),
        ({"seed": -1}, "seed=-1"),
        ({"cases": {"test": -1}}, "'test'"),
        ({"cases": {"tset": 1}}, "did you mean 'test'"),
        ({"task": "xry"}, "did you mean 'xray'"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Phantom(**options)  # type: ignore[arg-type]


def test_unknown_words_are_refused() -> None:
    with pytest.raises(TypeError, match="dificulty"):
        Phantom(dificulty=0.5)  # type: ignore[call-arg]
    with pytest.raises(UnknownNameError, match="did you mean 'spleen'"):
        Phantom().keys("test", ["splen"])
    with pytest.raises(UnknownNameError, match="did you mean 'test'"):
        Phantom().keys("tests")


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(("size", "difficulty", "least"), [(32, 1.0, 1), (256, 1.0, 30), (256, 0.0, 30)])
def test_no_present_target_is_too_small_to_find(size: int, difficulty: float, least: int) -> None:
    for (_, structure), samples in by_structure(size=size, difficulty=difficulty, cases=36).items():
        assert min(int(s.target.sum()) for s in samples) >= least, structure


@pytest.mark.parametrize("size", [32, 1024])
def test_the_extreme_sizes_draw(size: int) -> None:
    phantom = Phantom(size=size)
    for index, kind in enumerate(TASKS["mixed"]):
        if index in (0, 1, 2, 3, 4, 5, 10):  # one of each
            structure = kind.structures[0].replace(" ", "-")
            sample = check_sample(phantom[f"Phantom/val/{index:06d}-{kind.modality}/{structure}"])
            assert sample.image.shape == (size, size, 3)
            assert 20 < sample.image.std() < 110


# Brighter (+1) or darker (-1) than the ring of pixels just outside, on average over the cases.
CONTRAST = {
    ("ct", "aorta"): 1,
    ("ct", "liver"): 1,
    ("ct", "spleen"): 1,
    ("ct", "left kidney"): 1,
    ("ct", "right kidney"): 1,
    ("mr", "left ventricle"): 1,
    ("mr", "right ventricle"): 1,
    ("mr", "myocardium"): -1,
    ("fundus", "optic disc"): 1,
    ("fundus", "optic cup"): 1,
    ("xray", "left lung"): -1,
    ("xray", "right lung"): -1,
    ("xray", "heart"): 1,
    ("ultrasound", "left ventricle"): -1,
    ("ultrasound", "myocardium"): 1,
}


@pytest.mark.parametrize(("modality", "structure"), CONTRAST)
def test_inside_and_outside_differ_as_they_should(
    easy: dict[tuple[str, str], list[Sample]], modality: str, structure: str
) -> None:
    for sample in easy[modality, structure]:
        grey = sample.image.mean(2)
        target = sample.target.astype(np.uint8)
        outside = (cv2.dilate(target, np.ones((7, 7))) > 0) & ~sample.target
        assert (grey[sample.target].mean() - grey[outside].mean()) * CONTRAST[modality, structure] > 0, sample.key


# Not those beside a stronger edge of another thing: the ribs, the disc's rim, the blood within the muscle.
NEIGHBOURED = {("ct", "spleen"), ("fundus", "optic cup"), ("ultrasound", "myocardium")}
EDGED = sorted(({("ct", "stomach"), ("polyp", "polyp"), ("ultrasound", "lesion")} | CONTRAST.keys()) - NEIGHBOURED)


@pytest.mark.parametrize("structure", EDGED, ids="-".join)
def test_the_target_s_edge_lies_on_the_picture_s_edge(
    easy: dict[tuple[str, str], list[Sample]], structure: tuple[str, str]
) -> None:
    """Colour changes more across the drawn outline than across the same outline moved by 5 % of the image."""

    def step(sample: Sample, dx: int, dy: int) -> float:
        target = np.roll(sample.target, (dy, dx), (0, 1)).astype(np.uint8)
        smooth = cv2.GaussianBlur(sample.image, (0, 0), 1).astype(float)
        inner = (target - cv2.erode(target, np.ones((5, 5)))) > 0
        outer = (cv2.dilate(target, np.ones((5, 5))) - target) > 0
        return float(np.abs(smooth[inner].mean(0) - smooth[outer].mean(0)).sum())

    samples = easy[structure]
    there = np.mean([step(s, 0, 0) for s in samples])
    moved = [np.mean([step(s, dx, dy) for s in samples]) for dx, dy in ((6, 0), (-6, 0), (0, 6), (0, -6))]
    assert there > 1.15 * max(moved), (there, moved)


def test_left_and_right_are_the_patient_s(easy: dict[tuple[str, str], list[Sample]]) -> None:
    def x(sample: Sample) -> float:
        return float(np.nonzero(sample.target)[1].mean())

    for modality, organ in (("ct", "kidney"), ("xray", "lung")):
        pairs = zip(easy[modality, f"right {organ}"], easy[modality, f"left {organ}"], strict=True)
        assert all(x(right) < 64 < x(left) for right, left in pairs)
    assert all(x(s) < 64 for s in easy["ct", "liver"])
    assert all(x(s) > 64 for s in easy["ct", "spleen"] + easy["ct", "stomach"])
    for right, left in zip(easy["mr", "right ventricle"], easy["mr", "left ventricle"], strict=True):
        assert x(right) < x(left)


def test_structures_of_an_image_nest_or_exclude_each_other() -> None:
    phantom = Phantom(cases=36, size=96, difficulty=0.9)
    images = defaultdict(dict)
    for key in phantom.keys("train"):
        images[key.rpartition("/")[0]][phantom[key].structure] = phantom[key].target
    for patient, targets in images.items():
        cup = targets.pop("optic cup", None)
        if cup is not None:
            assert not (cup & ~targets["optic disc"]).any()
        assert np.sum(list(targets.values()), 0).max() <= 1, patient


def test_targets_lie_in_the_visible_field() -> None:
    for (modality, _), samples in by_structure(cases=48, difficulty=1.0).items():
        if modality in ("ultrasound", "fundus", "polyp"):
            for sample in samples:
                corner = sample.image[:3, :3].max() < 12  # the frame about the field is black
                lit = cv2.blur(sample.image.max(2), (9, 9)) > 3
                assert corner
                assert (sample.target & ~lit).sum() <= 0.02 * sample.target.sum(), sample.key


# ---------------------------------------------------------------- absent structures


def test_absent_structures_are_empty_and_not_drawn() -> None:
    """Without the structure the picture changes where it was, and hardly elsewhere."""
    there, gone = Phantom(size=128, cases=24), Phantom(size=128, cases=24, absent=1.0)
    changes = defaultdict(list)
    for key in there.keys("test"):
        target, empty = there[key].target, gone[key].target
        assert not empty.any()
        change = np.abs(there[key].image.astype(float) - gone[key].image).mean(2)
        everything = np.any([there[k].target for k in there.keys("test") if k.startswith(there[key].patient + "/")], 0)
        far = cv2.dilate(everything.astype(np.uint8), np.ones((25, 25))) == 0
        changes[key.split("/")[2].split("-")[1], there[key].structure].append(
            (change[target].mean(), change[far].mean())
        )
    for structure, pairs in changes.items():
        inside, outside = np.mean(pairs, 0)
        assert inside > 8 and inside > 4 * outside, (structure, inside, outside)


def test_the_share_of_absent_structures_is_the_one_asked_for() -> None:
    found = by_structure(task="ct", size=32, absent=0.3, cases=60)
    empty = np.mean([not s.target.any() for samples in found.values() for s in samples])
    assert 0.225 < empty < 0.375  # 360 draws: one standard deviation is 0.024
    again = Phantom(task="ct", size=32, absent=0.3, cases=60)
    assert [digest(again[s.key]) for s in found["ct", "spleen"][:9]] == [digest(s) for s in found["ct", "spleen"][:9]]


# ---------------------------------------------------------------- the cue


@pytest.fixture(scope="module")
def cues() -> tuple[np.ndarray, np.ndarray]:
    """600 cue images (N, 64, 64) and their answers."""
    phantom = Phantom(task="cue")
    keys = phantom.keys("train")[:600]
    images = np.stack([phantom[key].image[..., 0] for key in keys]).astype(np.float32) / 255
    return images, np.array([phantom.cue_answer(key) for key in keys])


def accuracy(features: np.ndarray, answers: np.ndarray, ridge: float = 1.0) -> float:
    """Of a least-squares classifier fitted on the first 400 and tested on the rest."""
    x = (features - features[:400].mean(0)) / (features[:400].std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    a, b = x[:400], np.eye(4)[answers[:400]]
    weights = a.T @ np.linalg.solve(a @ a.T + ridge * len(a) * np.eye(len(a)), b)  # the dual: fewer cases than features
    return float(((x[400:] @ weights).argmax(1) == answers[400:]).mean())


def test_the_target_fills_the_box_that_the_answer_names() -> None:
    phantom = Phantom(task="cue")
    assert phantom.size == 64
    assert phantom.structures == ("target",)
    for key in phantom.keys("test")[:20]:
        box = cue_boxes(64)[phantom.cue_answer(key)]
        rows, columns = np.nonzero(phantom[key].target)
        assert (columns.min(), rows.min(), columns.max(), rows.max()) == (box.x1, box.y1, box.x2, box.y2)
        assert phantom[key].target.sum() == 144  # 12 x 12


@pytest.mark.parametrize("size", [32, 64, 100, 1024])
def test_the_four_boxes_are_alike_and_apart(size: int) -> None:
    boxes = cue_boxes(size)
    assert len({(b.x2 - b.x1, b.y2 - b.y1) for b in boxes}) == 1
    assert [(b.x1 < size / 2, b.y1 < size / 2) for b in boxes] == [
        (True, True),
        (False, True),
        (True, False),
        (False, False),
    ]
    assert all((b.x2 < size / 2) == (b.x1 < size / 2) and b.x1 > 0 and b.x2 < size - 1 for b in boxes)


def test_all_answers_occur_about_equally(cues: tuple[np.ndarray, np.ndarray]) -> None:
    counts = np.bincount(cues[1], minlength=4)
    assert counts.sum() == 600
    assert counts.min() > 110  # 150 expected, one standard deviation is 10.6


def test_the_cue_is_linearly_separable(cues: tuple[np.ndarray, np.ndarray]) -> None:
    images, answers = cues
    spectrum = np.abs(np.fft.rfft2(images))[:, :, :20].reshape(600, -1)
    assert accuracy(images.reshape(600, -1), answers) > 0.97  # raw pixels
    assert accuracy(np.log1p(spectrum), answers) > 0.97


def test_the_four_places_themselves_tell_nothing(cues: tuple[np.ndarray, np.ndarray]) -> None:
    images, answers = cues
    blocks = np.stack([images[:, b.y1 : b.y2 + 1, b.x1 : b.x2 + 1] for b in cue_boxes(64)], 1)
    assert accuracy(blocks.reshape(600, -1), answers) < 0.40  # chance is 0.25
    moments = np.concatenate([blocks.mean((2, 3)), blocks.std((2, 3)), blocks.max((2, 3)), blocks.min((2, 3))], 1)
    assert accuracy(moments, answers) < 0.40
    target = np.array([blocks[i, k].mean() for i, k in enumerate(answers)])
    decoys = np.array([np.delete(blocks[i].mean((1, 2)), k).mean() for i, k in enumerate(answers)])
    assert abs((target - decoys).mean()) < 0.002  # of a tone of about 0.85


def test_an_answer_is_refused_outside_the_cue_task() -> None:
    phantom = Phantom()
    with pytest.raises(ValueError, match="task='cue'"):
        phantom.cue_answer(phantom.keys("test")[0])
    with pytest.raises(KeyError):
        Phantom(task="cue").cue_answer("Phantom/test/000000-ct/liver")


@pytest.mark.parametrize("key", ["Phantom/test/001797-polyp/polyp", "Phantom/test/002391-polyp/polyp"])
def test_rare_noise_leaves_no_hole_in_a_polyp_image(key: str) -> None:
    """These two once had a black bite taken out of them, from the logarithm of a negative distance."""
    with np.errstate(invalid="raise", divide="raise"):
        Phantom()[key]
