"""Reads, streams and writes through a store that breaks in every way: whole and right, or one clear error, in time."""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem, copy_files
from ray.train import Checkpoint
from s3fs import S3FileSystem

from freesolo.data import files, retry, stores
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import DatasetManifest, ShardError, read_dataset_manifest, read_shard
from freesolo.errors import JobError, UsageError
from freesolo.train.storage import checkpoint_files, checkpoint_storage
from tests.faults import FaultyProxy, Kind

pytestmark = pytest.mark.timeout(120)

CHUNK = 2**16
DATA = os.urandom(20 * CHUNK + 12345)
PASSING = [kind for kind in Kind if kind not in (Kind.FORBIDDEN, Kind.DEAD)]


@pytest.fixture
def proxy(bucket: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Between this process and the bucket; nothing breaks yet. Waits are a tenth of what they are."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.url)
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(seconds=12.0, first_wait=0.05, longest_wait=1.0))
    S3FileSystem.clear_instance_cache()
    s3_proxy.clear()
    yield s3_proxy
    s3_proxy.clear()
    S3FileSystem.clear_instance_cache()


def read_in_chunks(url: str) -> bytes:
    with files.open_stream(url) as stream:
        return b"".join(iter(lambda: stream.read(CHUNK), b""))


def read_at_once(url: str) -> bytes:
    with files.open_stream(url) as stream:
        return stream.read()


@pytest.mark.parametrize("kind", [kind for kind in PASSING if kind is not Kind.FLIPPED])
@pytest.mark.parametrize("read", [read_in_chunks, read_at_once])
def test_a_stream_goes_on_where_it_broke_off(
    kind: Kind, read: Callable[[str], bytes], bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_READ_BLOCK", 4 * CHUNK)
    files.write_atomic(f"{bucket}/x", DATA)
    assert read(f"{bucket}/x") == DATA
    blocks = proxy.count("GET", "/x")
    assert blocks >= 3
    proxy.clear()
    fault = proxy.add(kind, method="GET", path="/x", skip=1, count=2, delay=0.2)
    assert read(f"{bucket}/x") == DATA
    assert fault.hits == 2
    whole = proxy.count("GET", "/x")
    assert whole == (blocks if kind is not Kind.SLOW else blocks - 2), "a block that came is not asked for again"


@pytest.mark.parametrize("kind", PASSING)
def test_a_file_is_read_whole(kind: Kind, bucket: str, proxy: FaultyProxy) -> None:
    """A flipped bit too: the store kept a checksum."""
    files.write_atomic(f"{bucket}/x", DATA)
    fault = proxy.add(kind, method="GET", path="/x", count=2, delay=0.2)
    assert files.read_bytes(f"{bucket}/x") == DATA
    assert fault.hits == (2 if kind is not Kind.SLOW else 1)


def through_a_writer(url: str, data: bytes) -> None:
    with files.atomic_writer(url) as stream:
        stream.write(data)


@pytest.mark.parametrize("kind", [Kind.UNAVAILABLE, Kind.RESET, Kind.LOST_ANSWER, Kind.SLOW])
@pytest.mark.parametrize("write", [files.write_atomic, through_a_writer])
def test_a_file_is_written_whole(
    kind: Kind, write: Callable[[str, bytes], None], bucket: str, proxy: FaultyProxy
) -> None:
    write(f"{bucket}/x", b"old")
    fault = proxy.add(kind, method="PUT", path="/x", count=2, delay=0.2)
    write(f"{bucket}/x", DATA)
    assert fault.hits == (2 if kind is not Kind.SLOW else 1)
    assert files.read_bytes(f"{bucket}/x") == DATA


@pytest.mark.parametrize(
    ("kind", "method", "path"),
    [
        (Kind.UNAVAILABLE, "PUT", r"partNumber=2"),
        (Kind.LOST_ANSWER, "POST", r"uploadId="),
    ],
)
def test_an_upload_in_parts_is_begun_anew(kind: Kind, method: str, path: str, bucket: str, proxy: FaultyProxy) -> None:
    """Also when it was done and its answer was lost, and when what was begun cannot be withdrawn."""
    data = (DATA * 81)[: 101 * 2**20]  # over 100 MiB: s3fs sends it in parts
    faults = [proxy.add(kind, method=method, path=path, count=1)]
    faults.append(proxy.add(Kind.UNAVAILABLE, method="DELETE", path="uploadId=", count=1))
    files.write_atomic(f"{bucket}/x", data)
    assert [fault.hits for fault in faults] == [1, 1]
    assert proxy.count("PUT", "/x") >= 4, "in parts"
    assert read_at_once(f"{bucket}/x") == data


@pytest.mark.parametrize("kind", [Kind.UNAVAILABLE, Kind.RESET, Kind.TRUNCATED])
def test_what_is_there_is_seen(kind: Kind, bucket: str, proxy: FaultyProxy) -> None:
    """A store that is busy is not one that is empty."""
    for name in ("a/1", "a/2", "a/b/3"):
        files.write_atomic(f"{bucket}/{name}", b"12")
    looks: list[tuple[Callable[[str], object], object]] = [
        (lambda url: files.exists(f"{url}/1"), True),
        (lambda url: files.size(f"{url}/1"), 2),
        (lambda url: files.exists(f"{url}/4"), False),
        (files.is_folder, True),
        (files.list_files, ["1", "2", "b/3"]),
        (lambda url: files.glob_files(f"{url}/*")[1], ["1", "2"]),
    ]
    for look, expected in looks:
        proxy.clear()
        fault = proxy.add(kind, method="GET|HEAD", count=3)
        assert look(f"{bucket}/a") == expected
        assert fault.hits == 3 or (kind is Kind.TRUNCATED and fault.hits > 0)


def test_a_store_that_is_busy_for_a_while_is_waited_for(
    bucket: str, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    files.write_atomic(f"{bucket}/x", b"1")
    fault = proxy.add(Kind.UNAVAILABLE, method="GET", seconds=4.0)
    with caplog.at_level(logging.WARNING):
        assert files.read_bytes(f"{bucket}/x") == b"1"
    assert 4 < fault.hits < 60, "backs off"
    said = [record for record in caplog.records if record.name == "freesolo.data.retry"]
    assert len(said) == fault.hits + 1
    assert said[0].getMessage().startswith(f"{bucket}/x: try 1 failed (")
    assert all(record.exc_info is None for record in said)


def test_a_store_that_stays_away_is_an_error_in_time(bucket: str, proxy: FaultyProxy) -> None:
    files.write_atomic(f"{bucket}/x", b"1")
    retry.PATIENCE = retry.Patience(seconds=1.0, first_wait=0.05, longest_wait=1.0)  # put back by `proxy`
    for kind in (Kind.UNAVAILABLE, Kind.RESET, Kind.TRUNCATED):
        for act in (files.read_bytes, read_in_chunks):
            proxy.clear()
            proxy.add(kind, method="GET")
            began = time.monotonic()
            with pytest.raises(JobError, match=rf"^{bucket}/x: .*tried \d+ times in [12] s"):
                act(f"{bucket}/x")
            assert 0.9 < time.monotonic() - began < 4.0


def test_a_connection_that_is_dead_is_noticed(bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "READ_TIMEOUT", 1.0)
    files.write_atomic(f"{bucket}/x", DATA)
    proxy.add(Kind.DEAD, method="GET", skip=1, count=1)
    assert read_in_chunks(f"{bucket}/x") == DATA
    proxy.clear()
    proxy.add(Kind.DEAD)
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(seconds=2.0, first_wait=0.05))
    began = time.monotonic()
    with pytest.raises(JobError, match=r"the store cannot be reached .*tried \d times in [23] s\); check"):
        files.read_bytes(f"{bucket}/x")
    assert time.monotonic() - began < 5.0


def test_a_first_byte_that_takes_its_time_is_waited_for(bucket: str, proxy: FaultyProxy) -> None:
    assert stores.READ_TIMEOUT > 20.0
    files.write_atomic(f"{bucket}/x", b"1")
    fault = proxy.add(Kind.SLOW, method="GET", count=1, delay=4.0)
    assert files.read_bytes(f"{bucket}/x") == b"1"
    assert (fault.hits, proxy.count("GET", "/x")) == (1, 0)


def test_what_is_forbidden_is_not_asked_for_twice(bucket: str, proxy: FaultyProxy) -> None:
    files.write_atomic(f"{bucket}/x", b"1")
    for act in (files.read_bytes, files.exists, read_in_chunks, lambda url: files.write_atomic(url, b"2")):
        proxy.clear()
        fault = proxy.add(Kind.FORBIDDEN)
        with pytest.raises(UsageError, match=rf"^{bucket}/x: access denied"):
            act(f"{bucket}/x")
        assert fault.hits == 1


@pytest.mark.usefixtures("proxy")
def test_a_file_that_is_replaced_while_it_is_read_is_no_mixture(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_READ_BLOCK", 4 * CHUNK)
    files.write_atomic(f"{bucket}/x", DATA)
    with files.open_stream(f"{bucket}/x") as stream:
        stream.read(CHUNK)
        files.write_atomic(f"{bucket}/x", DATA[::-1])
        with pytest.raises(JobError, match=rf"^{bucket}/x: "):
            stream.read()


# --- data sets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    return compose_scenes(str(folder), 12, size=64, seed=0)


@pytest.fixture(scope="module")
def undisturbed(photos: str, tmp_path_factory: pytest.TempPathFactory) -> DatasetManifest:
    return pack(photos, str(tmp_path_factory.mktemp("packed")), samples_per_shard=4)


def test_a_data_set_is_packed_and_read_through_all_of_it(
    bucket: str, proxy: FaultyProxy, photos: str, undisturbed: DatasetManifest
) -> None:
    """Every request has something: a refusal, then a reset, then what the store says."""
    faults = [
        *(proxy.add(Kind.UNAVAILABLE, method="PUT", path=f"shard-00000{n}", count=1) for n in range(3)),
        *(proxy.add(Kind.RESET, method="PUT", path=f"shard-00000{n}", count=1) for n in range(3)),
        *(proxy.add(Kind.LOST_ANSWER, method="PUT", path=f"shard-00000{n}", count=1) for n in range(3)),
        *(proxy.add(Kind.TRUNCATED, method="GET", path=f"shard-00000{n}.tar", count=1) for n in range(3)),
        *(proxy.add(Kind.RESET_IN_BODY, method="GET", path=f"shard-00000{n}.tar", count=1) for n in range(3)),
        proxy.add(Kind.LOST_ANSWER, method="PUT", path="manifest.json", count=1),
    ]
    dataset = f"{bucket}/data"
    assert pack(photos, dataset, samples_per_shard=4).digest == undisturbed.digest
    manifest = read_dataset_manifest(dataset)
    samples = [sample for shard in manifest.shards for sample in read_shard(dataset, shard)]
    assert len({sample.image_id for sample in samples}) == len(samples) == 12
    assert [fault.hits for fault in faults] == [1] * len(faults)


def damaged_on_the_way(bucket: str, proxy: FaultyProxy) -> None:
    proxy.add(Kind.FLIPPED, method="GET", path=r"shard-000001\.tar")


def changed_after_packing(bucket: str, proxy: FaultyProxy) -> None:
    url = f"{bucket}/data/shard-000001.tar"
    data = bytearray(files.read_bytes(url))
    data[700] ^= 1  # in the first photo
    files.write_atomic(url, bytes(data))


def missing(bucket: str, proxy: FaultyProxy) -> None:
    S3FileSystem().rm(f"{bucket}/data/shard-000001.tar")


def cut_short(bucket: str, proxy: FaultyProxy) -> None:
    url = f"{bucket}/data/shard-000001.tar"
    files.write_atomic(url, files.read_bytes(url)[:-9000])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_on_the_way, "its sha256 is not the manifest's|damaged|truncated"),
        (changed_after_packing, "its sha256 is not the manifest's"),
        (missing, "the shard is missing; the manifest says 4 samples"),
        (cut_short, "truncated"),
    ],
)
def test_a_shard_that_is_not_what_was_packed_is_named_at_once(
    damage: Callable[[str, FaultyProxy], None], words: str, bucket: str, proxy: FaultyProxy, photos: str
) -> None:
    manifest = pack(photos, f"{bucket}/data", samples_per_shard=4)
    damage(bucket, proxy)
    began = time.monotonic()
    with pytest.raises(ShardError, match=rf"^{bucket}/data/shard-000001\.tar: .*({words})"):
        list(read_shard(f"{bucket}/data", manifest.shards[1]))
    assert time.monotonic() - began < 5.0


# --- Ray Train's way ----------------------------------------------------------------------------------------------


def test_checkpoints_outlast_what_pyarrow_does_not(bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    """As in a worker: pyarrow's S3, pickled and unpickled."""
    (tmp_path / "learner.pt").write_bytes(DATA)
    path, store = pickle.loads(pickle.dumps(checkpoint_storage(f"{bucket}/run/pretrain")))
    assert path == f"{bucket.removeprefix('s3://')}/run/pretrain"
    proxy.add(Kind.UNAVAILABLE, seconds=3.5)
    impatient = pickle.loads(pickle.dumps(FileSystem.from_uri(bucket)[0]))
    with pytest.raises(OSError, match="SLOW_DOWN"):
        copy_files(str(tmp_path), path, destination_filesystem=impatient, use_threads=False)
    proxy.clear()
    fault = proxy.add(Kind.UNAVAILABLE, seconds=3.5)
    copy_files(str(tmp_path), path, destination_filesystem=store, use_threads=False)
    assert fault.hits > 1
    assert files.read_bytes(f"{bucket}/run/pretrain/learner.pt") == DATA


def test_workers_of_a_node_read_a_checkpoint_each_from_files_of_its_own(bucket: str, tmp_path: Path) -> None:
    """Ray would have them share what the first of them fetched, and the second fetch it again over it."""
    files.write_atomic(f"{bucket}/step-1/learner.pt", b"weights")
    path, store = checkpoint_storage(f"{bucket}/step-1")
    checkpoint = Checkpoint(path, filesystem=store)
    with checkpoint_files(checkpoint) as first, checkpoint_files(checkpoint) as second:
        assert first != second
        assert (first / "learner.pt").read_bytes() == (second / "learner.pt").read_bytes() == b"weights"
    assert not first.exists()
    assert not second.exists()
    with checkpoint_files(Checkpoint(str(tmp_path))) as here:
        assert here == tmp_path
