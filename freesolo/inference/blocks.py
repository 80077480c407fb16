"""Batches as blocks of Ray Data, and what its tasks do with them: read and decode, without PyTorch."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from freesolo.data.shards import ShardInfo
from freesolo.inference.batches import BatchPlan, EncodedBatch, decode_batch, read_batches


def read_blocks(dataset_url: str, shard: ShardInfo, batches: BatchPlan) -> Iterator[pa.Table]:
    """The encoded batches of a shard, each a block; runs in a Ray task."""
    for batch in read_batches(dataset_url, shard, batches):
        yield block_of([batch])


def decode_block(batches: BatchPlan, block: pa.Table) -> pa.Table:
    """Decode the batches of a block; runs in a Ray task."""
    encoded: list[EncodedBatch] = payloads_of(block)
    return block_of([decode_batch(batch, batches) for batch in encoded])


def block_of(payloads: Sequence[Any]) -> pa.Table:
    """A block with a row for each payload."""
    return pa.table({"payload": pa.array([pickle.dumps(payload) for payload in payloads], pa.binary())})


def payloads_of(block: pa.Table) -> list[Any]:
    """What `block_of` was given."""
    return [pickle.loads(payload.as_buffer()) for payload in block.column("payload")]
