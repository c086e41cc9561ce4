"""Weights: what is found where, what is read from checkpoint files and what is refused, and registered files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from medseg_gym import tools
from medseg_gym.errors import BadDataError, UnknownNameError, WeightsMissingError
from medseg_gym.home import weights_path
from medseg_gym.tools import records, register, sources
from medseg_gym.tools.cards import TOOLS
from medseg_gym.tools.weights import file_sha256, find_weights, have_weights, read_state

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("home")

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7], dtype=torch.int64)}


class Bomb:
    """A pickle of this one makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def saved(path: Path, content: Any = STATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def same(state: dict[str, Any]) -> bool:
    return list(state) == list(STATE) and all(
        torch.equal(state[k], STATE[k]) and state[k].dtype == STATE[k].dtype for k in STATE
    )


# --- where they are found


def test_a_folder_in_transformers_format_and_a_single_file_are_found_in_the_data_home() -> None:
    assert not have_weights("MedSAM2")
    file = touched(weights_path("MedSAM2") / "MedSAM2_latest.pt")
    touched(weights_path("SAMB") / "config.json")
    assert find_weights("MedSAM2") == file and have_weights("MedSAM2")
    with pytest.raises(WeightsMissingError, match=r"has no model\.safetensors; get them with `medseg-gym tools downl"):
        find_weights("SAMB")
    touched(weights_path("SAMB") / "model.safetensors")
    assert find_weights("SAMB") == weights_path("SAMB") and have_weights("SAMB")
    touched(weights_path("SAMB") / "sam_vit_b.pth")  # a whole folder is whole, whatever lies beside it
    assert find_weights("SAMB") == weights_path("SAMB")


def test_two_checkpoints_in_a_folder_are_not_chosen_from(tmp_path: Path) -> None:
    one, two = touched(tmp_path / "w" / "one.pt"), touched(tmp_path / "w" / "two.pth")
    with pytest.raises(WeightsMissingError, match=r"several checkpoints \(one\.pt, two\.pth\)"):
        find_weights("SAMB", tmp_path / "w")
    assert find_weights("SAMB", two) == two
    one.unlink()
    assert find_weights("SAMB", tmp_path / "w") == two


def test_model_safetensors_without_its_config_is_not_taken_for_the_authors_format(tmp_path: Path) -> None:
    touched(tmp_path / "w" / "model.safetensors")
    with pytest.raises(WeightsMissingError, match=r"w has no config\.json;"):
        find_weights("SAM2.1T", tmp_path / "w")


def test_a_path_that_is_not_there_or_no_checkpoint_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissingError, match=r"no config\.json and no model\.safetensors; .* --file PATH"):
        find_weights("SAM2.1T", tmp_path / "nowhere")
    with pytest.raises(WeightsMissingError, match=r"weights\.bin is not a \.pt, \.pth, \.safetensors file"):
        find_weights("SAM2.1T", touched(tmp_path / "weights.bin"))


# --- what is read


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE},
        {"state_dict": STATE, "epoch": 3, "optimizer": {"lr": 1.0}},
        {"model": {"state_dict": STATE}},
        {f"module.{name}": value for name, value in STATE.items()},
    ],
    ids=["bare", "model", "trainer", "nested", "data-parallel"],
)
def test_the_levels_around_a_state_dict_are_taken_off(tmp_path: Path, content: Any) -> None:
    assert same(read_state(saved(tmp_path / "w.pt", content)))


def test_safetensors_and_the_old_pickle_format_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "w.safetensors")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(dict(sorted(read_state(tmp_path / "w.safetensors").items()))) and same(read_state(tmp_path / "old.pth"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain"])
def test_a_pickle_with_code_is_refused_by_name_and_its_code_does_not_run(tmp_path: Path, legacy: bool) -> None:
    trap = tmp_path / "sprung"
    content = {"model": STATE, "extra": Bomb(trap)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadDataError, match=r"refused.*posix\.mkdir|refused.*nt\.mkdir"):
        read_state(tmp_path / "w.pt")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(trap), 2))
    with pytest.raises(BadDataError, match=r"bare\.pth"):
        read_state(tmp_path / "bare.pth")
    (tmp_path / "new.pth").write_bytes(pickle.dumps(Bomb(trap), 4))
    with (
        pytest.warns(UserWarning, match="protocol 4"),
        pytest.raises(BadDataError, match="Unsupported operand") as told,
    ):
        read_state(tmp_path / "new.pth")
    assert "`weights_only` set to `False`" not in str(told.value)  # torch's advice, and the one thing not to do
    assert not trap.exists()
    pickle.loads(pickle.dumps(Bomb(trap)))  # it would have
    assert trap.exists()


def test_damaged_and_strange_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    whole = saved(tmp_path / "w.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10" + bytes(30))
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>sign in to download</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello\n")
    with pytest.raises(BadDataError, match="neither PyTorch's archive nor a pickle"):
        read_state(tmp_path / "text.pt")
    for name in ("cut.pt", "cut.safetensors", "page.pt", "empty.pth"):
        with pytest.raises(BadDataError, match=name.replace(".", r"\.")):
            read_state(tmp_path / name)
    with pytest.raises(BadDataError, match=r"wanted tensors by name.*got \['a', 'c'\]"):
        read_state(saved(tmp_path / "n.pt", {"a": 1, "b": torch.zeros(1), "c": [2]}))
    with pytest.raises(BadDataError, match="got list, 2 entries"):
        read_state(saved(tmp_path / "l.pt", [1, 2]))
    with pytest.raises(BadDataError, match=r"wanted tensors by name, or one of"):  # two states: which?
        read_state(saved(tmp_path / "t.pt", {"model": STATE, "state_dict": STATE}))
    with pytest.raises(BadDataError, match=r"weights are read from \.pt"):
        read_state(touched(tmp_path / "w.bin"))
    with pytest.raises(BadDataError, match="no such file"):
        read_state(tmp_path / "none.pt")


# --- where they come from


def test_an_archive_that_would_unpack_to_far_more_is_refused_unread(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(20_000_000))
    with pytest.raises(BadDataError, match="refused, an archive of .* bytes that unpacks to 20000000"):
        read_state(tmp_path / "bomb.pt")


def test_every_tool_with_weights_has_a_source_at_a_fixed_revision_with_a_checksum_or_a_way_by_hand() -> None:
    assert set(sources.SOURCES) == {name for name, card in TOOLS.items() if card.weights}
    for source in sources.SOURCES.values():
        if source.places:
            kind, _, digits = source.checksum.partition(":")
            assert (kind, len(digits)) in (("sha256", 64), ("md5", 32)) and int(digits, 16)
            assert source.revision and all(url.startswith("https://") and source.file in url for url in source.urls)
            assert source.revision != "main"
        else:
            assert source.note
    with pytest.raises(WeightsMissingError, match="GrabCut needs no weights"):
        sources.source_of("GrabCut")
    with pytest.raises(UnknownNameError, match="did you mean 'SAMB'"):
        sources.source_of("SAM-B")


def test_the_hubs_mirror_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1/hub/")
    urls = sources.source_of("SAM2.1T").urls
    revision = "de431c4043854a71d8101e17995dfe596bf101a5"
    assert urls[0] == f"http://127.0.0.1:1/hub/facebook/sam2.1-hiera-tiny/resolve/{revision}/sam2.1_hiera_tiny.pt"
    assert urls[1].startswith("https://dl.fbaipublicfiles.com/")


# --- files the user has


def test_a_registered_file_stays_where_it_is_and_is_found(tmp_path: Path) -> None:
    file = saved(tmp_path / "mine" / "medsam2.pt")
    record = register.register("MedSAM2", file, check=False)
    assert find_weights("MedSAM2") == file and have_weights("MedSAM2")
    assert [(f.path, f.size, f.sha256) for f in record.files] == [(file, file.stat().st_size, file_sha256(file))]
    assert record.registered and records.read("MedSAM2") == record
    assert sorted(p.name for p in weights_path("MedSAM2").iterdir()) == ["weights.json"]
    assert register.published("MedSAM2", record) is False
    assert register.published("MedSAM", record) is None  # its authors publish no sha256
    other = saved(tmp_path / "other.pt", {"c": torch.zeros(1)})
    register.register("MedSAM2", other, check=False)
    assert find_weights("MedSAM2") == other


def test_a_copy_is_the_data_homes_and_survives_the_original_and_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path / "mine.pt")
    register.register("MedSAM2", file, copy=True, check=False)
    content = file.read_bytes()
    file.unlink()
    assert find_weights("MedSAM2") == weights_path("MedSAM2") / "mine.pt"
    assert find_weights("MedSAM2").read_bytes() == content
    home = weights_path("MedSAM2").parents[1]
    home.rename(tmp_path / "moved")
    monkeypatch.setenv("MEDSEG_GYM_HOME", str(tmp_path / "moved"))
    assert find_weights("MedSAM2") == tmp_path / "moved" / "weights" / "MedSAM2" / "mine.pt"
    assert register.verify("MedSAM2") == [(find_weights("MedSAM2"), "ok")]


def test_a_changed_file_is_refused_until_verify_finds_its_bytes_the_same(tmp_path: Path) -> None:
    file = saved(tmp_path / "mine.pt")
    register.register("MedSAM2", file, check=False)
    assert register.verify("MedSAM2") == [(file, "ok")]
    os.utime(file, ns=(1, 1))
    with pytest.raises(BadDataError, match=r"changed since .*`medseg-gym tools verify MedSAM2`"):
        find_weights("MedSAM2")
    assert register.verify("MedSAM2") == [(file, "ok")]
    assert find_weights("MedSAM2") == file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert register.verify("MedSAM2") == [(file, "changed")]
    file.unlink()
    assert register.verify("MedSAM2") == [(file, "missing")]
    with pytest.raises(WeightsMissingError):
        find_weights("MedSAM2")
    assert not have_weights("MedSAM2")


def test_verify_tells_of_weights_put_there_by_hand_and_of_none() -> None:
    assert register.verify("SAMB") == [(weights_path("SAMB"), "missing")]
    file = touched(weights_path("SAMB") / "sam.pth")
    assert register.verify("SAMB") == [(file, "unrecorded")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SAM 2.1 in transformers' format."""
    from test_sam2 import tiny_config

    from medseg_gym.tools.sam2_config import random_model

    folder = tmp_path_factory.mktemp("tiny")
    random_model(tiny_config(), 0).save_pretrained(folder)
    return folder


def test_register_loads_the_tool_once_and_what_does_not_load_is_not_recorded(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(BadDataError, match=r"wrong\.pt does not load as MedSAM2, nothing was recorded: .*a\.weight"):
        register.register("MedSAM2", saved(tmp_path / "wrong.pt"))
    with pytest.raises(BadDataError, match="refused"):
        register.register("MedSAM2", saved(tmp_path / "bomb.pt", {"a": Bomb(tmp_path / "sprung")}))
    assert not (tmp_path / "sprung").exists() and records.read("MedSAM2") is None
    with pytest.raises(BadDataError, match="several|no config"):
        register.register("MedSAM2", tmp_path)
    with pytest.raises(BadDataError, match=r"nowhere\.pt does not exist; register takes"):
        register.register("MedSAM2", tmp_path / "nowhere.pt")
    with pytest.raises(WeightsMissingError, match="Stub needs no weights"):
        register.register("Stub", tiny)
    record = register.register("MedSAM2", tiny)
    assert record.path == tiny and [f.path.name for f in record.files] == ["config.json", "model.safetensors"]
    assert tools.available("MedSAM2") and tools.make("MedSAM2").fingerprint == tools.make("MedSAM2").fingerprint


def test_a_folder_is_copied_whole(tmp_path: Path, tiny: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(tiny, own)
    register.register("SAM2.1T", own, copy=True, check=False)
    shutil.rmtree(own)
    assert find_weights("SAM2.1T") == weights_path("SAM2.1T")
    assert [status for _, status in register.verify("SAM2.1T")] == ["ok", "ok"]


def test_a_damaged_record_says_so_and_does_not_hide_the_other_tools() -> None:
    file = touched(weights_path("SAMB") / records.NAME)
    for text in ("", "[]", '{"schema": 9}', json.dumps({"schema": 1, "path": "x", "files": [{}], "source": {}})):
        file.write_text(text)
        assert not have_weights("SAMB")
        with pytest.raises(BadDataError, match=r"not a record of weights .*download or register SAMB again"):
            find_weights("SAMB")
