"""Weights on their way: whole files, nothing old left lying, nothing misnamed taken."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError  # noqa: E402
from medseg_gym.rl import sync  # noqa: E402
from medseg_gym.rl.engines.base import WeightRef  # noqa: E402

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.full((4,), 0.1, dtype=torch.bfloat16)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize("travels", ["in process", "by file"])
def test_what_is_published_is_what_is_loaded_whatever_the_learner_does_next(tmp_path: Path, travels: str) -> None:
    mine = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    ref = sync.publish(mine, 3, True, None if travels == "in process" else tmp_path)
    for tensor in mine.values():
        tensor += 1
    loaded = sync.load(ref)
    assert list(loaded) == list(WEIGHTS)
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    assert all(loaded[name].dtype == WEIGHTS[name].dtype for name in WEIGHTS)
    assert (ref.version, ref.full) == (3, True)


def test_tensors_that_share_memory_or_lie_in_strides_are_written_as_they_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    ref = sync.publish({"x": whole, "tied": whole, "turned": whole.T, "part": whole[1]}, 0, True, tmp_path)
    loaded = sync.load(ref)
    assert torch.equal(loaded["x"], whole)
    assert torch.equal(loaded["tied"], whole)
    assert torch.equal(loaded["turned"], whole.T)
    assert torch.equal(loaded["part"], whole[1])


def test_old_versions_go_but_the_full_one_below_a_partial_one_stays(tmp_path: Path) -> None:
    """Trap 18: a run of any length leaves two files at most."""
    sync.publish(WEIGHTS, 0, True, tmp_path)
    part = {"a.weight": WEIGHTS["a.weight"] + 1}
    refs = [sync.publish(part, version, False, tmp_path) for version in (1, 2, 3)]
    assert len(list(tmp_path.iterdir())) == 2
    assert [(ref.version, ref.full) for ref in sync.newest(tmp_path)] == [(0, True), (3, False)]
    with pytest.raises(MedSegError, match="gone"):
        sync.load(refs[0])
    sync.publish(WEIGHTS, 4, True, tmp_path)
    assert [(ref.version, ref.full) for ref in sync.newest(tmp_path)] == [(4, True)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_went_back_to_an_earlier_version_leaves_none_of_the_later_ones(tmp_path: Path) -> None:
    for version in (5, 6, 4):
        sync.publish(WEIGHTS, version, True, tmp_path)
    assert [ref.version for ref in sync.newest(tmp_path)] == [4]


def test_a_write_that_is_cut_off_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync.publish(WEIGHTS, 1, True, tmp_path)

    def full_disk(tensors: object, file: str, metadata: object = None) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        sync.publish(WEIGHTS, 2, True, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert [ref.version for ref in sync.newest(tmp_path)] == [1]


def test_a_file_that_is_cut_short_or_says_another_version_is_not_believed(tmp_path: Path) -> None:
    ref = sync.publish(WEIGHTS, 1, True, tmp_path)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(BadDataError, match="no whole safetensors file"):
        sync.load(ref)
    file.write_bytes(data)
    file.rename(file.with_name("weights-00000002-full.safetensors"))
    with pytest.raises(BadDataError, match="says it is"):
        sync.load(WeightRef(2, True, folder=str(tmp_path)))


def test_weights_that_do_not_fit_are_named() -> None:
    """Trap 16."""
    sync.check(WEIGHTS, SHAPES, True)
    sync.check({"a.weight": WEIGHTS["a.weight"]}, SHAPES, False)
    sync.check({"a.weight": WEIGHTS["a.weight"]}, SHAPES, True, optional=["b.bias"])
    with pytest.raises(UnknownNameError, match="did you mean 'a.weight'"):
        sync.check({"a.weigth": WEIGHTS["a.weight"]}, SHAPES, False)
    with pytest.raises(BadDataError, match=r"a.weight is \(3, 2\); the model's is \(2, 3\)"):
        sync.check({"a.weight": WEIGHTS["a.weight"].T}, SHAPES, False)
    with pytest.raises(BadDataError, match=r"1 of 2 weights are missing .* the first b.bias"):
        sync.check({"a.weight": WEIGHTS["a.weight"]}, SHAPES, True)
    with pytest.raises(BadDataError, match="no weights came"):
        sync.check({}, SHAPES, False)


@pytest.mark.parametrize(
    ("weights", "version"), [({}, 1), ({"a": torch.ones(2, dtype=torch.long)}, 1), (WEIGHTS, -1), (WEIGHTS, 10**8)]
)
def test_what_cannot_be_weights_is_not_published(
    tmp_path: Path, weights: dict[str, torch.Tensor], version: int
) -> None:
    with pytest.raises(BadDataError):
        sync.publish(weights, version, True, tmp_path)
    assert not list(tmp_path.iterdir())
