"""Free Mask after the backbone: from one photo's feature map to what a label set stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

from freesolo.data.label_records import LabelledInstance
from freesolo.freemask.algorithm import free_masks
from freesolo.inference.labellers import labelled_instances
from freesolo.ops.mask_storage import Rle
from freesolo.ops.masks import decode_rle
from freesolo.settings import FreeMaskSettings
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.synthetic import smooth_noise


@dataclass(frozen=True, slots=True)
class Found:
    """One mask as it is stored, from either side.

    Attributes:
        rle: COCO's encoding at the photo's size.
        bbox_xywh: Tight around the mask, in px.
        score: Maskness after Matrix NMS.
        embedding: L2-normalised, float16, `(D,)`.
    """

    rle: Rle
    bbox_xywh: tuple[float, float, float, float]
    score: float
    embedding: np.ndarray


def cases(
    device: torch.device,
    channels: int = 2048,
    map_size: tuple[int, int] = (25, 34),
    photo_size: tuple[int, int] = (480, 640),
) -> tuple[Case[Any, Any], ...]:
    """Free Mask of one photo with the released settings."""
    settings = FreeMaskSettings()
    generator = torch.Generator().manual_seed(0)
    # A ResNet's last map is after a ReLU.
    features = smooth_noise(channels, *map_size, generator, cells=6, roughness=0.3).relu().to(device)
    return (
        Case(
            name="map to run-length encodings, a photo",
            peer_name="plain torch transcription, a mask at a time after NMS",
            ours=lambda: ours_free_masks(features, photo_size, settings),
            peer=lambda: peer_free_masks(features, photo_size, settings),
            assert_equal=_assert_same_masks,
        ),
    )


def ours_free_masks(
    features: Float[Tensor, "E h w"], photo_size: tuple[int, int], settings: FreeMaskSettings
) -> list[Found]:
    """What the extraction does with a map."""
    (found,) = free_masks(features[None], [photo_size], settings)
    no_category = torch.zeros_like(found.query_index)
    boxes_xywh = found.masks.projections().boxes_xywh()
    stored: tuple[LabelledInstance, ...] = labelled_instances(
        found.masks.encode_rle(), boxes_xywh, found.scores, no_category, found.embeddings
    )
    return [Found(one.rle, one.bbox_xywh, one.score, one.embedding) for one in stored]


@torch.no_grad()
def peer_free_masks(
    features: Float[Tensor, "E h w"], photo_size: tuple[int, int], settings: FreeMaskSettings
) -> list[Found]:
    """FreeSOLO (arXiv:2202.12181) sec. 3.1 as it reads: candidates are thrown out as soon as a rule says so."""
    channels, height, width = features.shape
    pyramid = [
        functional.interpolate(
            features[None],
            size=(max(1, int(height * scale)), max(1, int(width * scale))),
            mode="bilinear",
            align_corners=False,
        )[0]
        .view(channels, -1)
        .T
        for scale in settings.query_scales
    ]
    queries = torch.cat(pyramid)
    keys = features.view(channels, -1)
    keys = keys / keys.norm(dim=0, keepdim=True)
    soft = (queries / queries.norm(dim=1, keepdim=True)) @ keys
    soft = soft - soft.min(dim=1, keepdim=True).values
    soft = soft / soft.max(dim=1, keepdim=True).values
    masks = soft > settings.mask_threshold

    keep = masks.sum(dim=1) > 1
    queries, soft, masks = queries[keep], soft[keep], masks[keep]
    maskness = (soft * masks).sum(dim=1) / masks.sum(dim=1)
    order = maskness.argsort(descending=True)
    queries, soft, masks, maskness = queries[order], soft[order], masks[order], maskness[order]
    scores = maskness * _decay(masks, settings.nms_sigma)
    best = scores.argsort(descending=True)[: settings.max_instances]

    found = []
    for index in best.tolist():
        one = soft[index].view(1, 1, height, width)
        resized = functional.interpolate(one, size=photo_size, mode="bilinear", align_corners=False)[0, 0]
        mask = (resized > settings.mask_threshold).cpu().numpy()
        score = float(scores[index])
        if score < settings.min_maskness or not _plausible(mask, settings):
            continue
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        query = queries[index].view(1, 1, -1)
        embedding = functional.interpolate(query, size=settings.embedding_channels, mode="linear", align_corners=False)
        embedding = functional.normalize(embedding[0, 0], dim=0)
        found.append(
            Found(
                rle={"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
                bbox_xywh=tuple(coco_mask.toBbox(rle).tolist()),
                score=score,
                embedding=embedding.cpu().numpy().astype(np.float16),
            )
        )
    return found


def _decay(masks: Bool[Tensor, "N cells"], sigma: float) -> Float[Tensor, " N"]:
    """Matrix NMS (arXiv:2003.10152, sec. 3.4) of masks that are sorted by score: what to multiply each score by."""
    flat = masks.float()
    intersection = flat @ flat.T
    areas = flat.sum(dim=1)
    iou = (intersection / (areas[:, None] + areas[None, :] - intersection)).triu(diagonal=1)
    compensate = iou.max(dim=0).values[:, None]
    return (torch.exp(-sigma * iou**2) / torch.exp(-sigma * compensate**2)).min(dim=0).values


def _plausible(mask: Bool[np.ndarray, "H W"], settings: FreeMaskSettings) -> bool:
    height, width = mask.shape
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return (
        len(rows) > 0
        and float(rows.mean()) > settings.top_border * height
        and len(columns) < settings.max_width * width
    )


def _assert_same_masks(ours: list[Found], peer: list[Found]) -> None:
    assert len(ours) == len(peer) > 0, f"{len(ours)} masks, the peer has {len(peer)}"
    for one, other in zip(ours, peer, strict=True):
        np.testing.assert_allclose(one.score, other.score, rtol=1e-4)
        np.testing.assert_allclose(one.embedding.astype(float), other.embedding.astype(float), atol=1e-3)
        # A soft value within rounding of the threshold may fall on either side of it, and move an edge by a pixel.
        np.testing.assert_allclose(one.bbox_xywh, other.bbox_xywh, atol=1)
        height, width = one.rle["size"]
        mask, other_mask = decode_rle([one.rle, other.rle], height, width)
        assert (mask != other_mask).float().mean() < 1e-3


BENCHMARK = Benchmark(
    name="free_mask",
    inputs="a ResNet-50's stage-5 map of a photo at 800 px, 2048 x 25 x 34",
    cases=cases,
)
