"""Published weights are fetched once, whole and the right ones, through what networks do."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections import Counter
from pathlib import Path

import pytest

from freesolo.errors import JobError, UsageError
from freesolo.models.download import RetryPolicy, download
from freesolo.models.published import PUBLISHED, PublishedWeights, pull, recorded_sha256

IMPATIENT = RetryPolicy(attempts=3, first_delay=0.01, timeout=5.0)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path that ends in .pth; what it is asked is recorded in `requests`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = bytes(range(256)) * 20_000  # 5 MB
        self.etag: str | None = '"one"'
        self.drops: list[int] = []  # break off after so many bytes of the answer, one entry a request
        self.failures: list[int] = []  # statuses to answer first
        self.ranges = True
        self.requests: list[str | None] = []  # the Range header of each
        self.sent = Counter[str]()
        self.change_on_drop: tuple[bytes, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/models/w.pth"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.headers.get("Range"))
        if self.server.failures:
            self.send_error(self.server.failures.pop(0))
            return
        if not self.path.endswith(".pth"):
            self.send_error(404)
            return
        content, start = self.server.content, 0
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        unchanged = self.headers.get("If-Range") in (None, self.server.etag)
        if match and self.server.ranges and unchanged:
            start = int(match[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.server.drops.pop(0) if self.server.drops else len(content)
        self.wfile.write(content[start:end])
        self.server.sent["bytes"] += len(content[start:end])
        if end < len(content) and self.server.change_on_drop:
            self.server.content, self.server.etag = self.server.change_on_drop

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_pull_fetches_once_and_reports_progress(server, tmp_path):
    seen: list[tuple[int, int | None]] = []
    path = pull(server.url, tmp_path / "new", progress=lambda done, total: seen.append((done, total)), retry=IMPATIENT)
    assert path == tmp_path / "new" / "w.pth"
    assert path.read_bytes() == server.content
    assert seen[-1] == (len(server.content), len(server.content))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert recorded_sha256(path) == server.sha256
    assert pull(server.url, tmp_path / "new", sha256=server.sha256.upper(), retry=IMPATIENT) == path
    assert len(server.requests) == 1
    assert names(tmp_path / "new") == {"w.pth", "w.pth.sha256"}


def test_published_names_are_resolved(server, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "mine", PublishedWeights(server.url, server.sha256, "resnet18", "a test"))
    assert pull("mine", tmp_path, retry=IMPATIENT).read_bytes() == server.content
    with pytest.raises(UsageError, match="its publisher states"):
        pull("mine", tmp_path, sha256="0" * 64)


def test_published_table_is_well_formed():
    for published in PUBLISHED.values():
        assert re.fullmatch(r"https://[\w./-]+\.(pth|pth\.tar)", published.url)
        assert published.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", published.sha256)
    assert len({published.url for published in PUBLISHED.values()}) == len(PUBLISHED)


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(JobError, match=f"has sha256 {server.sha256}, expected {'0' * 64}"):
        pull(server.url, tmp_path, sha256="0" * 64, retry=IMPATIENT)
    assert names(tmp_path) == set()


def test_first_use_is_remembered(server, tmp_path):
    path = pull(server.url, tmp_path, retry=IMPATIENT)
    path.unlink()
    server.content = b"something else" * 100_000
    with pytest.raises(JobError, match="has sha256"):
        pull(server.url, tmp_path, retry=IMPATIENT)
    assert not path.exists()


def test_a_file_that_was_changed_on_disk_is_refused(server, tmp_path):
    path = pull(server.url, tmp_path, retry=IMPATIENT)
    path.write_bytes(b"changed")
    with pytest.raises(JobError, match="delete it to fetch it again"):
        pull(server.url, tmp_path, retry=IMPATIENT)


def test_an_interrupted_transfer_goes_on(server, tmp_path):
    server.drops = [3_000_000, 1_000_000]
    path = pull(server.url, tmp_path, retry=IMPATIENT)
    assert path.read_bytes() == server.content
    assert server.requests == [None, "bytes=3000000-", "bytes=4000000-"]
    assert server.sent["bytes"] == len(server.content)


def test_a_second_run_goes_on_where_the_first_gave_up(server, tmp_path):
    server.drops = [2_000_000, 0, 0, 0]
    with pytest.raises(JobError, match=r"2000000 bytes are kept in .*run again"):
        pull(server.url, tmp_path, retry=IMPATIENT)
    assert names(tmp_path) == {"w.pth.part", "w.pth.part.etag"}
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == server.content
    assert server.requests[-1] == "bytes=2000000-"
    assert names(tmp_path) == {"w.pth", "w.pth.sha256"}


def test_a_file_that_changes_between_attempts_is_fetched_anew(server, tmp_path):
    server.drops = [3_000_000]
    server.change_on_drop = (b"second" * 900_000, '"two"')
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == b"second" * 900_000


def test_without_version_or_checksum_it_starts_again(server, tmp_path):
    server.etag = None
    server.drops = [3_000_000]
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == server.content
    assert server.requests == [None, None]


def test_with_a_checksum_no_version_is_needed(server, tmp_path):
    server.etag = None
    server.drops = [3_000_000]
    assert pull(server.url, tmp_path, sha256=server.sha256, retry=IMPATIENT).read_bytes() == server.content
    assert server.requests == [None, "bytes=3000000-"]


def test_a_server_without_ranges(server, tmp_path):
    server.ranges = False
    server.drops = [3_000_000]
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == server.content


@pytest.mark.parametrize("surplus", [0, 10])
def test_a_part_that_is_complete_or_too_long(server, tmp_path, surplus):
    (tmp_path / "w.pth.part").write_bytes(server.content + b"x" * surplus)
    path = tmp_path / "w.pth"
    assert download(server.url, path, sha256=server.sha256, retry=IMPATIENT) == server.sha256
    assert path.read_bytes() == server.content
    assert names(tmp_path) == {"w.pth"}


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.failures = [503, 429]
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == server.content


def test_a_server_that_stays_busy(server, tmp_path):
    server.failures = [503] * 9
    with pytest.raises(JobError, match=r"answered 503 .* 3 times in a row"):
        pull(server.url, tmp_path, retry=IMPATIENT)
    assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "words"), [(404, "check the address"), (403, "fetch it by hand")])
def test_a_definite_no_is_not_asked_again(server, tmp_path, status, words):
    server.failures = [status]
    with pytest.raises(UsageError, match=words):
        pull(server.url, tmp_path, retry=IMPATIENT)
    assert len(server.requests) == 1


def test_an_unreachable_server(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_address[1]
    with pytest.raises(JobError, match=r"refused.* 3 times in a row; 0 bytes are kept"):
        pull(f"http://127.0.0.1:{port}/w.pth", tmp_path, retry=IMPATIENT)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("densecl-r50-imagnet", "did you mean densecl-r50-imagenet"),
        ("s3://bucket/w.pth", "only http"),
        ("http://", "names no file"),
        ("http:///w.pth", "only http"),
        ("http://host/", "names no file"),
    ],
)
def test_what_cannot_be_pulled(tmp_path, name, words):
    with pytest.raises(UsageError, match=words):
        pull(name, tmp_path, retry=IMPATIENT)


def test_a_malformed_checksum(tmp_path):
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        pull("http://host/w.pth", tmp_path, sha256="abc")
