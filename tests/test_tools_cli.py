"""`medseg-gym tools`: list, download, register, verify and embed as people see them, with their exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Blobs
from test_download import CONTENT, Handler, Site, published, site  # noqa: F401  (a fixture)
from typer.testing import CliRunner, Result

from medseg_gym import tools
from medseg_gym.cli_tools import app
from medseg_gym.datasets.store_writer import StoreWriter
from medseg_gym.errors import MedSegError
from medseg_gym.home import dataset_path, embeddings_path, weights_path
from medseg_gym.images import image_hash
from medseg_gym.tools import embed as library
from medseg_gym.tools.cards import TOOLS
from medseg_gym.tools.disk_cache import DiskCache
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Embedding, Image

pytestmark = pytest.mark.usefixtures("home")

FINGERPRINT = "Slow:00000000000000aa"


class Slow(Stub):
    """A Stub with an encoder that takes a while and an option that changes its embeddings."""

    def __init__(self, seconds: float = 0.0, dtype: str = "float32", max_batch: int = 1) -> None:
        super().__init__(max_batch=max_batch)
        self.name = "Slow"
        self.seconds, self.dtype = seconds, dtype
        self.fingerprint = FINGERPRINT if dtype == "float32" else "Slow:00000000000000bb"

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        time.sleep(self.seconds * len(images))
        return [Embedding(image_hash(i), *i.shape[:2], {"level": i.astype(self.dtype)}) for i in images]


@pytest.fixture(autouse=True)
def nothing_stays_loaded() -> Iterator[None]:
    yield
    tools.unload()


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def little(home: Path) -> Path:
    """A store named Little: 9 images in train, 2 in test, each of its own grey, with two structures each."""
    path = dataset_path("Little")
    with StoreWriter(path, "Little") as writer:
        for number in range(11):
            writer.add(
                np.full((8, 9), 20 * number, np.uint8),
                {name: np.eye(8, 9, dtype=np.bool_) for name in ("liver", "spleen")},
                patient=f"{number:02d}",
                name="one",
                split="train" if number < 9 else "test",
                instructions={"liver": "liver", "spleen": "spleen"},
            )
    return path


def kept(dtype: str = "float32") -> DiskCache:
    return DiskCache(Slow(dtype=dtype).fingerprint)


def test_list_says_what_runs_what_to_get_and_under_which_terms() -> None:
    result = run("list")
    assert result.exit_code == 0 and all(name in result.output for name in TOOLS)
    rows = {line.split()[0]: line for line in result.output.splitlines() if line.split()}
    assert "download weights" in rows["SAM2.1T"] and "156 MB" in rows["SAM2.1T"]
    assert "register weights" in rows["IMISNet"] and "yes" in rows["Nano"].split()
    assert "for research and education" in result.output


def test_a_tool_without_weights_has_nothing_to_get_and_a_misspelt_one_is_named() -> None:
    assert run("download", "GrabCut").exit_code == 0
    for command in (("download",), ("verify",), ("register", "--file", "x")):
        result = run(*command, "MedSAM3")
        assert result.exit_code == 1 and "did you mean 'MedSAM" in result.output, command


def test_download_then_verify(site: Site) -> None:  # noqa: F811
    result = run("download", "MedSAM2")
    assert result.exit_code == 0, result.output
    file = weights_path("MedSAM2") / "MedSAM2_latest.pt"
    assert str(file) in result.stdout and file.read_bytes() == CONTENT
    assert run("verify", "MedSAM2").stdout == f"MedSAM2: ok {file}\n"
    assert run("verify").stdout == f"MedSAM2: ok {file}\n"
    file.write_bytes(CONTENT[:-1])
    changed = run("verify")
    assert changed.exit_code == 3 and changed.stdout == f"MedSAM2: changed {file}\n"
    file.unlink()
    gone = run("verify", "MedSAM2")
    assert gone.exit_code == 3 and gone.stdout == f"MedSAM2: missing {file}\n"
    assert run("download", "MedSAM2").exit_code == 0 and run("verify").exit_code == 0


def test_a_refused_download_is_one_message_and_exit_code_1(site: Site) -> None:  # noqa: F811
    site.content = b"<html>"
    result = run("download", "MedSAM2")
    assert result.exit_code == 1 and "not the file that was published" in result.output
    assert "Traceback" not in result.output
    assert run("verify").exit_code == 0 and "no weights were downloaded" in run("verify").output


def test_register_says_whether_it_is_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import hashlib

    file = tmp_path / "mine.pt"
    torch.save({"a": torch.zeros(2)}, file)
    result = run("register", "MedSAM2", "--file", file, "--no-check")
    assert result.exit_code == 0 and f"MedSAM2: {file} (not the file its authors published)" in result.stdout
    published(monkeypatch, "http://nowhere/x", checksum=f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}")
    result = run("register", "MedSAM2", "--file", file, "--no-check", "--copy")
    assert f"{weights_path('MedSAM2') / 'mine.pt'} (the file its authors published)" in result.stdout
    (tmp_path / "page.pt").write_text("<html>")
    result = run("register", "MedSAM2", "--file", tmp_path / "page.pt")
    assert result.exit_code == 1 and "page.pt" in result.output and "Traceback" not in result.output
    assert run("verify").stdout.startswith("MedSAM2: ok")


TOOL = ("--tool", "test_tools_cli:Slow")


def test_embed_encodes_every_image_once_and_says_how_to_use_them(little: Path) -> None:
    result = run("embed", "--dataset", "Little", *TOOL)
    assert result.exit_code == 0, result.output
    assert "Little: 11 images, 11 encoded now;" in result.stdout and "11 embeddings" in result.stdout
    assert "tool_options={'disk_cache': True}" in result.stdout
    assert "10 more images of 0.0 MB" in result.stderr and "GB, with room for" in result.stderr
    assert kept().size()[0] == 11 and kept().path.is_relative_to(embeddings_path())
    result = run("embed", "--dataset", little, *TOOL)  # the same by path
    assert "11 images, 0 encoded now" in result.stdout
    tool = tools.load("test_tools_cli:Slow", disk_cache=True)
    tool.encode([np.full((8, 9, 3), 40, np.uint8)])
    assert tool.counters()["encodes"] == 0 and tool.counters()["disk_hits"] == 1


def test_embed_takes_splits_options_and_another_folder(little: Path, tmp_path: Path) -> None:
    result = run("embed", "--dataset", "Little", *TOOL, "--split", "test", "--dtype", "float16")
    assert "2 images, 2 encoded now" in result.stdout and kept("float16").size()[0] == 2 and kept().size()[0] == 0
    assert "tool_options={'dtype': 'float16', 'disk_cache': True}" in result.stdout
    folder = tmp_path / "else where"
    result = run("embed", "--dataset", "Little", *TOOL, "--folder", folder, "--option", "max_batch=4")
    assert result.exit_code == 0 and DiskCache(FINGERPRINT, folder).size()[0] == 11
    assert f"'max_batch': 4, 'disk_cache': '{folder}'" in result.stdout


def test_embed_tells_mistakes_before_it_begins(little: Path) -> None:
    for words, told in (
        (("--tool", "Nano"), "nothing to gain"),
        (("--tool", "GrabCut"), "nothing to gain"),
        (("--tool", "SAM2.1T"), "medseg-gym tools download SAM2.1T"),
        ((*TOOL, "--split", "tests"), "did you mean 'test'"),
        ((*TOOL, "--option", "secs=1"), "did you mean 'seconds'"),
        ((*TOOL, "--option", "seconds"), "NAME=VALUE"),
    ):
        result = run("embed", "--dataset", "Little", *words)
        assert result.exit_code == 1 and told in result.output, (words, result.output)
    assert run("embed", "--dataset", "Littel", *TOOL).exit_code == 1
    assert not embeddings_path().exists()


def test_embed_stops_after_the_first_image_if_the_others_do_not_fit(little: Path) -> None:
    result = run(
        "embed", "--dataset", "Little", *TOOL, "--max-gb", 0.00002
    )  # 20 000 bytes; eleven have 864 each and more
    assert result.exit_code == 1 and "10 more images of 0.0 MB do not fit" in result.output
    assert kept().size()[0] == 1


def test_a_dataset_that_does_not_tell_which_cases_share_an_image_is_read_whole(tmp_path: Path) -> None:
    data = Blobs()
    disk = DiskCache(FINGERPRINT, tmp_path)
    first = library.plan(disk, data, ("train", "val"))
    # the three pictures of Blobs are the same in every split, each with two structures
    assert (first.images, first.todo) == (3, ("Blobs/train-0/bar", "Blobs/train-1/bar", "Blobs/train-2/bar"))
    assert library.embed(Slow(), disk, data, first.todo) == 3
    assert library.plan(disk, data, ("train", "val")).todo == ()


def test_embed_stops_when_the_disk_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Blobs()
    disk = DiskCache(FINGERPRINT, tmp_path)
    put = disk.put
    monkeypatch.setattr(disk, "put", lambda embedding: disk.writes < 2 and put(embedding))
    with pytest.raises(MedSegError, match="takes no more embeddings of Slow.* 2 were written and stay"):
        library.embed(Slow(), disk, data, library.plan(disk, data).todo)


@pytest.mark.slow
def test_embed_killed_midway_goes_on_from_there(little: Path) -> None:
    words = ["embed", "--dataset", "Little", *TOOL, "--option"]
    code = f"from medseg_gym.cli_tools import app; app({[*words, 'seconds=0.5']!r})"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    disk = kept()
    while disk.size()[0] < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = disk.size()[0]
    assert 3 <= there < 11
    result = run(*words, "seconds=0")
    assert f"11 images, {11 - there} encoded now" in result.stdout and disk.size()[0] == 11
