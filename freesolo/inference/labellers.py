"""The models that the pool's actors hold: Free Mask on a backbone, and a trained SOLO.

Nothing here knows of the cluster, of the registry or of files, so an actor starts without loading any of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from freesolo.data.label_records import LabelledInstance
from freesolo.freemask.algorithm import free_masks
from freesolo.inference.segment import SegmentPhotos, build_segmenter
from freesolo.models.model_file import ModelFile
from freesolo.models.resnet import build_resnet
from freesolo.ops.images import normalize
from freesolo.ops.mask_storage import Rle
from freesolo.ops.masks import boxes_xywh, encode_rle
from freesolo.settings import ExtractSettings, PredictSettings
from freesolo.types import ImageBatch


@runtime_checkable
class Labeller(Protocol):
    """A model that finds the instances in photos."""

    def __call__(
        self, images: ImageBatch, original_sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[LabelledInstance, ...]]:
        """The instances of each image, best first, masks at its original size.

        Args:
            images: uint8, on the CPU, of one padded extent.
            original_sizes: Height and width of each photo as it is stored.
        """


MakeLabeller = Callable[[Mapping[str, Tensor], torch.device], Labeller]
"""Makes a model from its weights, on a device."""


class FreeMaskLabeller:
    """A backbone on a device, and Free Mask on its map.

    Args:
        settings: Which backbone, which of its maps, thresholds and filters.
        weights: The backbone's, as `backbone_state_dict` gives them.
        device: Where to compute. On a GPU the backbone runs in bfloat16; Free Mask itself is always in float32.
    """

    def __init__(self, settings: ExtractSettings, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._settings = settings.free_mask
        self._device = device
        backbone = build_resnet(settings.backbone)
        backbone.load_state_dict(dict(weights))
        self._backbone = backbone.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(
        self, images: ImageBatch, original_sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[LabelledInstance, ...]]:
        """The free masks of each image, best first; images of one size, without padding."""
        pixels = normalize(images.pixels.to(self._device, non_blocking=True))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            maps = self._backbone(pixels.contiguous(memory_format=torch.channels_last))
        features = maps[self._settings.feature_level - 2]  # C2 is the first
        return [
            labelled_instances(
                found.masks.encode_rle(),
                found.masks.projections().boxes_xywh(),
                found.scores,
                torch.zeros_like(found.query_index),
                found.embeddings,
            )
            for found in free_masks(features, original_sizes, self._settings)
        ]


class SoloLabeller:
    """A segmenter on a device.

    Args:
        settings: Thresholds and limits; the width filter of self-training included.
        model: What the network is; its own tensors are not used.
        weights: The network's.
        device: Where to compute. On a GPU the network runs in bfloat16.
    """

    def __init__(
        self, settings: PredictSettings, model: ModelFile, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._segment = SegmentPhotos(build_segmenter(replace(model, state_dict=weights)), settings, device)

    def __call__(
        self, images: ImageBatch, original_sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[LabelledInstance, ...]]:
        """The instances of each image, best first; images of one padded extent."""
        return [
            labelled_instances(
                encode_rle(found.masks),
                boxes_xywh(found.masks),
                found.scores,
                found.category_ids,
                found.embeddings,
            )
            for found in self._segment.segment(images, original_sizes)
        ]


def labelled_instances(
    rles: Sequence[Rle],
    boxes_xywh: Float[Tensor, "N 4"],
    scores: Float[Tensor, " N"],
    category_ids: Int64[Tensor, " N"],
    embeddings: Float[Tensor, "N E"],
) -> tuple[LabelledInstance, ...]:
    """The instances of one image as a label set stores them.

    Args:
        rles: Of masks of the photo's own size. N may be 0.
        boxes_xywh: Tight around the masks.
        scores: Best first.
        category_ids: 0 for class-agnostic objects.
        embeddings: E may be 0.
    """
    columns = zip(
        rles,
        boxes_xywh.tolist(),
        scores.tolist(),
        category_ids.tolist(),
        embeddings.to(torch.float16).cpu().numpy(),
        strict=True,
    )
    return tuple(
        LabelledInstance(
            mask_id=0,
            rle=rle,
            bbox_xywh=(x, y, width, height),
            score=score,
            category_id=category_id,
            embedding=embedding,
        )
        for rle, (x, y, width, height), score, category_id, embedding in columns
    )
