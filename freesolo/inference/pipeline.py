"""A data set through a pool of models into a label set: Free Mask extraction and SOLO prediction alike.

Exactly once, whatever dies. A batch is a function of its shard (`inference.batches`); a lost task or actor is replaced
by Ray and computes the same again (`inference.pool`); records are collected here by their place in the shard, and a
shard's file is written when the last of them has come, whole or not at all. A job started again skips the shards whose
files are there, and the manifest comes last.

Ray Data's own row checkpoints (`ray.data.checkpoint`) are not used: they remember which rows were done, while the
number and order of the files that hold them depend on scheduling, so no two runs of them give the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from freesolo.data import files
from freesolo.data.label_records import ImageLabels
from freesolo.data.labels import (
    MANIFEST_NAME,
    LabelFile,
    LabelManifest,
    LabelPlan,
    begin_label_set,
    check_label_set,
    finish_label_set,
    finished_label_files,
    read_label_file,
    read_label_manifest,
    write_label_file,
)
from freesolo.data.lease import held
from freesolo.data.shards import DatasetManifest, ShardInfo
from freesolo.errors import JobError
from freesolo.inference.batches import BatchPlan, Entry
from freesolo.inference.pool import ModelPool, label_batches
from freesolo.progress import progress
from freesolo.settings import ExtractSettings, PredictSettings, ResourceSettings

NAMED_UNREADABLE = 5


@dataclass(frozen=True, slots=True)
class LabellingJob:
    """A label set to make.

    Attributes:
        name: Of the work, where progress is shown.
        dataset_url: The photos.
        dataset: Their manifest.
        labels_url: Where the label set goes.
        plan: What it is made from, kept with it.
        batches: How photos are resized and grouped.
        pool: The model.
        max_bad_samples: Share of the photos that may be unreadable.
    """

    name: str
    dataset_url: str
    dataset: DatasetManifest
    labels_url: str
    plan: LabelPlan
    batches: BatchPlan
    pool: ModelPool
    max_bad_samples: float


@dataclass(frozen=True, slots=True)
class LabellingResult:
    """What came of a labelling job.

    Attributes:
        manifest: Of the label set.
        seconds: Time that this run took.
        labelled_shards: Shards that this run labelled, in the data set's order.
        skipped_shards: Shards that an earlier run had finished.
    """

    manifest: LabelManifest
    seconds: float
    labelled_shards: tuple[str, ...]
    skipped_shards: tuple[str, ...]

    @property
    def images_per_second(self) -> float | None:
        """Of the shards that this run labelled; None for none."""
        labelled = set(self.labelled_shards)
        images = sum(file.images for file in self.manifest.files if file.name in labelled)
        return images / self.seconds if images else None

    @property
    def images(self) -> int:
        """Images of the label set, unreadable ones included."""
        return self.manifest.images

    @property
    def instances(self) -> int:
        """Instances of all images."""
        return self.manifest.instances

    @property
    def unreadable(self) -> int:
        """Images that could not be read."""
        return self.manifest.unreadable


def plan_settings(settings: ExtractSettings | PredictSettings, resources: ResourceSettings) -> dict[str, Any]:
    """All settings that decide what the labels are, for a `LabelPlan`.

    How many unreadable photos are too many does not: a job that stopped over it may go on with another budget. Neither
    does the number of workers. Whether they have GPUs does, because those compute in bfloat16.
    """
    precision = "bfloat16" if resources.gpus_per_worker else "float32"
    return settings.model_dump(mode="json", exclude={"max_bad_samples"}) | {"precision": precision}


def label_photos(job: LabellingJob) -> LabellingResult:
    """Label every photo of a data set, or those that an earlier, unfinished run has left.

    Ray must be connected, unless the label set is complete already.

    Raises:
        UsageError: Another label set is at the URL, or the pool does not fit the cluster.
        LeaseError: Another process labels it.
        JobError: Too many photos are unreadable, a shard was altered, or the store fails. What is finished is kept.
    """
    started = time.monotonic()
    if done := _finished(job, started):
        return done
    with held(files.join(job.labels_url, ".lease")):
        return _finished(job, started) or _label_unfinished(job, started)


def _finished(job: LabellingJob, started: float) -> LabellingResult | None:
    """The result where the label set is complete already."""
    if not check_label_set(job.labels_url, job.plan):
        return None
    if not files.exists(files.join(job.labels_url, MANIFEST_NAME)):
        return None
    names = tuple(shard.name for shard in job.dataset.shards)
    manifest = read_label_manifest(job.labels_url)
    return LabellingResult(manifest, time.monotonic() - started, labelled_shards=(), skipped_shards=names)


def _label_unfinished(job: LabellingJob, started: float) -> LabellingResult:
    begin_label_set(job.labels_url, job.plan)
    finished = finished_label_files(job.labels_url, job.dataset)
    unreadable = _Unreadable(job)
    unreadable.add_finished(finished.values())
    unfinished = [shard for shard in job.dataset.shards if shard.name not in finished]
    written = dict(finished)
    for shard_name, records in _label_shards(job, unfinished):
        written[shard_name] = write_label_file(job.labels_url, shard_name, records)
        unreadable.add(records)
    return LabellingResult(
        manifest=finish_label_set(job.labels_url, job.dataset, written=written.values()),
        seconds=time.monotonic() - started,
        labelled_shards=tuple(shard.name for shard in unfinished),
        skipped_shards=tuple(shard.name for shard in job.dataset.shards if shard.name in finished),
    )


def _label_shards(job: LabellingJob, shards: Sequence[ShardInfo]) -> Iterator[tuple[str, list[ImageLabels]]]:
    """Each shard's records, when the last of them has come."""
    collected = {shard.name: _ShardRecords(shard) for shard in shards}
    for shard in shards:
        if shard.samples == 0:
            yield shard.name, collected.pop(shard.name).in_order()
    filled = [shard for shard in shards if shard.samples]
    done_before = job.dataset.samples - sum(shard.samples for shard in filled)
    with (
        progress(job.name, total=job.dataset.samples, unit="images", done=done_before) as advance,
        closing(label_batches(job.pool, job.dataset_url, filled, job.batches)) as stream,
    ):
        for shard_name, entries in stream:
            advance(len(entries))
            if collected[shard_name].add(entries):
                yield shard_name, collected.pop(shard_name).in_order()
    if collected:
        raise JobError(f"{job.labels_url}: not all records of {', '.join(collected)} have come; run the job again")


@dataclass(slots=True)
class _ShardRecords:
    """The records of a shard that have come so far, each in its place."""

    shard: ShardInfo
    _by_index: dict[int, ImageLabels] = field(default_factory=dict)

    def add(self, entries: Sequence[Entry]) -> bool:
        """Take some; whether all are there now."""
        self._by_index.update((entry.index, entry.labels) for entry in entries)
        return len(self._by_index) == self.shard.samples

    def in_order(self) -> list[ImageLabels]:
        """All, in the shard's order."""
        return [self._by_index[index] for index in range(self.shard.samples)]


class _Unreadable:
    """Counts unreadable photos, and stops the job when they are too many."""

    def __init__(self, job: LabellingJob) -> None:
        self._job = job
        self._count = 0
        self._named: list[str] = []

    def add_finished(self, label_files: Iterable[LabelFile]) -> None:
        """Count those of shards that an earlier run has finished.

        Raises:
            JobError: As `add`.
        """
        for file in label_files:
            if file.unreadable:
                self.add(read_label_file(self._job.labels_url, file))

    def add(self, records: Sequence[ImageLabels]) -> None:
        """Count those of a shard.

        Raises:
            JobError: There are more than the job allows; names the first few.
        """
        bad = [f"{record.key} ({record.error})" for record in records if record.error is not None]
        self._count += len(bad)
        self._named += bad[: NAMED_UNREADABLE - len(self._named)]
        allowed = self._job.max_bad_samples * self._job.dataset.samples
        if self._count > allowed:
            raise JobError(
                f"{self._job.dataset_url}: {self._count} unreadable photos, more than the {allowed:g} that "
                f"max_bad_samples={self._job.max_bad_samples:g} allows; first: {'; '.join(self._named)}. Finished "
                "shards are kept: raise max_bad_samples and run again to go on"
            )
