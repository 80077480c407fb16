"""Files by URL: the same behaviour on every store, whole files or none, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from freesolo.data import files, retry
from freesolo.errors import JobError, UsageError


@pytest.fixture
def fresh_s3() -> Iterator[None]:
    """fsspec keeps one connected client a process; these tests change the environment under it."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["path", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/a folder"
    return {
        "path": str(tmp_path / "a folder"),
        "file": f"file://{tmp_path}/a folder",
        "memory": f"memory://{uuid.uuid4().hex}/a folder",
    }[request.param]


def test_what_is_written_is_read_back_and_replaced(root: str) -> None:
    url = files.join(root, "deep", "ünïcode.bin")
    assert not files.exists(url)
    assert files.size(url) is None
    files.write_atomic(url, b"first")
    files.write_atomic(url, b"second, longer")
    assert files.read_bytes(url) == b"second, longer"
    assert files.exists(url)
    assert files.size(url) == len(b"second, longer")


def test_a_folder_is_not_a_file(root: str) -> None:
    files.write_atomic(files.join(root, "deep/x"), b"1")
    assert not files.exists(files.join(root, "deep"))
    assert files.is_folder(files.join(root, "deep"))
    assert not files.is_folder(files.join(root, "deep/x"))
    assert not files.is_folder(files.join(root, "nothing"))


def test_streams_read_from_front_to_back(root: str) -> None:
    url = files.join(root, "x")
    files.write_atomic(url, bytes(range(256)) * 100)
    with files.open_stream(url) as stream:
        assert stream.read(3) == b"\x00\x01\x02"
        assert stream.read() == (bytes(range(256)) * 100)[3:]


def test_listings_are_relative_sorted_and_recursive(root: str) -> None:
    for name in ("b/2", "b/10", "a", "c/d/e"):
        files.write_atomic(files.join(root, name), b"x")
    assert files.list_files(root) == ["a", "b/10", "b/2", "c/d/e"]
    assert files.list_files(files.join(root, "nothing")) == []


def test_globs_give_names_below_the_fixed_part(root: str) -> None:
    for name in ("b/2.jpg", "b/1.jpg", "b/no.txt", "c/3.jpg"):
        files.write_atomic(files.join(root, name), name.encode())
    for pattern, expected_base, expected in (
        ("**/*.jpg", root, ["b/1.jpg", "b/2.jpg", "c/3.jpg"]),
        ("b/?.jpg", files.join(root, "b"), ["1.jpg", "2.jpg"]),
        ("*/3.jpg", root, ["c/3.jpg"]),
        ("*.png", root, []),
    ):
        base, names = files.glob_files(files.join(root, pattern))
        assert (base, names) == (expected_base, expected)
        assert all(files.exists(files.join(base, name)) for name in names)


def test_a_relative_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.write_atomic("photos/1.jpg", b"1")
    assert files.glob_files("photos/*.jpg") == ("photos", ["1.jpg"])
    assert files.glob_files("*/1.jpg") == ("", ["photos/1.jpg"])
    assert files.read_bytes(files.join("", "photos/1.jpg")) == b"1"


def test_a_relative_glob_in_a_folder_whose_name_would_be_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run [1]").mkdir()
    monkeypatch.chdir(tmp_path / "run [1]")
    files.write_atomic("1.jpg", b"1")
    assert files.glob_files("*.jpg") == ("", ["1.jpg"])
    assert files.glob_files("./*.jpg") == (".", ["1.jpg"])
    assert files.glob_files("../run */*.jpg") == ("..", ["run [1]/1.jpg"])


def test_links_are_followed_but_not_into_what_they_lie_in(tmp_path: Path) -> None:
    for name in ("in/a", "in/b/c", "other/d"):
        files.write_atomic(str(tmp_path / name), b"x")
    (tmp_path / "in" / "to-a-file").symlink_to("a")
    (tmp_path / "in" / "to-a-folder").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "b" / "up").symlink_to("..")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "in" / "b")
    (tmp_path / "in" / "nowhere").symlink_to("gone")
    below = ["a", "b/c", "nowhere", "to-a-file", "to-a-folder/back/c", "to-a-folder/d"]
    assert files.list_files(str(tmp_path / "in")) == below
    assert files.list_files(str(tmp_path / "in"), depth=1) == ["a", "nowhere", "to-a-file"]
    assert files.list_files(str(tmp_path / "in"), depth=2) == [name for name in below if name.count("/") < 2]
    assert files.glob_files(str(tmp_path / "in" / "**")) == (str(tmp_path / "in"), below)
    assert files.glob_files(str(tmp_path / "in" / "*")) == (str(tmp_path / "in"), ["a", "nowhere", "to-a-file"])
    assert files.glob_files(str(tmp_path / "*" / "d")) == (str(tmp_path), ["other/d"])


def test_a_folder_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("in/a", "in/lost+found/b"):
        files.write_atomic(str(tmp_path / name), b"x")
    scandir = os.scandir

    def refused(folder: str) -> Any:  # root may read everything
        if folder.rstrip("/").endswith("lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)
    assert files.list_files(str(tmp_path / "in")) == ["a"]
    assert "lost+found: access denied; what is in it is left out" in caplog.text
    with pytest.raises(UsageError, match="access denied"):
        files.list_files(str(tmp_path / "in" / "lost+found"))


@pytest.mark.parametrize("name", ["x::y.jpg", "a b", "a#b", "a?b", "a%20b", "ä"])
def test_a_name_is_taken_as_it_is(root: str, name: str) -> None:
    if root.startswith("memory"):
        pytest.skip("names of that store, which only tests use, are read as fsspec's syntax")
    files.write_atomic(files.join(root, name), b"x")
    assert files.read_bytes(files.join(root, name)) == b"x"
    assert files.list_files(root) == [name]


def test_a_server_that_does_not_tell_how_large_a_file_is() -> None:
    with serving(b"some bytes, and no length") as url:
        assert files.exists(url)
        with pytest.raises(files.UnreadableFileError, match="does not tell how large it is; copy it"):
            files.size(url)


def test_a_name_that_is_too_long_is_one_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(files.UnreadableFileError, match="name too long"):
        files.read_bytes(str(tmp_path / ("x" * 300)))


@contextmanager
def serving(body: bytes) -> Iterator[str]:
    """An HTTP server that answers with a body and does not say how long it is."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on the screen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_writer_that_fails_leaves_what_was_there(root: str) -> None:
    url = files.join(root, "x")
    files.write_atomic(url, b"old")

    def fail_half_way() -> None:
        with files.atomic_writer(url) as stream:
            stream.write(b"new")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail_half_way()
    assert files.read_bytes(url) == b"old"
    assert files.list_files(root) == ["x"]


def test_nothing_is_seen_before_the_writer_is_done(root: str) -> None:
    url = files.join(root, "x")
    with files.atomic_writer(url) as stream:
        stream.write(b"new")
        stream.flush()
        assert not files.exists(url)
    assert files.read_bytes(url) == b"new"


def test_other_processes_writes_are_seen_at_once(root: str) -> None:
    url = files.join(root, "x")
    assert files.list_files(root) == []
    assert not files.exists(url)
    files.write_atomic(url, b"1")
    assert files.exists(url)


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("a", ("b", "c.tar"), "a/b/c.tar"),
        ("a/", ("/b/",), "a/b"),
        ("s3://bucket", ("x",), "s3://bucket/x"),
        ("memory://", ("x",), "memory://x"),
        ("/", ("x",), "/x"),
        ("", ("x",), "x"),
    ],
)
def test_join(url: str, parts: tuple[str, ...], joined: str) -> None:
    assert files.join(url, *parts) == joined


def test_is_local(tmp_path: Path) -> None:
    assert files.is_local(str(tmp_path))
    assert files.is_local(f"file://{tmp_path}")
    assert not files.is_local("memory://x")


@pytest.mark.parametrize("url", ["", "nosuch://bucket/x"])
def test_an_url_that_means_nothing_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="s3://"):
        files.read_bytes(url)


def test_a_missing_file_is_named(root: str) -> None:
    url = files.join(root, "nothing")
    with pytest.raises(UsageError, match=r"nothing: no such file or bucket"):
        files.read_bytes(url)
    with pytest.raises(UsageError, match="no such file or bucket"), files.open_stream(url):
        pass


def test_a_folder_in_place_of_a_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder where a file should be"):
        files.read_bytes(str(tmp_path))


def test_a_file_in_place_of_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UsageError, match="a folder where a file should be, or the reverse"):
        files.write_atomic(str(tmp_path / "x" / "y"), b"1")
    assert not files.exists(str(tmp_path / "x" / "y"))


def test_a_large_object_goes_in_parts_and_comes_back_whole(bucket: str) -> None:
    """More than one part of a multipart upload, and several blocks of a stream."""
    data = bytes(range(256)) * (60 * 4096)  # 60 MiB
    url = files.join(bucket, "large")
    with files.atomic_writer(url) as stream:
        stream.write(data)
    assert files.size(url) == len(data)
    with files.open_stream(url) as stream:
        assert stream.read(1000) == data[:1000]
        assert stream.read() == data[1000:]


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    missing = f"{bucket}-missing/x"
    assert not files.exists(missing)
    for act in (files.read_bytes, lambda url: files.write_atomic(url, b"1")):
        with pytest.raises(UsageError, match=rf"^{missing}: no such file or bucket; check the URL"):
            act(missing)


@pytest.mark.usefixtures("fresh_s3")
def test_a_key_that_the_store_does_not_take_is_explained(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_atomic(f"{bucket}/x", b"1")
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    for act in (files.read_bytes, files.exists, lambda url: files.write_atomic(url, b"2")):
        with pytest.raises(UsageError, match=rf"^{bucket}/x: access denied .*; check the credentials"):
            act(f"{bucket}/x")


@pytest.mark.usefixtures("fresh_s3")
def test_s3_without_credentials_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"^s3://nobody/x: no credentials; set AWS_ACCESS_KEY_ID"):
        files.write_atomic("s3://nobody/x", b"1")


@pytest.mark.usefixtures("fresh_s3")
@pytest.mark.timeout(60)
def test_an_s3_server_that_is_away_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(seconds=3.0, first_wait=0.1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for act in (files.read_bytes, files.exists, lambda url: files.write_atomic(url, b"1")):
        with pytest.raises(JobError, match=r"^s3://away/x: the store cannot be reached .*times in .*AWS_ENDPOINT_URL"):
            act("s3://away/x")
