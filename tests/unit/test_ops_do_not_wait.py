"""The shared operations never ask the device for a value: they run on fake tensors, which have shapes and no values.

A `.item()` or a boolean index, which would stall a training step, raises on them.
"""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from freesolo.ops.affinity import PairwiseTerms, colour_similarity, pairwise_affinity_terms
from freesolo.ops.images import normalize
from freesolo.ops.masks import (
    Projections,
    areas,
    boxes_xywh,
    boxes_xyxy,
    mask_iou,
    resize_masks_soft,
)
from freesolo.ops.nms import matrix_nms, point_nms


def masks() -> torch.Tensor:
    return torch.zeros(3, 8, 8, dtype=torch.bool)


def indices() -> torch.Tensor:
    return torch.zeros(3, dtype=torch.int64)


OPERATIONS: dict[str, Callable[[], object]] = {
    "boxes_xyxy": lambda: boxes_xyxy(masks()),
    "boxes_xywh": lambda: boxes_xywh(masks()),
    "areas": lambda: areas(masks()),
    "centres_of_mass": lambda: Projections.of(masks()).centres_of_mass(),
    "mask_iou": lambda: mask_iou(masks(), masks()),
    "resize_masks_soft": lambda: resize_masks_soft(torch.zeros(3, 8, 8), 5, 6),
    "matrix_nms gaussian": lambda: matrix_nms(masks(), torch.zeros(3), indices()),
    "matrix_nms linear": lambda: matrix_nms(masks(), torch.zeros(3), indices(), kernel="linear"),
    "point_nms": lambda: point_nms(torch.zeros(3, 1, 8, 8)),
    "colour_similarity": lambda: colour_similarity(torch.zeros(3, 3, 8, 8), masks()),
    "pairwise_affinity_terms": lambda: pairwise_affinity_terms(
        torch.zeros(3, 8, 8),
        torch.zeros(1, 8, 8, 8),
        indices(),
        masks(),
        whole_maps=True,  # as on a GPU
    ),
    "normalize": lambda: normalize(torch.zeros(3, 3, 8, 8, dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_never_read_a_value(name: str):
    with FakeTensorMode():
        result = OPERATIONS[name]()
    # A tensor without values came out, so nothing on the way can have needed one.
    values = [result.loss_sum, result.pair_count] if isinstance(result, PairwiseTerms) else [result]
    assert all(isinstance(value, FakeTensor) for value in values)


def test_reading_a_value_would_be_noticed():
    with FakeTensorMode():
        with pytest.raises(DataDependentOutputException):
            masks().any().item()
        with pytest.raises(DynamicOutputShapeException):
            masks()[masks()].sum()
