"""The labels of a shard's images as a parquet file.

A row of the parquet is an image; `instances` is a list, empty for an image in which nothing was found:

    key: string, image_id: int64, file_name: string, width: int32, height: int32, error: string or null,
    instances: list<struct<mask_id: int64, counts: string (COCO's compressed RLE at the image's size),
                           bbox_xywh: list<double>, score: double, category_id: int64, embedding: list<halffloat>>>

A label file comes from a bucket: it is read in bounded memory, and a value that no writer of ours can have written
makes it a damaged file, so that what is read is what the rest of the system may rely on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float16, Float64, Integer

from freesolo.data.documents import short
from freesolo.data.label_records import ImageLabels, LabelledInstance, counts_as_text
from freesolo.data.parquet_footer import declared_size
from freesolo.errors import JobError
from freesolo.ops.mask_storage import check_rle_counts
from freesolo.settings import MAX_INSTANCES

# What a label file may become in memory. A few kilobytes of parquet can say "the same value, a billion times".
MAX_DECODED_BYTES = 2**31
_MAX_PIXELS = 2**29 - 1
_TEXTS = ("key", "file_name", "error", "instances.list.element.counts")

_INSTANCE = pa.struct(
    [
        ("mask_id", pa.int64()),
        ("counts", pa.string()),
        ("bbox_xywh", pa.list_(pa.float64())),
        ("score", pa.float64()),
        ("category_id", pa.int64()),
        ("embedding", pa.list_(pa.float16())),
    ]
)
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("error", pa.string()),
        ("instances", pa.list_(_INSTANCE)),
    ]
)


class LabelFileError(JobError):
    """A label file that is missing, damaged or not its manifest's."""


def encode_labels(records: Sequence[ImageLabels]) -> bytes:
    """One shard's labels as a parquet file; the same records give the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(_table(records), sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def decode_labels(data: bytes, location: str) -> list[ImageLabels]:
    """Read what `encode_labels` wrote.

    Args:
        data: The file.
        location: Where it was, for the error.

    Raises:
        LabelFileError: Truncated, altered, or not a label file.
    """
    try:
        table = _read_table(data)
        if table is not None:
            return _records(table)
    except (pa.ArrowException, OSError, MemoryError, ValueError, OverflowError) as error:
        raise LabelFileError(f"{location}: a damaged label file ({' '.join(str(error).split())})") from error
    raise LabelFileError(f"{location}: not a label file: its columns are not those of one")


def _read_table(data: bytes) -> pa.Table | None:
    """The file as one chunk a column, texts as dictionaries, not yet written out; None if it is of another schema.

    Raises:
        ValueError: It would become too large.
        pa.ArrowException, OSError, MemoryError: It is damaged.
    """
    metadata = pq.read_metadata(pa.BufferReader(data))
    if not metadata.schema.to_arrow_schema().equals(_SCHEMA):
        return None
    values, page_bytes = declared_size(data)
    _check_size(8 * values + page_bytes)  # no value is wider, nor a text's place in its dictionary
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data), metadata=metadata, page_checksum_verification=True, read_dictionary=_TEXTS
        )
    except KeyError:  # a name within a column, which the schema's comparison leaves out
        return None
    table = file.read().combine_chunks()
    table.validate(full=True)
    texts = [table.column(name) for name in _TEXTS[:3]]
    if table.num_rows:
        texts.append(table.column("instances").chunk(0).values.field("counts"))
    _check_size(sum(_text_bytes(chunk) for text in texts for chunk in getattr(text, "chunks", [text])))
    return table


def _check_size(decoded: int) -> None:
    if decoded > MAX_DECODED_BYTES:
        raise ValueError(f"it would take {decoded} bytes of memory, more than {MAX_DECODED_BYTES}; use smaller shards")


def _text_bytes(texts: pa.DictionaryArray) -> int:
    return pc.sum(pc.binary_length(texts.dictionary).cast(pa.int64()).take(texts.indices)).as_py() or 0


def _table(records: Sequence[ImageLabels]) -> pa.Table:
    """Built column by column: a million embedding values as Python objects would take a gigabyte."""
    instances = [instance for record in records for instance in record.instances]
    embeddings = [instance.embedding for instance in instances]
    columns = [
        pa.array([instance.mask_id for instance in instances], pa.int64()),
        pa.array([counts_as_text(instance.rle) for instance in instances], pa.string()),
        pa.array([list(instance.bbox_xywh) for instance in instances], pa.list_(pa.float64())),
        pa.array([instance.score for instance in instances], pa.float64()),
        pa.array([instance.category_id for instance in instances], pa.int64()),
        pa.ListArray.from_arrays(
            _offsets([len(embedding) for embedding in embeddings]),
            pa.array(np.concatenate([np.zeros(0, np.float16), *embeddings]), pa.float16()),
        ),
    ]
    rows = pa.ListArray.from_arrays(
        _offsets([len(record.instances) for record in records]),
        pa.StructArray.from_arrays(columns, fields=list(_INSTANCE)),
    )
    fields = ("key", "image_id", "file_name", "width", "height", "error")
    outer = [pa.array([getattr(record, name) for record in records], _SCHEMA.field(name).type) for name in fields]
    return pa.Table.from_arrays([*outer, rows], schema=_SCHEMA)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)]), pa.int32())


def _records(table: pa.Table) -> list[ImageLabels]:
    """The rows of a table of our schema.

    Raises:
        ValueError: A value is none that could have been written; names the image.
    """
    if table.num_rows == 0:
        return []
    outer = table.drop_columns(["instances"]).to_pylist()
    rows = table.column("instances").chunk(0)
    first = rows.offsets.to_numpy()
    struct = rows.values
    _check_images(outer, np.diff(first))
    _check_whole(rows, struct, *(struct.field(name) for name in ("bbox_xywh", "embedding")))
    embeddings = struct.field("embedding")
    bounds = embeddings.offsets.to_numpy()
    # Bits as they are: half floats are not converted one by one.
    values = np.array(embeddings.values.to_numpy(zero_copy_only=False), dtype=np.float16)
    boxes = struct.field("bbox_xywh").flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    columns = {name: struct.field(name).to_pylist() for name in ("mask_id", "counts", "score", "category_id")}
    _check_instances(columns, boxes, values)
    counts = columns["counts"][first[0] : first[-1]]
    check_rle_counts(counts, np.repeat([row["height"] * row["width"] for row in outer], np.diff(first)).tolist())

    def instance(i: int, size: list[int]) -> LabelledInstance:
        x, y, w, h = boxes[i].tolist()
        return LabelledInstance(
            mask_id=columns["mask_id"][i],
            rle={"size": list(size), "counts": columns["counts"][i]},
            bbox_xywh=(x, y, w, h),
            score=columns["score"][i],
            category_id=columns["category_id"][i],
            embedding=values[bounds[i] : bounds[i + 1]],
        )

    return [
        ImageLabels(
            **row,
            instances=tuple(instance(i, [row["height"], row["width"]]) for i in range(first[n], first[n + 1])),
        )
        for n, row in enumerate(outer)
    ]


def _check_images(rows: Sequence[dict[str, Any]], instances: Integer[np.ndarray, " n"]) -> None:
    keys: set[str] = set()
    for row, count in zip(rows, instances.tolist(), strict=True):
        missing = [name for name, value in row.items() if value is None and name != "error"]
        if missing:
            raise ValueError(f"image {short(row['key'])} has no {missing[0]}")
        if row["key"] in keys:
            raise ValueError(f"image {short(row['key'])} is there twice")
        keys.add(row["key"])
        least = 0 if row["error"] is not None else 1  # of a lost image nothing is known
        if min(row["height"], row["width"]) < least or row["height"] * row["width"] > _MAX_PIXELS:
            raise ValueError(f"image {short(row['key'])} is {row['width']} x {row['height']} pixels")
        if count > (0 if row["error"] is not None else MAX_INSTANCES):
            reason = "unreadable" if row["error"] is not None else f"more than {MAX_INSTANCES} in one image"
            raise ValueError(f"image {short(row['key'])} has {count} instances: {reason}")


def _check_whole(rows: pa.ListArray, instances: pa.StructArray, boxes: pa.ListArray, embeddings: pa.ListArray) -> None:
    """Nothing is null, boxes have four numbers, embeddings one length."""
    fields = [instances.field(index) for index in range(instances.type.num_fields)]
    nested = (rows, instances, *fields, boxes.values, embeddings.values)
    if any(array.null_count for array in nested):
        raise ValueError("a value of an instance is missing")
    if len(instances) != rows.offsets[-1].as_py() or rows.offsets[0].as_py() != 0:
        raise ValueError("instances that belong to no image")
    if (np.diff(boxes.offsets.to_numpy()) != 4).any():
        raise ValueError("a box that is not four numbers")
    if len(np.unique(np.diff(embeddings.offsets.to_numpy()))) > 1:
        raise ValueError("embeddings of several lengths")


def _check_instances(
    columns: dict[str, list[Any]], boxes: Float64[np.ndarray, "n 4"], embeddings: Float16[np.ndarray, " values"]
) -> None:
    scores = np.array(columns["score"], np.float64)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("a score that is not in [0, 1]")
    if not (np.isfinite(boxes).all() and np.isfinite(embeddings).all()):
        raise ValueError("a box or an embedding that is not finite")
    if min(columns["category_id"], default=0) < 0 or min(columns["mask_id"], default=0) < 0:
        raise ValueError("a category or a mask id below 0")
