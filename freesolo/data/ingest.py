"""Photos onto a Ray cluster: packed into shards by its tasks, a fraction taken, and streamed as training batches.

Streams: Ray Data reads, decodes and augments on the cluster's CPUs, one stream per train worker.

    shards ──(read: whole windows, permuted)──▶ samples ──(view: decode, crop)──▶ rows ──(collate)──▶ batches

Each train worker drives its own Ray Data execution over exactly the pieces that `data.order` gives it, in that order.
No process sees the whole data set, and what has been consumed is known by counting steps.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayTaskError

from freesolo.data.ahead import made_ahead
from freesolo.data.files import join
from freesolo.data.labels import LabelSet
from freesolo.data.lease import held
from freesolo.data.order import Order, Piece, Span, StreamState, worker_spans
from freesolo.data.pack import PackedShard, ShardTask, check_skipped, finish_data_set, pack_shard, packing
from freesolo.data.reading import SAMPLES_PER_TABLE, PieceReader
from freesolo.data.shards import DatasetManifest, Sample, ShardInfo
from freesolo.data.sources import PhotoCollection
from freesolo.data.stand_ins import with_stand_ins
from freesolo.data.subset import (
    ShardSurvey,
    Subset,
    SubsetSource,
    choose_subset,
    finish_subset,
    finished_subset,
    subset_tasks,
    survey_shard,
    write_subset_shard,
)
from freesolo.data.views import Row, View
from freesolo.errors import JobError, UsageError
from freesolo.progress import progress
from freesolo.settings import DEFAULT_BOUNDS, BoundsSettings

# That one reader keeps at work: it waits for storage, and decodes nothing.
DECODING_CPUS_PER_READER = 4
# Read tasks of one Ray Data execution. Small data sets run all their epochs in one, without a pause between epochs.
PIECES_PER_EXECUTION = 2000
# Put together during the step before, or waiting for it to end.
BATCHES_AHEAD = 1

AnyView = TypeVar("AnyView", bound=View)
Batch = TypeVar("Batch")
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that could not be used, and why.

    Attributes:
        key: The sample's, or its shard's name where the sample was not reached.
        reason: In a few words.
    """

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class StreamBatch(Generic[Batch]):
    """One batch of a worker's stream; in place of `bad` samples it has copies of good ones."""

    content: Batch
    bad: tuple[BadSample, ...]


@dataclass(frozen=True, slots=True)
class TrainingStream(Generic[AnyView, Batch]):
    """The samples of a data set as batches, epoch after epoch.

    Attributes:
        dataset_url: Of the data set.
        manifest: Its manifest.
        labels: Label set to join, shard by shard; None: the data set's own annotations, where the view wants any.
        view: How a sample becomes a row, in a Ray task.
        collate: How the view's rows become a batch, in the train worker.
        order: The order of epochs.
        batch_size: Samples of an optimiser step, all workers together.
        max_bad_samples: Share of samples that may be unusable; others stand in for them.
        accumulation_steps: Batches that this stream yields per optimiser step.
        prefetch_batches: Batches made ready ahead of use.
        bounds: A larger sample is a bad one.
    """

    dataset_url: str
    manifest: DatasetManifest
    labels: LabelSet | None
    view: AnyView
    collate: Callable[[AnyView, Sequence[Row]], Batch]
    order: Order
    batch_size: int
    max_bad_samples: float
    accumulation_steps: int = 1
    prefetch_batches: int = 2
    bounds: BoundsSettings = DEFAULT_BOUNDS

    @property
    def samples(self) -> int:
        """Samples in the data set."""
        return self.manifest.samples

    def batches(
        self, state: StreamState, *, steps: int, worker: int = 0, workers: int = 1
    ) -> Iterator[StreamBatch[Batch]]:
        """The batches of one worker for the next `steps` steps: `steps * accumulation_steps` of them.

        They are put together in a thread, the next one while this one is used.

        Raises:
            JobError: A shard or label file cannot be read at all, an epoch is seen to have no usable sample or more
                unusable ones than may be met, or shared memory is full.
        """
        return made_ahead(self._batches(state, steps, worker, workers), BATCHES_AHEAD)

    def _batches(
        self, state: StreamState, steps: int, worker: int, workers: int
    ) -> Generator[StreamBatch[Batch], None, None]:
        rows_per_batch = self.batch_size // workers // self.accumulation_steps
        spans = partial(
            worker_spans, state, self.samples, steps=steps, batch_size=self.batch_size, worker=worker, workers=workers
        )
        rows = with_stand_ins(
            self._rows(spans()),
            spans(),
            self._rows,
            samples=self.samples,
            batch_size=self.batch_size,
            max_bad_samples=self.max_bad_samples,
        )
        while batch := list(islice(rows, rows_per_batch)):
            yield self._batch(batch)

    def _rows(self, spans: Iterable[Span]) -> Iterator[Row]:
        pieces = self.order.pieces(spans)
        while chunk := list(islice(pieces, PIECES_PER_EXECUTION)):
            with DataContext.current(_context(self.view.task_bytes)):  # a data set keeps the one that it was made in
                dataset = ray.data.read_datasource(
                    Readers([self._reader(piece).tables for piece in chunk], [len(piece) for piece in chunk]),
                    override_num_blocks=len(chunk),
                    # No CPUs, and a limit: any that reading does not need, Ray Data would keep from decoding.
                    num_cpus=0,
                    concurrency=min(_readers(), len(chunk)),  # Ray Data warns of more
                ).map_batches(partial(_view_block, self.view), batch_size=None, batch_format="pyarrow", num_cpus=1)
            try:
                with full_memory_told():
                    for table in dataset.iter_batches(
                        batch_size=self.batch_size, batch_format="pyarrow", prefetch_batches=self.prefetch_batches
                    ):
                        yield from _rows_of(table)
            except RayTaskError as error:
                raise cause_of(error) from None

    def _reader(self, piece: Piece) -> PieceReader:
        numbers = piece.window.shards
        return PieceReader(
            dataset_url=self.dataset_url,
            shards=tuple(self.manifest.shards[number] for number in numbers),
            labels_url=None if self.labels is None else self.labels.url,
            label_files=() if self.labels is None else tuple(self.labels.manifest.files[number] for number in numbers),
            piece=piece,
            bounds=self.bounds,
        )

    def _batch(self, rows: Sequence[tuple[Row, Row]]) -> StreamBatch[Batch]:
        bad = tuple(BadSample(row["key"], row["error"]) for row, _ in rows if row["error"])
        return StreamBatch(self.collate(self.view, [used for _, used in rows]), bad)


def configure_ray_data(*, cpus: float | None = None) -> None:
    """Set up Ray Data in this process, which must be a train worker's: ordered and quiet.

    Args:
        cpus: The most that this process's streams may use; None: no limit.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if cpus is not None:
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(cpu=cpus)


def pack_on_cluster(
    collection: PhotoCollection, tasks: Sequence[ShardTask], dataset_url: str, *, max_bad_samples: float
) -> DatasetManifest:
    """Pack photos into a data set, a Ray task a shard; result and errors are those of `pack.pack`.

    Args:
        collection: The photos.
        tasks: What `plan_shards` made of them.
        dataset_url: The data set.
        max_bad_samples: Share of photos that may be unreadable.
    """
    pack_remotely = ray.remote(pack_shard)
    packed: list[PackedShard] = []
    with packing(dataset_url), progress("pack", total=len(collection.photos), unit="photos") as advance:
        for _, shard in _as_they_are_done([pack_remotely.remote(task) for task in tasks]):
            packed.append(shard)
            check_skipped(collection, packed, max_bad_samples=max_bad_samples)
            advance(shard.photos)
        return finish_data_set(collection, dataset_url, packed, max_bad_samples=max_bad_samples)


def choose_subsets_on_cluster(
    dataset_url: str, manifest: DatasetManifest, sources: Sequence[SubsetSource], *, bounds: BoundsSettings
) -> list[Subset]:
    """Choose fractions of a data set's photos, by what a Ray task a shard sees in it. Nothing is written.

    Args:
        dataset_url: The data set.
        manifest: Its manifest.
        sources: What to choose; nothing is read for none.
        bounds: Larger photos are in no fraction.

    Raises:
        UsageError: A fraction leaves a category empty; as `subset.choose_subset`.
        JobError: A shard is damaged, or the store cannot be reached.
    """
    if not sources:
        return []
    survey_remotely = ray.remote(survey_shard)
    surveys: dict[int, ShardSurvey] = {}
    with progress("survey", total=manifest.samples, unit="photos") as advance:
        asked = [survey_remotely.remote(dataset_url, shard, manifest.categories, bounds) for shard in manifest.shards]
        for number, survey in _as_they_are_done(asked):
            surveys[number] = survey
            advance(manifest.shards[number].samples)
    in_order = [surveys[number] for number in range(len(manifest.shards))]
    return [choose_subset(dataset_url, manifest, in_order, source) for source in sources]


def write_subset_on_cluster(subset: Subset, url: str, *, bounds: BoundsSettings) -> DatasetManifest:
    """Write a subset as a data set of its own, a Ray task a shard; one that is there already is left as it is.

    Killed anywhere and called again it ends with the same bytes.

    Args:
        subset: What was chosen.
        url: Where it goes.
        bounds: By which it was chosen.

    Returns:
        The manifest, which is in place.

    Raises:
        UsageError: Something else is at the URL.
        LeaseError: Somebody else writes it.
        JobError: A shard is damaged, or a store failed.
    """
    write_remotely = ray.remote(write_subset_shard)
    with held(join(url, ".lease")):
        if done := finished_subset(url, subset.source):
            return done
        with progress("subset", total=subset.samples, unit="photos") as advance:
            shards: list[ShardInfo] = []
            tasks = subset_tasks(subset, url, bounds)
            for _, shard in _as_they_are_done([write_remotely.remote(task) for task in tasks]):
                shards.append(shard)
                advance(shard.samples)
        return finish_subset(subset, url, shards)


def over_shards(work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    """What `map` gives, of tasks of the cluster; a single one is done here.

    Raises:
        UsageError, JobError: What the work raised for people.
    """
    if len(tasks) == 1:
        return [work(tasks[0])]
    remotely = ray.remote(work)
    done = dict(_as_they_are_done([remotely.remote(task) for task in tasks]))
    return [done[number] for number in range(len(tasks))]


class Readers(Datasource):
    """Tables from functions, each called in a read task of its own, in order."""

    def __init__(self, readers: Sequence[Callable[[], Iterable[pa.Table]]], rows: Sequence[int | None]) -> None:
        """Plan the read tasks.

        Args:
            readers: Picklable; each yields tables, a block each.
            rows: That each reader will yield; None where it is not known.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._readers = readers
        self._rows = rows

    def get_name(self) -> str:
        """Shown by Ray's dashboard."""
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known: nothing is read to plan."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One a reader, whatever parallelism Ray proposes."""
        return [
            ReadTask(reader, BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None))
            for reader, rows in zip(self._readers, self._rows, strict=True)
        ]


def cause_of(error: RayTaskError) -> BaseException:
    """What was raised in a task: an error made for people as it is, any other in Ray's wrapping, with its traceback."""
    cause = error.cause
    if not isinstance(cause, UsageError | JobError):
        return error
    cause.args = (str(cause).partition("\n")[0],)  # Ray Data appends advice about itself
    return cause


@contextmanager
def full_memory_told() -> Iterator[None]:
    """Have one line say that Ray's shared memory is full, in this process or in a task that it waits for.

    Raises:
        JobError: It is, and so is the disk that its objects could go to.
    """
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError, RayTaskError) as error:
        reason = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(reason, ObjectStoreFullError | OutOfDiskError):
            raise
        raise JobError(
            "a node's shared memory is full, and so is the disk that Ray moves objects to; `ray memory` shows whose "
            "they are; run the same again to go on"
        ) from error


def _as_they_are_done(asked: Sequence[ray.ObjectRef[Result]]) -> Iterator[tuple[int, Result]]:
    """The results of tasks, each with its number.

    Raises:
        UsageError, JobError: What a task raised for people.
    """
    numbers = {each: number for number, each in enumerate(asked)}
    waiting = list(asked)
    while waiting:
        (done, *_), waiting = ray.wait(waiting)
        try:
            yield numbers[done], ray.get(done)
        except RayTaskError as error:
            raise cause_of(error) from None


def _rows_of(table: pa.Table) -> Iterator[Row]:
    """Its rows; what is binary stays where it is, in Ray's shared memory, and comes as a buffer."""
    columns = [
        [value.as_buffer() for value in column] if pa.types.is_binary(column.type) else column.to_pylist()
        for column in table.columns
    ]
    for values in zip(*columns, strict=True):
        yield dict(zip(table.column_names, values, strict=True))


def _context(task_bytes: int) -> DataContext:
    """Of a stream of whose samples a task has so many bytes."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = task_bytes
    context.target_min_block_size = 1
    return context


def _readers() -> int:
    """That keep as many CPUs at work as this process's streams may use."""
    cpus = DataContext.get_current().execution_options.resource_limits.cpu
    if cpus is None or math.isinf(cpus):
        cpus = ray.cluster_resources().get("CPU", 1.0)
    return max(1, int(cpus) // DECODING_CPUS_PER_READER)


def _view_block(view: View, block: pa.Table) -> Iterator[pa.Table]:
    """Decode and crop the samples of a block, a few at a time; runs in a Ray task."""
    for start in range(0, block.num_rows, SAMPLES_PER_TABLE):
        rows = [_view_row(view, record) for record in block.slice(start, SAMPLES_PER_TABLE).to_pylist()]
        yield pa.Table.from_pylist(rows, schema=view.schema)


def _view_row(view: View, record: Row) -> Row:
    if record["error"]:
        return {"key": record["key"], "error": record["error"]}
    sample: Sample
    sample, labels = pickle.loads(record["payload"])
    # A sample's augmentation depends on the seed, the epoch and the sample, not on who reads it or when.
    random = np.random.default_rng([*record["seed"], sample.image_id])
    return view.row(sample, labels, random)
