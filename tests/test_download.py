"""Downloading weights from a server on this machine: cuts, resumption, checksums, mirrors, and what is said offline."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medseg_gym.errors import WeightsMissingError
from medseg_gym.home import weights_path
from medseg_gym.tools import download as module
from medseg_gym.tools import locks, records, register, sources
from medseg_gym.tools.download import DownloadError, download
from medseg_gym.tools.weights import find_weights

pytestmark = pytest.mark.usefixtures("home")

CONTENT = bytes(range(256)) * 1200  # 307 200 bytes: two reads of the downloader
NAME = "MedSAM2_latest.pt"


@dataclass
class Site:
    """What the server does; every request is noted as (path, Range header)."""

    content: bytes = CONTENT
    ranges: bool = True  # whether it knows Range
    cut_after: list[int] = field(default_factory=list)  # bytes of the body sent before the connection is cut, a request
    status: list[int] = field(default_factory=list)  # errors answered first
    lengths: bool = True  # whether it tells how long its answers are
    elsewhere: bool = False  # whether /a only sends on to /b
    requests: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site, wanted = self.site, self.headers.get("Range", "")
        site.requests.append((self.path, wanted))
        if site.status:
            self.send_error(site.status.pop(0))
            return
        if self.path.startswith("/gone"):
            self.send_error(404)
            return
        if site.elsewhere and self.path == "/a":
            self.send_response(302)
            self.send_header("Location", "/b")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
        if start >= len(site.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(site.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            length = len(site.content) if site.lengths else "*"
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{length}")
        if site.lengths:
            self.send_header("Content-Length", str(len(site.content) - start))
        self.end_headers()
        stop = start + site.cut_after.pop(0) if site.cut_after else len(site.content)
        self.wfile.write(site.content[start:stop])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server that has MedSAM2's weights, which are CONTENT here."""
    told = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": told}))
    told.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    published(monkeypatch, f"{told.address}/a")
    yield told
    server.shutdown()
    server.server_close()
    thread.join()


def published(monkeypatch: pytest.MonkeyPatch, *places: str, checksum: str = "", size: int = len(CONTENT)) -> None:
    checksum = checksum or f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    source = sources.Source("someone/somewhere", "r1", NAME, size, checksum, "none", places)
    monkeypatch.setitem(sources.SOURCES, "MedSAM2", source)


def target() -> Path:
    return weights_path("MedSAM2") / NAME


def part() -> Path:
    return weights_path("MedSAM2") / f".{NAME}.part"


def visible() -> list[str]:
    return sorted(p.name for p in weights_path("MedSAM2").iterdir() if not p.name.startswith("."))


def test_a_download_is_recorded_with_its_place_and_checksum(site: Site) -> None:
    told: list[tuple[str, int, int]] = []
    path = download("MedSAM2", progress=lambda *a: told.append(a))
    assert path == target() == find_weights("MedSAM2") and path.read_bytes() == CONTENT
    assert visible() == [NAME, "weights.json"] and not part().exists()
    record = records.read("MedSAM2")
    assert record is not None and not record.registered
    assert record.files[0].sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert (record.source["repository"], record.source["revision"]) == ("someone/somewhere", "r1")
    assert register.verify("MedSAM2") == [(path, "ok")] and register.published("MedSAM2", record)
    assert told[0] == (NAME, 0, len(CONTENT)) and (NAME, len(CONTENT), len(CONTENT)) in told
    assert told[-1] == (f"checking {NAME}", len(CONTENT), len(CONTENT))
    assert download("MedSAM2") == path and len(site.requests) == 1  # they are there
    assert download("MedSAM2", force=True) == path and len(site.requests) == 2


def test_a_connection_cut_midway_is_taken_up_where_it_was_cut(site: Site) -> None:
    site.cut_after = [100_000, 70_001]
    assert download("MedSAM2", wait=0).read_bytes() == CONTENT
    assert [wanted for _, wanted in site.requests] == ["", "bytes=100000-", "bytes=170001-"]


def test_a_cut_is_no_end_where_a_server_does_not_tell_the_length(site: Site) -> None:
    site.lengths = False
    site.cut_after = [100_000, 70_001]
    assert download("MedSAM2", wait=0).read_bytes() == CONTENT
    assert [wanted for _, wanted in site.requests] == ["", "bytes=100000-", "bytes=170001-"]


def test_a_later_call_goes_on_from_what_an_earlier_one_left(site: Site) -> None:
    site.cut_after = [100_000] + [0] * module.ATTEMPTS
    with pytest.raises(DownloadError, match="What came is kept; the same command goes on from there"):
        download("MedSAM2", wait=0)
    assert part().read_bytes() == CONTENT[:100_000] and visible() == []
    with pytest.raises(WeightsMissingError):
        find_weights("MedSAM2")
    site.requests.clear()
    site.cut_after.clear()
    assert download("MedSAM2").read_bytes() == CONTENT
    assert site.requests == [("/a", "bytes=100000-")]


def test_a_part_that_is_whole_already_is_only_checked(site: Site) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(CONTENT)
    assert download("MedSAM2").read_bytes() == CONTENT
    assert site.requests == [("/a", f"bytes={len(CONTENT)}-")]


def test_a_server_without_ranges_sends_everything_again(site: Site) -> None:
    site.ranges = False
    site.cut_after = [100_000]
    assert download("MedSAM2", wait=0).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"x" * 5000, CONTENT + b"more"], ids=["damaged", "longer"])
def test_a_part_of_something_else_is_thrown_away_and_fetched_once_more(site: Site, left: bytes) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(left)
    assert download("MedSAM2", wait=0).read_bytes() == CONTENT
    assert site.requests[-1] == ("/a", "")


def test_a_wrong_checksum_is_refused_and_nothing_gets_the_name(site: Site) -> None:
    site.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match=r"not the file that was published: its sha256 is .*--file PATH"):
        download("MedSAM2")
    assert visible() == [] and not part().exists() and records.read("MedSAM2") is None
    with pytest.raises(WeightsMissingError):
        find_weights("MedSAM2")


def test_an_earlier_good_file_survives_a_bad_download(site: Site) -> None:
    download("MedSAM2")
    site.content = b"sign in first"
    with pytest.raises(DownloadError):
        download("MedSAM2", force=True)
    assert find_weights("MedSAM2").read_bytes() == CONTENT and register.verify("MedSAM2") == [(target(), "ok")]


def test_a_published_md5_is_checked_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch, f"{site.address}/a", checksum=f"md5:{hashlib.md5(CONTENT).hexdigest()}", size=0)
    download("MedSAM2")
    published(monkeypatch, f"{site.address}/a", checksum="md5:" + "0" * 32)
    with pytest.raises(DownloadError, match="its md5 is"):
        download("MedSAM2", force=True)


def test_errors_that_pass_are_waited_for_and_others_are_not(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.status = [503, 429]
    assert download("MedSAM2", wait=0).read_bytes() == CONTENT
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    site.status = [500] * 9
    with pytest.raises(DownloadError, match="HTTP 500"):
        download("MedSAM2", force=True, wait=1)
    assert waits == [1, 2, 4, 8]
    site.status = [403]
    with pytest.raises(DownloadError, match="HTTP 403"):
        download("MedSAM2", force=True)
    assert len(waits) == 4


def test_a_second_place_is_asked_and_a_redirect_is_followed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch, f"{site.address}/gone", f"{site.address}/a")
    site.elsewhere = True
    site.cut_after = [1000]
    assert download("MedSAM2", wait=0).read_bytes() == CONTENT
    assert site.requests == [("/gone", ""), ("/a", ""), ("/b", ""), ("/a", "bytes=1000-"), ("/b", "bytes=1000-")]


def test_without_a_network_the_error_comes_at_once_and_says_how_to_register_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("waited for nothing"))
    published(monkeypatch, "http://127.0.0.1:9/x")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DownloadError) as caught:
        download("MedSAM2", wait=0)
    for words in (
        "http://127.0.0.1:9/x",
        NAME,
        "someone/somewhere r1",
        "medseg-gym tools register MedSAM2 --file PATH",
    ):
        assert words in str(caught.value)
    assert "What came is kept" not in str(caught.value)


def test_weights_behind_a_cloud_drive_say_where_and_how_to_register_them() -> None:
    with pytest.raises(DownloadError, match=r"IMIS-Bench; then: `medseg-gym tools register IMISNet --file PATH`"):
        download("IMISNet")


def test_only_one_process_fetches_at_a_time(site: Site) -> None:
    with locks.held(weights_path("MedSAM2") / ".lock") as ours:
        assert ours
        with pytest.raises(DownloadError, match="another process is fetching"):
            download("MedSAM2")
    download("MedSAM2")


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(monkeypatch, f"{site.address}/a", size=10**18)
    with pytest.raises(DownloadError, match="needs 1000000000000 MB more"):
        download("MedSAM2")
    assert site.requests == []
