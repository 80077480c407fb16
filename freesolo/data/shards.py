"""Data sets: photos in WebDataset shards beside a manifest.

A data set is a folder, `<url>/manifest.json` plus `<url>/shard-000000.tar` and so on. In a shard a sample is two
members side by side, `<key>.jpg` (the photo's own bytes; the extension is that of its real format) and `<key>.json`:

    {"image_id": 7, "file_name": "cats/7.jpg", "width": 640, "height": 480, "annotations": [COCO's, if there are any]}

`width` and `height` are those of the photo as it is looked at, after its EXIF orientation. The manifest is written
last, so that a data set half written is none; it names every shard, and nothing lists a folder to find them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from freesolo.data import files
from freesolo.data.documents import canonical_digest, document_text, parse_versioned
from freesolo.data.photos import file_extension
from freesolo.errors import JobError, UsageError

FORMAT = "freesolo.dataset"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_CHUNK = 2**20


class ShardError(JobError):
    """A shard that is not what its manifest says: truncated, altered, missing, or not a shard at all."""


@dataclass(frozen=True, slots=True)
class SkippedPhoto:
    """A photo that could not be packed.

    Attributes:
        file_name: Relative to the folder that was packed.
        reason: Why, in a few words.
    """

    file_name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard of a data set.

    Attributes:
        name: `shard-000000`; the file is `<name>.tar`.
        samples: How many it holds.
        bytes: Size of the file.
        sha256: Of the file, in hexadecimal.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One photo of a data set.

    Attributes:
        key: Unique in the data set, without a dot.
        image_bytes: The photo's file as it was found, never re-encoded.
        image_id: Unique in the data set; COCO's own where it came from COCO.
        file_name: Relative path that it was packed from.
        width: Pixels, after the EXIF orientation.
        height: Pixels, after the EXIF orientation.
        annotations: COCO's, verbatim; empty where there are none.
    """

    key: str
    image_bytes: bytes
    image_id: int
    file_name: str
    width: int
    height: int
    annotations: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class DatasetManifest:
    """What a data set holds.

    Attributes:
        format_version: Of the layout described at the head of this module.
        shards: In order.
        annotated: Whether the samples carry ground truth; an image without objects has none in either case.
        categories: COCO's, verbatim; empty where the set is not annotated.
        skipped: Photos that were found but could not be read.
    """

    format_version: int
    shards: tuple[ShardInfo, ...]
    annotated: bool
    categories: tuple[dict[str, Any], ...]
    skipped: tuple[SkippedPhoto, ...]

    @property
    def samples(self) -> int:
        """Photos in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """Sha256 of the manifest's canonical JSON: two data sets with the same digest have the same bytes."""
        return canonical_digest(self._raw())

    def to_json(self) -> str:
        """The manifest's file: the same text for the same manifest."""
        totals = {"samples": self.samples, "bytes": sum(shard.bytes for shard in self.shards)}
        return document_text(self._raw() | {"totals": totals})

    @classmethod
    def from_json(cls, text: str) -> DatasetManifest:
        """Read what `to_json` wrote.

        Raises:
            UsageError: Not a data set's manifest, or a newer format's.
        """
        raw = parse_versioned(text, FORMAT, FORMAT_VERSION)
        try:
            return cls(
                format_version=raw["format_version"],
                shards=tuple(ShardInfo(**shard) for shard in raw["shards"]),
                annotated=raw["annotated"],
                categories=tuple(raw["categories"]),
                skipped=tuple(SkippedPhoto(**photo) for photo in raw["skipped"]),
            )
        except (KeyError, TypeError) as error:
            raise UsageError(f"a damaged manifest: {error}; pack the data set again") from error

    def _raw(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def shard_name(index: int) -> str:
    """The name of the shard at `index`, from 0: its file is `<name>.tar`, its labels' `<name>.parquet`."""
    return f"shard-{index:06d}"


def shard_index(name: str) -> int:
    """The index that `shard_name` was given.

    Raises:
        ValueError: Not a shard's name.
    """
    prefix, _, digits = name.partition("-")
    if prefix != "shard" or not digits.isdecimal():
        raise ValueError(f"{name!r} is not a shard's name such as shard-000012")
    return int(digits)


def read_dataset_manifest(url: str) -> DatasetManifest:
    """The manifest of the data set at `url`.

    Raises:
        UsageError: Nothing is there, it is not a data set, or a newer freesolo made it.
        JobError: The store cannot be reached.
    """
    location = files.join(url, MANIFEST_NAME)
    if not files.exists(location):
        raise UsageError(f"{url}: no data set there (no {MANIFEST_NAME}); make one with jobs/pack_shards.py")
    try:
        return DatasetManifest.from_json(files.read_bytes(location).decode(errors="replace"))
    except UsageError as error:
        raise UsageError(f"{location}: {error}") from error


def write_dataset_manifest(url: str, manifest: DatasetManifest) -> None:
    """Make the data set at `url` whole: write its manifest, when all of its shards are there.

    Raises:
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    files.write_atomic(files.join(url, MANIFEST_NAME), manifest.to_json().encode())


def write_shard(url: str, name: str, samples: Iterable[Sample]) -> ShardInfo:
    """Write one shard into the data set at `url`; the same samples give the same bytes.

    Args:
        url: The data set.
        name: `shard_name(index)`.
        samples: In the order of the shard; consumed one at a time, so that a generator is never held in memory.

    Raises:
        ValueError: Two samples share a key, or a key has a dot (WebDataset would split it there).
        UsageError, JobError: The store refuses, or cannot be reached. No file is left.
    """
    # Here and not above: webdataset imports torch, three seconds that reading a manifest need not wait for.
    from webdataset import TarWriter

    keys: set[str] = set()
    with files.atomic_writer(files.join(url, f"{name}.tar")) as stream:
        digesting = _DigestingWriter(stream)
        # An integer time: a float would cost an extended header of 1 kB a member.
        with TarWriter(digesting, user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
            for sample in samples:
                if sample.key in keys or "." in sample.key or not sample.key:
                    raise ValueError(f"{name}: key {sample.key!r} is empty, has a dot, or is used twice")
                keys.add(sample.key)
                tar.write(
                    {
                        "__key__": sample.key,
                        file_extension(sample.image_bytes): sample.image_bytes,
                        "json": _sample_json(sample),
                    }
                )
    return ShardInfo(name=name, samples=len(keys), bytes=digesting.size, sha256=digesting.hexdigest())


def read_shard(url: str, shard: ShardInfo) -> Iterator[Sample]:
    """The samples of one shard, in order, streamed in constant memory.

    The digest is known, and checked, only at the end: who must not act on a damaged shard waits for the end.

    Raises:
        ShardError: The shard is missing, truncated, altered or not a shard; names it. May come after some samples.
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    location = files.join(url, f"{shard.name}.tar")
    if not files.exists(location):
        raise ShardError(f"{location}: the shard is missing; the manifest says {shard.samples} samples")
    count = 0
    with files.open_stream(location) as stream:
        digesting = _DigestingReader(stream)
        try:
            for sample in _read_tar(digesting, location):
                count += 1
                yield sample
        except tarfile.TarError as error:
            raise ShardError(f"{location}: truncated or not a tar, after {count} samples ({error})") from error
        digesting.drain()
    if count != shard.samples:
        raise ShardError(f"{location}: {count} samples where the manifest says {shard.samples}: truncated")
    if digesting.hexdigest() != shard.sha256:
        raise ShardError(f"{location}: its sha256 is not the manifest's: altered since it was packed")


def _sample_json(sample: Sample) -> bytes:
    record: dict[str, Any] = {
        "image_id": sample.image_id,
        "file_name": sample.file_name,
        "width": sample.width,
        "height": sample.height,
    }
    if sample.annotations:
        record["annotations"] = list(sample.annotations)
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()


def _read_tar(stream: _DigestingReader, location: str) -> Iterator[Sample]:
    """Pair each photo with its JSON, its neighbour; hold no more than one pair."""
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK) as tar:
        pending: dict[str, bytes] = {}
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps a record of all that it has read
            key, _, extension = member.name.partition(".")
            body = tar.extractfile(member)
            if body is None:
                raise ShardError(f"{location}: {member.name} is not a file; was this packed by freesolo?")
            pending["json" if extension == "json" else "image"] = body.read()
            previous = pending.setdefault("key", key.encode()).decode()
            if previous != key:
                raise ShardError(f"{location}: {previous} lacks its photo or its JSON; was this packed by freesolo?")
            if "json" in pending and "image" in pending:
                yield _parse_sample(key, pending["image"], pending["json"], location)
                pending = {}


def _parse_sample(key: str, image: bytes, record: bytes, location: str) -> Sample:
    try:
        raw = json.loads(record)
        return Sample(
            key=key,
            image_bytes=image,
            image_id=int(raw["image_id"]),
            file_name=str(raw["file_name"]),
            width=int(raw["width"]),
            height=int(raw["height"]),
            annotations=tuple(raw.get("annotations", ())),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{location}: {key}.json is damaged: {error!r}") from error


class _DigestingReader(io.RawIOBase):
    """A stream that hashes what passes through it."""

    def __init__(self, stream: files.ReadStream) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    def drain(self) -> None:
        """Read what is left: a tar ends before its file does."""
        while self.read(_CHUNK):
            pass

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _DigestingWriter:
    """A stream that hashes and counts what passes through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._stream.write(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
