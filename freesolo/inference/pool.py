"""Shards through readers, decoders and a pool of actors that hold the model: all of inference that Ray runs.

    shards ──(read: a task a shard)──▶ encoded batches ──(decode: a task a batch)──▶ pixels ──(actors)──▶ entries

A row of the stream is a whole batch, pickled, and a block of its own. Few shards are read at a time, and queues are
first in, first out: so shards finish one after another, who collects them holds the records of few, and a kill costs
little.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import RayTaskError
from torch import Tensor

from freesolo.cluster import check_cluster
from freesolo.data.ingest import Readers, cause_of, full_memory_told
from freesolo.data.shards import ShardInfo
from freesolo.errors import JobError
from freesolo.inference.batches import BatchPlan, DecodedBatch, Entry
from freesolo.inference.blocks import block_of, decode_block, payloads_of, read_blocks
from freesolo.inference.labellers import Labeller, MakeLabeller
from freesolo.settings import ResourceSettings
from freesolo.types import ImageBatch

# A reader waits for storage most of its time; together with one decoder it fits the one CPU that must be left.
READ_CPUS = 0.1
DECODE_CPUS = 0.9

LabelledBatch = tuple[str, tuple[Entry, ...]]
"""A shard's name and some of its entries: labelled, or with the reason why they could not be."""


@dataclass(frozen=True, slots=True)
class ModelPool:
    """Actors that hold a model.

    Attributes:
        make_labeller: Makes the model in an actor. Picklable.
        weights: The model's, on the CPU.
        resources: How many actors, of what size.
    """

    make_labeller: MakeLabeller
    weights: Mapping[str, Tensor]
    resources: ResourceSettings


def label_batches(
    pool: ModelPool, dataset_url: str, shards: Sequence[ShardInfo], batches: BatchPlan
) -> Generator[LabelledBatch, None, None]:
    """Label every sample of some shards, each once, on the cluster that this process is connected to.

    Args:
        pool: The model.
        dataset_url: Where the shards are.
        shards: None of them empty.
        batches: How photos are resized and grouped.

    Yields:
        Batches as they are done, in no order. Closing the generator stops the work.

    Raises:
        UsageError: The pool does not fit the cluster.
        ShardError: A shard was altered.
        JobError: The store fails, shared memory is full, or a GPU cannot be used.
    """
    if not shards:
        return
    spare_cpus = check_cluster(pool.resources)
    readers = reader_count(pool.resources.max_workers, spare_cpus)
    decoders = decoder_count(pool.resources, readers, spare_cpus)
    with full_memory_told():
        weights = ray.put(dict(pool.weights))  # once on each node, however many actors there are
    with DataContext.current(_context(pool.resources)):  # a data set keeps the context that it was made in
        dataset = _stream(pool, weights, dataset_url, shards, batches, readers, decoders)
    try:
        with full_memory_told(), _quiet_loggers(), closing(_rows(dataset)) as rows:
            yield from rows
    except RayTaskError as error:
        raise cause_of(error) from None


def reader_count(workers: int, spare_cpus: float) -> int:
    """Shards to read at a time: enough to feed the pool, and so few that a decoder always finds a CPU beside them.

    Args:
        workers: Actors of the pool.
        spare_cpus: CPUs that the actors leave, at least 1.
    """
    affordable = math.floor((spare_cpus - DECODE_CPUS) / READ_CPUS + 1e-6)
    return max(1, min(1 + workers // 2, affordable))


def decoder_count(resources: ResourceSettings, readers: int, spare_cpus: float) -> int | None:
    """Batches to decode at a time; None: as many as there are CPUs for.

    Args:
        resources: The actors', and what decoding may use.
        readers: Shards that are read at a time.
        spare_cpus: CPUs that the actors leave, or as many of them as reading and decoding may use.
    """
    # A network on a CPU is slower than a decoder; one on a GPU may need all the decoders that there can be.
    needed = None if resources.gpus_per_worker else resources.max_workers
    if resources.data_cpus is None:
        return needed
    affordable = max(1, math.floor((spare_cpus - readers * READ_CPUS) / DECODE_CPUS + 1e-6))
    return affordable if needed is None else min(needed, affordable)


def _stream(
    pool: ModelPool,
    weights: ray.ObjectRef[dict[str, Tensor]],
    dataset_url: str,
    shards: Sequence[ShardInfo],
    batches: BatchPlan,
    readers: int,
    decoders: int | None,
) -> Dataset:
    resources = pool.resources
    read = ray.data.read_datasource(
        Readers([partial(read_blocks, dataset_url, shard, batches) for shard in shards], [None] * len(shards)),
        num_cpus=READ_CPUS,
        concurrency=readers,
        override_num_blocks=len(shards),
    )
    decoded = read.map_batches(
        partial(decode_block, batches),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=DECODE_CPUS,
        compute=TaskPoolStrategy(decoders),
    )
    labelled: Dataset = decoded.map_batches(
        _LabellingActor,
        fn_constructor_args=(pool.make_labeller, weights, resources),
        batch_size=1,  # a row is a batch of photos; Ray wants a number where there are GPUs
        batch_format="pyarrow",
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        compute=ActorPoolStrategy(min_size=resources.min_workers, max_size=resources.max_workers),
        label_selector=resources.label_selector or None,
    )
    return labelled


def _rows(dataset: Dataset) -> Generator[LabelledBatch, None, None]:
    blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    try:
        for block in blocks:
            yield from payloads_of(block)
    finally:
        blocks.close()  # type: ignore[attr-defined]  # a generator; closed, it stops the execution


def _context(resources: ResourceSettings) -> DataContext:
    """Settings of this stream; those of the process's other streams stay as they are."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # bytes: a row, which is a batch, is a block of its own
    context.target_min_block_size = 1
    context.execution_options.preserve_order = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1  # torch is large
    context.max_consecutive_actor_init_deaths = resources.max_failures
    context.raise_original_map_exception = True  # an error made for people, as it is
    return context


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Leave the terminal to our own progress and errors: Ray Data's warnings still come.

    Not that its bars are off, and not the tracebacks of an error: it is raised here, with all that is known of it.
    """
    quiet = {
        "_internal.progress": logging.ERROR,
        "_internal.execution": logging.WARNING,
        "_internal.execution.streaming_executor_state": logging.CRITICAL,
        "exceptions": logging.CRITICAL,
    }
    levels = {logging.getLogger(f"ray.data.{name}"): level for name, level in quiet.items()}
    before = {logger: logger.level for logger in levels}
    try:
        for logger, level in levels.items():
            logger.setLevel(level)
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


class _LabellingActor:
    """Holds the model; one process of the pool."""

    def __init__(
        self,
        make_labeller: MakeLabeller,
        weights: ray.ObjectRef[dict[str, Tensor]],
        resources: ResourceSettings,
    ) -> None:
        # The number of threads decides how sums are split, and so the last bits of results: it is fixed by the job,
        # not by the machine.
        torch.set_num_threads(resources.cpus_per_worker)
        torch.backends.cudnn.deterministic = True
        self._make_labeller = make_labeller
        self._weights = weights
        self._resources = resources

    @cached_property
    def _label(self) -> Labeller:
        """Made for the first batch: of what is raised while an actor is made, a job sees only Ray's text, and late."""
        tensors: dict[str, Tensor] = ray.get(self._weights)
        return self._make_labeller(tensors, _device(self._resources))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Label the batches of a block."""
        decoded: list[DecodedBatch] = payloads_of(block)
        return block_of([(batch.shard, _labelled(batch, self._label)) for batch in decoded])


def _device(resources: ResourceSettings) -> torch.device:
    if not resources.gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise JobError(
            f"resources.gpus_per_worker={resources.gpus_per_worker:g}: Ray gave this worker a GPU that torch "
            f"{torch.__version__} cannot use; check the driver and that torch is a CUDA build"
        )
    return torch.device("cuda")


def _labelled(batch: DecodedBatch, label: Labeller) -> tuple[Entry, ...]:
    """The entries of a batch with their instances."""
    if not batch.readable:
        return batch.unreadable
    images = ImageBatch(
        pixels=torch.from_numpy(batch.pixels).permute(0, 3, 1, 2),
        sizes=torch.from_numpy(batch.sizes),
        image_ids=tuple(entry.labels.image_id for entry in batch.readable),
    )
    instances = label(images, [(entry.labels.height, entry.labels.width) for entry in batch.readable])
    labelled = [
        replace(entry, labels=replace(entry.labels, instances=found))
        for entry, found in zip(batch.readable, instances, strict=True)
    ]
    return (*labelled, *batch.unreadable)
