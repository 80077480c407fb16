"""Matrix NMS of an image's masks before post-processing keeps the best, and the two mask operations beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from pycocotools import mask as coco_mask
from torch import Tensor

from freesolo.ops.mask_storage import Rle
from freesolo.ops.masks import encode_rle, mask_iou
from freesolo.ops.nms import matrix_nms
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.synthetic import crowded_ellipses

SIGMA = 2.0


def cases(
    device: torch.device, objects: int = 20, masks_per_object: int = 25, height: int = 160, width: int = 200
) -> tuple[Case[Any, Any], ...]:
    """Matrix NMS, mask IoU and run-length encoding of one image's masks, which lie on the device."""
    generator = torch.Generator().manual_seed(0)
    masks = crowded_ellipses(objects, masks_per_object, height, width, generator).to(device)
    scores = torch.rand(len(masks), generator=generator).to(device)
    category_ids = torch.zeros(len(masks), dtype=torch.int64, device=device)
    return (
        Case(
            name="Matrix NMS",
            peer_name="pycocotools' mask IoU, the decay in numpy",
            ours=lambda: matrix_nms(masks, scores, category_ids, sigma=SIGMA),
            peer=lambda: peer_matrix_nms(masks, scores),
            assert_equal=torch.testing.assert_close,
        ),
        Case(
            name="mask IoU",
            peer_name="pycocotools' mask IoU, masks encoded for it in one call",
            ours=lambda: mask_iou(masks, masks),
            peer=lambda: torch.from_numpy(peer_iou(masks)).float().to(device),
            assert_equal=torch.testing.assert_close,
        ),
        Case(
            name="run-length encoding",
            peer_name="pycocotools, one mask at a time",
            ours=lambda: encode_rle(masks),
            peer=lambda: peer_encode(masks),
            assert_equal=_assert_same_encodings,
        ),
    )


def peer_iou(masks: Bool[Tensor, "N H W"]) -> Float[np.ndarray, "N N"]:
    """All pairs' IoU by pycocotools, in float64."""
    encodings = coco_mask.encode(np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8)))
    return np.asarray(coco_mask.iou(encodings, encodings, [False] * len(encodings)))


def peer_matrix_nms(masks: Bool[Tensor, "N H W"], scores: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The decay of SOLOv2 (arXiv:2003.10152) sec. 3.4 on pycocotools' IoU; one category, gaussian kernel."""
    order = np.argsort(-scores.cpu().numpy(), kind="stable")
    iou = np.triu(peer_iou(masks)[np.ix_(order, order)], k=1)
    compensate = iou.max(axis=0)[:, None]
    ratio = np.exp(-SIGMA * iou**2) / np.exp(-SIGMA * compensate**2)
    decayed = np.empty(len(masks))
    # Row i of column j counts where i comes before j; the first mask has none before it and keeps its score.
    before = np.triu(np.ones_like(ratio, dtype=bool), k=1)
    decayed[order] = np.where(before, ratio, 1.0).min(axis=0)
    return scores * torch.from_numpy(decayed).float().to(scores.device)


def peer_encode(masks: Bool[Tensor, "N H W"]) -> list[Rle]:
    """COCO's run-length encoding of each mask, `counts` as bytes."""
    return [coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8))) for mask in masks]


def _assert_same_encodings(ours: list[Rle], peer: list[Rle]) -> None:
    assert [one["counts"] for one in ours] == [one["counts"].decode("ascii") for one in peer]
    assert [one["size"] for one in ours] == [list(one["size"]) for one in peer]


BENCHMARK = Benchmark(
    name="matrix_nms",
    inputs="500 masks of 160 x 200, 25 of each of 20 objects",
    cases=cases,
)
