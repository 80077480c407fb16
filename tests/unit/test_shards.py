"""Data sets: samples come back as they went in, bytes are reproducible, and damage is told."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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

JPEG = b"\xff\xd8\xff"
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
    with tarfile.open(Path(url, "shard-000000.tar"), "w") as tar:
        tar.add(tmp_path / "1.jpg", "1.jpg")
        tar.add(tmp_path / "2.jpg", "2.jpg")
    with pytest.raises(ShardError, match="1 lacks its photo or its JSON"):
        list(read_shard(url, ShardInfo("shard-000000", 2, 1, "")))


def test_a_damaged_record_is_named(url: str) -> None:
    Path(url).mkdir()
    with Path(url, "shard-000000.tar").open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as tar:
        tar.write({"__key__": "7", "jpg": JPEG, "json": b'{"image_id": 7}'})
    with pytest.raises(ShardError, match=r"7\.json is damaged: KeyError\('file_name'\)"):
        list(read_shard(url, ShardInfo("shard-000000", 1, 1, "")))


def test_shard_errors_are_job_errors() -> None:
    assert issubclass(ShardError, JobError)


def test_manifest_round_trip_and_totals(url: str) -> None:
    manifest = some_manifest(ShardInfo("shard-000000", 3, 10, "aa"), ShardInfo("shard-000001", 2, 5, "bb"))
    write_dataset_manifest(url, manifest)
    assert read_dataset_manifest(url) == manifest
    assert manifest.samples == 5
    raw = json.loads(Path(url, "manifest.json").read_text(encoding="utf-8"))
    assert raw["totals"] == {"samples": 5, "bytes": 15}
    assert raw["format_version"] == 1


def test_digest_follows_content_only(url: str) -> None:
    manifest = some_manifest(ShardInfo("shard-000000", 3, 10, "aa"))
    assert DatasetManifest.from_json(manifest.to_json()).digest == manifest.digest
    assert len(manifest.digest) == 64
    assert some_manifest(ShardInfo("shard-000000", 3, 10, "ab")).digest != manifest.digest


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
        ('{"format": "freesolo.dataset", "format_version": 1}', "damaged manifest: 'shards'"),
    ],
)
def test_what_is_not_a_data_sets_manifest_is_refused(url: str, text: str, message: str) -> None:
    Path(url).mkdir()
    Path(url, "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        read_dataset_manifest(url)
    assert "manifest.json" in str(caught.value)


def test_shard_names_and_indices_are_inverse() -> None:
    assert shard_name(12) == "shard-000012"
    assert shard_index(shard_name(1_234_567)) == 1_234_567
    for name in ("shard-", "train-000001", "shard-x"):
        with pytest.raises(ValueError, match="not a shard's name"):
            shard_index(name)
