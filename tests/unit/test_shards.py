"""Data sets: samples come back as they went in, bytes are reproducible, and damage is told."""

from __future__ import annotations

import hashlib
import json
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from freesolo.data import files
from freesolo.data.shards import (
    DatasetManifest,
    Sample,
    ShardError,
    ShardInfo,
    SkippedPhoto,
    read_dataset_manifest,
    read_shard,
    shard_index,
    shard_name,
    write_dataset_manifest,
    write_shard,
)
from freesolo.errors import JobError, UsageError
from freesolo.settings import BoundsSettings

JPEG = b"\xff\xd8\xff"
A, B = 64 * "a", 64 * "b"
PNG = b"\x89PNG\r\n\x1a\n"


def some_samples(count: int = 4, size: int = 20_000) -> list[Sample]:
    return [
        Sample(
            key=f"{i:012d}",
            image_bytes=(PNG if i % 2 else JPEG) + bytes([i % 251]) * size,
            image_id=i,
            file_name=f"été/{i}.v2.jpg",
            width=64,
            height=48 + i,
            annotations=({"id": 10 * i, "bbox": [0.5, 1, 2, 3], "iscrowd": 0},) if i % 3 == 0 else (),
        )
        for i in range(count)
    ]


def some_manifest(*shards: ShardInfo) -> DatasetManifest:
    return DatasetManifest(1, shards, True, ({"id": 1, "name": "chat"},), (SkippedPhoto("broken.jpg", "truncated"),))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "dataset")


@pytest.mark.parametrize("place", ["file", "memory"])
def test_samples_come_back_as_they_went_in(place: str, tmp_path: Path) -> None:
    url = {"file": f"file://{tmp_path}/d", "memory": "memory://shards/round-trip"}[place]
    shard = write_shard(url, "shard-000000", some_samples())
    assert list(read_shard(url, shard)) == some_samples()
    assert shard.samples == 4


def test_shard_info_tells_the_file(url: str) -> None:
    shard = write_shard(url, "shard-000003", some_samples())
    data = Path(url, "shard-000003.tar").read_bytes()
    assert shard == ShardInfo("shard-000003", 4, len(data), hashlib.sha256(data).hexdigest())


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_shard(str(tmp_path / "a"), "shard-000000", some_samples())
    monkeypatch.setattr("time.time", lambda: 1.0)  # a clock must not matter
    second = write_shard(str(tmp_path / "b"), "shard-000000", iter(some_samples()))
    assert first == second
    assert write_shard(str(tmp_path / "c"), "shard-000000", some_samples()[::-1]) != first


def test_a_sample_costs_two_headers_and_its_blocks(url: str) -> None:
    photo = Sample("1", JPEG + bytes(509), 1, "1.jpg", 1, 1)
    write_shard(url, "shard-000000", [photo])
    with tarfile.open(Path(url, "shard-000000.tar")) as tar:
        assert [member.offset for member in tar] == [0, 1024]


def test_members_are_the_photos_own_bytes_under_their_real_format(url: str) -> None:
    write_shard(url, "shard-000000", some_samples(2))
    with tarfile.open(Path(url, "shard-000000.tar")) as tar:
        assert sorted(tar.getnames()) == [
            "000000000000.jpg",
            "000000000000.json",
            "000000000001.json",
            "000000000001.png",
        ]
        body = tar.extractfile("000000000001.png")
        assert body is not None
        assert body.read() == some_samples(2)[1].image_bytes
        member = tar.getmember("000000000000.jpg")
        assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o444)


def test_webdataset_itself_reads_a_shard(url: str) -> None:
    write_shard(url, "shard-000000", some_samples(2))
    with Path(url, "shard-000000.tar").open("rb") as stream:
        read = list(group_by_keys(tar_file_expander([{"url": url, "stream": stream}])))
    assert [sample["__key__"] for sample in read] == ["000000000000", "000000000001"]
    assert read[0]["jpg"] == some_samples(1)[0].image_bytes
    assert json.loads(read[0]["json"]) == {
        "image_id": 0,
        "file_name": "été/0.v2.jpg",
        "width": 64,
        "height": 48,
        "annotations": [{"id": 0, "bbox": [0.5, 1, 2, 3], "iscrowd": 0}],
    }


def test_an_empty_shard_is_a_shard(url: str) -> None:
    shard = write_shard(url, "shard-000000", [])
    assert shard.samples == 0
    assert list(read_shard(url, shard)) == []


@pytest.mark.parametrize("key", ["a.b", "000000000000", ""])
def test_keys_that_webdataset_would_confuse_are_refused(url: str, key: str) -> None:
    with pytest.raises(ValueError, match="has a dot, or is used twice"):
        write_shard(url, "shard-000000", [some_samples(1)[0], replace(some_samples(1)[0], key=key)])
    assert files.list_files(url) == []


def test_a_writer_that_is_stopped_leaves_no_shard(url: str) -> None:
    def samples() -> Iterator[Sample]:
        yield from some_samples()
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(url, "shard-000000", samples())
    assert files.list_files(url) == []


def test_reading_holds_one_sample_at_a_time(url: str) -> None:
    shard = write_shard(url, "shard-000000", some_samples(200, size=100_000))
    consumed = read_shard(url, shard)
    assert next(consumed).image_id == 0
    # Cut the file under the reader: had it been read whole, the cut would go unnoticed.
    with Path(url, "shard-000000.tar").open("r+b") as stream:
        stream.truncate(5_000_000)
    with pytest.raises(ShardError):
        list(consumed)


@pytest.mark.parametrize("kept", [0, 100, 512, 15_000, 21_504, 30_000, -512, -11_000])
def test_a_truncated_shard_is_named_wherever_it_is_cut(url: str, kept: int) -> None:
    shard = write_shard(url, "shard-000000", some_samples())
    path = Path(url, "shard-000000.tar")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ShardError, match=r"shard-000000\.tar"):
        list(read_shard(url, shard))


def test_good_samples_come_before_the_truncation_is_found(url: str) -> None:
    shard = write_shard(url, "shard-000000", some_samples())
    path = Path(url, "shard-000000.tar")
    path.write_bytes(path.read_bytes()[:50_000])
    consumed = read_shard(url, shard)
    assert [next(consumed), next(consumed)] == some_samples()[:2]
    with pytest.raises(ShardError, match="truncated or not a tar, after 2 samples"):
        next(consumed)


def test_an_altered_shard_is_noticed_at_its_end(url: str) -> None:
    shard = write_shard(url, "shard-000000", some_samples())
    path = Path(url, "shard-000000.tar")
    data = bytearray(path.read_bytes())
    data[1000] ^= 1  # within the first photo
    path.write_bytes(data)
    consumed = read_shard(url, shard)
    assert len([next(consumed) for _ in range(4)]) == 4
    with pytest.raises(ShardError, match="sha256 is not the manifest's"):
        next(consumed)


def test_a_shard_of_another_count_is_noticed(url: str) -> None:
    shard = write_shard(url, "shard-000000", some_samples())
    with pytest.raises(ShardError, match="4 samples where the manifest says 5"):
        list(read_shard(url, replace(shard, samples=5)))


def test_a_missing_shard_is_named(url: str) -> None:
    with pytest.raises(ShardError, match=r"shard-000009\.tar: the shard is missing"):
        list(read_shard(url, ShardInfo("shard-000009", 1, 1, "")))


def test_the_padding_at_the_end_of_a_tar_is_part_of_its_digest(url: str) -> None:
    # Two headers, a block of JSON and two end blocks: what tells the end comes within the first MiB, the padding after.
    photo = Sample("1", JPEG + bytes(2**20 - 5 * 512 - 3), 1, "1.jpg", 1, 1)
    shard = write_shard(url, "shard-000000", [photo])
    assert shard.bytes > 2**20
    assert list(read_shard(url, shard)) == [photo]


def test_a_tar_of_something_else_is_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(JPEG)
    (tmp_path / "2.jpg").write_bytes(JPEG)
    Path(url).mkdir()
    with tarfile.open(Path(url, "shard-000000.tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "1.jpg", "1.jpg")
        tar.add(tmp_path / "2.jpg", "2.jpg")
    with pytest.raises(ShardError, match="1 lacks its photo or its JSON"):
        list(read_shard(url, ShardInfo("shard-000000", 2, 10240, A)))


def test_a_damaged_record_is_named(url: str) -> None:
    Path(url).mkdir()
    with (
        Path(url, "shard-000000.tar").open("wb") as stream,
        webdataset.TarWriter(stream, mtime=0, encoder=False) as tar,
    ):
        tar.write({"__key__": "7", "jpg": JPEG, "json": b'{"image_id": 7}'})
    with pytest.raises(ShardError, match=r"7\.json is damaged: ValueError\('it has no file_name'\)"):
        list(read_shard(url, ShardInfo("shard-000000", 1, 10240, A)))


def test_shard_errors_are_job_errors() -> None:
    assert issubclass(ShardError, JobError)


def test_manifest_round_trip_and_totals(url: str) -> None:
    manifest = some_manifest(ShardInfo("shard-000000", 3, 10, A), ShardInfo("shard-000001", 2, 5, B))
    write_dataset_manifest(url, manifest)
    assert read_dataset_manifest(url) == manifest
    assert manifest.samples == 5
    raw = json.loads(Path(url, "manifest.json").read_text(encoding="utf-8"))
    assert raw["totals"] == {"samples": 5, "bytes": 15}
    assert raw["format_version"] == 1


def test_digest_follows_content_only(url: str) -> None:
    manifest = some_manifest(ShardInfo("shard-000000", 3, 10, A))
    assert DatasetManifest.from_json(manifest.to_json()).digest == manifest.digest
    assert len(manifest.digest) == 64
    assert some_manifest(ShardInfo("shard-000000", 3, 10, B)).digest != manifest.digest


def test_a_folder_without_a_manifest_is_no_data_set(url: str) -> None:
    with pytest.raises(UsageError, match="no data set there"):
        read_dataset_manifest(url)
    write_shard(url, "shard-000000", some_samples())
    with pytest.raises(UsageError, match="no data set there"):
        read_dataset_manifest(url)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"format": "freesolo.dataset", "format_ver', "was it cut short"),
        ("[]", "not a freesolo.dataset but some other JSON"),
        ('{"format": "freesolo.labels", "format_version": 1}', "not a freesolo.dataset but freesolo.labels"),
        ('{"format": "freesolo.dataset", "format_version": 2}', "made by a newer freesolo: upgrade"),
        ('{"format": "freesolo.dataset", "format_version": 1}', "damaged manifest: shards: field required"),
    ],
)
def test_what_is_not_a_data_sets_manifest_is_refused(url: str, text: str, message: str) -> None:
    Path(url).mkdir()
    Path(url, "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        read_dataset_manifest(url)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize("categories", [({},), ({"id": "3"},), ({"id": 3}, {"id": 3})])
def test_categories_without_numbers_of_their_own_are_refused(url: str, categories: tuple[dict[str, Any], ...]) -> None:
    write_dataset_manifest(url, DatasetManifest(1, (), True, categories, ()))
    with pytest.raises(UsageError, match=r"category ids .* are not numbers that differ; pack the data set again"):
        read_dataset_manifest(url)


def test_shard_names_and_indices_are_inverse() -> None:
    assert shard_name(12) == "shard-000012"
    assert shard_index(shard_name(1_234_567)) == 1_234_567
    for name in ("shard-", "train-000001", "shard-x"):
        with pytest.raises(ValueError, match="not a shard's name"):
            shard_index(name)


# --- shards of bad actors -------------------------------------------------------------------------------------------


def member(name: str, body: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """A member's header and its body, as tar has them; `size` is what the header declares."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    info.size = len(body) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def record(**changes: object) -> bytes:
    raw = {"image_id": 1, "file_name": "1.jpg", "width": 8, "height": 6} | changes
    return json.dumps({name: value for name, value in raw.items() if value is not None}).encode()


def shard_of(url: str, *members: bytes, samples: int = 1) -> ShardInfo:
    """A shard whose manifest is right in every way: whoever made it made that, too."""
    data = b"".join(members) + bytes(1024)
    Path(url).mkdir(exist_ok=True)
    Path(url, "shard-000000.tar").write_bytes(data)
    return ShardInfo("shard-000000", samples, len(data), hashlib.sha256(data).hexdigest())


GOOD = member("1.jpg", JPEG) + member("1.json", record())
SECOND = member("2.jpg", JPEG) + member("2.json", record(image_id=2))


@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE),
        *(tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, b"V"),
    ],
)
def test_what_is_not_a_plain_file_is_refused(url: str, kind: bytes) -> None:
    shard = shard_of(url, GOOD, member("2.jpg", kind=kind), samples=2)
    with pytest.raises(ShardError, match=r"after 1 samples \(2\.jpg is not a plain file; was this packed"):
        list(read_shard(url, shard))


@pytest.mark.parametrize(
    "name", ["../2.jpg", "/etc/2.jpg", "a/2.jpg", "2", ".json", "2.tar.gz", "2.JPG\n", "2\x1b[31m.jpg", "é.jpg"]
)
def test_a_name_that_is_no_samples_is_refused(url: str, name: str) -> None:
    shard = shard_of(url, GOOD, member(name, JPEG), samples=2)
    with pytest.raises(ShardError, match=r"is not a sample's name; was this packed by freesolo") as caught:
        list(read_shard(url, shard))
    assert str(caught.value).isprintable()


def test_a_key_twice_or_two_photos_are_refused(url: str) -> None:
    with pytest.raises(ShardError, match="1 lacks its photo or its JSON, or is there twice"):
        list(read_shard(url, shard_of(url, GOOD, GOOD, samples=2)))
    with pytest.raises(ShardError, match="1 has two photos"):
        list(read_shard(url, shard_of(url, member("1.jpg", JPEG), member("1.png", PNG), samples=1)))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [10 * 2**30, 2**62, -1])
def test_a_declared_size_costs_no_memory(url: str, kind: bytes, size: int) -> None:
    shard = shard_of(url, member("1.jpg", kind=kind, size=size), bytes(3 * 2**20))
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match=r"shard-000000\.tar"):
            list(read_shard(url, shard))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20  # a few of the reader's blocks of 1 MiB


def test_a_sample_over_the_bounds_is_named_and_not_read(url: str) -> None:
    large = member("1.jpg", JPEG + bytes(50 * 2**20)) + member("1.json", record())
    shard = shard_of(url, large, SECOND, samples=2)
    tracemalloc.start()
    try:
        first, second = read_shard(url, shard, bounds=BoundsSettings(max_sample_bytes=2**20))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert first.error == "52428803 bytes are more than bounds.max_sample_bytes=1048576 allows; raise it to read this"
    assert first.image_bytes == b""
    assert (first.key, first.image_id, first.width) == ("1", 1, 8)
    assert (second.image_bytes, second.error) == (JPEG, None)
    assert peak < 8 * 2**20


def test_a_photo_of_too_many_pixels_is_named(url: str) -> None:
    shard = shard_of(url, member("1.jpg", JPEG), member("1.json", record(width=65500, height=65500)))
    (sample,) = read_shard(url, shard)
    assert sample.error == (
        "65500 x 65500 pixels are more than bounds.max_pixels=128000000 allows; raise it to read this"
    )
    assert sample.image_bytes == b""
    (sample,) = read_shard(
        url, shard_of(url, member("1.jpg", JPEG), member("1.json", record(width=12000, height=9000)))
    )
    assert sample.error is None


def test_a_record_over_the_bounds_is_refused(url: str) -> None:
    shard = shard_of(url, member("1.jpg", JPEG), member("1.json", record() + b" " * 2000))
    with pytest.raises(ShardError, match=r"1\.json: 2062 bytes are more than bounds\.max_sample_bytes=1000 allows"):
        list(read_shard(url, shard, bounds=BoundsSettings(max_sample_bytes=1000)))


def test_a_shard_that_does_not_end_is_left_where_it_should_have_ended(url: str) -> None:
    shard = shard_of(url, GOOD)
    with Path(url, "shard-000000.tar").open("ab") as stream:
        stream.truncate(2**33)  # eight gigabytes of nothing, as a sparse file
    with pytest.raises(ShardError, match="longer than its manifest says: altered"):
        list(read_shard(url, shard))


def test_more_samples_than_the_manifest_says_are_not_let_in(url: str) -> None:
    consumed = read_shard(url, shard_of(url, GOOD, SECOND, samples=1))
    assert next(consumed).key == "1"
    with pytest.raises(ShardError, match="more than the 1 samples of its manifest: altered"):
        next(consumed)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (record(width="8"), "width is not of type int"),
        (record(width=8.0), "width is not of type int"),
        (record(image_id=True), "image_id is not of type int"),
        (record(file_name=["1.jpg"]), "file_name is not of type str"),
        (record(height=0), "out of range"),
        (record(image_id=2**63), "out of range"),
        (record(image_id=-1), "out of range"),
        (record(annotations={"id": 1}), "annotations is not of type list"),
        (record(annotations=[7]), "an annotation that is no object"),
        (record(width=None), "it has no width"),
        (record(more=1), "more or other fields"),
        (record(annotations=[{"area": float("nan")}]), "NaN is not a number"),
        (record()[:-1] + b', "width": 9}', "a key is there twice"),
        (record().replace(b"1.jpg", b"\\ud800"), "surrogates not allowed"),
        (record().replace(b"1.jpg", b"\xff"), "UnicodeDecodeError"),
        (record()[:-1] + b', "annotations": [{"a": ' + b"[" * 90 + b"]" * 90 + b"}]}", "nested more than 64 deep"),
        (b"[" * 100_000, "nested too deep"),
        (record(image_id=1).replace(b"1,", b"1" * 5000 + b","), "Exceeds the limit"),
        (record()[:-1] + b', "annotations": [{"area": 1e999}]}', "too large a number"),
        (b"", "Expecting value"),
    ],
)
def test_a_record_is_read_strictly(url: str, body: bytes, complaint: str) -> None:
    with pytest.raises(ShardError, match=rf"1\.json is damaged: .*{complaint}"):
        list(read_shard(url, shard_of(url, member("1.jpg", JPEG), member("1.json", body))))


MANIFEST = some_manifest(ShardInfo("shard-000000", 3, 10, A), ShardInfo("shard-000001", 2, 5, B)).to_json()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"name": "shard-000001"', '"name": "../../shard-000001"', r"shards\.1\.name: string should match"),
        ('"name": "shard-000001"', '"name": "shard-000000"', "two parts are named shard-000000"),
        ('"samples": 2', '"samples": -2', r"shards\.1\.samples: input should be greater"),
        ('"samples": 2', '"samples": 2.0', r"shards\.1\.samples: input should be a valid integer"),
        ('"samples": 2', '"samples": 3', "its totals are .*'samples': 5.*, its parts' .*'samples': 6"),
        ('"samples": 2', f'"samples": {10**400}', "shards.1.samples"),
        ('"samples": 2', '"samples": NaN', "NaN is not a number"),
        (f'"sha256": "{B}"', '"sha256": "BB"', r"shards\.1\.sha256: string should match"),
        ('"annotated": true', '"annotated": 1', "annotated: input should be a valid boolean"),
        ('"annotated": true', '"annotated": true, "annotated": false', "a key is there twice"),
        ('"annotated": true', '"annotated": true, "unknown": 1', "unknown: unexpected"),
        ('"format_version": 1', '"format_version": true', "format_version=True is not a version"),
        ('"format_version": 1', '"format_version": 0', "format_version=0 is not a version"),
        ('"categories": [', '"categories": [[], ', r"categories\.0: input should be an object"),
        ('"name": "chat"', f'"name": {"[" * 5000}', "nested"),
        ('"name": "chat"', f'"name": {"[" * 70 + "]" * 70}', "nested more than 64 deep"),
    ],
)
def test_a_manifest_is_read_strictly(old: str, new: str, complaint: str) -> None:
    assert DatasetManifest.from_json(MANIFEST).samples == 5
    assert MANIFEST.count(old) == 1
    with pytest.raises(UsageError, match=complaint):
        DatasetManifest.from_json(MANIFEST.replace(old, new))


def test_a_manifest_that_is_too_large_to_be_one_is_not_read(url: str) -> None:
    Path(url).mkdir()
    with Path(url, "manifest.json").open("wb") as stream:
        stream.truncate(2**31)
    with pytest.raises(UsageError, match=r"manifest\.json: 2147483648 bytes, more than"):
        read_dataset_manifest(url)
