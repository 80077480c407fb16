"""Label sets: the instances of a data set's images, as one model or algorithm saw them.

A label set is a folder of its own, so that images are stored once however many rounds of labels there are:

    <url>/plan.json              first: what makes it, from what; a resumed job must ask for the same
    <url>/shard-000000.parquet   one for each shard of the data set, under its name; one row an image, in its order
    <url>/manifest.json          last: a label set without it is not there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from freesolo.data import files
from freesolo.data.documents import (
    STRICT,
    Count,
    Sha256,
    ShardName,
    canonical_digest,
    differences,
    document_text,
    parse_fields,
    parse_manifest,
    parse_versioned,
    read_document,
)
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.label_table import LabelFileError, decode_labels, encode_labels
from freesolo.data.shards import DatasetManifest, ShardInfo, shard_index
from freesolo.errors import JobError, UsageError

__all__ = [  # the records are part of what a label set is, wherever they are defined
    "ImageLabels",
    "LabelFile",
    "LabelFileError",
    "LabelKind",
    "LabelManifest",
    "LabelPlan",
    "LabelSet",
    "LabelledInstance",
    "begin_label_set",
    "check_label_set",
    "check_labels_match",
    "finish_label_set",
    "finished_label_files",
    "number_instances",
    "read_label_file",
    "read_label_manifest",
    "read_labels_of",
    "write_label_file",
]

FORMAT = "freesolo.labels"
PLAN_FORMAT = "freesolo.labels.plan"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
MASK_IDS_PER_SHARD = 10_000_000

LabelKind = Literal["free-masks", "pseudo-labels", "predictions"]


@dataclass(frozen=True, slots=True)
class LabelPlan:
    """What a label set is made from, written down before the first label.

    Attributes:
        dataset_digest: `DatasetManifest.digest` of the images.
        dataset_url: Where they were; the only thing that may differ when a job is resumed.
        kind: What the labels are.
        model: What made them: weights reference, sha256 digest, registry version or None; `categories`, COCO's
            records by ascending id, where it tells any apart: a label's category is a place among them.
        settings: The resolved configuration.
        parent: Digest of the label set that the model was trained on, its lineage; None for the first.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    dataset_digest: Sha256
    dataset_url: str
    kind: LabelKind
    model: dict[str, Any]
    settings: dict[str, Any]
    parent: Sha256 | None


@dataclass(frozen=True, slots=True)
class LabelFile:
    """One file of a label set.

    Attributes:
        name: The image shard's, `shard-000000`; the file is `<name>.parquet`.
        images: Rows, unreadable images included.
        instances: Of all images.
        unreadable: Images with an error.
        bytes: Size of the file.
        sha256: Of the file, in hexadecimal.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: ShardName
    images: Count
    instances: Count
    unreadable: Count
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class LabelManifest:
    """What a label set holds and where it comes from.

    Attributes:
        format_version: Of the layout described at the head of this module.
        plan: What it was made from.
        files: One for each shard of the data set, in order.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format_version: int
    plan: LabelPlan
    files: tuple[LabelFile, ...]

    @property
    def images(self) -> int:
        """Images of the data set, all of which have a row."""
        return sum(file.images for file in self.files)

    @property
    def instances(self) -> int:
        """Instances of all images."""
        return sum(file.instances for file in self.files)

    @property
    def unreadable(self) -> int:
        """Images that could not be read."""
        return sum(file.unreadable for file in self.files)

    @property
    def digest(self) -> str:
        """Sha256 of the manifest's canonical JSON: the label set's identity in a lineage."""
        return canonical_digest(self._raw())

    def to_json(self) -> str:
        """The manifest's file: the same text for the same manifest."""
        return document_text(self._raw() | {"totals": self.totals()})

    @classmethod
    def from_json(cls, text: str | bytes) -> LabelManifest:
        """Read what `to_json` wrote.

        Raises:
            UsageError: Not a label set's manifest, or a newer format's.
        """
        return parse_manifest(cls, text, FORMAT, FORMAT_VERSION, again="make the label set again")

    def names(self) -> list[str]:
        """Of the files."""
        return [file.name for file in self.files]

    def totals(self) -> dict[str, int]:
        """Of the files together."""
        return {"images": self.images, "instances": self.instances, "unreadable": self.unreadable}

    def _raw(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True, slots=True)
class LabelSet:
    """A label set and where it is."""

    url: str
    manifest: LabelManifest


def begin_label_set(url: str, plan: LabelPlan) -> None:
    """Start the label set at `url`, or take up one that was started with the same plan.

    Raises:
        UsageError: Something else is there: names what differs and what to do.
        JobError: The store cannot be reached.
    """
    if not check_label_set(url, plan):
        files.write_atomic(files.join(url, PLAN_NAME), _plan_text(plan).encode())


def check_label_set(url: str, plan: LabelPlan) -> bool:
    """Whether the label set of this plan is at `url`, begun or finished; False where nothing is.

    Raises:
        UsageError, JobError: As `begin_label_set`.
    """
    location = files.join(url, PLAN_NAME)
    asked = json.loads(_plan_text(plan))
    if not files.exists(location):
        if files.exists(files.join(url, MANIFEST_NAME)):
            raise UsageError(f"{url}: there is something else already (a {MANIFEST_NAME}); choose another URL")
        return False
    try:
        there = parse_versioned(read_document(location), PLAN_FORMAT, FORMAT_VERSION)
    except UsageError as error:
        raise UsageError(f"{location}: {error}") from error
    different = differences(there | {"dataset_url": None}, asked | {"dataset_url": None})
    if different:
        raise UsageError(
            f"{url}: a label set made otherwise is there: {'; '.join(different)}; choose another URL for this one"
        )
    return True


def number_instances(shard_name: str, records: Iterable[ImageLabels]) -> list[ImageLabels]:
    """Give every instance its `mask_id`: ten million times the shard's index, plus 1, 2, ... in the order of the file.

    So an id is unique in the label set, tells its shard, and depends neither on image ids nor on who computed what.

    Raises:
        ValueError: More than ten million instances.
    """
    first = shard_index(shard_name) * MASK_IDS_PER_SHARD + 1
    numbered: list[ImageLabels] = []
    count = 0
    for record in records:
        instances = tuple(replace(each, mask_id=first + count + i) for i, each in enumerate(record.instances))
        numbered.append(replace(record, instances=instances))
        count += len(instances)
    if count >= MASK_IDS_PER_SHARD:
        raise ValueError(f"{shard_name}: {count} instances; ids are given for fewer than {MASK_IDS_PER_SHARD}")
    return numbered


def write_label_file(url: str, shard_name: str, records: Iterable[ImageLabels]) -> LabelFile:
    """Write the labels of one shard's images; the same records give the same bytes.

    Args:
        url: The label set, begun.
        shard_name: The image shard's name.
        records: One for each sample of the shard, in the shard's order. Their `mask_id`s are numbered here.

    Raises:
        ValueError: A key is used twice, or an RLE is not of its image's size.
        UsageError, JobError: The store refuses, or cannot be reached. No file is left.
    """
    numbered = number_instances(shard_name, records)
    _check_records(shard_name, numbered)
    data = encode_labels(numbered)
    files.write_atomic(_file_url(url, shard_name), data)
    return _describe(shard_name, data, numbered)


def finished_label_files(url: str, dataset: DatasetManifest) -> dict[str, LabelFile]:
    """The label files that are there and whole, by shard name: what a resumed job need not make again.

    Raises:
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    finished: dict[str, LabelFile] = {}
    for shard in dataset.shards:
        if files.exists(_file_url(url, shard.name)):
            file = _inspect(url, shard.name)
            if file is not None and file.images == shard.samples:
                finished[shard.name] = file
    return finished


def finish_label_set(url: str, dataset: DatasetManifest, *, written: Iterable[LabelFile] = ()) -> LabelManifest:
    """Make the label set at `url` whole: check that every image is accounted for, then write the manifest.

    Args:
        url: The label set, begun, its files written.
        dataset: Of the images.
        written: What `write_label_file` and `finished_label_files` returned, to save reading those files again.

    Raises:
        UsageError: The label set was not begun, or for another data set.
        JobError: A file is missing, damaged or does not account for every image of its shard; names the first few.
    """
    plan = read_label_plan(url)
    if plan.dataset_digest != dataset.digest:
        raise UsageError(f"{url}: {_other_dataset(plan)}")
    known = {file.name: file for file in written}
    found = [known[shard.name] if shard.name in known else _inspect(url, shard.name) for shard in dataset.shards]
    wrong = [
        complaint
        for shard, file in zip(dataset.shards, found, strict=True)
        if (complaint := _complain(url, shard, file))
    ]
    if wrong:
        raise JobError(
            f"{url}: {len(wrong)} label files are not whole, first: {'; '.join(wrong[:3])}; run the job again"
        )
    manifest = LabelManifest(FORMAT_VERSION, plan, tuple(file for file in found if file is not None))
    files.write_atomic(files.join(url, MANIFEST_NAME), manifest.to_json().encode())
    return manifest


def read_label_manifest(url: str) -> LabelManifest:
    """The manifest of the label set at `url`.

    Raises:
        UsageError: Nothing is there, it is half written, it is not a label set, or a newer freesolo made it.
        JobError: The store cannot be reached.
    """
    location = files.join(url, MANIFEST_NAME)
    if not files.exists(location):
        if files.exists(files.join(url, PLAN_NAME)):
            raise UsageError(f"{url}: a label set that was begun and not finished; run its job again to finish it")
        raise UsageError(f"{url}: no label set there (no {MANIFEST_NAME}); check the URL")
    try:
        return LabelManifest.from_json(read_document(location))
    except UsageError as error:
        raise UsageError(f"{location}: {error}") from error


def read_label_file(url: str, file: LabelFile) -> list[ImageLabels]:
    """The labels of one shard's images, in the shard's order.

    Args:
        url: The label set.
        file: As its manifest has it.

    Raises:
        LabelFileError: The file is missing, damaged, or not the one of the manifest; names it.
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    location = _file_url(url, file.name)
    if not files.exists(location):
        raise LabelFileError(f"{location}: the label file is missing; was the label set made for this data set?")
    data = read_document(location)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise LabelFileError(f"{location}: its sha256 is not the manifest's: altered since the label set was made")
    return decode_labels(data, location)


def read_labels_of(url: str, dataset: DatasetManifest) -> LabelSet:
    """The label set at `url`, which must be of the images of `dataset`.

    Raises:
        UsageError: As `read_label_manifest`, or the label set was made for another data set.
        JobError: The store cannot be reached.
    """
    labels = read_label_manifest(url)
    try:
        check_labels_match(labels, dataset)
    except UsageError as error:
        raise UsageError(f"{url}: {error}") from error
    return LabelSet(url, labels)


def check_labels_match(labels: LabelManifest, dataset: DatasetManifest) -> None:
    """Refuse labels of other images.

    Raises:
        UsageError: The label set was made for another data set, or has not one file for each of its shards, in order.
    """
    if labels.plan.dataset_digest != dataset.digest:
        raise UsageError(_other_dataset(labels.plan))
    if [file.name for file in labels.files] != [shard.name for shard in dataset.shards]:
        raise UsageError("a damaged manifest: its files are not those of the data set's shards; make the labels again")


def _other_dataset(plan: LabelPlan) -> str:
    return (
        f"the label set was made for another data set ({plan.dataset_url}, digest {plan.dataset_digest[:12]}); "
        "give that one, or make labels for this one"
    )


def _file_url(url: str, name: str) -> str:
    return files.join(url, f"{name}.parquet")


def _plan_text(plan: LabelPlan) -> str:
    return document_text({"format": PLAN_FORMAT, "format_version": FORMAT_VERSION, **asdict(plan)})


def read_label_plan(url: str) -> LabelPlan:
    """What the label set at `url`, finished or not, was begun with.

    Raises:
        UsageError: None was begun there, or the plan is damaged.
        JobError: The store cannot be reached.
    """
    location = files.join(url, PLAN_NAME)
    if not files.exists(location):
        raise UsageError(f"{url}: no label set was begun there (no {PLAN_NAME})")
    try:
        raw = parse_versioned(read_document(location), PLAN_FORMAT, FORMAT_VERSION)
        del raw["format"], raw["format_version"]
        return parse_fields(LabelPlan, raw)
    except UsageError as error:
        raise UsageError(f"{location}: {error}") from error


def _check_records(shard_name: str, records: Sequence[ImageLabels]) -> None:
    keys = {record.key for record in records}
    if len(keys) != len(records):
        raise ValueError(f"{shard_name}: {len(records)} records have {len(keys)} different keys")
    for record in records:
        for instance in record.instances:
            if list(instance.rle["size"]) != [record.height, record.width]:
                raise ValueError(
                    f"{shard_name}: {record.key}: an RLE of size {instance.rle['size']} in an image of "
                    f"height and width {[record.height, record.width]}"
                )


def _describe(shard_name: str, data: bytes, records: Sequence[ImageLabels]) -> LabelFile:
    return LabelFile(
        name=shard_name,
        images=len(records),
        instances=sum(len(record.instances) for record in records),
        unreadable=sum(record.error is not None for record in records),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _inspect(url: str, name: str) -> LabelFile | None:
    """What is in a label file; None if it is missing or damaged."""
    try:
        location = _file_url(url, name)
        if not files.exists(location):
            return None
        data = read_document(location)
        return _describe(name, data, decode_labels(data, location))
    except LabelFileError:
        return None


def _complain(url: str, shard: ShardInfo, file: LabelFile | None) -> str | None:
    if file is None or files.size(_file_url(url, shard.name)) != file.bytes:
        return f"{shard.name} is missing or damaged"
    if file.images != shard.samples:
        return f"{shard.name} accounts for {file.images} of {shard.samples} images"
    return None
