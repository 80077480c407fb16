"""The labels of an image as records. Nothing of files is here, so that a model that makes labels loads none of that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16

from freesolo.ops.mask_storage import Rle


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
        size, counts = tuple(self.rle["size"]), counts_as_text(self.rle)
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

    @property
    def is_lost(self) -> bool:
        """Whether this stands for a sample that a damaged shard no longer held: it has no sample's key, id or size."""
        return self.height == 0


def counts_as_text(rle: Rle) -> str:
    """An encoding's counts, which pycocotools gives as bytes."""
    counts = rle["counts"]
    return counts if isinstance(counts, str) else counts.decode("ascii")
