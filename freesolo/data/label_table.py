"""Labels of images as records, and as the parquet file that holds those of one shard.

A row of the parquet is an image; `instances` is a list, empty for an image in which nothing was found:

    key: string, image_id: int64, file_name: string, width: int32, height: int32, error: string or null,
    instances: list<struct<mask_id: int64, counts: string (COCO's compressed RLE at the image's size),
                           bbox_xywh: list<double>, score: double, category_id: int64, embedding: list<halffloat>>>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16

from freesolo.errors import JobError
from freesolo.ops.masks import Rle

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


@dataclass(frozen=True, slots=True, eq=False)
class LabelledInstance:
    """One object of an image.

    Attributes:
        mask_id: Unique in the label set; `write_label_file` numbers them, so 0 until then.
        rle: COCO's compressed RLE: at the image's size; its counts are text when read, text or bytes when written.
        bbox_xywh: COCO's box, tight around the mask, in pixels.
        score: Confidence in [0, 1].
        category_id: 0 for class-agnostic objects; COCO's own id in ground truth.
        embedding: Semantic embedding, `(E,)`; E is 0 where the source has none.
    """

    mask_id: int
    rle: Rle
    bbox_xywh: tuple[float, float, float, float]
    score: float
    category_id: int
    embedding: Float16[np.ndarray, " E"]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LabelledInstance):
            return NotImplemented
        return self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def _values(self) -> tuple[object, ...]:
        size, counts = tuple(self.rle["size"]), _text(self.rle["counts"])
        return self.mask_id, size, counts, self.bbox_xywh, self.score, self.category_id, self.embedding.tobytes()


@dataclass(frozen=True, slots=True)
class ImageLabels:
    """The instances of one image of the data set, none included.

    Attributes:
        key: The sample's.
        image_id: The sample's.
        file_name: The sample's.
        width: Pixels.
        height: Pixels.
        error: Why the image could not be read; None if it could.
        instances: Best first, as their maker ordered them; empty for an unreadable image.
    """

    key: str
    image_id: int
    file_name: str
    width: int
    height: int
    error: str | None
    instances: tuple[LabelledInstance, ...]


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
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise LabelFileError(f"{location}: a damaged label file ({' '.join(str(error).split())})") from error
    if not table.schema.equals(_SCHEMA):
        raise LabelFileError(f"{location}: not a label file: its columns are {table.schema.names}")
    return _records(table)


def _table(records: Sequence[ImageLabels]) -> pa.Table:
    """Built column by column: a million embedding values as Python objects would take a gigabyte."""
    instances = [instance for record in records for instance in record.instances]
    embeddings = [instance.embedding for instance in instances]
    columns = [
        pa.array([instance.mask_id for instance in instances], pa.int64()),
        pa.array([_text(instance.rle["counts"]) for instance in instances], pa.string()),
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


def _text(counts: str | bytes) -> str:
    return counts if isinstance(counts, str) else counts.decode("ascii")


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)]), pa.int32())


def _records(table: pa.Table) -> list[ImageLabels]:
    if table.num_rows == 0:
        return []
    rows = table.column("instances").chunk(0)
    first = rows.offsets.to_numpy()
    struct = rows.values
    embeddings = struct.field("embedding")
    bounds = embeddings.offsets.to_numpy()
    # Bits as they are: half floats are not converted one by one.
    values = np.array(embeddings.values.to_numpy(zero_copy_only=False), dtype=np.float16)
    columns = {
        name: struct.field(name).to_pylist() for name in ("mask_id", "counts", "bbox_xywh", "score", "category_id")
    }
    outer = table.drop_columns(["instances"]).to_pylist()

    def instance(i: int, size: list[int]) -> LabelledInstance:
        x, y, w, h = columns["bbox_xywh"][i]
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
