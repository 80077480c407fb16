"""Every job while S3 breaks: the undisturbed run's result, or one clear line and an exit code, in time."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from freesolo.data import files
from tests.chaos.jobs import JOBS, Place, Run
from tests.chaos.record import FOLDER, Row, record
from tests.faults import Fault, FaultyProxy, Kind
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN
from tests.servers import S3Server

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.usefixtures("ray_cluster"),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]

ROWS = Path(__file__).stem
OUTAGE = 30.0
SLOW = 20.0
# What is promised, in seconds: going on after an outage of 30 s, after a single fault, and saying what is wrong. The
# machine may be busy with other things.
RECOVERED_BY, ERROR_BY = OUTAGE + 45.0, 90.0


@pytest.fixture(scope="module")
def place(s3_server: S3Server, s3_proxy: FaultyProxy) -> Iterator[Place]:
    (FOLDER / f"{ROWS}.jsonl").unlink(missing_ok=True)
    if not s3_server.running:
        s3_server.start()
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in s3_server.environment.items():
            environment.setenv(variable, value)
        environment.setenv("AWS_ENDPOINT_URL", s3_proxy.url)
        S3FileSystem.clear_instance_cache()
        S3FileSystem().mkdir("chaos-store")
        place = Place("s3://chaos-store")
        place.make_photos()
        yield place
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def before(place: Place, s3_proxy: FaultyProxy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every job once, undisturbed: what is expected, and what the others start from."""
    runs: dict[str, Run] = {}
    folder = tmp_path_factory.mktemp("configs")
    for job in JOBS:
        s3_proxy.clear()
        ended = place.run(job, "undisturbed", runs, folder)
        assert uploads_done_twice(s3_proxy) == 0
        runs[job] = place.made_by(job, "undisturbed", ended)
    return runs


@pytest.fixture(autouse=True)
def whole_again(s3_proxy: FaultyProxy) -> Iterator[None]:
    s3_proxy.clear()
    yield
    s3_proxy.clear()


# Files that a run writes again and again, undisturbed: its journal, its leases, which checkpoint is the best, Ray's
# books and its mark that a folder is there.
GROWING = re.compile(r"metrics\.jsonl$|/\.lease/|best\.json$|checkpoint_manager_snapshot|validate_storage_marker")


def uploads_done_twice(proxy: FaultyProxy) -> int:
    """Uploads that reached the store beyond one a file."""
    twice = {path: count for path, count in proxy.stored.items() if count > 1 and not GROWING.search(path)}
    logging.getLogger(__name__).info("uploaded more than once: %s", twice)
    return sum(count - 1 for count in twice.values())


def seconds_to_recovery(fault: Fault) -> float:
    assert fault.first_hit is not None, "the fault hit nothing"
    assert fault.recovered is not None, "nothing was asked again"
    return fault.recovered - fault.first_hit


@dataclass(frozen=True, slots=True)
class Passing:
    """A fault that passes.

    Attributes:
        name: In the table.
        job: What is under way.
        make: Puts it into force.
        within: Seconds to recovery that are promised.
    """

    name: str
    job: str
    make: Callable[[FaultyProxy], Fault]
    within: float


def outage(begin: str) -> Callable[[FaultyProxy], Fault]:
    """Of the whole store, from the first request of a file on: every call of every process."""
    return lambda proxy: proxy.add(Kind.UNAVAILABLE, begin=begin, seconds=OUTAGE)


def one_each(kind: Kind, pattern: str, **which: object) -> Callable[[FaultyProxy], Fault]:
    return lambda proxy: proxy.add(kind, path=pattern, **which)


SHARD = r"data/shard-.*\.tar"
PASSING = [
    Passing("503 for 30 s", "pack", outage(r"shard-000001\.tar"), RECOVERED_BY),
    Passing("503 for 30 s", "pretrain", outage(r"samples/step-00000002"), RECOVERED_BY),
    Passing("503 for 30 s", "extract", outage(r"masks-.*shard-000000\.parquet"), RECOVERED_BY),
    Passing("connections reset", "predict", one_each(Kind.RESET_IN_BODY, SHARD, method="GET", count=6), RECOVERED_BY),
    Passing("answers lost", "pack", one_each(Kind.LOST_ANSWER, r"\.tar", method="PUT", count=6), RECOVERED_BY),
    Passing("answers cut short", "train", one_each(Kind.TRUNCATED, SHARD, method="GET", count=6), RECOVERED_BY),
    Passing("first byte after 20 s", "evaluate", one_each(Kind.SLOW, r"parquet", count=1, delay=SLOW), RECOVERED_BY),
    Passing("first byte after 20 s", "train", one_each(Kind.SLOW, SHARD, count=2, delay=SLOW), RECOVERED_BY),
]


@pytest.mark.parametrize("case", PASSING, ids=lambda case: f"{case.job}: {case.name}")
def test_what_passes_changes_nothing(
    case: Passing, place: Place, s3_proxy: FaultyProxy, before: dict[str, Run], tmp_path: Path
) -> None:
    expected = before[case.job]
    name = re.sub(r"\W+", "-", case.name)
    fault = case.make(s3_proxy)
    ended = place.run(case.job, name, before, tmp_path)
    hits, seconds, twice = fault.hits, seconds_to_recovery(fault), uploads_done_twice(s3_proxy)
    s3_proxy.clear()
    made = place.made_by(case.job, name, ended)
    lost = made.lost(expected)
    again = sum(len(epoch) - len(set(epoch)) for epoch in made.used)
    reads = hits if fault.kind in (Kind.TRUNCATED, Kind.RESET_IN_BODY) else 0
    said = [f"{count} {what}" for count, what in ((twice, "uploads"), (reads, "reads"), (again, "samples")) if count]
    same = made.made == expected.made and made.used == expected.used
    record(ROWS, Row(case.name, case.job, "same result" if same else "other", lost, ", ".join(said), seconds, hits))
    assert made.used == expected.used, "each sample once an epoch"
    assert made.made == expected.made, "another result than the undisturbed run's"
    assert seconds < case.within


@dataclass(frozen=True, slots=True)
class Lasting:
    """A fault that does not pass.

    Attributes:
        name: In the table.
        job: What is under way.
        breaks: Breaks it, given the bucket, the proxy before it and the environment.
        code: Of exit.
        words: Regular expression, in the line that the job ends with.
    """

    name: str
    job: str
    breaks: Callable[[str, FaultyProxy, pytest.MonkeyPatch], None]
    code: int
    words: str


def wrong_key(bucket: str, proxy: FaultyProxy, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    S3FileSystem.clear_instance_cache()


def withdrawn_key(bucket: str, proxy: FaultyProxy, environment: pytest.MonkeyPatch) -> None:
    proxy.add(Kind.FORBIDDEN, method="GET", path=SHARD)


def missing_shard(bucket: str, proxy: FaultyProxy, environment: pytest.MonkeyPatch) -> None:
    S3FileSystem().rm(f"{bucket}/data/shard-000002.tar")


def changed_shard(bucket: str, proxy: FaultyProxy, environment: pytest.MonkeyPatch) -> None:
    url = f"{bucket}/data/shard-000002.tar"
    data = bytearray(files.read_bytes(url))
    data[700] ^= 1  # in its first photo
    files.write_atomic(url, bytes(data))


MISSING, CHANGED = "shard-000002.tar: the shard is missing", "shard-000002.tar: its sha256 is not the manifest's"
LASTING = [
    *(Lasting("wrong key", job, wrong_key, 2, r"access denied .*; check the credentials") for job in JOBS),
    Lasting("key withdrawn", "extract", withdrawn_key, 2, r"shard-\d+\.tar: access denied .*; check the credentials"),
    Lasting("key withdrawn", "pretrain", withdrawn_key, 2, r"shard-\d+\.tar: access denied .*; check the credentials"),
    Lasting("a shard missing", "extract", missing_shard, 1, MISSING),
    Lasting("a shard missing", "train", missing_shard, 1, MISSING),
    Lasting("a shard changed", "predict", changed_shard, 1, CHANGED),
    Lasting("a shard changed", "pretrain", changed_shard, 1, CHANGED),
]


@pytest.mark.parametrize("case", LASTING, ids=lambda case: f"{case.job}: {case.name}")
def test_what_lasts_is_one_clear_error(
    case: Lasting,
    place: Place,
    s3_proxy: FaultyProxy,
    before: dict[str, Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = re.sub(r"\W+", "-", case.name)
    url = f"{place.root}/data/shard-000002.tar"
    whole = files.read_bytes(url)
    case.breaks(place.root, s3_proxy, monkeypatch)
    try:
        ended = place.run(case.job, name, before, tmp_path)
    finally:
        hits = sum(fault.hits for fault in s3_proxy.faults)
        s3_proxy.clear()
        monkeypatch.undo()
        S3FileSystem.clear_instance_cache()
        files.write_atomic(url, whole)
    said = re.sub(r"s3://\S*/", "", ended.error)
    record(ROWS, Row(case.name, case.job, f"exit code {ended.code}: {said}", None, "", ended.seconds, hits))
    assert ended.code == case.code, ended.errors[-3000:]
    assert re.search(rf"^error: .*{case.words}", ended.error), ended.errors[-3000:]
    assert "Traceback" not in ended.errors
    assert ended.seconds < ERROR_BY
