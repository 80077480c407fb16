"""Typed records that pass between the parts.

Legend of shapes, used in every module:
    B  images of a batch            N  instances of a batch, all images' concatenated
    H, W  height and width in px    E  channels of an embedding
    S  cells on a side of a level's grid
    L  cells of all levels' grids, concatenated level by level, row by row: sum of S * S
    P  positive slots: (instance, cell) pairs that the mask losses train
Boxes carry their format in the name: `_xyxy` are pixel edges (x2 and y2 exclusive), `_xywh` is COCO's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor


def _to(value: Any, device: torch.device | str) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


@dataclass(frozen=True, slots=True)
class Instances:
    """The instances of a batch of images, one row an instance, sorted by image.

    Attributes:
        image_index: Which image of the batch each instance is in, `(N,)`, ascending.
        masks: Object masks over the batch's padded extent, `(N, H, W)`.
        category_ids: 0 for class-agnostic objects, `(N,)`.
        scores: Confidence in [0, 1]; 1 for ground truth, `(N,)`.
        embeddings: L2-normalised semantic embeddings, `(N, E)`; E is 0 where the source has none.
    """

    image_index: Int64[Tensor, " N"]
    masks: Bool[Tensor, "N H W"]
    category_ids: Int64[Tensor, " N"]
    scores: Float[Tensor, " N"]
    embeddings: Float[Tensor, "N E"]

    @classmethod
    def empty(
        cls, height: int, width: int, *, embedding_channels: int = 0, device: torch.device | str = "cpu"
    ) -> Instances:
        """No instances at all, over an extent of `height` x `width` pixels."""
        return cls(
            image_index=torch.zeros(0, dtype=torch.int64, device=device),
            masks=torch.zeros(0, height, width, dtype=torch.bool, device=device),
            category_ids=torch.zeros(0, dtype=torch.int64, device=device),
            scores=torch.zeros(0, device=device),
            embeddings=torch.zeros(0, embedding_channels, device=device),
        )

    def __len__(self) -> int:
        return self.image_index.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Instances:
        """The instances at `index`: a boolean mask, integer indices or a slice."""
        return Instances(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def of_image(self, image: int) -> Instances:
        """The instances of one image of the batch."""
        return self[self.image_index == image]

    def to(self, device: torch.device | str) -> Instances:
        """The same record on another device."""
        return replace(self, **{field.name: _to(getattr(self, field.name), device) for field in fields(self)})


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Images padded at the right and bottom to one extent.

    Attributes:
        pixels: RGB in 0..255, uint8 or float, `(B, 3, H, W)`; padding is 0.
        sizes: Height and width of each image before padding, `(B, 2)`.
        image_ids: The data set's ids, one an image.
    """

    pixels: Tensor
    sizes: Int64[Tensor, "B 2"]
    image_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same record on another device."""
        return replace(self, **{field.name: _to(getattr(self, field.name), device) for field in fields(self)})

    def valid_pixels(self) -> Bool[Tensor, "B H W"]:
        """True where a pixel belongs to an image, False in the padding."""
        height, width = self.pixels.shape[-2:]
        rows = torch.arange(height, device=self.sizes.device)
        columns = torch.arange(width, device=self.sizes.device)
        inside_rows = rows[None, :, None] < self.sizes[:, 0, None, None]
        inside_columns = columns[None, None, :] < self.sizes[:, 1, None, None]
        return inside_rows & inside_columns


@dataclass(frozen=True, slots=True)
class CropPair:
    """Two crops of each image, before colour augmentation.

    Attributes:
        query: RGB, `(B, 3, S, S)`.
        key: RGB, `(B, 3, S, S)`.
        image_ids: The data set's ids, one an image.
    """

    query: UInt8[Tensor, "B 3 S S"]
    key: UInt8[Tensor, "B 3 S S"]
    image_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> CropPair:
        """The same record on another device."""
        return CropPair(
            self.query.to(device, non_blocking=True), self.key.to(device, non_blocking=True), self.image_ids
        )


@dataclass(frozen=True, slots=True)
class ViewPair:
    """Two augmented views of each image, for contrastive pre-training.

    Attributes:
        query: Normalised RGB, `(B, 3, H, W)`.
        key: Normalised RGB, `(B, 3, H, W)`; row i is another view of the image of `query`'s row i.
        image_ids: The data set's ids, one an image.
    """

    query: Float[Tensor, "B 3 H W"]
    key: Float[Tensor, "B 3 H W"]
    image_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True, slots=True)
class SegmentationBatch:
    """Images and the instances in them, for SOLO training."""

    images: ImageBatch
    instances: Instances

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """The data set's ids, one an image."""
        return self.images.image_ids

    def to(self, device: torch.device | str) -> SegmentationBatch:
        """The same record on another device."""
        return replace(self, images=self.images.to(device), instances=self.instances.to(device))


@dataclass(frozen=True, slots=True)
class GridTargets:
    """What every cell of a SOLO head is trained towards; made once per batch by `solo.targets`.

    Positives are slots of a fixed capacity, so that nothing waits for the device to count them; a slot that holds
    none has `valid` False and indices 0.

    Attributes:
        categories: Category of each cell of each image; `num_categories` is background, `(B, L)`.
        valid: Slots that hold a positive, `(P,)`.
        instance: Row of `Instances` that the slot trains, `(P,)`.
        image: Image of the batch, `(P,)`.
        level: Pyramid level, `(P,)`.
        cell: Index among all levels' cells, in 0..L-1, `(P,)`.
    """

    categories: Int64[Tensor, "B L"]
    valid: Bool[Tensor, " P"]
    instance: Int64[Tensor, " P"]
    image: Int64[Tensor, " P"]
    level: Int64[Tensor, " P"]
    cell: Int64[Tensor, " P"]
