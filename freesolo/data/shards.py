"""Data sets: photos in WebDataset shards beside a manifest.

A data set is a folder, `<url>/manifest.json` plus `<url>/shard-000000.tar` and so on. In a shard a sample is two
members side by side, `<key>.jpg` (the photo's own bytes; the extension is that of its real format) and `<key>.json`:

    {"image_id": 7, "file_name": "cats/7.jpg", "width": 640, "height": 480, "annotations": [COCO's, if there are any]}

`width` and `height` are those of the photo as it is looked at, after its EXIF orientation. The manifest is written
last, so that a data set half written is none; it names every shard, and nothing lists a folder to find them.

A shard may come from anyone. Its members are read as a stream and never put on a disk, nothing but its samples is let
in, and a reader holds no more than one sample of `bounds` (`freesolo.settings`), whatever the shard declares.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, ClassVar

from pydantic import ConfigDict

from freesolo.data import files
from freesolo.data.documents import (
    STRICT,
    Count,
    Sha256,
    ShardName,
    canonical_digest,
    document_text,
    parse_json,
    parse_manifest,
    read_document,
    short,
)
from freesolo.data.photos import file_extension
from freesolo.data.tar_members import DAMAGED, Member, read_members
from freesolo.errors import JobError, UsageError
from freesolo.settings import DEFAULT_BOUNDS, BoundsSettings

FORMAT = "freesolo.dataset"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_CHUNK = 2**20
_RECORD: dict[str, type] = {"image_id": int, "file_name": str, "width": int, "height": int, "annotations": list}


class ShardError(JobError):
    """A shard that is not what its manifest says: truncated, altered, missing, or not a shard at all."""


@dataclass(frozen=True, slots=True)
class SkippedPhoto:
    """A photo that could not be packed.

    Attributes:
        file_name: Relative to the folder that was packed.
        reason: Why, in a few words.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

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

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: ShardName
    samples: Count
    bytes: Count
    sha256: Sha256


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
        error: Why the photo must not be used: it is over the reader's bounds. `image_bytes` are then empty.
    """

    key: str
    image_bytes: bytes
    image_id: int
    file_name: str
    width: int
    height: int
    annotations: tuple[dict[str, Any], ...] = ()
    error: str | None = None


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

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

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
        return document_text(self._raw() | {"totals": self.totals()})

    @classmethod
    def from_json(cls, text: str | bytes) -> DatasetManifest:
        """Read what `to_json` wrote.

        Raises:
            UsageError: Not a data set's manifest, or a newer format's.
        """
        again = "pack the data set again"
        manifest = parse_manifest(cls, text, FORMAT, FORMAT_VERSION, again=again)
        ids = [category.get("id") for category in manifest.categories]
        if not all(type(each) is int for each in ids) or len(set(ids)) != len(ids):
            raise UsageError(f"a damaged manifest: category ids {short(ids)} are not numbers that differ; {again}")
        return manifest

    def names(self) -> list[str]:
        """Of the shards."""
        return [shard.name for shard in self.shards]

    def totals(self) -> dict[str, int]:
        """Of the shards together."""
        return {"samples": self.samples, "bytes": sum(shard.bytes for shard in self.shards)}

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
        return DatasetManifest.from_json(read_document(location))
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


def read_shard(url: str, shard: ShardInfo, *, bounds: BoundsSettings = DEFAULT_BOUNDS) -> Iterator[Sample]:
    """The samples of one shard, in order, streamed in constant memory.

    The digest is known, and checked, only at the end: who must not act on a damaged shard waits for the end.

    Args:
        url: The data set.
        shard: As its manifest has it.
        bounds: A larger sample comes without its photo, and with the reason as its `error`.

    Raises:
        ShardError: The shard is missing, truncated, altered or not a shard; names it. May come after some samples.
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    location = files.join(url, f"{shard.name}.tar")
    if not files.exists(location):
        raise ShardError(f"{location}: the shard is missing; the manifest says {shard.samples} samples")
    count = 0
    with files.open_stream(location) as stream:
        digesting = _DigestingReader(stream, shard.bytes, location)
        try:
            for sample in _read_samples(digesting, location, bounds):
                if count == shard.samples:
                    raise ShardError(f"{location}: more than the {shard.samples} samples of its manifest: altered")
                count += 1
                yield sample
            digesting.drain()
        except DAMAGED as error:
            raise ShardError(f"{location}: truncated or not a tar, after {count} samples ({error})") from error
    if count != shard.samples:
        raise ShardError(f"{location}: {count} samples where the manifest says {shard.samples}: truncated")
    if digesting.hexdigest() != shard.sha256:
        raise ShardError(f"{location}: its sha256 is not the manifest's: altered since it was packed")


def check_record(sample: Sample, bounds: BoundsSettings) -> None:
    """See that a sample's record can be written and will be read again.

    Raises:
        ValueError: Its annotations hold what JSON cannot, or are nested too deep, or it is too large.
    """
    try:
        record = _sample_json(sample)
        parse_json(record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its annotations cannot be stored: {error}") from error
    if too_large := over_bytes(len(record), bounds):
        raise ValueError(f"its annotations: {too_large}")


def _sample_json(sample: Sample) -> bytes:
    record: dict[str, Any] = {
        "image_id": sample.image_id,
        "file_name": sample.file_name,
        "width": sample.width,
        "height": sample.height,
    }
    if sample.annotations:
        record["annotations"] = list(sample.annotations)
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _read_samples(stream: _DigestingReader, location: str, bounds: BoundsSettings) -> Iterator[Sample]:
    """Pair each photo with its JSON, its neighbour; hold no more than one pair."""
    keys: set[str] = set()
    pending = _Pair()
    for member in read_members(stream, stream.expected):
        if pending.key not in ("", member.key) or member.key in keys:
            raise ShardError(
                f"{location}: {pending.key or member.key} lacks its photo or its JSON, or is there twice; "
                "was this packed by freesolo?"
            )
        pending.take(member, location, bounds)
        if pending.record is not None and pending.has_photo:
            keys.add(member.key)
            yield _parse_sample(pending, location, bounds)
            pending = _Pair()


@dataclass(slots=True)
class _Pair:
    """What has been read of one sample."""

    key: str = ""
    record: bytes | None = None
    photo: bytes = b""
    has_photo: bool = False
    error: str | None = None

    def take(self, member: Member, location: str, bounds: BoundsSettings) -> None:
        """Read a member, unless it is too large to be."""
        self.key = member.key
        is_record = member.extension == "json"
        if (self.record is not None) if is_record else self.has_photo:
            raise ShardError(f"{location}: {self.key} has two {'records' if is_record else 'photos'}; was it altered?")
        too_large = over_bytes(member.size, bounds)
        if too_large and is_record:
            raise ShardError(f"{location}: {self.key}.json: {too_large}")
        data = b"" if too_large else member.read()
        if is_record:
            self.record = data
        else:
            self.photo, self.has_photo, self.error = data, True, too_large


def over_bytes(size: int, bounds: BoundsSettings) -> str | None:
    """Why a file of `size` bytes is too large to be read; None if it is not."""
    if size <= bounds.max_sample_bytes:
        return None
    return f"{size} bytes are more than bounds.max_sample_bytes={bounds.max_sample_bytes} allows; raise it to read this"


def over_pixels(height: int, width: int, bounds: BoundsSettings) -> str | None:
    """Why a photo of this size is too large to be decoded; None if it is not."""
    if height * width <= bounds.max_pixels:
        return None
    return (
        f"{width} x {height} pixels are more than bounds.max_pixels={bounds.max_pixels} allows; raise it to read this"
    )


def _parse_sample(pair: _Pair, location: str, bounds: BoundsSettings) -> Sample:
    try:
        raw = parse_json(pair.record or b"")
        if not isinstance(raw, dict) or not raw.keys() <= _RECORD.keys():
            raise ValueError(f"it has more or other fields than {', '.join(_RECORD)}")
        raw.setdefault("annotations", [])
        for name, kind in _RECORD.items():
            if name not in raw:
                raise ValueError(f"it has no {name}")
            if type(raw[name]) is not kind:
                raise ValueError(f"{name} is not of type {kind.__name__}")
        if not (0 <= raw["image_id"] < 2**63 and 1 <= raw["width"] < 2**31 and 1 <= raw["height"] < 2**31):
            raise ValueError("image_id, width or height is out of range")
        if not all(isinstance(annotation, dict) for annotation in raw["annotations"]):
            raise ValueError("an annotation that is no object")
    except ValueError as error:
        raise ShardError(f"{location}: {pair.key}.json is damaged: {error!r}") from error
    reason = pair.error or over_pixels(raw["height"], raw["width"], bounds)
    return Sample(
        key=pair.key,
        image_bytes=b"" if reason else pair.photo,
        image_id=raw["image_id"],
        file_name=raw["file_name"],
        width=raw["width"],
        height=raw["height"],
        annotations=tuple(raw["annotations"]),
        error=reason,
    )


class _DigestingReader(io.RawIOBase):
    """A stream that hashes what passes through it, and ends in an error where the file should have ended."""

    def __init__(self, stream: files.ReadStream, expected: int, location: str) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.expected = expected
        self._left = expected
        self._location = location

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        self._left -= len(data)
        if self._left < 0:
            raise ShardError(f"{self._location}: longer than its manifest says: altered since it was packed")
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
